"""The best approximation of a rank to a dense matrix, for methods whose result has full rank.

A block Krylov space from a seeded block (Musco and Musco, arXiv 1504.05477, algorithm 2), with a stopping test in place
of a fixed number of blocks:

    Q = orth [M X, (M M^T) M X, (M M^T)^2 M X, ...]    until the k largest |Q^T M|^2 gain less than a share of 1e-6
    Q^T M = U S V^T                                    M_k = Q U_k S_k V_k^T

Few blocks do where the spectrum is flat, as that of a trimmed update is, and subspace iteration would need dozens. The
space is found in float32; a last iteration and the projection are in float64, so that a matrix which has the rank
comes back to float64's rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.truncate import Truncation

OVERSAMPLED = 10  # columns more than the rank
GAIN = 1e-6  # of the captured energy, below which the space is large enough
MOST_BLOCKS = 12
SMALL = 4  # blocks to the shorter side of a matrix, below which its own SVD is as cheap


def best_approximation(matrix: Tensor, rank: int) -> Truncation:
    """M_k of a matrix M (out, in) in float64; sqrt(S) on both sides, as `truncate`."""
    total = float(matrix.square().sum())
    k = min(rank, *matrix.shape)
    if total == 0.0:
        return Truncation(Factors(matrix.new_zeros(k, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], k)), 1.0)
    if min(matrix.shape) <= SMALL * (k + OVERSAMPLED):
        u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        q = _leading_space(matrix, k, k + OVERSAMPLED)  # (out, p)
        u, singular, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    root = singular[:k].sqrt()
    factors = Factors(root[:, None] * vh[:k], u[:, :k] * root)
    return Truncation(factors, min(float(singular[:k].square().sum()) / total, 1.0))


def _leading_space(matrix: Tensor, k: int, columns: int) -> Tensor:
    """(out, columns): an orthonormal basis of a space that has the k leading left singular vectors, float64."""
    generator = torch.Generator().manual_seed(0)
    half = (matrix / matrix.abs().max()).float()  # whose squares stay within float32's range
    basis = torch.linalg.qr(half @ torch.randn(matrix.shape[1], columns, generator=generator)).Q  # (out, c)
    images = half.T @ basis  # (in, c): M^T Q
    captured = 0.0
    for _ in range(MOST_BLOCKS):
        energies, rotation = torch.linalg.eigh(images.T @ images)  # ascending
        found = float(energies[-k:].double().sum())
        if found - captured <= GAIN * found or basis.shape[1] + columns > min(matrix.shape):
            break
        captured = found
        block = half @ images[:, -columns:]
        for _ in range(2):  # once leaves what rounding left of the space in it
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, half.T @ block], dim=1)
    leading = basis @ rotation[:, -columns:]
    polished: Tensor = torch.linalg.qr(matrix @ (matrix.T @ leading.double())).Q
    return polished
