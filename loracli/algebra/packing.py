"""Several updates in one tensor, as PEFT packs them: the experts of a parameter, the groups of a convolution.

The experts of one parameter, in two matrices:

    dW_e = s B_e A_e        A_e (r, in), B_e (out, r) of expert e = 0 ... E - 1

    A (E r, in)     expert after expert: rows e r ... e r + r - 1 are those of A_e
    B (out, r E)    rank after rank, an expert in each: columns e, E + e, 2 E + e, ... are those of B_e

so B A is no update of anything, and two adapters are concatenated expert by expert. The layout is that of peft 0.21,
tuners/lora/layer.py, ParamWrapper.get_delta_weight.

The groups of a convolution, in two kernels:

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
from typing import Literal

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, pad_rank


def split_experts(lora_A: Tensor, lora_B: Tensor, experts: int, *, by_expert: bool = False) -> tuple[Tensor, Tensor]:
    """A_e (E, r, in) and B_e (E, out, r) from the matrices (E r, in) and (out, r E); with `by_expert` B is (out, E r),
    expert after expert as A is, which PEFT does not write."""
    parts_A = lora_A.view(experts, -1, lora_A.shape[1])
    if by_expert:
        return parts_A, lora_B.view(lora_B.shape[0], experts, -1).transpose(0, 1).contiguous()
    parts_B = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1).contiguous()
    return parts_A, parts_B


def stack_experts(updates: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor]:
    """A_e (E, rank, in) and B_e (E, out, rank) of the experts in their order, filled up with zeros; scalings are not in
    them."""
    padded = [pad_rank(update, rank) for update in updates]
    return torch.stack([p.lora_A for p in padded]), torch.stack([p.lora_B for p in padded])


def join_experts(updates: Sequence[Factors], rank: int) -> Factors:
    """The matrices (E rank, in) and (out, rank E) of the experts in their order; scalings are not in them."""
    parts_A, parts_B = stack_experts(updates, rank)  # (E, r, in), (E, out, r)
    return Factors(parts_A.flatten(0, 1), parts_B.permute(1, 2, 0).flatten(1))


@dataclass(frozen=True)
class Convolution:
    """What the factors of a convolution do not tell of its kernels.

    Args:
        groups: G.
        kernel: its size, (kh, kw) of nn.Conv2d, one number or three of nn.Conv1d and nn.Conv3d.
    """

    groups: int
    kernel: tuple[int, ...]


def _join_groups(updates: Sequence[Factors], rank: int) -> Factors:
    """The flat kernels (G rank, in k) and (out, rank) of the groups in their order, and their biases one after the
    other; scalings are not in them."""
    padded = [pad_rank(update, rank) for update in updates]
    biases = [update.bias for update in padded if update.bias is not None]
    return Factors(
        torch.cat([update.lora_A for update in padded]),
        torch.cat([update.lora_B for update in padded]),
        bias=torch.cat(biases) if biases else None,
    )


def pack(packing: Literal["experts", "groups"] | None, updates: Sequence[Factors], rank: int) -> Factors:
    """The one pair of matrices of what was targeted: its updates joined, or its only one, filled up to the rank.

    Args:
        packing: of the kind of module, None where each update has a pair of its own.
        updates: in their order.
        rank: of each update in what is returned.
    """
    if packing is None:
        (update,) = updates
        return pad_rank(update, rank)
    return {"experts": join_experts, "groups": _join_groups}[packing](updates, rank)
