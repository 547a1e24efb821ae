"""How far an update that was cut or rounded is from the exact one, without a dense matrix, and the cheap way to round.

Rounded factors B' = B + E_B, A' = A + E_A:

    B' A' - B A = [E_B, B'] [A; E_A]        |L R|_F^2 = sum((L^T L) * (R R^T))

The differences are taken entry by entry in float64, so nothing cancels in them, and Gram matrices (R, R) are enough:
about a third of the work of the QR of both sides. Where the terms of such a sum cancel to less than _CANCELLED of their
size, as with an adapter and its negative, too few digits would be left and QR takes over.

A cut update stands in the exact one's own coordinates, dW = Q_B K Q_A^T from one QR of both sides:

    P = Q_B^T B', B_o = B' - Q_B P,  S = A' Q_A, A_o = A' - S Q_A^T
    |dW - B' A'|_F^2 = |K - P S|_F^2 + |P A_o|_F^2 + |B_o S|_F^2 + |B_o A_o|_F^2

whose four parts are at right angles to each other. It does not lean on the SVD that made the cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, concatenate, relative_error

_BLOCK_ROWS = 1024  # of (rows, R) in float64: small enough for the cache
# A sum of Gram products below this share of its terms is computed by QR; above it, a norm has 16 - 7 = 9 digits.
_CANCELLED = 1e-7


def rounded_concatenation(
    updates: Sequence[Factors], weights: Sequence[float], dtype: torch.dtype
) -> tuple[Factors, float]:
    """`concatenate(updates, weights).to(dtype)` with the same bits, block by block, and its relative error.

    Args:
        updates: N updates of one module; A_i (r_i, in), B_i (out, r_i), ranks may differ.
        weights: N numbers.
        dtype: of the result.
    Returns:
        lora_A (R, in) and lora_B (out, R) with scaling 1, and |dW' - dW|_F / |dW|_F as `relative_error`.
    """
    parts = [update.lora_A for update in updates]
    lora_A = torch.cat([part.to(dtype) for part in parts])
    exact_A = lora_A if all(torch.promote_types(part.dtype, dtype) == dtype for part in parts) else torch.cat(parts)
    del parts
    scaled = [(w * update.scaling, update.lora_B) for w, update in zip(weights, updates, strict=True)]
    out = scaled[0][1].shape[0]
    lora_B = torch.empty(out, lora_A.shape[0], dtype=dtype)
    grams = _Grams(lora_A, exact_A)
    for rows in _blocks(out):
        exact = torch.cat([factor * part[rows].double() for factor, part in scaled], dim=1)
        lora_B[rows] = exact
        grams.add(lora_B[rows].double(), exact)
    error = grams.relative_error()
    if error is None:
        error = relative_error(Factors(lora_A, lora_B), concatenate(updates, weights))
    return Factors(lora_A, lora_B), error


def rounding_error(written: Factors, exact: Factors) -> float:
    """`relative_error` of factors that were rounded entry by entry from the exact ones; both with scaling 1."""
    grams = _Grams(written.lora_A, exact.lora_A)
    for rows in _blocks(exact.out_features):
        grams.add(written.lora_B[rows].double(), exact.lora_B[rows].double())
    error = grams.relative_error()
    return relative_error(written, exact) if error is None else error


def error_in_core(written: Factors, parts: tuple[Tensor, Tensor, Tensor]) -> float:
    """`relative_error` of an update (scaling 1) of any rank against dW = Q_B K Q_A^T as `core` gives it."""
    q_b, middle, q_a = parts
    lora_B, lora_A = written.lora_B.double(), written.lora_A.double()
    left, right = q_b.T @ lora_B, lora_A @ q_a  # P, S
    outside_B, outside_A = torch.addmm(lora_B, q_b, left, alpha=-1), torch.addmm(lora_A, right, q_a.T, alpha=-1)
    gram_B, gram_A = outside_B.T @ outside_B, outside_A @ outside_A.T
    total = (
        (middle - left @ right).square().sum()
        + ((left.T @ left) * gram_A).sum()
        + (gram_B * (right @ right.T)).sum()
        + (gram_B * gram_A).sum()
    )
    return _ratio(float(total), float(middle.square().sum()))


class _Grams:
    """Sums of Gram matrices over blocks, float64.

    Args:
        written: A' (R, in) as it is written.
        exact: A (R, in); the same object where nothing is rounded.
    """

    def __init__(self, written: Tensor, exact: Tensor) -> None:
        rank, inner = exact.shape
        self._rounded_A = written is not exact
        size = 2 * rank if self._rounded_A else rank
        self._right = torch.zeros(size, size, dtype=torch.float64)  # of [A; E_A]
        self._left = torch.zeros(size, size, dtype=torch.float64)  # of [E_B, B']
        self._exact = torch.zeros(rank, rank, dtype=torch.float64)  # of B
        for columns in _blocks(inner):
            part = exact[:, columns].double()
            if self._rounded_A:
                part = torch.cat([part, written[:, columns].double() - part])
            self._right.addmm_(part, part.T)

    def add(self, written: Tensor, exact: Tensor) -> None:
        """A block of rows of B' and B, (rows, R) in float64."""
        part = written - exact
        if self._rounded_A:
            part = torch.cat([part, written], dim=1)
        self._left.addmm_(part.T, part)
        self._exact.addmm_(exact.T, exact)

    def relative_error(self) -> float | None:
        """None where too much cancels."""
        rank = self._exact.shape[0]
        difference = _total(self._left, self._right)
        reference = _total(self._exact, self._right[:rank, :rank])
        if difference is None or reference is None:
            return None
        return _ratio(difference, reference)


def _total(left: Tensor, right: Tensor) -> float | None:
    terms = left * right
    total, size = float(terms.sum()), float(terms.abs().sum())
    if not math.isfinite(size):  # overflow in the output's dtype, which the caller refuses
        return math.inf
    return total if size == 0.0 or total > _CANCELLED * size else None


def _ratio(difference: float, reference: float) -> float:
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return math.sqrt(max(difference, 0.0) / reference)


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK_ROWS, length)) for start in range(0, length, _BLOCK_ROWS)]
