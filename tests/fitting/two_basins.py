"""A base and two adapters for which one weight for each adapter is a trap.

The last layer's MLP has 8 units of its own, D1 and D2, and 8 hidden dimensions, S and G, that only the head reads. With
u and d the weights of the first adapter's up_proj and down_proj, these dimensions receive

    S    u d E                        E: an effect of both together, which the planted answers have (u = d = 1)
    G    u (1 - d) F + d (1 - u) H    F, H: what either does without the other, which is harmful

so u = d = 0 is a minimum of its own: from there every small step makes it worse, and at u = d = 1 is a better one. A
third module of the same adapter has the opposite sign in the planted answers. One weight for all three cannot have
both, and the least harmful is about 0. The second adapter is plain.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.fitting.mixing import make_layout
from tests.tiny import make_adapter, make_base

UP, DOWN = "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"
THIRD = "model.layers.0.self_attn.v_proj"
OPPOSITE = -0.3

UNITS = 4
D1, D2 = slice(0, UNITS), slice(UNITS, 2 * UNITS)
S, G = slice(24, 24 + UNITS), slice(28, 28 + UNITS)


def make_two_basins(folder: Path) -> tuple[Path, list[LoraAdapter], torch.Tensor]:
    """The base, both adapters, and the weights (L, 2) that the answers are planted with."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = make_base(folder / "base")
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[24:] = 0
    weights["model.embed_tokens.weight"][:, 24:] = 0
    head, up, down = (weights[f"{name}.weight"] for name in ("lm_head", UP, DOWN))
    head[:, S], head[:, G] = 4 * random(259, UNITS), 6 * random(259, UNITS)
    up[D1], up[D2] = 0.2 * random(UNITS, 32), 0
    down[:, D1], down[:, D2] = 0, 0
    down[G, D2] = torch.eye(UNITS)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    targets, rank = ("up_proj", "down_proj", "v_proj"), 2 * UNITS
    path = make_adapter(folder / "first", base, targets=targets, rank=rank, alpha=rank, seed=1, size=0.18)
    factors = load_file(path / "adapter_model.safetensors")
    ours = {f"base_model.model.{THIRD}.lora_{x}.weight" for x in "AB"}
    kept = {name: tensor for name, tensor in factors.items() if name in ours}
    both = torch.zeros(32, rank)  # (hidden, D1 and D2)
    both[G, D1], both[G, D2], both[S, D2] = torch.eye(UNITS), -torch.eye(UNITS), torch.eye(UNITS)
    kept |= {
        f"base_model.model.{UP}.lora_A.weight": torch.cat([-up[D1], 0.2 * random(UNITS, 32)]),
        f"base_model.model.{UP}.lora_B.weight": torch.eye(48, rank),
        f"base_model.model.{DOWN}.lora_A.weight": torch.eye(rank, 48),
        f"base_model.model.{DOWN}.lora_B.weight": both,
    }
    save_file(kept, path / "adapter_model.safetensors", metadata={"format": "pt"})

    other = make_adapter(folder / "second", base, targets=("q_proj", "o_proj"), rank=2, alpha=2, seed=2)
    factors = load_file(other / "adapter_model.safetensors")
    for name, tensor in factors.items():
        if name.endswith("o_proj.lora_B.weight"):
            tensor[24:] = 0
    save_file(factors, other / "adapter_model.safetensors", metadata={"format": "pt"})

    adapters = [read_adapter(str(path)), read_adapter(str(other))]
    truth = [[OPPOSITE if name == THIRD else 1.0, 1.0] for name in make_layout(adapters).modules]
    return base, adapters, torch.tensor(truth)
