"""One way to compose, as the attached model takes it: weights where it lies in their span, factors where it does
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, module_names
from loracli.adapters.names import is_numbered, target_of
from loracli.algebra.factors import Factors, norm
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.algebra.packing import stack_experts
from loracli.composition.composition import CPU, compose_module
from loracli.composition.weights import ModuleWeights, equal_weights
from loracli.errors import RecipeError
from loracli.fitting.mixing import Applied, DiagonalMixing, FixedFactors, Layout, make_diagonal
from loracli.recipe.record import INLINE_KINDS, RecipeMixing

_NOTHING = torch.zeros(0)


@dataclass(frozen=True, eq=False)
class MixingPoint:
    """One way to compose: a mixing with its numbers, as the attached model takes it, and what there is to say of it.

    Args:
        mixing: what is set.
        theta: with these numbers.
        rank: of the one adapter it would be exported as; None for the base model alone.
        kept_energy: share of |dW|^2 over all modules that this rank keeps; None where nothing is lost.
        weights: one for each adapter where it is the same in every module, None otherwise.
        note: what a reader has to know.
    """

    mixing: Applied
    theta: Tensor
    rank: int | None
    kept_energy: float | None = None
    weights: tuple[float, ...] | None = None
    note: str = ""


def weighted(layout: Layout, weights: Sequence[float], *, note: str = "") -> MixingPoint:
    """One weight for each adapter, the same in every module."""
    mixing = make_diagonal(layout, "adapter")
    used = [rank for row in layout.ranks for rank in [sum(r for r, w in zip(row, weights, strict=True) if w)]]
    return MixingPoint(mixing, mixing.constant(weights), max(used) or None, weights=tuple(weights), note=note)


def of_recipe(mixing: RecipeMixing, adapters: Sequence[LoraAdapter], layout: Layout, *, note: str = "") -> MixingPoint:
    """What a recipe says, as it will be exported.

    Raises:
        RecipeError: if it has no weight for an adapter, or no tensor that fits.
    """
    if mixing.kind in INLINE_KINDS:
        diagonal = make_diagonal(layout, mixing.kind)
        theta = torch.tensor(_entries(mixing, diagonal), dtype=torch.float64)
        weights = tuple(theta.tolist()) if mixing.kind == "adapter" else None
        used = torch.split(theta[diagonal.index] != 0, layout.sizes)  # an adapter of weight 0 takes no rank
        return MixingPoint(diagonal, theta, max(1, *(int(rows.sum()) for rows in used)), weights=weights, note=note)
    return of_factors({name: compose_module(mixing, adapters, name) for name in module_names(adapters)}, note=note)


def of_weights(weights: ModuleWeights, adapters: Sequence[LoraAdapter], layout: Layout) -> MixingPoint:
    """Weights by hand."""
    equal = equal_weights(weights)
    if equal is not None:
        return weighted(layout, equal)
    numbers = sum(weight is not None for row in weights.values() for weight in row)
    return of_recipe(RecipeMixing("module", dict(weights), numbers), adapters, layout)


def of_method(
    method: Method,
    options: MethodOptions,
    adapters: Sequence[LoraAdapter],
    layout: Layout,
    device: torch.device = CPU,
) -> MixingPoint:
    """A method that needs no data, computed on a device.

    Raises:
        ValueError: if it cannot honour these adapters, with the reason.
    """
    weights = method.fixed_weights(len(adapters), options)
    if weights is not None:
        return weighted(layout, weights)
    factors, kept, whole = {}, 0.0, 0.0
    for module in module_names(adapters):
        updates = [a.modules[module].factors.on(device) if module in a.modules else None for a in adapters]
        merged = method.merge_updates(updates, options)
        factors[module] = merged.factors.on(CPU)
        energy = norm(merged.factors) ** 2
        kept += energy
        whole += energy / merged.kept_energy if merged.kept_energy > 0 else 0.0
    kept_share = kept / whole if method.full_rank and whole > 0 else None
    return of_factors(factors, kept_energy=kept_share, note=one_draw(options.seed) if "seed" in method.takes else "")


def one_draw(seed: int) -> str:
    """What there is to say of what another seed would draw otherwise."""
    return f"one draw, seed {seed}"


def of_factors(factors: Mapping[str, Factors], *, kept_energy: float | None = None, note: str = "") -> MixingPoint:
    """Factors of every module, by name; experts in their own order."""
    rank = max(f.rank for f in factors.values())
    targets: dict[str, list[Factors]] = {}
    for name, f in factors.items():
        bias = None if f.bias is None else (f.scaling * f.bias.double()).float()
        scaled = Factors(f.lora_A.float(), (f.scaling * f.lora_B.double()).float(), bias=bias)
        targets.setdefault(target_of(name), []).append(scaled)
    experts = {target_of(name) for name in factors if is_numbered(name)}
    pairs = tuple(
        stack_experts(scaled, max(f.rank for f in scaled)) if name in experts else _of_linear(scaled[0])
        for name, scaled in sorted(targets.items())
    )
    return MixingPoint(FixedFactors(pairs), _NOTHING, rank, kept_energy, note=note)


def _of_linear(update: Factors) -> tuple[Tensor, ...]:
    pair = update.lora_A, update.lora_B
    return pair if update.bias is None else (*pair, update.bias)


def _entries(mixing: RecipeMixing, diagonal: DiagonalMixing) -> list[float]:
    """The weights in the order of theta: group by group, of the adapters that change something in the group."""
    adapters = diagonal.layout.adapters
    entries = []
    for place in diagonal.present.nonzero().flatten().tolist():
        group, index = diagonal.groups[place // adapters], place % adapters
        weight = mixing.weights[group][index] if group in mixing.weights else None
        if weight is None:
            raise RecipeError(f"the recipe has no weight of adapter {index + 1} for {group}")
        entries.append(weight)
    return entries
