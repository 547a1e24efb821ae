"""The canonical gauge of updates, and the way of a mixing from there to the gauge of the files.

B -> B G, A -> G^-1 A leaves an update as it is, but changes what a weight of one row of A means and how a penalty on M
measures. So a mixing finer than a weight per adapter is fitted between canonical factors, the thin SVD of each
adapter's update with sqrt(S) on both sides:

    s B A = U S V^T        lora_A = sqrt(S) V^T = G_A A         G_A = S^-1/2 U^T (s B)      (r, r)
                           lora_B = U sqrt(S)   = (s B) G_B     G_B = A V S^-1/2            (r, r)

With equal singular values that basis is not unique, so it is no basis to keep: a recipe holds M in the files' gauge.
For N adapters in one module, stacked, with block-diagonal G_A and G_B (R, R):

    lora_B M_can lora_A = B M A        M = G_B M_can G_A        A = [A_1; ...; A_N], B = [s_1 B_1, ..., s_N B_N]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, thin_svd

# A direction below this share of its adapter's largest singular value carries nothing: rounding puts it there when an
# update has a lower rank than its factors.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class CanonicalStack:
    """N updates of one module in their canonical gauges, stacked; all float64.

    Args:
        lora_A: (R, in), sqrt(S) V^T of each adapter, R = sum of the files' ranks r_i.
        lora_B: (out, R), U sqrt(S) of each; the scaling is in it.
        gauge_A: G_A (R, R), block-diagonal; lora_A = G_A A.
        gauge_B: G_B (R, R), block-diagonal; lora_B = B G_B.
        ranks: r_i of each adapter, the sizes of the blocks.
        present: (R,) which directions carry something. The others are zero in all four tensors, so that rows and
            columns of M_can there have no effect and no gradient.
    """

    lora_A: Tensor
    lora_B: Tensor
    gauge_A: Tensor
    gauge_B: Tensor
    ranks: tuple[int, ...]
    present: Tensor


def canonical_stack(updates: Sequence[Factors]) -> CanonicalStack:
    """The canonical factors of N >= 1 updates of one module, and their gauges.

    Args:
        updates: A_i (r_i, in), B_i (out, r_i) and the scaling s_i, in any dtype; r_i may exceed in or out.
    """
    parts = [_canonical(update) for update in updates]
    lora_A, lora_B, gauge_A, gauge_B, present = zip(*parts, strict=True)
    return CanonicalStack(
        lora_A=torch.cat(lora_A),
        lora_B=torch.cat(lora_B, dim=1),
        gauge_A=torch.block_diag(*gauge_A),  # type: ignore[no-untyped-call]
        gauge_B=torch.block_diag(*gauge_B),  # type: ignore[no-untyped-call]
        ranks=tuple(update.rank for update in updates),
        present=torch.cat(present),
    )


def mixing_in_file_gauge(stack: CanonicalStack, mixing: Tensor) -> Tensor:
    """M = G_B M_can G_A (R, R) in float64, for which B M A is the update lora_B M_can lora_A.

    M_can = w I gives w I again wherever the update has the rank of its factors; an adapter with s = 0 or B = 0 has zero
    rows and columns.

    Args:
        stack: the canonical factors that M_can was fitted between.
        mixing: M_can (R, R).
    """
    return stack.gauge_B @ mixing.to(stack.gauge_B) @ stack.gauge_A


def _canonical(update: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lora_A (r, in), lora_B (out, r), G_A (r, r), G_B (r, r), present (r,) of one adapter."""
    left, singular, right = thin_svd(update)  # (out, m), (m,), (m, in) with m <= r
    present = singular > NEGLIGIBLE * singular.max()
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
