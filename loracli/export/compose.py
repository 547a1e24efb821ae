"""The composition of a recipe, module by module: algebra on factors, without base model or data."""

from __future__ import annotations

from collections.abc import Sequence

from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.concatenate import concatenate
from loracli.algebra.factors import Factors
from loracli.errors import RecipeError
from loracli.recipe import Recipe


def composed_modules(adapters: Sequence[LoraAdapter]) -> tuple[str, ...]:
    """The modules that any of the adapters changes, sorted."""
    return tuple(sorted({name for adapter in adapters for name in adapter.modules}))


def compose_module(recipe: Recipe, adapters: Sequence[LoraAdapter], module: str) -> Factors:
    """sum_i w_li s_i B_i A_i of one module in float64, concatenated: lora_A (R, in) as stored, lora_B (out, R) with w s
    in it.

    Raises:
        RecipeError: if the recipe has no weight for an adapter that changes the module.
    """
    try:
        weights = recipe.weights_of(module)
    except KeyError:
        raise RecipeError(f"the recipe has no weights for {module}") from None
    updates, chosen = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if module not in adapter.modules:
            continue
        if weight is None:
            raise RecipeError(f"the recipe has no weight of {adapter.reference} for {module}")
        updates.append(adapter.modules[module].factors)
        chosen.append(weight)
    return concatenate(updates, chosen)
