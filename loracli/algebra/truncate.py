"""The best approximation of an update at a lower rank, from its factors.

    B = Q_B R_B,  A^T = Q_A R_A,  s R_B R_A^T = U S V^T  (R x R),  A' = sqrt(S_k) (Q_A V_k)^T,  B' = Q_B U_k sqrt(S_k)

By Eckart and Young, B' A' is the closest matrix of rank k to dW in the Frobenius norm, the same as from the SVD of the
dense (out, in) matrix, which is never formed. A bias is not cut.

By what it does to the activations x that occur, E|(dW - B' A') x|^2, the best rank k needs of them only G = E[z z^T]
(R, R), z = A x:

    B G^1/2 = U S V^T        B' = U_k sqrt(S_k), A' = sqrt(S_k) V_k^T G^-1/2 A,  so that  B' A' = U_k U_k^T dW

(the d x d form is that of SVD-LLM, arXiv 2403.07378; the row space of dW stays that of A, so G is enough.) It projects
dW on U_k, which needs no inverse of G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, core, norm, svd_of_core

DAMPING = 1e-4


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
    return truncate_core(core(factors), rank, factors.delta_bias())


def truncate_core(parts: tuple[Tensor, Tensor, Tensor], rank: int, bias: Tensor | None = None) -> Truncation:
    """`truncate` of dW = Q_B K Q_A^T as `core` gives it, with the bias beside it."""
    left, singular, right = svd_of_core(*parts)
    k = min(rank, singular.numel())
    root = singular[:k].sqrt()
    lora_A = root[:, None] * right[:k]  # (k, in)
    lora_B = left[:, :k] * root  # (out, k)
    total = float(singular.square().sum())
    kept = float(singular[:k].square().sum()) / total if total > 0 else 1.0
    return Truncation(Factors(lora_A, lora_B, bias=bias), kept)


def truncate_for(factors: Factors, rank: int, moment: Tensor) -> Truncation:
    """The update of rank at most `rank` that changes the outputs least in the mean square, sqrt(S) on both sides.

    Args:
        factors: with scaling 1.
        rank: k.
        moment: G (R, R) = E[z z^T]. DAMPING of its mean diagonal is added to the diagonal, so that directions which the
            records do not show are not cut at will. Where G = 0 the cut is that of `truncate`.
    """
    root = _root(moment)
    if root is None:
        return truncate(factors, rank)
    q_b, r_b = torch.linalg.qr(factors.lora_B.double())
    left = torch.linalg.svd(r_b @ root, full_matrices=False).U[:, :rank]
    return project(factors, q_b @ left)


def project(factors: Factors, basis: Tensor) -> Truncation:
    """Q Q^T dW with sqrt(S) on both sides.

    Args:
        factors: with scaling 1.
        basis: Q (out, k), orthonormal columns.
    """
    projected = Factors((basis.T @ factors.lora_B.double()) @ factors.lora_A.double(), basis, bias=factors.delta_bias())
    whole = norm(factors) ** 2
    kept = norm(projected) ** 2 / whole if whole > 0 else 1.0
    return Truncation(truncate(projected, basis.shape[1]).factors, min(kept, 1.0))


def relative_gap(factors: Factors, rank: int, moment: Tensor) -> float:
    """(s_k - s_k+1) / s_1 of B (G + d I)^1/2: how firmly `truncate_for` is told which subspace to keep; 0 where nothing
    tells."""
    root = _root(moment)
    if root is None:
        return 0.0
    singular = torch.linalg.svdvals(torch.linalg.qr(factors.lora_B.double(), mode="r").R @ root)
    following = float(singular[rank]) if rank < len(singular) else 0.0
    return (float(singular[rank - 1]) - following) / float(singular[0]) if float(singular[0]) > 0 else 0.0


def _root(moment: Tensor) -> Tensor | None:
    """(G + d I)^1/2 (R, R), None where G = 0."""
    damping = DAMPING * float(moment.diagonal().mean())
    if damping == 0.0:
        return None
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    root: Tensor = (vectors * (values.clamp(min=0.0) + damping).sqrt()) @ vectors.T
    return root
