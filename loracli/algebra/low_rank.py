"""The best approximation of a rank to a dense matrix, for methods whose result has full rank.

Block subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1) from a seeded block,
with a stopping test in place of a fixed number of iterations:

    Q <- orth(M (M^T Q))    until |Q^T M|_F^2 gains less than a share of 1e-6
    Q^T M = U S V^T         M_k = Q U_k S_k V_k^T

The iterations are in float32, the last one and the projection in float64, so that a matrix which has the rank comes
back to float64's rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.truncate import Truncation

OVERSAMPLED = 10  # columns more than the rank
GAIN = 1e-6  # of the captured energy, below which the iterations end
MOST_ITERATIONS = 40


def best_approximation(matrix: Tensor, rank: int) -> Truncation:
    """M_k of a matrix M (out, in) in float64; sqrt(S) on both sides, as `truncate`."""
    total = float(matrix.square().sum())
    k = min(rank, *matrix.shape)
    if total == 0.0:
        return Truncation(Factors(matrix.new_zeros(k, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], k)), 1.0)
    q = _range(matrix, min(k + OVERSAMPLED, *matrix.shape))  # (out, p)
    u, singular, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    root = singular[:k].sqrt()
    factors = Factors(root[:, None] * vh[:k], (q @ u[:, :k]) * root)
    return Truncation(factors, min(float(singular[:k].square().sum()) / total, 1.0))


def _range(matrix: Tensor, columns: int) -> Tensor:
    """(out, columns): an orthonormal basis of the leading left singular space, float64."""
    generator = torch.Generator().manual_seed(0)
    half = matrix.float()
    q = torch.linalg.qr(half @ torch.randn(matrix.shape[1], columns, generator=generator)).Q
    captured = 0.0
    for _ in range(MOST_ITERATIONS):
        product = half.T @ q  # (in, columns)
        energy = float(product.double().square().sum())
        if energy - captured <= GAIN * energy:
            break
        captured = energy
        q = torch.linalg.qr(half @ product).Q
    basis: Tensor = torch.linalg.qr(matrix @ (matrix.T @ q.double())).Q
    return basis
