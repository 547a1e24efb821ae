"""Adapters by the names that the base model has for their modules.

Adapters that were trained inside a model of text and images, on a base that is the text model alone.

There a module of the text model has one component more in its path, `model.language_model.layers.0` or
`language_model.model.layers.0` for `model.layers.0`. Only the base tells which of the two it is, so nothing is renamed
without its names, and then all modules of an adapter or none.

Adapters that have a module for each expert, on a base that keeps the experts of a layer in one parameter.

Until transformers 5 the experts of most mixtures were linear layers, and other tools still have them so. Now a
parameter holds them all, and of gate and up both, one below the other:

    experts.3.gate_proj, experts.3.up_proj    experts.gate_up_proj[3]    also w1 and w3
    experts.3.down_proj                       experts.down_proj[3]       also w2

    dW = [s_g B_g A_g; s_u B_u A_u] = blockdiag(s_g B_g, s_u B_u) [A_g; A_u]

These are transformers' own rules (conversion_mapping.py, 5.23), and what PEFT does with such an adapter when it loads
it. Which of the two the base has, only the base tells.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.adapters.names import numbered_name, target_of
from loracli.algebra.factors import Factors
from loracli.errors import BaseModelMismatch

Value = TypeVar("Value")

_WRAPPER = "language_model"


def inside_other_model(adapter: LoraAdapter) -> bool:
    """Whether its names may be those of a text model inside another one."""
    return any(_WRAPPER in name.split(".") for name in adapter.modules)


def as_text_model(adapter: LoraAdapter, base: Container[str]) -> LoraAdapter:
    """The adapter by the base's names, if all its modules are in the base once that component is left out; otherwise as
    it is.

    Args:
        adapter: as it was read.
        base: names of the base's modules, and of its parameters with experts.
    """
    plain = [_plain(name) for name in adapter.modules]
    fits = all(target_of(name) in base for name in plain) and len(set(plain)) == len(plain)
    if not inside_other_model(adapter) or not fits or all(target_of(name) in base for name in adapter.modules):
        return adapter
    modules = {_plain(name): replace(module, name=_plain(name)) for name, module in adapter.modules.items()}
    saved = {module: _renamed(tensors) for module, tensors in _renamed(adapter.saved).items()}
    return replace(
        adapter,
        modules=dict(sorted(modules.items(), key=lambda item: target_of(item[0]))),
        base_copies=_renamed(adapter.base_copies),
        saved=dict(sorted(saved.items())),
    )


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word != _WRAPPER)


def _renamed(named: Mapping[str, Value]) -> dict[str, Value]:
    return {_plain(name): value for name, value in named.items()}


# The parts of a parameter, from its first row down, in each of their spellings.
PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERT = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<expert>\d{1,4})\.(?P<part>\w+)", re.ASCII)


@dataclass(frozen=True)
class ExpertPart:
    """Where the matrix of one expert's linear layer lies in a parameter.

    Args:
        parameter: the parameter's path.
        expert: whose it is.
        place: which of the parts of the expert's matrix.
        parts: how many those are.
    """

    parameter: str
    expert: int
    place: int
    parts: int


def expert_part(module: str, outs: Mapping[str, int]) -> ExpertPart | None:
    """Of a module of one expert, `mlp.experts.3.up_proj`; None if the base has no parameter for it.

    Args:
        module: its path.
        outs: of the base's parameters with experts, by path.
    """
    match = _EXPERT.fullmatch(module)
    if match is None:
        return None
    for experts in (match["experts"], match["experts"].replace(".block_sparse_moe.", ".mlp.")):
        for name, spellings in PARTS.items():
            for parts in spellings:
                if match["part"] in parts and f"{experts}.{name}" in outs:
                    return ExpertPart(f"{experts}.{name}", int(match["expert"]), parts.index(match["part"]), len(parts))
    return None


def has_expert_layers(adapter: LoraAdapter) -> bool:
    """Whether it has modules of experts, which the base may have in a parameter."""
    return any(_EXPERT.fullmatch(name) for name in adapter.modules)


def as_fused_experts(adapter: LoraAdapter, outs: Mapping[str, int]) -> LoraAdapter:
    """The adapter by the base's names, where the base keeps in a parameter what the adapter has modules for.

    An expert before the last changed one that is not changed itself gets an update of zeros; those after it get none,
    so that adapters that end at different experts cannot be composed.

    Args:
        adapter: as it was read.
        outs: `out` of one expert of the base's parameters with experts, by path.
    Raises:
        BaseModelMismatch: if its layers of one parameter do not fit together.
    """
    parts: dict[str, dict[tuple[int, int], Factors]] = {}
    modules: dict[str, LoraModule] = {}
    counts: dict[str, int] = {}
    for name, module in adapter.modules.items():
        part = expert_part(name, outs)
        if part is None:
            modules[name] = module
            continue
        found = parts.setdefault(part.parameter, {})
        if (part.expert, part.place) in found:
            raise BaseModelMismatch(f"{adapter.reference} adapts a part of {part.parameter} twice, once as {name}")
        if module.factors.bias is not None:
            raise BaseModelMismatch(
                f"{adapter.reference} has lora_bias for {name}, which is a part of {part.parameter} in the base",
                hint="train the adapter without lora_bias",
            )
        found[part.expert, part.place] = module.factors
        counts[part.parameter] = part.parts
    if not parts:
        return adapter
    for parameter, found in parts.items():
        like, out = next(iter(found.values())), outs[parameter] // counts[parameter]
        for factors in found.values():
            if (factors.out_features, factors.in_features) != (out, like.in_features):
                raise BaseModelMismatch(
                    f"{adapter.reference} adapts experts of {parameter} by layers of (out, in) = "
                    f"{(factors.out_features, factors.in_features)}, not {(out, like.in_features)}"
                )
        zeros = Factors(
            torch.zeros(1, like.in_features, dtype=like.dtype), torch.zeros(out, 1, dtype=like.dtype), like.scaling
        )
        for expert in range(max(expert for expert, _ in found) + 1):
            name = numbered_name(parameter, expert)
            if name in modules:
                raise BaseModelMismatch(f"{adapter.reference} adapts {parameter} as a whole and by its experts' layers")
            below = tuple(found.get((expert, place), zeros) for place in range(counts[parameter]))
            modules[name] = LoraModule(name, "experts", FusedExpert(below))
    return replace(adapter, modules=dict(sorted(modules.items(), key=lambda item: target_of(item[0]))))


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
