"""The composition of a recipe, module by module: algebra on factors, without base model or data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loracli.adapters.adapter import LoraAdapter, module_names, widest_dtype
from loracli.algebra.concatenate import concatenate, without_zeros
from loracli.algebra.factors import Factors
from loracli.errors import RecipeError
from loracli.recipe.recipe import INLINE_KINDS, Recipe, RecipeMixing, group_name
from loracli.recipe.tensors import composed_update


def composed_modules(recipe: Recipe, adapters: Sequence[LoraAdapter]) -> tuple[str, ...]:
    """The modules that any of the adapters changes, sorted.

    Raises:
        RecipeError: if the recipe has tensors for another module, which would be left out.
    """
    modules = module_names(adapters)
    if recipe.mixing.kind not in INLINE_KINDS:
        unknown = sorted(recipe.mixing.weights.keys() - set(modules))
        if unknown:
            raise RecipeError(f"the recipe has tensors for {unknown[0]}, which no adapter changes")
    return modules


def compose_module(mixing: RecipeMixing, adapters: Sequence[LoraAdapter], module: str) -> Factors:
    """The update of one module in float64, scaling 1, concatenated.

    lora_A (R, in) as stored and lora_B = B M (out, R), with sum_i w_li s_i B_i A_i for a weight per adapter, and the
    bias sum_i w_li s_i b_i of adapters with lora_bias; with `factors` the trained lora_A and lora_B.

    Raises:
        RecipeError: if the recipe has no weight for an adapter that changes the module, or no tensor that fits.
    """
    if mixing.kind not in INLINE_KINDS:
        biased = next((a for a in adapters if module in a.modules and a.modules[module].factors.bias is not None), None)
        if biased is not None:
            raise RecipeError(f"the recipe's {mixing.kind} mixing cannot weigh the lora_bias of {biased.reference}")
        updates = [adapter.modules[module].factors for adapter in adapters if module in adapter.modules]
        return composed_update(mixing.kind, mixing.tensors, module, updates)
    return concatenate(*weighted_updates(mixing, adapters, module))


def weighted_updates(
    mixing: RecipeMixing, adapters: Sequence[LoraAdapter], module: str
) -> tuple[list[Factors], list[float]]:
    """The updates of one module and their weights, of a mixing with a weight per adapter; adapters of weight 0 are left
    out, so that they cost no rank.

    Raises:
        RecipeError: if the recipe has no weight for an adapter that changes the module.
    """
    try:
        weights = mixing.weights[group_name(module, mixing.kind)]
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
    return without_zeros(updates, chosen)


def composed_rank(recipe: Recipe, adapters: Sequence[LoraAdapter], module: str) -> int:
    """The rank of `compose_module`: the sum of the ranks of adapters whose weight is not 0, or that of the trained
    factors."""
    if recipe.mixing.kind in INLINE_KINDS:
        return sum(update.rank for update in weighted_updates(recipe.mixing, adapters, module)[0])
    if recipe.mixing.kind == "factors":
        return compose_module(recipe.mixing, adapters, module).rank
    return sum(adapter.modules[module].factors.rank for adapter in adapters if module in adapter.modules)


def composed_dtype(recipe: Recipe, adapters: Sequence[LoraAdapter]) -> torch.dtype:
    """The dtype that keeps what a composition is made of: the adapters' widest, or that of the trained factors."""
    if recipe.mixing.kind == "factors":
        return torch.float32
    return widest_dtype([adapter.dtype for adapter in adapters])
