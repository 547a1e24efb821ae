"""DoRA: the direction of W + dV is trained as a LoRA, the length of each of its rows as a number.

    W' = D (W + dV),  D = diag(m / |W + dV|_row),  dV = s B A          dW = W' - W = (D - I) W + D dV

Liu et al., arXiv 2402.09353, equation 5; PEFT 0.21 (tuners/lora/dora.py) takes the norm over the input dimension, one
row for each output, and so does this. D dV has the rank of dV, and (D - I) W that of W: the whole has full rank, and a
LoRA can only come close to it.

We differ from PEFT in the arithmetic alone: float64, where PEFT takes the norm in the dtype of the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracli.algebra.factors import Factors


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
