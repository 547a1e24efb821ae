"""Adapters by the names that the base model has for their modules.

Adapters that have a module for each expert, on a base that keeps the experts of a layer in one parameter.

Until transformers 5 the experts of most mixtures were linear layers, and other tools still have them so. Now a
parameter holds them all, and of gate and up both, one below the other:

    experts.3.gate_proj, experts.3.up_proj    experts.gate_up_proj[3]
    experts.3.down_proj                       experts.down_proj[3]

    dW = [s_g B_g A_g; s_u B_u A_u] = blockdiag(s_g B_g, s_u B_u) [A_g; A_u]

which is what PEFT does with such an adapter when it loads it. What goes where is transformers' own table
(model/modules.py); an expert that an adapter has no module for, or a part of one, gets an update of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraModule
from loracli.adapters.base_module import MAX_EXPERTS, BaseModule
from loracli.adapters.names import BasePlace, numbered_name
from loracli.algebra.factors import Factors
from loracli.errors import BaseModelMismatch

# The spellings that recipes before schema 4 rely on.
_OLDER_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERT = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<expert>\d{1,4})\.(?P<part>\w+)", re.ASCII)


def fused_experts(
    reference: str, parameter: str, parts: Mapping[BasePlace, LoraModule], base: BaseModule | None
) -> dict[str, LoraModule]:
    """The updates of all experts of a parameter, made of an adapter's modules for parts of them.

    Args:
        reference: of the adapter, for errors.
        parameter: its path in the base.
        parts: modules by where they lie in it.
        base: the parameter; None, or without a number of experts, where older records do not say it: then the experts
            behind the last changed one get no update.
    Raises:
        BaseModelMismatch: if the modules do not fit together or into the parameter.
    """
    found: dict[tuple[int, int], Factors] = {}
    for place, module in parts.items():
        if module.factors.bias is not None:
            raise BaseModelMismatch(
                f"{reference} has lora_bias for {module.name}, which is a part of {parameter} in the base",
                hint="train the adapter without lora_bias",
            )
        found[int(place.expert or 0), place.part] = module.factors
    counts = {place.parts for place in parts}
    if len(counts) > 1:
        raise BaseModelMismatch(f"{reference} adapts experts of {parameter} in different divisions")
    count, like = counts.pop(), next(iter(found.values()))
    out = like.out_features if base is None else base.out_features // count
    for factors in found.values():
        if (factors.out_features, factors.in_features) != (out, like.in_features):
            raise BaseModelMismatch(
                f"{reference} adapts experts of {parameter} by layers of (out, in) = "
                f"{(factors.out_features, factors.in_features)}, not {(out, like.in_features)}"
            )
    last = max(expert for expert, _ in found)
    known = 0 if base is None else base.experts
    experts = known or min(last + 1, MAX_EXPERTS)
    if last >= experts:
        raise BaseModelMismatch(
            f"{reference} adapts the expert {last} of {parameter}, and the base has {experts}, from 0 on",
            hint="the adapter was trained on another model; check --base",
        )
    zeros = Factors(
        torch.zeros(1, like.in_features, dtype=like.dtype), torch.zeros(out, 1, dtype=like.dtype), like.scaling
    )
    modules = {}
    for expert in range(experts):
        name = numbered_name(parameter, expert)
        below = tuple(found.get((expert, part), zeros) for part in range(count))
        modules[name] = LoraModule(name, "experts", FusedExpert(below))
    return modules


def older_expert_places(names: Iterable[str], base: Mapping[str, BaseModule]) -> dict[str, BasePlace]:
    """Where the modules of experts lie, by the spellings that were known before places were kept."""
    found = {}
    for name in names:
        match = _EXPERT.fullmatch(name)
        if match is None:
            continue
        for experts in (match["experts"], match["experts"].replace(".block_sparse_moe.", ".mlp.")):
            for parameter, spellings in _OLDER_PARTS.items():
                for parts in spellings:
                    if match["part"] in parts and f"{experts}.{parameter}" in base and name not in found:
                        place = parts.index(match["part"])
                        found[name] = BasePlace(f"{experts}.{parameter}", int(match["expert"]), place, len(parts))
    return found


class FusedExpert(Factors):
    """The update of one expert's matrix, made of those of its parts when it is wanted.

    Args:
        parts: one below the other; where their scalings differ, those go into lora_B, which is float64 then.
    """

    parts: Sequence[Factors]

    def __init__(self, parts: Sequence[Factors]) -> None:
        scalings = {part.scaling for part in parts}
        # Factors are frozen
        vars(self).update(parts=parts, scaling=scalings.pop() if len(scalings) == 1 else 1.0, bias=None)

    @property
    def lora_A(self) -> Tensor:
        return torch.cat([part.lora_A.to(self.dtype) for part in self.parts])

    @property
    def lora_B(self) -> Tensor:
        scaled = (
            part.lora_B.to(self.dtype) * (1.0 if part.scaling == self.scaling else part.scaling) for part in self.parts
        )
        return torch.block_diag(*scaled)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its parts."""
        own = torch.float64 if len({part.scaling for part in self.parts}) > 1 else self.parts[0].dtype
        return reduce(torch.promote_types, (part.dtype for part in self.parts), own)

    def loaded(self) -> Factors:
        """The same factors in memory."""
        return Factors(self.lora_A, self.lora_B, self.scaling)
