"""One low-rank update, and what its factors tell without ever forming the dense matrix.

    dW = s B A          A (r, in), B (out, r), s = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA

With a bias on B (PEFT's lora_bias) the module's output changes by s (B A x + b), so its own bias by s b. Norms, inner
products and singular values are those of dW alone.

LoRA: arXiv 2106.09685, section 4.1; rsLoRA: arXiv 2312.03732, equation 4; lora_bias: peft 0.21, tuners/lora/layer.py.

Concatenation along the rank: updates of one module composed to one update, exactly.

    B M A                    A = [A_1; ...; A_N] (R, in), B = [s_1 B_1, ..., s_N B_N] (out, R), R = sum r_i
    sum_i w_i s_i B_i A_i    the same with M = blockdiag(w_i I); biases of B beside it, sum_i w_i s_i b_i

The second is CAT, LoRA Soups (arXiv 2410.13025), section 3; it has none of the cross terms B_i A_j that PEFT's
`linear` combination brings in by adding A and B apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def lora_scaling(lora_alpha: float, rank: int, *, use_rslora: bool) -> float:
    """s: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` for rsLoRA."""
    return lora_alpha / math.sqrt(rank) if use_rslora else lora_alpha / rank


@dataclass(frozen=True)
class Factors:
    """The update dW = scaling * lora_B @ lora_A of one module.

    Args:
        lora_A: (r, in).
        lora_B: (out, r), same dtype as `lora_A`.
        scaling: s.
        bias: b (out,) of lora_B, None without one.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.lora_A.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are; what stays in a file until it is wanted comes into the machine's own memory."""
        lora_A = vars(self).get("lora_A")
        return torch.device("cpu") if lora_A is None else lora_A.device

    def loaded(self) -> Factors:
        """The same factors in memory, which these are in."""
        return self

    def on(self, device: torch.device | str) -> Factors:
        """The same factors on a device; themselves where they are there."""
        if self.device == torch.device(device):
            return self.loaded()
        bias = None if self.bias is None else self.bias.to(device)
        return Factors(self.lora_A.to(device), self.lora_B.to(device), self.scaling, bias)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype; each entry is rounded once."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Factors(self.lora_A.to(dtype), self.lora_B.to(dtype), self.scaling, bias)

    def is_finite(self) -> bool:
        """Whether no entry is infinite or NaN."""
        parts = [part for part in (self.lora_A, self.lora_B, self.bias) if part is not None]
        return all(math.isfinite(bound) for part in parts for bound in part.aminmax())

    def delta_weight(self) -> Tensor:
        """dW (out, in) in float64. Dense: for tests and small modules."""
        return self.scaling * (self.lora_B.double() @ self.lora_A.double())

    def delta_bias(self) -> Tensor | None:
        """s b (out,) in float64, None without a bias."""
        return None if self.bias is None else self.scaling * self.bias.double()


def inner_product(left: Factors, right: Factors) -> float:
    """<dW_1, dW_2> = s_1 s_2 sum((B_1^T B_2) * (A_1 A_2^T)), in float64, in O((in + out) r_1 r_2)."""
    outer = left.lora_B.double().T @ right.lora_B.double()  # (r_1, r_2)
    inner = left.lora_A.double() @ right.lora_A.double().T  # (r_1, r_2)
    return left.scaling * right.scaling * float((outer * inner).sum())


@dataclass(frozen=True)
class Grams:
    """The inner products of one update's factors, of which a cut and its error are made without a QR.

    Args:
        rows: A A^T (r, r), float64.
        columns: s^2 B^T B (r, r), float64; <rows, columns> = |dW|_F^2.
    """

    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(factors: Factors) -> Grams:
        """In O((in + out) r^2), a quarter of what the QR of both sides takes."""
        lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
        return Grams(lora_A @ lora_A.T, factors.scaling**2 * (lora_B.T @ lora_B))


def norm(factors: Factors) -> float:
    """|dW|_F through the QR factors of both sides, which keeps its accuracy where terms cancel; float64."""
    return float(torch.linalg.matrix_norm(core(factors)[1]))


def core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """dW = Q_B K Q_A^T with orthonormal Q_B (out, p), Q_A (in, q) and the small core K (p, q); all float64.

    K = s R_B R_A^T from the QR of B and of A^T, so p = min(out, r) and q = min(in, r): the singular values of dW are
    those of K.
    """
    q_b, r_b = torch.linalg.qr(factors.lora_B.double())
    q_a, r_a = torch.linalg.qr(factors.lora_A.double().T)
    return q_b, factors.scaling * (r_b @ r_a.T), q_a


def thin_svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """dW = U diag(S) V^T from the factors: U (out, m), S (m,) descending, V^T (m, in), with m = min(r, in, out).

    QR of both sides, then the SVD of the small core; float64. A singular pair is defined up to a common sign: the
    largest entry of each left vector is positive.
    """
    return svd_of_core(*core(factors))


def svd_of_core(q_b: Tensor, middle: Tensor, q_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`thin_svd` of dW = Q_B K Q_A^T as `core` gives it."""
    u, singular, vh = torch.linalg.svd(middle, full_matrices=False)
    left, right = q_b @ u, vh @ q_a.T
    largest = left.abs().argmax(dim=0)
    signs = torch.where(left[largest, torch.arange(left.shape[1], device=left.device)] < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, singular, right * signs[:, None]


def concatenate(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The update sum_i w_i s_i B_i A_i with scaling 1, in float64, and the bias sum_i w_i s_i b_i where there is any.

    A keeps the values of the ingredients; w_i s_i goes into B and the bias alone.

    Args:
        updates: N updates of one module; A_i (r_i, in), B_i (out, r_i), ranks may differ.
        weights: N numbers of any sign.
    Returns:
        lora_A (R, in) and lora_B (out, R) with R = sum r_i.
    Raises:
        ValueError: if there is not one weight for each update.
    """
    first, rank = updates[0], sum(update.rank for update in updates)
    lora_A = torch.empty(rank, first.in_features, dtype=torch.float64, device=first.device)
    lora_B = torch.empty(first.out_features, rank, dtype=torch.float64, device=first.device)
    row = 0
    for w, update in zip(weights, updates, strict=True):
        rows = slice(row, row := row + update.rank)
        lora_A[rows] = update.lora_A
        torch.mul(update.lora_B.double(), w * update.scaling, out=lora_B[:, rows])
    biases = [w * bias for w, update in zip(weights, updates, strict=True) if (bias := update.delta_bias()) is not None]
    return Factors(lora_A, lora_B, bias=torch.stack(biases).sum(dim=0) if biases else None)


def without_zeros(updates: Sequence[Factors], weights: Sequence[float]) -> tuple[list[Factors], list[float]]:
    """The same sum without the updates of weight 0; if all are, one update of rank 1 that is 0."""
    kept = [(update, w) for update, w in zip(updates, weights, strict=True) if w != 0]
    if kept:
        return [update for update, _ in kept], [w for _, w in kept]
    return [no_update(updates[0]).to(torch.bfloat16)], [1.0]  # the narrowest: exact in every dtype


def no_update(like: Factors) -> Factors:
    """The update 0 of the same module, of rank 1, in float64."""
    return Factors(torch.zeros(1, like.in_features).double(), torch.zeros(like.out_features, 1).double())


def mix(updates: Sequence[Factors], mixing: Tensor) -> Factors:
    """The update B M A with scaling 1, in float64.

    A keeps the values of the ingredients; the scalings and M go into B alone.

    Args:
        updates: N updates of one module; A_i (r_i, in), B_i (out, r_i), ranks may differ.
        mixing: M (R, R) with R = sum r_i.
    Returns:
        lora_A (R, in) and lora_B (out, R).
    Raises:
        ValueError: if an update has a bias, which belongs to an adapter as a whole and not to a row of M.
    """
    if any(update.bias is not None for update in updates):
        raise ValueError("an update with a bias has no mixing matrix")
    stacked = concatenate(updates, [1.0] * len(updates))
    return Factors(stacked.lora_A, stacked.lora_B @ mixing.to(stacked.lora_B))


def relative_error(written: Factors, exact: Factors) -> float:
    """|dW_written - dW_exact|_F / |dW_exact|_F from the factors, float64; where dW_exact is 0: 0 if dW_written is too,
    else inf. A bias counts as one more column of dW."""
    difference = _norm_with_bias(concatenate([written, exact], [1.0, -1.0]))
    reference = _norm_with_bias(exact)
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / reference


def _norm_with_bias(factors: Factors) -> float:
    bias = factors.delta_bias()
    return math.hypot(norm(factors), 0.0 if bias is None else float(torch.linalg.vector_norm(bias)))


def pad_rank(factors: Factors, rank: int) -> Factors:
    """The same dW at a higher rank: zero rows below A, zero columns right of B.

    Raises:
        ValueError: if `rank` is below the rank of `factors`.
    """
    missing = rank - factors.rank
    if missing < 0:
        raise ValueError(f"rank {factors.rank} cannot be padded to {rank}")
    if missing == 0:
        return factors
    lora_A = torch.nn.functional.pad(factors.lora_A, (0, 0, 0, missing))
    lora_B = torch.nn.functional.pad(factors.lora_B, (0, missing))
    return Factors(lora_A, lora_B, factors.scaling, factors.bias)
