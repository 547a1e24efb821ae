"""What stands between an adapter and a plain LoRA: DoRA's lengths, and initialisations taken from the base.

DoRA: the direction of W + dV is trained as a LoRA, the length of each of its rows as a number.

    W' = D (W + dV),  D = diag(m / |W + dV|_row),  dV = s B A          dW = W' - W = (D - I) W + D dV

Liu et al., arXiv 2402.09353, equation 5; PEFT 0.21 (tuners/lora/dora.py) takes the norm over the input dimension, one
row for each output, and so does this. D dV has the rank of dV, and (D - I) W that of W: the whole has full rank, and a
LoRA can only come close to it.

We differ from PEFT in the arithmetic alone: float64, where PEFT takes the norm in the dtype of the activations.

What an initialisation took from the base's weight, computed again from that weight.

    W_res = W - s B_0 A_0        the model of the training is W_res + s B A, so dW = s B A - s B_0 A_0

PiSSA (Meng et al., arXiv 2404.02948, equations 2 to 4): s B_0 A_0 is the best approximation of rank r of W (out, in).
OLoRA (Bueyuekakyuez, arXiv 2406.01775, algorithm 1): with the QR of W, s B_0 A_0 = s Q_r R_r, which is s times the
projection of W on the span of its first r columns.

Both products are one matrix whatever signs or bases a library picks for the factors, so they can be computed in another
way than PEFT 0.21 (tuners/lora/layer.py: pissa_init, olora_init) computes them in float32: here from the leading
singular vectors alone and from the QR of r columns, in float64. How far two float32 computations may be apart is the
`uncertainty`. PiSSA's randomised form (`pissa_niter_*`), CorDA and LoRA-GA depend on random numbers or on data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.truncate import leading_left


def dora_update(weight: Tensor, direction: Factors, magnitude: Tensor) -> Tensor:
    """dW (out, in) in float64, dense.

    Args:
        weight: W (out, in); of an embedding, out is the width and in the vocabulary.
        direction: dV.
        magnitude: m (out,).
    Raises:
        ValueError: if a row of W + dV is zero, so that it has no direction.
    """
    # In place: a head of 128,000 words is gigabytes in float64, and one of these is enough.
    result = weight.to(torch.float64, copy=True)
    result.addmm_(direction.lora_B.double(), direction.lora_A.double(), alpha=direction.scaling)
    lengths = torch.linalg.vector_norm(result, dim=1)
    if not lengths.all():
        raise ValueError("a row of the weight is zero, and has no direction")
    result *= (magnitude.double() / lengths)[:, None]
    return result.sub_(weight)


_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Initial:
    """s B_0 A_0.

    Args:
        factors: lora_A (r, in), lora_B (out, r), float64, with the scaling.
        uncertainty: about how far, in the Frobenius norm, PEFT's float32 result may be from it.
    """

    factors: Factors
    uncertainty: float


def initial_update(kind: str, weight: Tensor, rank: int, scaling: float) -> Initial | None:
    """What the initialisation `kind` took from W (out, in); None if that cannot be computed again.

    Raises:
        ValueError: if W has no such rank.
    """
    if rank > min(weight.shape):
        raise ValueError(f"the weight is {tuple(weight.shape)} and has no rank {rank}")
    if kind == "pissa":
        return _pissa(weight.double(), rank)
    if kind == "olora":
        return _olora(weight.double(), rank, scaling)
    return None


def _pissa(weight: Tensor, rank: int) -> Initial:
    wide = weight.shape[0] <= weight.shape[1]
    smaller = weight if wide else weight.T
    values, vectors = leading_left(smaller, min(rank + 1, smaller.shape[0]))
    leading = vectors[:, :rank]
    factors = Factors(leading.T @ weight, leading) if wide else Factors(leading.T, weight @ leading)
    error = _EPS * float(values[0]) * math.sqrt(rank)
    if rank == smaller.shape[0]:
        return Initial(factors, error)
    # Wedin: an error E of W turns the leading space by |E| / gap, and moves W_r by that times the values at the edge.
    last, after = float(values[rank - 1]), float(values[rank])
    return Initial(factors, error * (1 + (last + after) / (last - after)) if last > after else float("inf"))


def _olora(weight: Tensor, rank: int, scaling: float) -> Initial:
    q, r = torch.linalg.qr(weight[:, :rank])
    singular = torch.linalg.svdvals(r)
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")
    factors = Factors(q.T @ weight, q, scaling)
    return Initial(factors, _EPS * condition * float(torch.linalg.matrix_norm(weight)) * abs(scaling))
