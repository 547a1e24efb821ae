"""The experts of a mixture with adapters on their parameters, and its routers.

The tokens that the router sends to expert e go through its matrices as through linear layers (`attach.MixedLinear`):

    y = W_e x + B_e (M A_e x)        A_e (R, in), B_e (out, R): all adapters stacked, the same M for every expert

so nothing as large as W is made or kept. transformers gives the experts of nearly all its mixtures one form, which its
own fast implementations rely on (integrations/moe.py, `use_experts_implementation`, 5.23): parameters gate_up_proj, or
up_proj, and down_proj, with `_apply_gate` or `act_fn` between them. That form is computed here, expert by expert; of
others the update cannot be mixed, and `check_experts` says so.

A router multiplies by a weight of its own and chooses by the product, each class in its way. It runs as it is, with
W + B M A, which is no larger than W, as its weight.

A batch's tokens come in the order of its records, so which record's weights a token takes is known by its place,
however the router spreads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.kinds import kind_of
from loracli.algebra.factors import Factors
from loracli.algebra.packing import stack_experts
from loracli.errors import BaseModelMismatch

# (x (t, in), weight (out, in), bias (out,), expert, places (t,), tokens) to (t, out); places are those of the t tokens
# among all tokens of the batch.
ExpertLinear = Callable[[Tensor, Tensor, Tensor | None, int, Tensor, int], Tensor]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R) of N adapters on a parameter, in its dtype, and the scalings (R,) of rank rows.

    Where the experts of an adapter have different scalings, those go into B.
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
    return torch.cat(parts_A, dim=1), torch.cat(parts_B, dim=2), torch.cat(scalings)


def experts_forward(module: Any, linears: Mapping[str, ExpertLinear]) -> Any:
    """A forward in the place of the module's own, with these linear layers for its parameters, where they are given."""

    def linear(x: Tensor, parameter: str, expert: int, places: Tensor, tokens: int) -> Tensor:
        stored = getattr(module, parameter)[expert]
        weight = stored.T if module.is_transposed else stored
        bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
        if parameter in linears:
            return linears[parameter](x, weight, bias, expert, places, tokens)
        return F.linear(x, weight, bias)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, each = top_k_index.shape
        chosen = top_k_index.reshape(-1)  # (S,) with S = T * each
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=module.num_experts).tolist()
        outputs = []
        for expert, places in enumerate(torch.split(order // each, counts)):
            if not len(places):
                continue
            y = linear(hidden_states[places], _first_of(module), expert, places, tokens)
            y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
            outputs.append(linear(y, "down_proj", expert, places, tokens))
        together = torch.cat(outputs)
        if module.has_post_expert_norm:
            together = module.post_expert_norm(together)
        weighted = (together * top_k_weights.reshape(-1)[order, None])[torch.argsort(order)]
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
