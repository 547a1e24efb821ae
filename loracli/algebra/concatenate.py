"""Concatenation along the rank: the weighted sum of updates as one update, exactly.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, ..., w_N s_N B_N] [A_1; ...; A_N]

CAT, LoRA Soups (arXiv 2410.13025), section 3. PEFT's `linear` combination adds A and B apart instead, which brings in
the cross terms B_i A_j; this does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loracli.algebra.factors import Factors, norm


def concatenate(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The update sum_i w_i s_i B_i A_i with scaling 1, in float64.

    A keeps the values of the ingredients; w_i s_i goes into B alone.

    Args:
        updates: N updates of one module; A_i (r_i, in), B_i (out, r_i), ranks may differ.
        weights: N numbers of any sign.
    Returns:
        lora_A (R, in) and lora_B (out, R) with R = sum r_i.
    Raises:
        ValueError: if there is not one weight for each update.
    """
    lora_A = torch.cat([update.lora_A.double() for update in updates])
    lora_B = torch.cat(
        [w * update.scaling * update.lora_B.double() for w, update in zip(weights, updates, strict=True)], dim=1
    )
    return Factors(lora_A, lora_B)


def relative_error(written: Factors, exact: Factors) -> float:
    """|dW_written - dW_exact|_F / |dW_exact|_F from the factors, float64; where dW_exact is 0: 0 if dW_written is too,
    else inf."""
    difference = norm(concatenate([written, exact], [1.0, -1.0]))
    reference = norm(exact)
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / reference


def pad_rank(factors: Factors, rank: int) -> Factors:
    """The same dW at a higher rank: zero rows below A, zero columns right of B.

    Raises:
        ValueError: if `rank` is below the rank of `factors`.
    """
    missing = rank - factors.rank
    if missing < 0:
        raise ValueError(f"rank {factors.rank} cannot be padded to {rank}")
    lora_A = torch.nn.functional.pad(factors.lora_A, (0, 0, 0, missing))
    lora_B = torch.nn.functional.pad(factors.lora_B, (0, missing))
    return Factors(lora_A, lora_B, factors.scaling)
