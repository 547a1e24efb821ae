"""The layout that mlx-lm reads (mlx-lm 0.32, mlx_lm/tuner/utils.py and lora.py).

    <path>.lora_a   (in, r)    the transpose of lora_A
    <path>.lora_b   (r, out)   the transpose of lora_B        y = W x + scale (x lora_a) lora_b

One rank and one scale for all. `keys` are whole module paths, which mlx-lm looks up in the model itself: those relative
to a layer, as it writes them, count layers from the last, and an export does not know how many there are. mlx-lm fills
a key without tensors with random numbers times zero, and raises on a tensor without a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loracli.adapters.names import layer
from loracli.recipe.recipe import BaseModule

# Where MLX's models have the names of transformers': its loaders rename what lies elsewhere.
_SAME_NAME = re.compile(r"(model\.layers\.\d+\.[A-Za-z0-9_.]+|lm_head)")


def mlx_config(base: str, keys: Sequence[str], rank: int) -> dict[str, Any]:
    """`adapter_config.json`; the scale is folded into the factors."""
    layers = {layer(key) for key in keys if key.startswith("model.layers.")}
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": list(keys), "rank": rank, "scale": 1.0},
        "model": base,
        "num_layers": len(layers),
    }


def mlx_obstacle(modules: Sequence[BaseModule], ranks: Mapping[str, int]) -> str | None:
    """Why MLX cannot hold a composition, naming the module, or None."""
    kinds = {module.name: module.kind for module in modules}
    for name in sorted(ranks):
        if kinds[name] == "embedding":
            return f"{name} is an embedding, whose update MLX gives to a tied head as well, and PEFT does not"
        if kinds[name] == "conv1d":
            return f"{name} is a Conv1D, which goes by another name in MLX"
        if kinds[name] == "experts" or ".experts." in name:
            return f"{name} belongs to an expert, and MLX stacks experts into one layer"
        if not _SAME_NAME.fullmatch(name):
            return f"{name} may go by another name in MLX, which knows model.layers.<i>.<...> and lm_head"
    return None
