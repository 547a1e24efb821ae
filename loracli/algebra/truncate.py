"""The best approximation of an update at a lower rank, from its factors.

    B = Q_B R_B,  A^T = Q_A R_A,  s R_B R_A^T = U S V^T  (R x R),  A' = sqrt(S_k) (Q_A V_k)^T,  B' = Q_B U_k sqrt(S_k)

By Eckart and Young, B' A' is the closest matrix of rank k to dW in the Frobenius norm, the same as from the SVD of the
dense (out, in) matrix, which is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loracli.algebra.factors import Factors, core, svd_of_core


@dataclass(frozen=True)
class Truncation:
    """An update cut to a rank.

    Args:
        factors: lora_A (k, in), lora_B (out, k), float64, scaling 1, with sqrt(S) on both sides.
        kept_energy: sum of the kept squared singular values over the sum of all; 1 for dW = 0.
    """

    factors: Factors
    kept_energy: float


def truncate(factors: Factors, rank: int) -> Truncation:
    """The closest update of rank at most `rank`; the result has rank min(rank, r, in, out)."""
    return truncate_core(core(factors), rank)


def truncate_core(parts: tuple[Tensor, Tensor, Tensor], rank: int) -> Truncation:
    """`truncate` of dW = Q_B K Q_A^T as `core` gives it."""
    left, singular, right = svd_of_core(*parts)
    k = min(rank, singular.numel())
    root = singular[:k].sqrt()
    lora_A = root[:, None] * right[:k]  # (k, in)
    lora_B = left[:, :k] * root  # (out, k)
    total = float(singular.square().sum())
    kept = float(singular[:k].square().sum()) / total if total > 0 else 1.0
    return Truncation(Factors(lora_A, lora_B), kept)
