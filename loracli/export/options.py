"""What can be chosen for an export, ranks by an error, an energy or a size among it.

The ranks of a compressed export: given, or chosen from the singular values of every module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.adapters.names import target_of
from loracli.algebra.truncate import rank_for_energy, rank_within, ranks_for_bytes, ranks_for_energy
from loracli.errors import UsageError
from loracli.export.gguf import LlamaCppBase
from loracli.export.layout import PROFILES


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


OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """How a composition is written.

    Args:
        merge: compress to `rank` instead of concatenating.
        rank: of the result with `merge`, or of a method that cuts its result; None is the largest ingredient rank with
            `merge` unless one of the next three is set, and what the method says otherwise.
        tolerance: with `merge`, the smallest rank with which no module has a larger relative error.
        energy: with `merge`, the smallest ranks that keep this share of |dW|_F^2 over all modules.
        budget: with `merge`, the ranks that keep most in a tensor file of at most so many bytes.
        activation_aware: with `merge` and a rank, cut what calibration records show least of.
        dtype: float32, float16 or bfloat16; None is the widest of the ingredients' dtypes, and float32 for trained
            factors.
        profile: `portable`, `peft` or `mlx`; None is portable where that is possible.
        gguf: how llama.cpp has the base, to write a GGUF file as well; None for none.
    """

    merge: bool = False
    rank: int | None = None
    dtype: str | None = None
    profile: str | None = None
    gguf: LlamaCppBase | None = None
    tolerance: float | None = None
    energy: float | None = None
    budget: int | None = None
    activation_aware: bool = False

    @property
    def rule(self) -> RankRule | None:
        """What ranks are chosen by, None where the rank is given."""
        rule = RankRule(self.tolerance, self.energy, self.budget)
        return None if rule == RankRule() else rule

    def check(self, *, cuts: bool = False) -> None:
        """Raises UsageError for options that contradict each other or are out of their range."""
        if self.rank is not None and not (self.merge or cuts):
            raise UsageError("--rank is for --merge; a concatenation has the sum of the ranks", hint="add --merge")
        rules = {"rank": self.rank, "tolerance": self.tolerance, "energy": self.energy, "budget": self.budget}
        given = [f"--{name}" for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} cannot both decide on the rank", hint="give one of them")
        if self.rule is not None and not self.merge:
            raise UsageError(f"{given[0]} is for --merge; a concatenation has the sum of the ranks", hint="add --merge")
        if self.activation_aware and (not self.merge or self.rule is not None):
            raise UsageError("--activation-aware is for --merge to a rank", hint="add --merge, and --rank K if need be")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance} is not at least 0 and below 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy} is not above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank} is below 1")
        if self.dtype is not None and self.dtype not in OUTPUT_DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of {', '.join(OUTPUT_DTYPES)}")
        if self.profile is not None and self.profile not in PROFILES:
            raise UsageError(f"--profile {self.profile} is not one of {', '.join(PROFILES)}")
