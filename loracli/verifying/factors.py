"""Written factors of one module against computed ones.

A concatenation is unique: lora_A (R, in) are the ingredients' rows and lora_B (out, R) their columns times their
weights, so every entry has to be the float64 value rounded to the file's dtype. Of mixings that are matrices, B M is
summed in another order on another machine, which is allowed for.

A truncation is unique as far as its singular values differ: with S_k the k-th and gap_k its distance to the others,
another machine's SVD turns the k-th direction by about eps S_1 / gap_k (Davis and Kahan). So its entries may
lie that far from the computed one before it is rounded, and the sign of the direction is free. Where singular values
are equal, only the update as a whole is: |dW_written - dW|_F is held against what rounding can do, and so are
A A^T and B^T B, which a change of scale between the two factors would move.

A cut by activations is the projection of dW on the columns of its own lora_B, whatever it was that chose them: where
the second moments that did are not at hand, that is what is checked.

A cut that was refitted is B' M A' with M at hand. Its A' is held against the truncation's as above; where a row has the
other sign there, or is turned a little, so are M's row and what may differ of the entries of B' M.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, concatenate, norm, pad_rank
from loracli.algebra.truncate import project

TURN = 1e-13  # of a direction whose gap is as large as S_1
_ORDER = 2.0**-44  # of the largest entry, for a sum in another order


def stripped(written: Factors, rank: int) -> Factors | None:
    """The factors without the zeros that pad them to a common rank; None if what should be zero is not."""
    if written.lora_A[rank:].any() or written.lora_B[:, rank:].any():
        return None
    return Factors(written.lora_A[:rank], written.lora_B[:, :rank], written.scaling, written.bias)


def compare_bias(expected: Tensor | None, written: Tensor | None) -> str | None:
    """What differs between a float64 bias and that of a file, where None is a bias of zeros."""
    if written is None:
        wrong = 0 if expected is None else int(expected.count_nonzero())
    else:
        wrong = _outside(written.new_zeros(written.shape).double() if expected is None else expected, written, 0.0)
    return f"{wrong} entries of the bias of lora_B are not the recorded composition's" if wrong else None


def compare_concatenation(expected: Factors, written: Factors, *, summed: bool) -> str | None:
    """What differs between a concatenation and the tensors of a file, None if nothing does.

    Args:
        expected: float64, scaling 1.
        written: as stored, without padding.
        summed: whether lora_B comes from a product of matrices.
    """
    if written.rank != expected.rank:
        return f"has rank {written.rank} instead of {expected.rank}"
    for name, right, found in (
        ("lora_A", expected.lora_A, written.lora_A),
        ("lora_B", expected.lora_B, written.lora_B),
    ):
        slack = _ORDER * float(right.abs().max()) if summed and name == "lora_B" else 0.0
        wrong = _outside(right, found, slack)
        if wrong:
            return f"{wrong} of {found.numel()} entries of {name} are not the recorded composition's"
    return None


def compare_truncation(
    expected: Factors, written: Factors, *, others: Tensor, noise: float, turn: float = TURN
) -> str | None:
    """What differs between a truncated update and the tensors of a file, None if nothing does.

    Args:
        expected: float64, scaling 1.
        written: as stored, without padding.
        others: singular values that the truncation left out.
        noise: relative, of a computation that is less exact than an SVD; 0 otherwise.
        turn: how far another machine may turn a direction whose gap is as large as S_1.
    """
    if written.rank != expected.rank:
        return f"has rank {written.rank} instead of {expected.rank}"
    rounded = expected.to(written.lora_A.dtype)
    if torch.equal(rounded.lora_A, written.lora_A) and torch.equal(rounded.lora_B, written.lora_B):
        return None
    info = torch.finfo(written.lora_A.dtype)
    unit, least = info.eps / 2, info.smallest_normal * info.eps / 2
    canonical = _singular_values(expected)
    if canonical is not None and noise == 0.0:
        wrong = _wrong_directions(expected, written, turn * _turned(canonical, others))
        if wrong:
            return f"{wrong} of {expected.rank} directions are not those of the recorded composition"
    exact = Factors(expected.lora_A.double(), expected.lora_B.double())
    noise = max(noise, turn)
    bound = _rounding(exact, unit, least, canonical) + noise * norm(exact)
    return _off(exact, written, bound) or _other_scale(exact, written, 3 * unit + noise)


def compare_projection(exact: Factors, written: Factors) -> str | None:
    """What differs between the tensors of a file and the projection of an update on the columns of their lora_B, with
    sqrt(S) on both sides; None if nothing does.

    Rounding tilts those columns, which are orthogonal before it: by at most u sqrt(k) / s_k, with s_k the smallest
    singular value of the columns at norm 1, and so it moves the projection of dW by that share of |dW|.

    Args:
        exact: dW, float64, scaling 1.
        written: as stored, without padding.
    """
    info = torch.finfo(written.lora_A.dtype)
    unit, least = info.eps / 2, info.smallest_normal * info.eps / 2
    basis, tilt = column_space(written.lora_B)
    tilt *= unit
    if basis.shape[1] == 0:
        return "lora_A is not zero beside a lora_B that is" if written.lora_A.any() else None
    expected = pad_rank(project(exact, basis).factors, written.rank)
    bound = _rounding(expected, unit, least, _singular_values(expected)) + 2 * tilt * norm(exact)
    return _off(expected, written, bound) or _other_scale(expected, written, 3 * unit + 2 * tilt)


def column_space(lora_B: Tensor) -> tuple[Tensor, float]:
    """Orthonormal columns (out, m) with the span of lora_B's, and sqrt(k) / s_k of those at norm 1; zeros left out."""
    columns = lora_B.double()
    sizes = columns.norm(dim=0)
    columns = columns[:, sizes > 0] / sizes[sizes > 0]
    if columns.shape[1] == 0:
        return columns, 0.0
    smallest = float(torch.linalg.svdvals(columns)[-1])
    return torch.linalg.qr(columns).Q, math.sqrt(columns.shape[1]) / max(smallest, torch.finfo(torch.float64).tiny)


