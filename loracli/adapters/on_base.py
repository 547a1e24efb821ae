"""An adapter as the base has its modules: by the base's names, experts in its parameters, factors in today's order.

A base may call its modules otherwise than the model that the adapter was trained in. Which module of the base is meant
is settled where the base is (model/modules.py), and kept in what is written, so that it holds without the base too
and with any later version of transformers.

Until transformers 5 the experts of most mixtures were linear layers, and other tools still have them so. Now a
parameter holds them all, and of gate and up both, one below the other:

    experts.3.gate_proj, experts.3.up_proj    experts.gate_up_proj[3]
    experts.3.down_proj                       experts.down_proj[3]

    dW = [s_g B_g A_g; s_u B_u A_u] = blockdiag(s_g B_g, s_u B_u) [A_g; A_u]

which is what PEFT does with such an adapter when it loads it. What goes where is transformers' own table
(model/modules.py); an expert that an adapter has no module for, or a part of one, gets an update of zeros.

Files may leave open in which order the factors of experts lie. Two orders have the same shapes, so a wrong one is read
without a word: the norm of every update stays, and each expert gets what was trained for others. unsloth kept lora_B
expert after expert until September 2026, and says which only since then. PEFT before 0.20 had lora_A and lora_B the
other way round, which shows where a matrix is not square; PEFT before 0.18 does not say its version. What is open is
read as PEFT reads it, warned of, and tried where there are records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.adapters.kinds import MAX_EXPERTS, BaseModule, kind_of
from loracli.adapters.names import BasePlace, RecipePlace, numbered_name, target_of
from loracli.adapters.stored import GROUPED_BY_EXPERT, RANK_MAJOR, FusedExpert, TurnedExpert
from loracli.algebra.factors import Factors
from loracli.algebra.packing import join_experts, split_experts
from loracli.errors import BaseModelMismatch
from loracli.progress import Progress

Value = TypeVar("Value")

_WRAPPER = "language_model"
_STACKS = re.compile(r"encoder|decoder")
_ANY_NUMBER = "*"
_NUMBER = re.compile(r"(?<![^.\[])\d+(?![^.\]])", re.ASCII)  # a component, or the number of an expert


def by_base_names(adapter: LoraAdapter, places: Mapping[str, BasePlace], base: Mapping[str, BaseModule]) -> LoraAdapter:
    """The adapter by the base's names, with an update for every expert of a parameter.

    Args:
        adapter: as it was read.
        places: by name of what it adapts, carries a copy of or replaces; what is not in it keeps its name.
        base: the base's modules and parameters, as far as they are known.
    Raises:
        BaseModelMismatch: if two modules of the adapter are one in the base, or those of one parameter do not fit
            together.
    """
    moved = {name: place for name, place in places.items() if place != BasePlace(name)}
    modules: dict[str, LoraModule] = {}
    parts: dict[str, dict[BasePlace, LoraModule]] = {}
    for name, module in adapter.modules.items():
        place = moved.get(target_of(name), BasePlace(target_of(name)))
        if place.expert is not None:
            of_parameter = parts.setdefault(place.target, {})
            if place in of_parameter:
                raise _twice(adapter, place.target, name)
            of_parameter[place] = module
            continue
        own = place.target + name.removeprefix(target_of(name))
        if own in modules:
            raise _twice(adapter, own, name)
        modules[own] = _of_kind(module, own, base.get(place.target), turned=place.turned)
    for parameter, of_parameter in parts.items():
        if any(target_of(name) == parameter for name in modules):
            raise BaseModelMismatch(f"{adapter.reference} adapts {parameter} as a whole and by its experts' layers")
        modules |= _fused_experts(adapter.reference, parameter, of_parameter, base.get(parameter))
    as_before = len(modules) == len(adapter.modules) and all(modules.get(n) is m for n, m in adapter.modules.items())
    if as_before and not any(name in moved for name in (*adapter.saved, *adapter.base_copies)):
        return adapter
    saved = {
        _target(moved, owner): {
            _target(moved, owner) + path.removeprefix(owner): tensor for path, tensor in tensors.items()
        }
        for owner, tensors in adapter.saved.items()
    }
    return replace(
        adapter,
        modules=dict(sorted(modules.items(), key=lambda item: target_of(item[0]))),
        base_copies={_target(moved, name): copy for name, copy in adapter.base_copies.items()},
        saved=dict(sorted(saved.items())),
        places={**adapter.places, **moved},
    )


def adapted_names(adapter: LoraAdapter) -> dict[str, str]:
    """What an adapter has to say of the base, by the name it has there: a parameter of it in the base."""
    names = {target: kind_of(modules[0]).parameter(target) for target, modules in adapter.targets.items()}
    names |= {name: f"{name}.weight" for name in adapter.base_copies}
    return names | {owner: min(tensors) for owner, tensors in adapter.saved.items()}


def named_apart(adapters: Sequence[LoraAdapter]) -> bool:
    """Whether the adapters may have different names for the same layers, so that only the base tells.

    Layers of one have in front of their number what no layer of another has, and the other way round, and the same
    behind it; or one has a layer for each expert and another a parameter; or what has one name is of another kind or
    size. An encoder's layers and a decoder's are what they say.
    """
    stacks = [_stacks_of(adapter) for adapter in adapters]
    for place, own in enumerate(stacks):
        if any(_may_be_one(own, other) for other in stacks[:place]):
            return True
    kinds = [{kind_of(m[0]).of_experts for n, m in a.targets.items() if "experts" in n.split(".")} for a in adapters]
    first: dict[str, tuple[str, int]] = {}
    for target, modules in (item for adapter in adapters for item in adapter.targets.items()):
        size = modules[0].kind, modules[0].factors.in_features
        if first.setdefault(target, size) != size:
            return True
    return len(set().union(*kinds)) > 1


def _stacks_of(adapter: LoraAdapter) -> dict[str, set[str]]:
    """What stands behind the number of a layer, by what stands in front of it."""
    stacks: dict[str, set[str]] = {}
    for name in adapter.targets:
        front, *behind = _NUMBER.split(name, maxsplit=1)
        for rest in behind:
            stacks.setdefault(front, set()).add(_NUMBER.sub(_ANY_NUMBER, rest))
    return stacks


def _may_be_one(own: Mapping[str, set[str]], other: Mapping[str, set[str]]) -> bool:
    """Whether a stack of layers that only one adapter has may be one that only the other has, by another name."""

    def alone(stacks: Mapping[str, set[str]], others: Mapping[str, set[str]]) -> set[tuple[frozenset[str], str]]:
        fronts = stacks.keys() - others.keys()
        return {(frozenset(_STACKS.findall(front)), behind) for front in fronts for behind in stacks[front]}

    return not alone(own, other).isdisjoint(alone(other, own))


def without_wrapper(name: str) -> str:
    """The name that a module of a text model inside another model has in the text model alone."""
    return ".".join(word for word in name.split(".") if word != _WRAPPER)


def recorded_places(places: Mapping[str, BasePlace]) -> dict[str, RecipePlace]:
    """The same for a document: one entry for all layers and experts, whose numbers are `*`, where that says it all."""
    whole = {name: RecipePlace(place.name, place.part, place.parts, place.turned) for name, place in places.items()}
    short: dict[str, RecipePlace] = {}
    for name, place in whole.items():
        if _NUMBER.findall(name) == _NUMBER.findall(place.base):
            short[_NUMBER.sub(_ANY_NUMBER, name)] = replace(place, base=_NUMBER.sub(_ANY_NUMBER, place.base))
        else:
            short[name] = place
    return short if read_places(short, places) == places else whole


def read_places(recorded: Mapping[str, RecipePlace], names: Iterable[str]) -> dict[str, BasePlace]:
    """The inverse of `recorded_places`, of these names."""
    found = {}
    for name in names:
        entry = recorded.get(name) or recorded.get(_NUMBER.sub(_ANY_NUMBER, name))
        if entry is None:
            continue
        base = entry.base
        for digits in _NUMBER.findall(name) if _ANY_NUMBER in base else ():
            base = base.replace(_ANY_NUMBER, digits, 1)
        target, _, expert = base.removesuffix("]").partition("[")
        number = int(expert) if re.fullmatch(r"\d{1,6}", expert, re.ASCII) else None
        found[name] = BasePlace(target, number, entry.part, entry.parts, entry.turned)
    return found


def older_places(adapter: LoraAdapter, base: Mapping[str, BaseModule]) -> dict[str, BasePlace]:
    """The places by a recipe from before they were kept: of a text model inside another one, and of experts' layers."""
    names = list(adapted_names(adapter))
    plain = {name: without_wrapper(name) for name in names}
    fits = all(plain[target] in base for target in adapter.targets) and len(set(plain.values())) == len(plain)
    if fits and not all(target in base for target in adapter.targets):
        return {name: BasePlace(target) for name, target in plain.items()}
    return _older_expert_places(names, base)


