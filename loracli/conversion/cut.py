"""Which rank a converted module gets: a given one, or the smallest whose relative error is within a tolerance.

|dW - dW_k|_F / |dW|_F = sqrt(1 - kept_energy)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.truncate import Truncation, best_approximation, truncate


@dataclass(frozen=True)
class Cut:
    """What is asked of every module. Neither a rank nor a tolerance asks for all that there is.

    Args:
        rank: at most this, whatever the error.
        tolerance: the largest relative error, whatever the rank, unless `most` is set.
        most: the largest rank that may be spent on the tolerance.
    """

    rank: int | None = None
    tolerance: float | None = None
    most: int | None = None


def cut_factors(factors: Factors, cut: Cut) -> Truncation:
    """Of an update that is known by its factors; without rank and tolerance nothing is lost.

    Not a concatenation: where factors cancel, as s B A - s B_0 A_0 does, each would be rounded on the scale of what
    cancels. With sqrt(S) on both sides the rounding is on the scale of what is left.
    """
    whole = truncate(factors, cut.rank or factors.rank)
    return whole if cut.rank else _smallest(whole, cut)


def cut_matrix(matrix: Tensor, cut: Cut, start: int) -> Truncation:
    """Of a dense dW (out, in) in float64.

    Args:
        matrix: dW.
        cut: has a rank or a tolerance.
        start: the rank to try first with a tolerance.
    Returns:
        With a tolerance that `most` does not allow, the approximation of rank `most`: its energy tells.
    """
    if cut.rank is not None:
        return best_approximation(matrix, cut.rank)
    assert cut.tolerance is not None
    limit = min(*matrix.shape, cut.most or max(matrix.shape))
    rank = min(start, limit)
    while True:
        found = best_approximation(matrix, rank)
        if _error(found) <= cut.tolerance or rank == limit:
            return _smallest(found, cut)
        rank = min(2 * rank, limit)


def _smallest(found: Truncation, cut: Cut) -> Truncation:
    """The same, without the directions that the tolerance does not need."""
    if cut.tolerance is None or found.kept_energy <= 0.0:
        return found
    energy = found.factors.lora_A.square().sum(dim=1).square()  # S^2, as sqrt(S) stands on both sides
    total = float(energy.sum()) / found.kept_energy
    if total == 0.0:
        return found
    kept = (energy.cumsum(0) / total).clamp(max=1.0)
    errors = (1.0 - kept).clamp(min=0.0).sqrt()
    enough = int((errors > cut.tolerance).sum()) + 1
    if enough >= found.factors.rank:
        return found
    factors = Factors(found.factors.lora_A[:enough], found.factors.lora_B[:, :enough])
    return Truncation(factors, float(kept[enough - 1]))


def _error(found: Truncation) -> float:
    return math.sqrt(1.0 - found.kept_energy)
