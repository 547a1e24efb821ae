"""The ranks of a compressed export: given, or chosen from the singular values of every module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.adapters.names import target_of
from loracli.algebra.truncate import rank_for_energy, rank_within, ranks_for_bytes, ranks_for_energy
from loracli.errors import UsageError


@dataclass(frozen=True)
class RankRule:
    """What the ranks have to satisfy. Exactly one is set.

    Args:
        tolerance: |dW - dW'|_F / |dW|_F of every module, at most.
        energy: share of |dW|_F^2 over all modules, at least.
        budget: bytes of the tensor file, at most.
    """

    tolerance: float | None = None
    energy: float | None = None
    budget: int | None = None


def choose_ranks(
    rule: RankRule,
    spectra: Mapping[str, Tensor],
    costs: Mapping[str, int],
    size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """A rank for each module, at least 1.

    Args:
        rule: what they have to satisfy.
        spectra: squared singular values of each module.
        costs: bytes of one rank of each module.
        size: of the tensor file with these ranks.
    Raises:
        UsageError: if the smallest file is larger than the budget.
    """
    if rule.tolerance is not None:
        return {name: rank_within(squares, rule.tolerance) for name, squares in spectra.items()}
    if rule.energy is not None:
        return ranks_for_energy(spectra, costs, rule.energy)
    assert rule.budget is not None
    least, most = dict.fromkeys(spectra, 1), {name: len(squares) for name, squares in spectra.items()}
    if size(least) > rule.budget:
        raise _too_small(rule.budget, size(least))
    for extreme in (least, most):  # the header's length depends on the digits of the ranks, a little
        header = size(extreme) - sum(costs[name] * rank for name, rank in extreme.items())
        if rule.budget - header >= sum(costs.values()):
            ranks = ranks_for_bytes(spectra, costs, rule.budget - header)
            if size(ranks) <= rule.budget:
                return ranks
    return least


def spectra_of_targets(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared singular values as a file can be cut: the experts of a parameter, or the groups of a convolution, have
    one rank, so its k-th value is the sum of theirs."""
    updates: dict[str, list[Tensor]] = {}
    for name, squares in spectra.items():
        updates.setdefault(target_of(name), []).append(squares)
    return {
        name: torch.nn.utils.rnn.pad_sequence(several).sum(dim=1) if len(several) > 1 else several[0]
        for name, several in updates.items()
    }


def choose_uniform_rank(rule: RankRule, spectra: Mapping[str, Tensor], size: Callable[[int], int]) -> int:
    """One rank for all modules, at least 1; the arguments are those of `choose_ranks`.

    Raises:
        UsageError: if the smallest file is larger than the budget.
    """
    if rule.tolerance is not None:
        return max(rank_within(squares, rule.tolerance) for squares in spectra.values())
    if rule.energy is not None:
        return rank_for_energy(list(spectra.values()), rule.energy)
    assert rule.budget is not None
    most = max(1, max(int((squares > 0).sum()) for squares in spectra.values()))
    fitting = [rank for rank in range(1, most + 1) if size(rank) <= rule.budget]
    if not fitting:
        raise _too_small(rule.budget, size(1))
    return fitting[-1]


def _too_small(budget: int, least: int) -> UsageError:
    return UsageError(
        f"--budget {budget} bytes is too small: at rank 1 the tensor file has {least} bytes",
        hint=f"give at least --budget {least}",
    )
