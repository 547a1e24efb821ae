"""Cutting an update to a lower rank, choosing the rank by singular values, and cutting dense matrices.

The best approximation of an update at a lower rank, from its factors.

    B = Q_B R_B,  A^T = Q_A R_A,  s R_B R_A^T = U S V^T  (R x R),  A' = sqrt(S_k) (Q_A V_k)^T,  B' = Q_B U_k sqrt(S_k)

By Eckart and Young, B' A' is the closest matrix of rank k to dW in the Frobenius norm, the same as from the SVD of the
dense (out, in) matrix, which is never formed. A bias is not cut.

Without a QR of all R columns, where what is cut off is not next to nothing:

    A A^T = L L^T,  L^T (s^2 B^T B) L = Y S^2 Y^T  (R x R),  Q = orth(s B L Y_k),  B' A' = Q (Q^T dW)

Squaring loses half of the digits of Y, but a subspace that is off by an angle of t keeps only t^2 less of the energy,
and what Q keeps is computed from dW itself. The squares S^2, off by about R eps |A A^T|_F |s^2 B^T B|_F at most, tell
how much the best Q would keep: where the two differ, or too much is cancelled to tell, the QR decides.

By what it does to the activations x that occur, E|(dW - B' A') x|^2, the best rank k needs of them only G = E[z z^T]
(R, R), z = A x:

    B G^1/2 = U S V^T        B' = U_k sqrt(S_k), A' = sqrt(S_k) V_k^T G^-1/2 A,  so that  B' A' = U_k U_k^T dW

(the d x d form is that of SVD-LLM, arXiv 2403.07378; the row space of dW stays that of A, so G is enough.) It projects
dW on U_k, which needs no inverse of G.

Ranks from singular values: how many directions each module keeps, for an error, a share of the energy, or a size.

The squares s_li^2 of a module's singular values are what each rank keeps of |dW_l|_F^2 (Eckart and Young). Under one
limit for all modules the best ranks come from one sorted list: a direction counts s_li^2 for each byte it costs, and
directions of a module stand in their own order there anyway. (As a knapsack that is the greedy solution: exact for
modules of one shape, and at most one direction short of the optimum otherwise.)

The best approximation of a rank to a dense matrix, for methods whose result has full rank.

A block Krylov space from a seeded block (Musco and Musco, arXiv 1504.05477, algorithm 2), with a stopping test in place
of a fixed number of blocks:

    Q = orth [M X, (M M^T) M X, (M M^T)^2 M X, ...]    until the k largest |Q^T M|^2 gain less than a share of 1e-6
    Q^T M = U S V^T                                    M_k = Q U_k S_k V_k^T

Few blocks do where the spectrum is flat, as that of a trimmed update is, and subspace iteration would need dozens. The
space is found in float32; a last iteration and the projection are in float64, so that a matrix which has the rank
comes back to float64's rounding.

The leading left singular vectors of a dense matrix to float64's accuracy, where the best energy is not enough: the
space itself is wanted.

Block Lanczos on W W^T with full reorthogonalisation (Golub and Van Loan, Matrix Computations, 4th ed., section 10.3.6;
why a Krylov space of so few products is enough: Musco and Musco, arXiv 1504.05477), from a seeded block:

    Q_1 = orth(W G),   Q_{j+1} = orth(W W^T Q_j - Q Q^T W W^T Q_j),   Q = [Q_1, ..., Q_j]
    Q^T W W^T Q = Y L Y^T,   X = Q Y_k       until |W W^T X - X L_k| <= 1e-10 L_1 in every column

In place of all n eigenvectors, which cost as much for one as for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, Grams, core, norm, svd_of_core

_DAMPING = 1e-4


@dataclass(frozen=True)
class Truncation:
    """An update cut to a rank.

    Args:
        factors: lora_A (k, in), lora_B (out, k), float64, scaling 1, with sqrt(S) on both sides.
        kept_energy: sum of the kept squared singular values over the sum of all; 1 for dW = 0.
    """

    factors: Factors
    kept_energy: float


def truncate(factors: Factors, rank: int, grams: Grams | None = None) -> Truncation:
    """The closest update of rank at most `rank`; the result has rank min(rank, r, in, out).

    Args:
        factors: dW.
        rank: k.
        grams: of `factors`, None to compute them.
    """
    found = None
    if rank < min(factors.rank, factors.in_features, factors.out_features):
        found = _truncated_by_grams(factors, rank, grams or Grams.of(factors))
    return found or _truncated(core(factors), rank, factors.delta_bias())


def _truncated(parts: tuple[Tensor, Tensor, Tensor], rank: int, bias: Tensor | None) -> Truncation:
    """`truncate` of dW = Q_B K Q_A^T as `core` gives it."""
    left, singular, right = svd_of_core(*parts)
    k = min(rank, singular.numel())
    root = singular[:k].sqrt()
    lora_A = root[:, None] * right[:k]  # (k, in)
    lora_B = left[:, :k] * root  # (out, k)
    total = float(singular.square().sum())
    # Sums of as many squares may differ in their last digit.
    kept = min(float(singular[:k].square().sum()) / total, 1.0) if total > 0 else 1.0
    return Truncation(Factors(lora_A, lora_B, bias=bias), kept)


_DIGITS = 1e-6  # relative, of the squared error of a cut that was found by squares


def _truncated_by_grams(factors: Factors, rank: int, grams: Grams) -> Truncation | None:
    """`truncate`, None where Gram matrices do not tell that it is the best to _DIGITS of its squared error."""
    eps = torch.finfo(torch.float64).eps
    noise = factors.rank * eps * float(grams.rows.norm() * grams.columns.norm())
    if not math.isfinite(noise):
        return None
    root = _symmetric_root(grams.rows)
    squares, inner = torch.linalg.eigh(root @ grams.columns @ root)  # ascending
    best, lost = float(squares[-rank:].sum()), float(squares[:-rank].sum())
    if not lost * _DIGITS > noise:
        return None
    lora_B = factors.lora_B.double()
    basis = torch.linalg.qr(lora_B @ (root @ inner[:, -rank:])).Q
    projected = factors.scaling * (basis.T @ lora_B) @ factors.lora_A.double()  # (k, in): Q^T dW
    q_a, r_a = torch.linalg.qr(projected.T)
    kept = float(r_a.square().sum())
    if best - kept > lost * _DIGITS:
        return None
    cut = _truncated((basis, r_a.T, q_a), rank, factors.delta_bias())
    return Truncation(cut.factors, min(kept / (best + lost), 1.0))


def _symmetric_root(matrix: Tensor, shift: float = 0.0) -> Tensor:
    """(G + d I)^1/2 of a matrix that is positive semidefinite to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * (values.clamp(min=0.0) + shift).sqrt()) @ vectors.T
    return root


