"""TSV-M (arXiv 2412.00081, section 4.2): singular vectors of all updates side by side, made orthogonal.

    dW_i = U_i S_i V_i^T,  U = [U_1 ... U_N], V = [V_1 ... V_N]        dW = scale U_o S V_o^T

with U_o = P Q^T of the SVD U = P D Q^T, the closest matrix with orthonormal columns (Procrustes), and V_o likewise.
Of each adapter at most min(out, in) / N directions are kept, as in the paper, which is all of a LoRA unless its rank is
very high. From factors alone, rank R, exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, thin_svd
from loracli.algebra.methods.method import Merged, Method, MethodOptions

NEGLIGIBLE = 1e-12  # share of an adapter's largest singular value


def tsv(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
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
    kept = min(most, int((singular > NEGLIGIBLE * singular.max()).sum()))
    return left[:, :kept], singular[:kept], right[:kept]


def _orthogonal(matrix: Tensor) -> Tensor:
    """P Q^T of matrix = P D Q^T."""
    q, r = torch.linalg.qr(matrix)
    u, _, vh = torch.linalg.svd(r, full_matrices=False)
    closest: Tensor = q @ u @ vh
    return closest


TSV = Method("tsv", "singular vectors of all, made orthogonal", merge=tsv, takes=frozenset({"scale"}))
