"""How far an update that was cut or rounded is from the exact one, without a dense matrix, and the cheap way to round.

Rounded factors B' = B + E_B, A' = A + E_A:

    B' A' - B A = [E_B, B'] [A; E_A]        |L R|_F^2 = sum((L^T L) * (R R^T))

The differences are taken entry by entry in float64, so nothing cancels in them, and Gram matrices (R, R) are enough:
about a third of the work of the QR of both sides. Where the terms of such a sum cancel to less than _CANCELLED of their
size, as with an adapter and its negative, too few digits would be left and QR takes over.

A concatenation's Gram matrices are taken in float32, of n rows at a time that are added up in float64. Each is off by
at most n 2^-24 of the product of its columns' norms, and by far less where the roundings are not all to one side. An
error that is printed to two digits and compared to three needs no more, while the terms do not cancel to less than
_CANCELLED_32 of their size and no square leaves the range; else float64 decides.

An update against another of any rank, by the Gram matrices that made the cut:

    |dW' - dW|_F^2 = |dW'|_F^2 - 2 <dW', dW> + |dW|_F^2

under the same rule for what cancels: a cut leaves more.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, Grams, concatenate, relative_error

_BLOCK, _BLOCK_ROWS = 1 << 18, 4096  # entries and rows of (rows, R) at most: small enough for the cache
# A sum of Gram products below this share of its terms is computed by QR; above it, a norm has 16 - 7 = 9 digits.
_CANCELLED = 1e-7
_CANCELLED_32 = 1e-2  # of float32: a norm has four digits
_COARSE = 2.0**-13  # eps of a dtype, from which float32 has a thousandth of what rounding takes off
_RANGE_32 = (1e-8, 1e8)  # of the largest entry of a factor: what float32 rounds off it has a square in its range


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
    columns = [update.lora_B for update in updates]
    rank, out = lora_A.shape[0], columns[0].shape[0]
    factors = torch.cat(
        [torch.full((u.rank,), w * u.scaling, dtype=torch.float64) for w, u in zip(weights, updates, strict=True)]
    )
    lora_B = torch.empty(out, rank, dtype=dtype)
    grams = _Grams(lora_A, exact_A, torch.float32)
    for rows in _blocks(out, rank):
        exact = _room("exact", rows.stop - rows.start, rank, torch.float64)
        row = 0
        for part in columns:
            exact[:, row : (row := row + part.shape[1])] = part[rows]
        lora_B[rows] = exact.mul_(factors)
        grams.add(lora_B[rows], exact)
    written, error = Factors(lora_A, lora_B), None
    if all(_RANGE_32[0] < _largest(part) < _RANGE_32[1] for part in (lora_A, lora_B)):
        error = grams.relative_error(_CANCELLED_32)
    return written, rounding_error(written, concatenate(updates, weights)) if error is None else error


def rounding_error(written: Factors, exact: Factors) -> float:
    """`relative_error` of factors that were rounded entry by entry from the exact ones; both with scaling 1."""
    grams = _Grams(written.lora_A, exact.lora_A, torch.float64)
    for rows in _blocks(exact.out_features, exact.rank):
        grams.add(written.lora_B[rows], exact.lora_B[rows].double())
    error = grams.relative_error(_CANCELLED)
    return relative_error(written, exact) if error is None else error


def _largest(matrix: Tensor) -> float:
    return max(abs(float(bound)) for bound in matrix.aminmax())  # NaN comes through


def error_by_grams(written: Factors, exact: Factors, grams: Grams) -> float:
    """`relative_error` of an update (scaling 1) of any rank against another without a bias, whose Gram matrices these
    are."""
    lora_B, lora_A = written.lora_B.double(), written.lora_A.double()
    reference = _total(grams.columns, grams.rows, _CANCELLED)
    mixed = exact.scaling * (exact.lora_B.double().T @ lora_B), exact.lora_A.double() @ lora_A.T  # (R, k)
    terms = grams.columns * grams.rows, -2.0 * mixed[0] * mixed[1], (lora_B.T @ lora_B) * (lora_A @ lora_A.T)
    difference = _sum_of(torch.cat([part.flatten() for part in terms]), _CANCELLED)
    if difference is None or reference is None:
        return relative_error(written, exact)
    return _ratio(difference, reference)


class _Grams:
    """Sums of Gram matrices over blocks, float64.

    Args:
        written: A' (R, in) as it is written.
        exact: A (R, in); the same object where nothing is rounded.
        precision: of the products in a block.
    """

    def __init__(self, written: Tensor, exact: Tensor, precision: torch.dtype) -> None:
        rank, inner = exact.shape
        self._rounded_A, self._precision = written is not exact, precision
        # What rounding to 16 bits takes off is told by float32, what rounding to float32 takes off is not.
        self._apart = torch.float64 if torch.finfo(written.dtype).eps < _COARSE else precision
        size = 2 * rank if self._rounded_A else rank
        self._right = torch.zeros(size, size, dtype=torch.float64)  # of [A; E_A]
        self._left = torch.zeros(size, size, dtype=torch.float64)  # of [E_B, B']
        self._exact = torch.zeros(rank, rank, dtype=torch.float64)  # of B
        for columns in _blocks(inner, rank):
            part = _room("part", size, columns.stop - columns.start, precision)
            part[:rank] = exact[:, columns]
            if self._rounded_A:
                part[rank:] = written[:, columns].to(self._apart) - exact[:, columns].to(self._apart)
            self._right += part @ part.T

    def add(self, written: Tensor, exact: Tensor) -> None:
        """A block of rows of B', and of B in float64, (rows, R)."""
        rows, rank = exact.shape
        precise = _room("precise", rows, rank, self._precision).copy_(exact)
        part = _room("part", rows, self._left.shape[0], self._precision)
        if self._apart == self._precision:
            torch.sub(part[:, -rank:].copy_(written), precise, out=part[:, :rank])
        else:
            part[:, -rank:] = written
            part[:, :rank] = written.to(self._apart) - exact
        self._left += part.T @ part
        self._exact += precise.T @ precise

    def relative_error(self, cancelled: float) -> float | None:
        """None where less than this share of the terms is left."""
        rank = self._exact.shape[0]
        difference = _total(self._left, self._right, cancelled)
        reference = _total(self._exact, self._right[:rank, :rank], cancelled)
        if difference is None or reference is None:
            return None
        return _ratio(difference, reference)


def _total(left: Tensor, right: Tensor, cancelled: float) -> float | None:
    return _sum_of(left * right, cancelled)


def _sum_of(terms: Tensor, cancelled: float) -> float | None:
    total, size = float(terms.sum()), float(terms.abs().sum())
    if not math.isfinite(size):  # overflow in the output's dtype, which the caller refuses
        return math.inf
    return total if size == 0.0 or total > cancelled * size else None


def _ratio(difference: float, reference: float) -> float:
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return math.sqrt(max(difference, 0.0) / reference)


def _blocks(length: int, rank: int) -> list[slice]:
    rows = min(max(_BLOCK // rank, 1), _BLOCK_ROWS)
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


_kept = threading.local()


def _room(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory (rows, columns) for what goes by this name in a thread's next step: the same each time, for the system is
    slow to give new memory."""
    room: Tensor | None = getattr(_kept, name, None)
    if room is None or room.dtype != dtype or room.numel() < rows * columns:
        room = torch.empty(rows * columns, dtype=dtype)
        setattr(_kept, name, room)
    return room[: rows * columns].view(rows, columns)
