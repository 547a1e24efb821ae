"""The leading left singular vectors of a dense matrix to float64's accuracy, where the best energy is not enough: the
space itself is wanted.

Block Lanczos on W W^T with full reorthogonalisation (Golub and Van Loan, Matrix Computations, 4th ed., section 10.3.6;
why a Krylov space of so few products is enough: Musco and Musco, arXiv 1504.05477), from a seeded block:

    Q_1 = orth(W G),   Q_{j+1} = orth(W W^T Q_j - Q Q^T W W^T Q_j),   Q = [Q_1, ..., Q_j]
    Q^T W W^T Q = Y L Y^T,   X = Q Y_k       until |W W^T X - X L_k| <= 1e-10 L_1 in every column

In place of all n eigenvectors, which cost as much for one as for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLED = 16  # columns of a block beyond those that are wanted
RESIDUAL = 1e-10  # of the largest eigenvalue of W W^T; float32 would leave 1e-7
CHECK_EVERY = 3  # blocks
DENSE_SHARE = 0.5  # of n, beyond which all eigenvectors cost no more


def leading_left(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest singular values (count,) of W (n, m), descending, and their left vectors (n, count).

    Args:
        matrix: W, float64, n <= m or not.
        count: at most min(n, m).
    """
    n = matrix.shape[0]
    block = min(count + OVERSAMPLED, n)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float64)
    bases = [torch.linalg.qr(matrix @ start).Q]  # each (n, block)
    images = [matrix.T @ bases[0]]  # W^T Q_j, each (m, block)
    while len(bases) * block <= DENSE_SHARE * n:
        if len(bases) % CHECK_EVERY == 0:
            found = _converged(matrix, torch.cat(bases, dim=1), torch.cat(images, dim=1), count)
            if found is not None:
                return found
        new = matrix @ images[-1]
        for _ in range(2):  # at length 1 again: of what is almost in the space already, once leaves mostly that
            for basis in bases:
                new = new - basis @ (basis.T @ new)
            new = torch.linalg.qr(new).Q
        bases.append(new)
        images.append(matrix.T @ bases[-1])
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return values[-count:].flip(0).clamp(min=0.0).sqrt(), vectors[:, -count:].flip(1)


def _converged(matrix: Tensor, basis: Tensor, image: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The values and vectors of the projection on the basis, None if they are not yet those of the matrix."""
    values, inner = torch.linalg.eigh(image.T @ image)
    values, inner = values[-count:].flip(0), inner[:, -count:].flip(1)
    vectors = basis @ inner
    residual = matrix @ (image @ inner) - vectors * values
    if float(torch.linalg.vector_norm(residual, dim=0).max()) > RESIDUAL * float(values[0]):
        return None
    return values.clamp(min=0.0).sqrt(), vectors