def truncate_for(factors: Factors, rank: int, moment: Tensor) -> Truncation:
    """The update of rank at most `rank` that changes the outputs least in the mean square, sqrt(S) on both sides.

    Args:
        factors: with scaling 1.
        rank: k.
        moment: G (R, R) = E[z z^T]. _DAMPING of its mean diagonal is added to the diagonal, so that directions which
            the records do not show are not cut at will. Where G = 0 the cut is that of `truncate`.
    """
    root = _root(moment)
    if root is None:
        return truncate(factors, rank)
    q_b, r_b = torch.linalg.qr(factors.lora_B.double())
    left = torch.linalg.svd(r_b @ root, full_matrices=False).U[:, :rank]
    return project(factors, q_b @ left)


def project(factors: Factors, basis: Tensor) -> Truncation:
    """Q Q^T dW with sqrt(S) on both sides.

    Args:
        factors: with scaling 1.
        basis: Q (out, k), orthonormal columns.
    """
    projected = Factors((basis.T @ factors.lora_B.double()) @ factors.lora_A.double(), basis, bias=factors.delta_bias())
    whole = norm(factors) ** 2
    kept = norm(projected) ** 2 / whole if whole > 0 else 1.0
    return Truncation(truncate(projected, basis.shape[1]).factors, min(kept, 1.0))


