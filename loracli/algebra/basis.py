"""Bases and inner products of updates: the canonical basis, the closest weights, how much two overlap.

B -> B G, A -> G^-1 A leaves an update as it is, but changes what a weight of one row of A means and how a penalty on M
measures. So a mixing finer than a weight per adapter is fitted between canonical factors, the thin SVD of each
adapter's update with sqrt(S) on both sides:

    s B A = U S V^T        lora_A = sqrt(S) V^T = G_A A         G_A = S^-1/2 U^T (s B)      (r, r)
                           lora_B = U sqrt(S)   = (s B) G_B     G_B = A V S^-1/2            (r, r)

With equal singular values that basis is not unique, so it is no basis to keep: a recipe holds M in the files' basis.
For N adapters in one module, stacked, with block-diagonal G_A and G_B (R, R):

    lora_B M_can lora_A = B M A        M = G_B M_can G_A        A = [A_1; ...; A_N], B = [s_1 B_1, ..., s_N B_N]

The weights that come closest to a composition: what a finer mixing amounts to for each adapter.

    argmin_w |dW - sum_i w_i dW_i|_F        C w = c,  C_ij = <dW_i, dW_j> (N, N),  c_i = <dW_i, dW>

From factors alone, by inner products. Where adapters are dependent, the shortest w over updates of norm 1.

How much two updates of one module get in each other's way, from their factors.

    cosine   <dW_1, dW_2> / (|dW_1| |dW_2|)                  whether they push the same way
    input    |Q_1^T Q_2|_F^2 / min(r_1, r_2)                 share of the smaller input space that the other reads too
    output   the same of the column spaces of B              share of the smaller output space that both write to

Q_i is an orthonormal basis of the rows of A_i, or of the columns of B_i; the shares are means of squared cosines of
principal angles (Golub and Van Loan, section 6.4.3), 0 for spaces at right angles and 1 for one within the other. Two
random spaces of ranks r_1 >= r_2 in n dimensions have r_1 / n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, inner_product, norm, thin_svd

# A direction below this share of its adapter's largest singular value carries nothing: rounding puts it there when an
# update has a lower rank than its factors.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class CanonicalStack:
    """N updates of one module in their canonical bases, stacked; all float64.

    Args:
        lora_A: (R, in), sqrt(S) V^T of each adapter, R = sum of the files' ranks r_i.
        lora_B: (out, R), U sqrt(S) of each; the scaling is in it.
        basis_A: G_A (R, R), block-diagonal; lora_A = G_A A.
        basis_B: G_B (R, R), block-diagonal; lora_B = B G_B.
        ranks: r_i of each adapter, the sizes of the blocks.
        present: (R,) which directions carry something. The others are zero in all four tensors, so that rows and
            columns of M_can there have no effect and no gradient.
    """

    lora_A: Tensor
    lora_B: Tensor
    basis_A: Tensor
    basis_B: Tensor
    ranks: tuple[int, ...]
    present: Tensor


def canonical_stack(updates: Sequence[Factors]) -> CanonicalStack:
    """The canonical factors of N >= 1 updates of one module, and their bases.

    Args:
        updates: A_i (r_i, in), B_i (out, r_i) and the scaling s_i, in any dtype; r_i may exceed in or out.
    """
    parts = [_canonical(update) for update in updates]
    lora_A, lora_B, basis_A, basis_B, present = zip(*parts, strict=True)
    return CanonicalStack(
        lora_A=torch.cat(lora_A),
        lora_B=torch.cat(lora_B, dim=1),
        basis_A=torch.block_diag(*basis_A),  # type: ignore[no-untyped-call]
        basis_B=torch.block_diag(*basis_B),  # type: ignore[no-untyped-call]
        ranks=tuple(update.rank for update in updates),
        present=torch.cat(present),
    )


def mixing_in_file_basis(stack: CanonicalStack, mixing: Tensor) -> Tensor:
    """M = G_B M_can G_A (R, R) in float64, for which B M A is the update lora_B M_can lora_A.

    M_can = w I gives w I again wherever the update has the rank of its factors; an adapter with s = 0 or B = 0 has zero
    rows and columns.

    Args:
        stack: the canonical factors that M_can was fitted between.
        mixing: M_can (R, R).
    """
    return stack.basis_B @ mixing.to(stack.basis_B) @ stack.basis_A


def _canonical(update: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lora_A (r, in), lora_B (out, r), G_A (r, r), G_B (r, r), present (r,) of one adapter."""
    left, singular, right = thin_svd(update)  # (out, m), (m,), (m, in) with m <= r
    present = singular > _NEGLIGIBLE * singular.max()
    root = torch.where(present, singular, 0.0).sqrt()
    inverse = torch.where(present, singular.rsqrt(), 0.0)
    missing = update.rank - singular.numel()
    scaled_B = update.scaling * update.lora_B.double()
    return (
        _pad(root[:, None] * right, rows=missing),
        _pad(left * root, columns=missing),
        _pad(inverse[:, None] * (left.T @ scaled_B), rows=missing),
        _pad((update.lora_A.double() @ right.T) * inverse, columns=missing),
        torch.nn.functional.pad(present, (0, missing)),
    )


def _pad(matrix: Tensor, *, rows: int = 0, columns: int = 0) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows))


_DEPENDENT = 1e-10  # share of C's largest eigenvalue, updates at norm 1, below which a direction counts as none


def projection(composed: Factors, updates: Sequence[Factors | None]) -> tuple[float | None, ...]:
    """The least-squares weights of an update on N others of the same module.

    Args:
        composed: dW.
        updates: dW_i of each adapter; None for one that does not have the module.
    Returns:
        w_i for each adapter; None where it changes nothing, because it lacks the module or dW_i = 0.
    """
    sizes = [0.0 if update is None else norm(update) for update in updates]
    present = [(update, size) for update, size in zip(updates, sizes, strict=True) if update is not None and size > 0]
    if not present:
        return (None,) * len(updates)
    directions = [Factors(update.lora_A, update.lora_B, update.scaling / size) for update, size in present]
    gram = torch.tensor([[inner_product(a, b) for b in directions] for a in directions], dtype=torch.float64)
    target = torch.tensor([inner_product(direction, composed) for direction in directions], dtype=torch.float64)
    solution = torch.linalg.pinv(gram, rtol=_DEPENDENT, hermitian=True) @ target
    weights = iter((solution / torch.tensor([size for _, size in present], dtype=torch.float64)).tolist())
    return tuple(next(weights) if size > 0 else None for size in sizes)


_ROUNDING = 1e-6  # share of the largest singular value: below, a direction is rounding


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
        _shared_space(first.lora_A.double().T, second.lora_A.double().T),
        _shared_space(first.lora_B.double(), second.lora_B.double()),
    )


def _shared_space(first: Tensor, second: Tensor) -> float:
    """Share of the smaller column space, of (n, r_1) and (n, r_2), that lies in the other; 0 if one is empty."""
    bases = [_basis(first), _basis(second)]
    smaller = min(basis.shape[1] for basis in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _basis(matrix: Tensor) -> Tensor:
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept = singular > _ROUNDING * singular.max() if singular.numel() else singular > 0
    basis: Tensor = left[:, kept & (singular > 0)]
    return basis
