"""The updates of the groups of a convolution, and the two kernels that PEFT keeps them in.

    dW_g = s B_g A_g        A_g (r, in k), B_g (out / G, r) of group g = 0 ... G - 1, k = kh kw

    A (G r, in, kh, kw)     group after group: rows g r ... g r + r - 1 are those of A_g
    B (out, r, 1, 1)        group after group: rows g out / G ... are those of B_g

A sees every input channel, also in a grouped convolution, whose own kernel does not: the update of group g is that of
the convolution's outputs of group g, a matrix of its own. G r is PEFT's `r`. Two adapters are concatenated group by
group; put one below the other, their A would be dealt out to the groups in the wrong order.

Source: peft 0.21, tuners/lora/layer.py, _ConvNd.update_layer and forward. Its get_delta_weight leaves the groups out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loracli.algebra.concatenate import pad_rank
from loracli.algebra.factors import Factors


@dataclass(frozen=True)
class Convolution:
    """What the factors of a convolution do not tell of its kernels.

    Args:
        groups: G.
        kernel: its size, (kh, kw) of nn.Conv2d, one number or three of nn.Conv1d and nn.Conv3d.
    """

    groups: int
    kernel: tuple[int, ...]


def join_groups(updates: Sequence[Factors], rank: int) -> Factors:
    """The flat kernels (G rank, in k) and (out, rank) of the groups in their order, and their biases one after the
    other; scalings are not in them."""
    padded = [pad_rank(update, rank) for update in updates]
    biases = [update.bias for update in padded if update.bias is not None]
    return Factors(
        torch.cat([update.lora_A for update in padded]),
        torch.cat([update.lora_B for update in padded]),
        bias=torch.cat(biases) if biases else None,
    )
