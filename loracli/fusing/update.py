"""What is added to a tensor of the base, as two thin matrices in the tensor's own layout.

nn.Linear                   W (out, in)       dW = B A          left = B         right = A
Conv1D                      W (in, out)       dW^T = A^T B^T    left = A^T       right = B^T
embedding                   W (vocab, dim)    (B A)^T           left = A^T       right = B^T
experts in one parameter    W (E, ., .)       as Linear or Conv1D, each by itself, stacked
a part of an expert         rows of W_e       as Linear         left = rows of B
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracli.adapters.names import numbered_name
from loracli.algebra.concatenate import pad_rank
from loracli.algebra.factors import Factors
from loracli.composition.composition import Source
from loracli.fusing.plan import FusedTensor


def update_of(source: Source, tensor: FusedTensor) -> tuple[Tensor, Tensor] | None:
    """left (..., rows, R) and right (..., R, columns) in float64; None where nothing is added.

    Raises:
        ValueError: if the source's method does not suit its adapters.
    """
    if tensor.module is None:
        return None
    if len(tensor.shape) == 2:
        left, right = _sides(source.compose(tensor.module).factors, tensor)
        return (left if tensor.rows is None else left[slice(*tensor.rows)]), right
    names = [numbered_name(tensor.module, expert) for expert in range(tensor.shape[0])]
    updates = [source.compose(name).factors for name in names]
    rank = max(update.rank for update in updates)
    lefts, rights = zip(*(_sides(pad_rank(update, rank), tensor) for update in updates), strict=True)
    return torch.stack(lefts), torch.stack(rights)


def _sides(update: Factors, tensor: FusedTensor) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = update.lora_A.double(), update.scaling * update.lora_B.double()
    return (lora_B, lora_A) if tensor.kind == "linear" else (lora_A.T, lora_B.T)
