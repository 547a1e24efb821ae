"""TIES (arXiv 2306.01708, section 4), on each module's updates.

    trim      keep the `density` largest entries of each dW_i by magnitude, 0 elsewhere
    elect     gamma = sign(sum_i dW_i), entry by entry
    merge     the mean over the adapters whose entry has that sign and is not 0

The paper trims a whole model's update at once; here, as in PEFT and mergekit, each module's. PEFT trims A and B apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.low_rank import best_approximation
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.methods.order import present_in_own_order

DENSITY = 0.2  # the paper's top-20 %
BLOCK = 1 << 17  # entries that are merged at a time, which a processor's cache holds


def ties(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """TIES of one module: its best approximation of the rank, as the result has full rank."""
    density = DENSITY if options.density is None else options.density
    present = present_in_own_order(updates)
    return approximated(disjoint_mean([trim(update.delta_weight(), density) for update in present]), present, options)


def trim(matrix: Tensor, density: float) -> Tensor:
    """The `density` largest entries by magnitude, and 0 elsewhere; equal ones at the threshold stay together."""
    kept = max(1, round(density * matrix.numel()))
    if kept >= matrix.numel():
        return matrix
    sizes = matrix.abs()
    ordered = sizes.flatten().clone().numpy()
    ordered.partition(matrix.numel() - kept)  # in place: twice as fast as torch.kthvalue
    return torch.where(sizes >= float(ordered[matrix.numel() - kept]), matrix, 0.0)


def disjoint_mean(matrices: Sequence[Tensor]) -> Tensor:
    """Elects the sign of the sum of each entry, and takes the mean over the entries that have it."""
    result = torch.empty_like(matrices[0])
    rows = max(1, BLOCK // result.shape[1])
    for start in range(0, result.shape[0], rows):
        parts = [matrix[start : start + rows] for matrix in matrices]
        elected = torch.stack(parts).sum(dim=0).sign()
        agreeing = [(part * elected > 0).to(part.dtype) for part in parts]
        total = torch.stack([part * votes for part, votes in zip(parts, agreeing, strict=True)]).sum(dim=0)
        result[start : start + rows] = total / torch.stack(agreeing).sum(dim=0).clamp(min=1)
    return result


def approximated(matrix: Tensor, present: Sequence[Factors], options: MethodOptions) -> Merged:
    """scale * matrix at the rank that is asked for, or the sum of the ranks."""
    rank = sum(update.rank for update in present) if options.rank is None else options.rank
    found = best_approximation(matrix, rank)
    factors = Factors(found.factors.lora_A, options.scale * found.factors.lora_B)
    return Merged(factors, found.kept_energy)


TIES = Method(
    "ties",
    "trimmed, signs elected, disjoint mean",
    merge=ties,
    takes=frozenset({"density", "scale"}),
    full_rank=True,
)