def _target(moved: Mapping[str, BasePlace], name: str) -> str:
    return moved[name].target if name in moved else name


def _of_kind(module: LoraModule, name: str, base: BaseModule | None, *, turned: bool) -> LoraModule:
    """A matrix of a parameter is a layer's where the base has a layer there, and the other way round."""
    kind = module.kind
    if base is not None and kind_of(base).matrix == kind_of(module).matrix:
        kind = base.kind
    factors = TurnedExpert(module.factors) if turned else module.factors
    same = (name, kind) == (module.name, module.kind) and not turned
    return module if same else replace(module, name=name, kind=kind, factors=factors)


def _twice(adapter: LoraAdapter, target: str, name: str) -> BaseModelMismatch:
    return BaseModelMismatch(f"{adapter.reference} adapts {target} twice, once as {name}")


# The spellings that recipes before schema 4 rely on.
_OLDER_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERT = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<expert>\d{1,4})\.(?P<part>\w+)", re.ASCII)


def _fused_experts(
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


def _older_expert_places(names: Iterable[str], base: Mapping[str, BaseModule]) -> dict[str, BasePlace]:
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


@dataclass(frozen=True)
class OpenOrder:
    """What a config does not say.

    Args:
        field: that would say it.
        taken: its value for the order that is taken.
        other: for the other one.
        why: that other one may be meant.
    """

    field: str
    taken: str
    other: str
    why: str


def open_orders(adapter: LoraAdapter) -> tuple[OpenOrder, ...]:
    """What is open of an adapter; nothing without experts that are kept in parameters."""
    config, found = adapter.config, []
    kept = [modules for modules in adapter.targets.values() if kind_of(modules[0]).of_experts]
    if not kept or not config.target_parameters:
        return ()
    several = any(len(modules) > 1 and modules[0].factors.rank > 1 for modules in kept)
    if config.made_by_unsloth and config.lora_B_layout is None and several:
        why = "unsloth wrote it, and until September 2026 kept lora_B expert after expert"
        found.append(OpenOrder("lora_B_layout", RANK_MAJOR, GROUPED_BY_EXPERT, why))
    square = any(modules[0].factors.in_features == modules[0].factors.out_features for modules in kept)
    if config.peft_version is None and square:
        why = "PEFT before 0.20 kept lora_A and lora_B the other way round, which a square matrix does not show"
        found.append(OpenOrder("peft_version", "0.20.0", "0.17.0", why))
    return tuple(found)


def warn_of_open_orders(adapters: Sequence[LoraAdapter], progress: Progress) -> None:
    """Names each adapter with what is open, how it is read, and what to write into its config."""
    for adapter in adapters:
        for order in open_orders(adapter):
            progress.warn(
                f"{adapter.reference}: {order.why}; its experts are read as PEFT reads them. If that is wrong, write "
                f'"{order.field}": "{order.other}" into its adapter_config.json, else "{order.taken}"'
            )


def read_otherwise(adapter: LoraAdapter, order: OpenOrder) -> LoraAdapter:
    """The adapter by the other order, as the base names it."""
    modules = dict(adapter.modules)
    for updates in adapter.targets.values():
        first = updates[0].factors
        if not kind_of(updates[0]).of_experts:
            continue
        if order.field == "lora_B_layout":
            modules |= _grouped(updates)
        elif first.in_features == first.out_features:
            modules |= {m.name: replace(m, factors=TurnedExpert(m.factors)) for m in updates}
    return replace(adapter, modules=modules)


def _grouped(updates: Sequence[LoraModule]) -> dict[str, LoraModule]:
    """The experts of a parameter whose lora_B was read rank after rank, read expert after expert."""
    turned = isinstance(updates[0].factors, TurnedExpert)
    stored = [m.factors.stored if isinstance(m.factors, TurnedExpert) else m.factors for m in updates]
    whole = join_experts(stored, stored[0].rank)
    parts_A, parts_B = split_experts(whole.lora_A, whole.lora_B, len(updates), by_expert=True)
    found = {}
    for m, lora_A, lora_B in zip(updates, torch.unbind(parts_A), torch.unbind(parts_B), strict=True):
        factors = Factors(lora_A, lora_B, m.factors.scaling)
        found[m.name] = replace(m, factors=TurnedExpert(factors) if turned else factors)
    return found


def turned_by_version(peft_version: tuple[int, ...] | None, *, transposed: bool) -> bool:
    """Whether the PEFT of this version keeps lora_A and lora_B of experts the other way round; False where it is not
    known.

    Args:
        peft_version: major and minor.
        transposed: whether the parameter is (E, in, out).
    """
    if peft_version is None or peft_version >= (0, 20):
        return False
    return peft_version >= (0, 19) or not transposed