def relative_gap(factors: Factors, rank: int, moment: Tensor) -> float:
    """(s_k - s_k+1) / s_1 of B (G + d I)^1/2: how firmly `truncate_for` is told which subspace to keep; 0 where nothing
    tells."""
    root = _root(moment)
    if root is None:
        return 0.0
    singular = torch.linalg.svdvals(torch.linalg.qr(factors.lora_B.double(), mode="r").R @ root)
    following = float(singular[rank]) if rank < len(singular) else 0.0
    return (float(singular[rank - 1]) - following) / float(singular[0]) if float(singular[0]) > 0 else 0.0


def _root(moment: Tensor) -> Tensor | None:
    """(G + d I)^1/2 (R, R), None where G = 0."""
    damping = _DAMPING * float(moment.diagonal().mean())
    if damping == 0.0:
        return None
    return _symmetric_root(moment, damping)


_NEGLIGIBLE = 1e-12  # share of the largest singular value: below, a direction is rounding


def spectrum(factors: Factors) -> Tensor:
    """The squared singular values of dW, (min(r, in, out),) descending, float64; what is rounding is 0."""
    r_b = torch.linalg.qr(factors.lora_B.double(), mode="r").R
    r_a = torch.linalg.qr(factors.lora_A.double().T, mode="r").R
    singular = torch.linalg.svdvals(factors.scaling * (r_b @ r_a.T))
    return torch.where(singular > _NEGLIGIBLE * singular.max(), singular, 0.0).square()


def rank_within(squares: Tensor, tolerance: float) -> int:
    """The smallest rank, at least 1, at which |dW - dW'|_F <= tolerance |dW|_F."""
    left_out = squares.flip(0).cumsum(0).flip(0)  # (m,) what is lost by keeping i directions, i = 0 ... m - 1
    return max(1, int((left_out > tolerance**2 * left_out[0]).sum()))


def rank_for_energy(spectra: Sequence[Tensor], share: float) -> int:
    """The smallest rank that keeps a share of sum_l |dW_l|_F^2 where every module has the same."""
    whole = torch.stack([torch.nn.functional.pad(s, (0, max(map(len, spectra)) - len(s))) for s in spectra]).sum(0)
    return rank_within(whole, max(1 - share, 0.0) ** 0.5)


def ranks_for_energy(spectra: Mapping[str, Tensor], costs: Mapping[str, int], share: float) -> dict[str, int]:
    """Ranks, at least 1 each, that keep a share of sum_l |dW_l|_F^2 in about the fewest bytes.

    Args:
        spectra: squared singular values of each module.
        costs: bytes of one rank of each module.
        share: between 0 and 1.
    """
    ranks = dict.fromkeys(spectra, 1)
    total = sum(float(s.sum()) for s in spectra.values())
    lost = sum(float(s[1:].sum()) for s in spectra.values())
    for name, square in _by_worth(spectra, costs):
        if lost <= (1 - share) * total:
            break
        ranks[name] += 1
        lost -= square
    return ranks


