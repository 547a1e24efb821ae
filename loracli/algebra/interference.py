"""How much two updates of one module get in each other's way, from their factors.

    cosine   <dW_1, dW_2> / (|dW_1| |dW_2|)                  whether they push the same way
    input    |Q_1^T Q_2|_F^2 / min(r_1, r_2)                 share of the smaller input space that the other reads too
    output   the same of the column spaces of B              share of the smaller output space that both write to

Q_i is an orthonormal basis of the rows of A_i, or of the columns of B_i; the shares are means of squared cosines of
principal angles (Golub and Van Loan, section 6.4.3), 0 for spaces at right angles and 1 for one within the other. Two
random spaces of ranks r_1 >= r_2 in n dimensions have r_1 / n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, inner_product, norm

NEGLIGIBLE = 1e-6  # share of the largest singular value: below, a direction is rounding


@dataclass(frozen=True)
class Interference:
    """Two updates of one module.

    Args:
        cosine: in [-1, 1]; 0 where one of them is 0.
        input: in [0, 1].
        output: in [0, 1].
    """

    cosine: float
    input: float
    output: float


def interference(first: Factors, second: Factors) -> Interference:
    """The three numbers, in O((in + out) r^2) and float64."""
    length = norm(first) * norm(second)
    return Interference(
        inner_product(first, second) / length if length > 0 else 0.0,
        shared_space(first.lora_A.double().T, second.lora_A.double().T),
        shared_space(first.lora_B.double(), second.lora_B.double()),
    )


def shared_space(first: Tensor, second: Tensor) -> float:
    """Share of the smaller column space, of (n, r_1) and (n, r_2), that lies in the other; 0 if one is empty."""
    bases = [_basis(first), _basis(second)]
    smaller = min(basis.shape[1] for basis in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _basis(matrix: Tensor) -> Tensor:
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept = singular > NEGLIGIBLE * singular.max() if singular.numel() else singular > 0
    basis: Tensor = left[:, kept & (singular > 0)]
    return basis