def _off(exact: Factors, written: Factors, bound: float) -> str | None:
    found = Factors(written.lora_A.double(), written.lora_B.double())
    distance = norm(concatenate([found, exact], [1.0, -1.0]))
    return f"the update is off by {distance:.2e}; rounding explains {bound:.2e}" if distance > bound else None


def _other_scale(exact: Factors, written: Factors, slack: float) -> str | None:
    for name, own, other in (
        ("lora_A", written.lora_A.double(), exact.lora_A),
        ("lora_B", written.lora_B.double().T, exact.lora_B.T),
    ):
        size = float(torch.linalg.matrix_norm(other)) * float(torch.linalg.matrix_norm(other, 2))
        gram = float(torch.linalg.matrix_norm(_moments(own) - _moments(other)))
        if gram > slack * size:
            return f"{name} has another scale than an export gives it"
    return None


def compare_refit(
    expected: Factors, refit: Tensor, written: Factors, *, others: Tensor, turn: float = TURN
) -> str | None:
    """What differs between a refitted cut and the tensors of a file, None if nothing does.

    Args:
        expected: the cut, lora_A (k, in) and lora_B (out, k), float64, sqrt(S) on both sides.
        refit: M (k, k) between them.
        written: as stored, without padding.
        others: singular values that the cut left out.
        turn: as in `compare_truncation`.
    """
    if written.rank != expected.rank:
        return f"has rank {written.rank} instead of {expected.rank}"
    agree = (expected.lora_A * written.lora_A.double()).sum(dim=1) >= 0
    signs = torch.where(agree, 1.0, -1.0).double()
    slack = turn * _turned(expected.lora_A.square().sum(dim=1), others)  # |row|^2 = S
    lora_A, lora_B = signs[:, None] * expected.lora_A, (expected.lora_B * signs) @ refit
    sums = _ORDER * float(lora_B.abs().max())
    for name, right, found, moved in (
        ("lora_A", lora_A, written.lora_A, slack[:, None]),
        ("lora_B", lora_B, written.lora_B, slack @ refit.abs() + sums),
    ):
        wrong = _outside(right, found, moved)
        if wrong:
            return f"{wrong} of {found.numel()} entries of {name} are not those of the refitted composition"
    return None


def _moments(matrix: Tensor) -> Tensor:
    """The eigenvalues of the rows' Gram matrix, which no turn among equal singular values changes."""
    values: Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
    return values[None]


def _outside(expected: Tensor, written: Tensor, slack: Tensor | float) -> int:
    """How many entries are not `expected`, give or take `slack`, rounded to their dtype."""
    low, high = (expected - slack).to(written.dtype), (expected + slack).to(written.dtype)
    return int(((written < low) | (written > high)).sum())


def _singular_values(factors: Factors) -> Tensor | None:
    """S of factors with sqrt(S) on both sides, None of others."""
    left, right = factors.lora_B.T @ factors.lora_B, factors.lora_A @ factors.lora_A.T
    singular = torch.diagonal(right)
    largest = float(singular.max())
    middle = torch.diag(singular)
    alike = all(float((gram - middle).abs().max()) <= 1e-10 * largest for gram in (left, right))
    return singular if alike and largest > 0 else None


def _wrong_directions(expected: Factors, written: Factors, slack: Tensor) -> int:
    wrong = 0
    for k in range(expected.rank):
        agree = float(expected.lora_B[:, k] @ written.lora_B[:, k].double()) >= 0
        sign = 1.0 if agree else -1.0
        wrong += bool(
            _outside(sign * expected.lora_A[k], written.lora_A[k], float(slack[k]))
            or _outside(sign * expected.lora_B[:, k], written.lora_B[:, k], float(slack[k]))
        )
    return wrong


def _turned(singular: Tensor, others: Tensor) -> Tensor:
    """(k,): how far the entries of each direction move, with sqrt(S) on both sides, if one whose gap is as large as S_1
    turns by 1."""
    every = torch.cat([singular, others.to(singular), singular.new_zeros(1)])
    distances = (singular[:, None] - every[None, :]).abs()
    distances.diagonal().fill_(float("inf"))
    gaps = distances.min(dim=1).values.clamp(min=torch.finfo(torch.float64).tiny)
    return float(singular.max()) / gaps * singular.clamp(min=0).sqrt()


def _rounding(exact: Factors, unit: float, least: float, singular: Tensor | None) -> float:
    """How far rounding both factors can move the update, |.|_F.

    |dB A|_F and |B dA|_F with |dB| <= u |B| + t entry by entry, where t is half the spacing of the smallest numbers:
    with sqrt(S) on both sides the first term is at most u |S| for each.
    """
    sides = [(torch.linalg.matrix_norm(m), torch.linalg.matrix_norm(m, 2)) for m in (exact.lora_A, exact.lora_B)]
    (a, a2), (b, b2) = sides
    relative = 2 * singular.norm() if singular is not None else b * a2 + a * b2
    tiny = least * (exact.lora_B.numel() ** 0.5 * a2 + exact.lora_A.numel() ** 0.5 * b2)
    return float((1 + unit) * (unit * relative + tiny))
