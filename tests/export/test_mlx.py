"""The mlx profile: mlx-lm's names, transposed factors, one rank, and what MLX cannot hold is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loracli.adapters.kinds import BaseModule
from loracli.errors import UsageError
from loracli.export.export import export_adapter
from loracli.export.layout import choose_layout
from loracli.export.request import ExportRequest
from tests.export.test_export import Made


def read_mlx(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """dW (out, in) of every module, by MLX's own formula y = x W^T + scale (x lora_a) lora_b, and the config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapters.safetensors")
    keys = config["lora_parameters"]["keys"]
    assert tensors.keys() == {f"{key}.{part}" for key in keys for part in ("lora_a", "lora_b")}
    updates = {}
    for key in keys:
        a, b = tensors[f"{key}.lora_a"].double(), tensors[f"{key}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == config["lora_parameters"]["rank"]
        identity = torch.eye(a.shape[0], dtype=torch.float64)
        updates[key] = (config["lora_parameters"]["scale"] * (identity @ a) @ b).T
    return updates, config


def exact(made: Made, module: str) -> torch.Tensor:
    """sum_i w_i s_i B_i A_i in float64, of the adapters that change the module."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, adapter in zip(made.recipe.weights_of(module), made.adapters, strict=True):
        if module in adapter.modules:
            factors = adapter.modules[module].factors
            total = total + float(weight or 0) * factors.scaling * factors.lora_B.double() @ factors.lora_A.double()
    return total


@pytest.mark.parametrize("case", ["mixed ranks", "both rslora", "patterns", "some layers only", "head"])
def test_mlx_gets_the_composition_by_its_own_formula(tmp_path: Path, case: str) -> None:
    made = Made(tmp_path, case)
    exported = export_adapter(ExportRequest(made.recipe, profile="mlx", dtype="float32"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "loracat.json",
    ]
    updates, config = read_mlx(tmp_path / "out")
    assert (config["fine_tune_type"], config["lora_parameters"]["dropout"]) == ("lora", 0.0)
    assert updates.keys() == {name for adapter in made.adapters for name in adapter.modules}
    for module, update in updates.items():
        torch.testing.assert_close(update, exact(made, module), rtol=0, atol=1e-6 * float(update.norm()))
    certificate = json.loads((tmp_path / "out" / "loracat.json").read_text())["certificate"]
    assert certificate["sha256"].keys() == {"adapters.safetensors"}
    assert exported.layout.rank == config["lora_parameters"]["rank"]


def test_a_compressed_mlx_export_has_the_rank_that_was_asked_for(tmp_path: Path) -> None:
    made = Made(tmp_path, "mixed ranks")
    export_adapter(ExportRequest(made.recipe, profile="mlx", merge=True, rank=3), tmp_path / "out")
    updates, config = read_mlx(tmp_path / "out")
    assert config["lora_parameters"]["rank"] == 3
    for module, update in updates.items():
        best = torch.linalg.svdvals(exact(made, module))[3:].norm()
        error = float((update - exact(made, module)).norm())
        assert error == pytest.approx(float(best), rel=1e-4, abs=1e-6)


def test_an_mlx_export_replaces_another_export_and_is_replaced(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    for profile in ("mlx", "portable", "mlx"):
        export_adapter(ExportRequest(made.recipe, profile=profile), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "kind", "named"),
    [
        ("model.embed_tokens", "embedding", "tied head"),
        ("transformer.h.0.attn.c_attn", "conv1d", "Conv1D"),
        ("model.layers.0.mlp.experts.3.up_proj", "linear", "expert"),
        ("gpt_neox.layers.0.attention.dense", "linear", "another name"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_by_name(name: str, kind: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named) as refused:
        choose_layout([BaseModule(name, kind, 8, 8)], {name: 2}, "mlx", rank=None)
    assert name in str(refused.value)
