"""The experts of a mixture with adapters on their parameters, and its routers.

The tokens that the router sends to expert e go through its matrices as through linear layers (`attach.MixedLinear`):

    y = W_e x + B_e (M A_e x)        A_e (R, in), B_e (out, R): all adapters stacked, the same M for every expert

so nothing as large as W is made or kept. transformers gives the experts of nearly all its mixtures one form, which its
own fast implementations rely on (integrations/moe.py, `use_experts_implementation`, 5.23): parameters gate_up_proj, or
up_proj, and down_proj, with `_apply_gate` or `act_fn` between them. That form is computed here, on tokens sorted by
expert and with the products of all experts at once; of others the update cannot be mixed, and `check_experts` says so.

A router multiplies by a weight of its own and chooses by the product, each class in its way. It runs as it is, with
W + B M A, which is no larger than W, as its weight.

A batch's tokens come in the order of its records, so which record's weights a token takes is known by its place,
however the router spreads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.kinds import kind_of
from loracli.algebra.factors import Factors
from loracli.algebra.packing import stack_experts
from loracli.errors import BaseModelMismatch

_ALIGNED = 16  # bytes, between the rows of what torch multiplies by groups


@dataclass(frozen=True)
class Routing:
    """The S = T k rows that a router makes of T tokens, k for each, sorted by expert.

    Args:
        experts: (S,) of each row.
        tokens: (S,) place of its token in the batch.
        ends: (E,) int32, behind the last row of each expert.
        batch: T.
    """

    experts: Tensor
    tokens: Tensor
    ends: Tensor
    batch: int


# (x (S, in), weight (E, out, in), routing) to (S, out).
ExpertLinear = Callable[[Tensor, Tensor, Routing], Tensor]


def check_experts(model: nn.Module, adapters: Sequence[LoraAdapter]) -> None:
    """Refuses experts that compute in a way of their own.

    Raises:
        BaseModelMismatch: naming the parameter and the class.
    """
    for adapter in adapters:
        for name, modules in adapter.targets.items():
            if not kind_of(modules[0]).of_experts:
                continue
            owner, _, parameter = name.rpartition(".")
            module = model.get_submodule(owner)
            # What transformers' decorator sets, and what the class itself has.
            common = hasattr(module, "has_gate") and hasattr(module, "_apply_gate")
            if not common or parameter not in (_first_of(module), "down_proj"):
                raise BaseModelMismatch(
                    f"{adapter.reference} adapts {name}, and the experts of a {type(module).__name__} compute in a way "
                    "that loracat cannot mix adapters in",
                    hint="compose without a fit: loracat export --method uniform, or another that needs no data",
                )


def _first_of(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def expert_stack(
    updates: Sequence[Sequence[Factors]], weight: Tensor, precision: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A (E, R, in) and B (E, out, R) of N adapters on a parameter, in its dtype, and the scalings (R,) of rank rows.

    Where the experts of an adapter have different scalings, those go into B. Where the rows of B would not be aligned,
    A and B are filled up with zeros, and (R + zeros,) says which rank row's weight each takes; else that is None.
    """
    parts_A, parts_B, scalings = [], [], []
    for experts in updates:
        same = len({update.scaling for update in experts}) == 1
        scaling = experts[0].scaling if same else 1.0
        rank = max(update.rank for update in experts)
        shared = [Factors(u.lora_A, u.lora_B if same else u.lora_B * u.scaling) for u in experts]
        lora_A, lora_B = stack_experts(shared, rank)
        parts_A.append(lora_A.to(weight.device, weight.dtype))
        parts_B.append(lora_B.to(weight.device, weight.dtype))
        scalings.append(torch.full((rank,), scaling, dtype=precision))
    lora_A, lora_B, scaling_of = torch.cat(parts_A, dim=1), torch.cat(parts_B, dim=2), torch.cat(scalings)
    if _aligned(lora_B):
        return lora_A, lora_B, scaling_of, None
    rows = len(scaling_of)
    zeros = -rows % (_ALIGNED // weight.element_size())
    entries = torch.arange(rows + zeros, device=weight.device).clamp(max=rows - 1)
    return F.pad(lora_A, (0, 0, 0, zeros)), F.pad(lora_B, (0, zeros)), scaling_of, entries


def grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The rows of each expert times its matrix: x (S, in), matrices (E, in, out), ends (E,) of a `Routing`; (S, out).

    One call whatever the number of experts; torch has none for float64, for rows that are not aligned, nor for GPUs
    before capability 8.
    """
    able = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)
    if able and x.dtype != torch.float64 and _aligned(x) and _aligned(matrices):
        return F.grouped_mm(x, matrices, offs=ends)
    parts = torch.tensor_split(x, ends[:-1].tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _aligned(x: Tensor) -> bool:
    step = max(x.stride()[-2:]) * x.element_size()
    return min(x.stride()[-2:]) == 1 and step % _ALIGNED == 0 and x.data_ptr() % _ALIGNED == 0


def experts_forward(module: Any, linears: Mapping[str, ExpertLinear]) -> Any:
    """A forward in the place of the module's own, with these linear layers for its parameters, where they are given."""

    def linear(x: Tensor, parameter: str, routing: Routing) -> Tensor:
        stored = getattr(module, parameter)
        weight = stored.mT if module.is_transposed else stored
        y = linears[parameter](x, weight, routing) if parameter in linears else grouped(x, weight.mT, routing.ends)
        return y + getattr(module, f"{parameter}_bias")[routing.experts] if module.has_bias else y

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, each = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (S,) with S = T * each
        ends = torch.searchsorted(
            experts, torch.arange(module.num_experts, device=experts.device), right=True, out_int32=True
        )
        routing = Routing(experts, order // each, ends, tokens)
        y = linear(hidden_states[routing.tokens], _first_of(module), routing)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = linear(y, "down_proj", routing)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        weighted = torch.empty_like(y).index_copy_(0, order, y)
        return weighted.view(tokens, each, -1).sum(dim=1).to(hidden_states.dtype)

    return forward


def weight_forward(module: Any, own: Callable[..., Any], updates: Callable[[], Sequence[Tensor]]) -> Any:
    """A forward in the place of the module's own, with W + dW as its weight W (out, in), whatever it does with it.

    Args:
        module: with a matrix as its weight, whose tokens come along the first dimension of what it is given.
        own: its forward so far.
        updates: dW (out, in) of all tokens, or of those of each record of the batch.
    """

    def once(dW: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        weight = module._parameters["weight"]
        module._parameters["weight"] = weight + dW.to(weight.device, weight.dtype)
        try:
            return own(*args, **kwargs)
        finally:
            module._parameters["weight"] = weight

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = updates()
        if len(found) == 1:
            return once(found[0], args, kwargs)
        tokens = len(args[0])

        def part(value: Any, record: int) -> Any:
            split = isinstance(value, Tensor) and value.dim() > 0 and len(value) == tokens
            return value[record * tokens // len(found) : (record + 1) * tokens // len(found)] if split else value

        return _together(
            [
                once(dW, [part(v, i) for v in args], {name: part(v, i) for name, v in kwargs.items()})
                for i, dW in enumerate(found)
            ]
        )

    return forward


def _together(outputs: Sequence[Any]) -> Any:
    """What a module returns for parts of its tokens, as for all of them."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    return tuple(_together(each) for each in zip(*outputs, strict=True)) if isinstance(first, (tuple, list)) else first
