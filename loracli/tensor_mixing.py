"""Mixings that are tensors, one or two for each module: what they compose, and how a fit hands them to a recipe.

    rank, core    <module>.mixing                     M (R, R) float64, in the gauge of the files:  dW = B M A
    factors       <module>.lora_A, <module>.lora_B    (r, in), (out, r) float32, scaling 1:         dW = lora_B lora_A

with A = [A_1; ...; A_N] (R, in) and B = [s_1 B_1, ..., s_N B_N] (out, R) of the adapters that change the module, in the
recipe's order. `rank` and `core` differ in what was fitted, not in what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.basis import projection
from loracli.algebra.concatenate import mix
from loracli.algebra.factors import Factors
from loracli.errors import RecipeError
from loracli.recipe import TENSOR_PARTS, MixingKind, RecipeMixing
from loracli.sidecar import PART_DTYPES, sidecar_sha256


def tensor_mixing(
    kind: MixingKind, tensors: Mapping[str, Tensor], adapters: Sequence[LoraAdapter], *, numbers: int
) -> RecipeMixing:
    """The mixing for a recipe, with its projection on the adapters as `weights`.

    Args:
        kind: `rank`, `core` or `factors`.
        tensors: by name, of every module that an adapter changes and no other; in any dtype and on any device, rounded
            once to the dtype they are kept in.
        adapters: N adapters in the recipe's order.
        numbers: how many were fitted.
    Raises:
        RecipeError: if a tensor is missing or its shape does not fit the adapters.
        ValueError: if there is a tensor of another name.
    """
    modules = sorted({name for adapter in adapters for name in adapter.modules})
    unknown = tensors.keys() - {f"{module}.{part}" for module in modules for part in TENSOR_PARTS[kind]}
    if unknown:
        raise ValueError(f"{min(unknown)} is no tensor of a {kind} mixing of these adapters")
    kept = {
        name: tensor.detach().to("cpu", PART_DTYPES[name.rpartition(".")[2]]).contiguous()
        for name, tensor in sorted(tensors.items())
    }
    weights = {}
    for module in modules:
        updates = [adapter.modules[module].factors if module in adapter.modules else None for adapter in adapters]
        present = [update for update in updates if update is not None]
        weights[module] = projection(composed_update(kind, kept, module, present), updates)
    return RecipeMixing(kind, weights, numbers, sidecar_sha256(kept), kept)


def composed_update(
    kind: MixingKind, tensors: Mapping[str, Tensor], module: str, updates: Sequence[Factors]
) -> Factors:
    """The update of one module in float64, scaling 1; with `rank` and `core` its lora_A is A as the files have it.

    Args:
        kind: `rank`, `core` or `factors`.
        tensors: of the mixing, by name.
        module: its name.
        updates: of the adapters that change it, at least one.
    Raises:
        RecipeError: if a tensor is missing or its shape does not fit the updates.
    """
    names = [f"{module}.{part}" for part in TENSOR_PARTS[kind]]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RecipeError(f"the recipe has no tensor {missing[0]}")
    rank = sum(update.rank for update in updates)
    found = [tuple(tensors[name].shape) for name in names]
    if kind == "factors":
        rank = found[0][0]
        expected = [(rank, updates[0].in_features), (updates[0].out_features, rank)]
    else:
        expected = [(rank, rank)]
    for name, shape, wanted in zip(names, found, expected, strict=True):
        if shape != wanted:
            raise RecipeError(f"the recipe's tensor {name} has the shape {shape}; the adapters need {wanted}")
    if kind == "factors":
        lora_A, lora_B = (tensors[name].double() for name in names)
        return Factors(lora_A, lora_B)
    return mix(updates, tensors[names[0]])
