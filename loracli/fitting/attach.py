"""The base model with all adapters attached, whose only free quantities are the mixing weights.

Per module, with the adapters stacked to A (R, in) and B (out, R):

    z = A x                    (T, R)
    y = W x + B (c * z)        c (R,): w_li s_i, repeated over the rows of adapter i

Two products whatever the number of adapters, and of the activations only z is kept for the backward pass: A, B and W
are frozen, so the gradient of w needs z and u = B^T dL/dy alone, and that of x needs no activation. The paper's code
keeps a (T, out) tensor for each adapter and module instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.adapters.adapter import LoraAdapter


class StackedUpdate(torch.autograd.Function):
    """y + B (c * z), keeping z (T, R) for the backward pass and nothing of width in or out."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, lora_B: Tensor, c: Tensor) -> Tensor:
        """y (..., out), z (T, R), lora_B (out, R) in the model's dtype; c (R,) in float32 or better."""
        ctx.save_for_backward(z, lora_B, c)
        scaled = (z * c).to(z.dtype)  # (T, R): multiplied in c's precision, rounded once
        return torch.addmm(y.reshape(-1, y.shape[-1]), scaled, lora_B.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, lora_B, c = ctx.saved_tensors
        u = (grad_y.reshape(-1, grad_y.shape[-1]) @ lora_B).to(c.dtype)  # (T, R)
        grad_z = (u * c).to(z.dtype) if ctx.needs_input_grad[1] else None
        grad_c = (u * z).sum(dim=0) if ctx.needs_input_grad[3] else None  # dL/dc_r = sum_t u_tr z_tr
        return grad_y, grad_z, None, grad_c


@dataclass(frozen=True)
class _Stack:
    """The adapters of one module, stacked along the rank.

    Args:
        lora_A: (R, in); for an embedding its transpose (in, R), so that looking up a token is reading a row.
        lora_B: (out, R).
        owner: (R,) which adapter each row belongs to.
        scaling: (R,) s_i of each row.
        embed_scale: what the module multiplies its rows with, a number; 1 for all but a few models' embeddings.
    """

    embedding: bool
    lora_A: Tensor
    lora_B: Tensor
    owner: Tensor
    scaling: Tensor
    embed_scale: Tensor


class AttachedModel:
    """A model under whose modules the adapters act with `weights` (L, N). Made by `attach`."""

    def __init__(self, model: Any, modules: tuple[str, ...], adapters: int, dtype: torch.dtype) -> None:
        self.model = model
        self.modules = modules
        device = next(model.parameters()).device
        self.weights = torch.zeros(len(modules), adapters, dtype=dtype, device=device)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def set_weights(self, weights: Tensor) -> None:
        """Takes (L, N) weights, which may require a gradient; rounded to the precision of the sums."""
        self.weights = weights.to(self.weights.device, self.weights.dtype)


@contextmanager
def attach(model: Any, adapters: Sequence[LoraAdapter], modules: tuple[str, ...]) -> Iterator[AttachedModel]:
    """Attaches the adapters at weight 0, which leaves the model's outputs as they are to the bit, and detaches them at
    the end.

    Args:
        model: a frozen model in evaluation mode; factors are cast to its modules' dtypes.
        adapters: N adapters that fit it.
        modules: L names, the union of what the adapters change; row l of the weights belongs to the l-th.
    """
    precision = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    attached = AttachedModel(model, modules, len(adapters), precision)
    handles = []
    try:
        for row, name in enumerate(modules):
            module = model.get_submodule(name)
            stack = _stack(name, module, adapters, precision)
            handles.append(module.register_forward_hook(_hook(attached, row, stack)))
        yield attached
    finally:
        for handle in handles:
            handle.remove()


def _stack(name: str, module: nn.Module, adapters: Sequence[LoraAdapter], precision: torch.dtype) -> _Stack:
    weight: Tensor = module.weight  # type: ignore[assignment]
    dtype = weight.dtype
    present = [(i, adapter.modules[name]) for i, adapter in enumerate(adapters) if name in adapter.modules]
    lora_A = torch.cat([m.factors.lora_A.to(weight.device, dtype) for _, m in present])  # (R, in)
    lora_B = torch.cat([m.factors.lora_B.to(weight.device, dtype) for _, m in present], dim=1)  # (out, R)
    ranks = torch.tensor([m.factors.rank for _, m in present])
    owner = torch.repeat_interleave(torch.tensor([i for i, _ in present]), ranks)
    scaling = torch.repeat_interleave(torch.tensor([m.factors.scaling for _, m in present], dtype=precision), ranks)
    embedding = present[0][1].kind == "embedding"
    if embedding:
        lora_A = lora_A.T.contiguous()
    embed_scale = torch.as_tensor(getattr(module, "embed_scale", 1.0), device=weight.device)
    return _Stack(embedding, lora_A, lora_B, owner.to(weight.device), scaling.to(weight.device), embed_scale)


def _hook(attached: AttachedModel, row: int, stack: _Stack) -> Any:
    def add_update(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        c = attached.weights[row][stack.owner] * stack.scaling  # (R,)
        x = args[0]
        if stack.embedding:
            z = F.embedding(x, stack.lora_A).view(-1, stack.lora_A.shape[1])  # (T, R)
            z = z * stack.embed_scale.to(z.dtype)
        else:
            z = F.linear(x.reshape(-1, x.shape[-1]), stack.lora_A)  # (T, R); A is frozen, so x is not kept
        updated: Tensor = StackedUpdate.apply(y, z, stack.lora_B, c)  # type: ignore[no-untyped-call]
        return updated

    return add_update
