"""The updates of the experts of one parameter, and the two matrices that PEFT keeps them in.

    dW_e = s B_e A_e        A_e (r, in), B_e (out, r) of expert e = 0 ... E - 1

    A (E r, in)     expert after expert: rows e r ... e r + r - 1 are those of A_e
    B (out, r E)    rank after rank, an expert in each: columns e, E + e, 2 E + e, ... are those of B_e

so B A is no update of anything, and two adapters are concatenated expert by expert. The layout is that of peft 0.21,
tuners/lora/layer.py, ParamWrapper.get_delta_weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.concatenate import pad_rank
from loracli.algebra.factors import Factors


def split_experts(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A_e (E, r, in) and B_e (E, out, r) from the matrices (E r, in) and (out, r E)."""
    parts_A = lora_A.view(experts, -1, lora_A.shape[1])
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
