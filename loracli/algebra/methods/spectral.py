"""Methods on singular vectors of the updates: svd, TSV-M, KnOTS.

The sum of the updates at a lower rank: the closest matrix of rank k to sum_i dW_i (Eckart and Young).

What PEFT's `svd` combination is meant to be, from the factors instead of the dense matrix, and with the scaling once;
k is the largest rank of an ingredient unless it is given.

TSV-M (arXiv 2412.00081, section 4.2): singular vectors of all updates side by side, made orthogonal.

    dW_i = U_i S_i V_i^T,  U = [U_1 ... U_N], V = [V_1 ... V_N]        dW = scale U_o S V_o^T

with U_o = P Q^T of the SVD U = P D Q^T, the closest matrix with orthonormal columns (Procrustes), and V_o likewise.
Of each adapter at most min(out, in) / N directions are kept, as in the paper, which is all of a LoRA unless its rank is
very high. From factors alone, rank R, exact.

KnOTS (arXiv 2410.19735, section 4): one basis for the outputs of all updates, TIES in its coordinates.

    [dW_1 ... dW_N] = U S [V_1^T ... V_N^T]        dW = U TIES(S V_1^T, ..., S V_N^T)

What is merged is S V_i^T, as in the authors' code. From the factors: with [s_1 B_1 ... s_N B_N] = Q R and
A_i^T = Q_i R_i, the SVD is that of the small matrix R blockdiag(R_i^T). The result has rank at most R and is exact; no
(out, in) matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, concatenate, thin_svd
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.methods.sparse import TIES_DENSITY, disjoint_mean, present_in_own_order, trim
from loracli.algebra.truncate import truncate


def _svd(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """The truncated sum of one module."""
    present = [update for update in updates if update is not None]
    rank = max(update.rank for update in present) if options.rank is None else options.rank
    found = truncate(concatenate(present, [1.0] * len(present)), rank)
    return Merged(found.factors, found.kept_energy)


SVD = Method("svd", "the sum, cut to the largest ingredient's rank", merge=_svd, takes=frozenset({"rank"}))


_NEGLIGIBLE = 1e-12  # share of an adapter's largest singular value


def _tsv(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """TSV-M of one module."""
    present = [update for update in updates if update is not None]
    most = max(1, min(present[0].in_features, present[0].out_features) // len(present))
    parts = [_leading(update, most) for update in present]
    lefts, singular, rights = (
        torch.cat(list(p), dim=d) for p, d in zip(zip(*parts, strict=True), (1, 0, 0), strict=True)
    )
    root = singular.sqrt()
    return Merged(Factors(root[:, None] * _orthogonal(rights.T).T, options.scale * _orthogonal(lefts) * root))


def _leading(update: Factors, most: int) -> tuple[Tensor, Tensor, Tensor]:
    left, singular, right = thin_svd(update)  # (out, m), (m,), (m, in)
    kept = min(most, int((singular > _NEGLIGIBLE * singular.max()).sum()))
    return left[:, :kept], singular[:kept], right[:kept]


def _orthogonal(matrix: Tensor) -> Tensor:
    """P Q^T of matrix = P D Q^T."""
    q, r = torch.linalg.qr(matrix)
    u, _, vh = torch.linalg.svd(r, full_matrices=False)
    closest: Tensor = q @ u @ vh
    return closest


TSV = Method("tsv", "singular vectors of all, made orthogonal", merge=_tsv, takes=frozenset({"scale"}))


def _knots(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """KnOTS with TIES of one module."""
    present = present_in_own_order(updates)
    density = TIES_DENSITY if options.density is None else options.density
    q, r = torch.linalg.qr(torch.cat([u.scaling * u.lora_B.double() for u in present], dim=1))  # (out, p), (p, R)
    sides = [torch.linalg.qr(update.lora_A.double().T) for update in present]  # (in, q_i), (q_i, r_i)
    middle = torch.cat(
        [part @ side.R.T for part, side in zip(r.split([u.rank for u in present], dim=1), sides, strict=True)], dim=1
    )  # (p, sum q_i)
    u, singular, vh = torch.linalg.svd(middle, full_matrices=False)
    kept = singular > _NEGLIGIBLE * singular.max()
    scaled = (singular[:, None] * vh)[kept].split([side.Q.shape[1] for side in sides], dim=1)
    tasks = [trim(part @ side.Q.T, density) for part, side in zip(scaled, sides, strict=True)]  # (m, in) each
    return Merged(Factors(disjoint_mean(tasks), options.scale * (q @ u[:, kept])))


KNOTS = Method(
    "knots", "TIES in one basis of all updates' outputs", merge=_knots, takes=frozenset({"density", "scale"})
)
