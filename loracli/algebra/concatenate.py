"""Concatenation along the rank: updates of one module composed to one update, exactly.

    B M A                    A = [A_1; ...; A_N] (R, in), B = [s_1 B_1, ..., s_N B_N] (out, R), R = sum r_i
    sum_i w_i s_i B_i A_i    the same with M = blockdiag(w_i I); biases of B beside it, sum_i w_i s_i b_i

The second is CAT, LoRA Soups (arXiv 2410.13025), section 3; it has none of the cross terms B_i A_j that PEFT's
`linear` combination brings in by adding A and B apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, norm


def concatenate(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The update sum_i w_i s_i B_i A_i with scaling 1, in float64, and the bias sum_i w_i s_i b_i where there is any.

    A keeps the values of the ingredients; w_i s_i goes into B and the bias alone.

    Args:
        updates: N updates of one module; A_i (r_i, in), B_i (out, r_i), ranks may differ.
        weights: N numbers of any sign.
    Returns:
        lora_A (R, in) and lora_B (out, R) with R = sum r_i.
    Raises:
        ValueError: if there is not one weight for each update.
    """
    first, rank = updates[0], sum(update.rank for update in updates)
    lora_A = torch.empty(rank, first.in_features, dtype=torch.float64)
    lora_B = torch.empty(first.out_features, rank, dtype=torch.float64)
    row = 0
    for w, update in zip(weights, updates, strict=True):
        rows = slice(row, row := row + update.rank)
        lora_A[rows] = update.lora_A
        torch.mul(update.lora_B.double(), w * update.scaling, out=lora_B[:, rows])
    biases = [w * bias for w, update in zip(weights, updates, strict=True) if (bias := update.delta_bias()) is not None]
    return Factors(lora_A, lora_B, bias=torch.stack(biases).sum(dim=0) if biases else None)


def without_zeros(updates: Sequence[Factors], weights: Sequence[float]) -> tuple[list[Factors], list[float]]:
    """The same sum without the updates of weight 0; if all are, one update of rank 1 that is 0."""
    kept = [(update, w) for update, w in zip(updates, weights, strict=True) if w != 0]
    if kept:
        return [update for update, _ in kept], [w for _, w in kept]
    first = updates[0]
    nothing = Factors(torch.zeros(1, first.in_features), torch.zeros(first.out_features, 1))
    return [nothing.to(torch.bfloat16)], [1.0]  # the narrowest: exact in every dtype


def mix(updates: Sequence[Factors], mixing: Tensor) -> Factors:
    """The update B M A with scaling 1, in float64.

    A keeps the values of the ingredients; the scalings and M go into B alone.

    Args:
        updates: N updates of one module; A_i (r_i, in), B_i (out, r_i), ranks may differ.
        mixing: M (R, R) with R = sum r_i.
    Returns:
        lora_A (R, in) and lora_B (out, R).
    Raises:
        ValueError: if an update has a bias, which belongs to an adapter as a whole and not to a row of M.
    """
    if any(update.bias is not None for update in updates):
        raise ValueError("an update with a bias has no mixing matrix")
    stacked = concatenate(updates, [1.0] * len(updates))
    return Factors(stacked.lora_A, stacked.lora_B @ mixing.double())


def relative_error(written: Factors, exact: Factors) -> float:
    """|dW_written - dW_exact|_F / |dW_exact|_F from the factors, float64; where dW_exact is 0: 0 if dW_written is too,
    else inf. A bias counts as one more column of dW."""
    difference = _norm_with_bias(concatenate([written, exact], [1.0, -1.0]))
    reference = _norm_with_bias(exact)
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / reference


def _norm_with_bias(factors: Factors) -> float:
    bias = factors.delta_bias()
    return math.hypot(norm(factors), 0.0 if bias is None else float(torch.linalg.vector_norm(bias)))


def pad_rank(factors: Factors, rank: int) -> Factors:
    """The same dW at a higher rank: zero rows below A, zero columns right of B.

    Raises:
        ValueError: if `rank` is below the rank of `factors`.
    """
    missing = rank - factors.rank
    if missing < 0:
        raise ValueError(f"rank {factors.rank} cannot be padded to {rank}")
    if missing == 0:
        return factors
    lora_A = torch.nn.functional.pad(factors.lora_A, (0, 0, 0, missing))
    lora_B = torch.nn.functional.pad(factors.lora_B, (0, missing))
    return Factors(lora_A, lora_B, factors.scaling, factors.bias)