def ranks_for_bytes(spectra: Mapping[str, Tensor], costs: Mapping[str, int], room: int) -> dict[str, int]:
    """Ranks, at least 1 each, that keep about the most energy in `room` bytes.

    Raises:
        ValueError: if rank 1 everywhere takes more, with the bytes it takes.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = room - sum(costs[name] for name in spectra)
    if left < 0:
        raise ValueError(room - left)
    full: set[str] = set()
    for name, _ in _by_worth(spectra, costs):
        if name in full or costs[name] > left:
            full.add(name)  # its later directions would come before this one
            continue
        ranks[name] += 1
        left -= costs[name]
    return ranks


def _by_worth(spectra: Mapping[str, Tensor], costs: Mapping[str, int]) -> list[tuple[str, float]]:
    """Every direction but the first of each module that carries something, most energy for a byte first."""
    found = [(name, float(square)) for name, squares in spectra.items() for square in squares[1:] if square > 0]
    return sorted(found, key=lambda item: -item[1] / costs[item[0]])


_OVERSAMPLED = 10  # columns more than the rank
_GAIN = 1e-6  # of the captured energy, below which the space is large enough
_MOST_BLOCKS = 12
_SMALL = 4  # blocks to the shorter side of a matrix, below which its own SVD is as cheap


def best_approximation(matrix: Tensor, rank: int) -> Truncation:
    """M_k of a matrix M (out, in) in float64; sqrt(S) on both sides, as `truncate`."""
    total = float(matrix.square().sum())
    k = min(rank, *matrix.shape)
    if total == 0.0:
        return Truncation(Factors(matrix.new_zeros(k, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], k)), 1.0)
    if min(matrix.shape) <= _SMALL * (k + _OVERSAMPLED):
        u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        q = _leading_space(matrix, k, k + _OVERSAMPLED)  # (out, p)
        u, singular, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    root = singular[:k].sqrt()
    factors = Factors(root[:, None] * vh[:k], u[:, :k] * root)
    return Truncation(factors, min(float(singular[:k].square().sum()) / total, 1.0))


def _leading_space(matrix: Tensor, k: int, columns: int) -> Tensor:
    """(out, columns): an orthonormal basis of a space that has the k leading left singular vectors, float64."""
    generator = torch.Generator().manual_seed(0)
    half = (matrix / matrix.abs().max()).float()  # whose squares stay within float32's range
    drawn = torch.randn(matrix.shape[1], columns, generator=generator)  # the same whatever the device
    basis = torch.linalg.qr(half @ drawn.to(half.device)).Q  # (out, c)
    images = half.T @ basis  # (in, c): M^T Q
    captured = 0.0
    for _ in range(_MOST_BLOCKS):
        energies, rotation = torch.linalg.eigh(images.T @ images)  # ascending
        found = float(energies[-k:].double().sum())
        if found - captured <= _GAIN * found or basis.shape[1] + columns > min(matrix.shape):
            break
        captured = found
        block = _orthogonal_to([basis], half @ images[:, -columns:])
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, half.T @ block], dim=1)
    leading = basis @ rotation[:, -columns:]
    polished: Tensor = torch.linalg.qr(matrix @ (matrix.T @ leading.double())).Q
    return polished


def _orthogonal_to(bases: Sequence[Tensor], block: Tensor) -> Tensor:
    """An orthonormal basis of what a block of a Krylov space adds to the bases before it, each orthonormal."""
    for _ in range(2):  # at length 1 again: of what is almost in the space already, once leaves mostly that
        for basis in bases:
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
    return block


_BLOCK_MARGIN = 16  # columns of a block beyond those that are wanted
_RESIDUAL = 1e-10  # of the largest eigenvalue of W W^T; float32 would leave 1e-7
_CHECK_EVERY = 3  # blocks
_DENSE_SHARE = 0.5  # of n, beyond which all eigenvectors cost no more


def leading_left(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest singular values (count,) of W (n, m), descending, and their left vectors (n, count).

    Args:
        matrix: W, float64, n <= m or not.
        count: at most min(n, m).
    """
    n = matrix.shape[0]
    block = min(count + _BLOCK_MARGIN, n)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float64)
    bases = [torch.linalg.qr(matrix @ start).Q]  # each (n, block)
    images = [matrix.T @ bases[0]]  # W^T Q_j, each (m, block)
    while len(bases) * block <= _DENSE_SHARE * n:
        if len(bases) % _CHECK_EVERY == 0:
            found = _converged(matrix, torch.cat(bases, dim=1), torch.cat(images, dim=1), count)
            if found is not None:
                return found
        bases.append(_orthogonal_to(bases, matrix @ images[-1]))
        images.append(matrix.T @ bases[-1])
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return values[-count:].flip(0).clamp(min=0.0).sqrt(), vectors[:, -count:].flip(1)


def _converged(matrix: Tensor, basis: Tensor, image: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The values and vectors of the projection on the basis, None if they are not yet those of the matrix."""
    values, inner = torch.linalg.eigh(image.T @ image)
    values, inner = values[-count:].flip(0), inner[:, -count:].flip(1)
    vectors = basis @ inner
    residual = matrix @ (image @ inner) - vectors * values
    if float(torch.linalg.vector_norm(residual, dim=0).max()) > _RESIDUAL * float(values[0]):
        return None
    return values.clamp(min=0.0).sqrt(), vectors
