"""An adapter by the names of a base, which may call its modules otherwise than the model that the adapter was trained
in.

Which module of the base is meant is settled where the base is (model/modules.py), and kept in what is written, so
that it holds without the base too and with any later version of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.adapters.base_module import BaseModule, RecipePlace
from loracli.adapters.experts import TurnedExpert
from loracli.adapters.names import BasePlace, numbered_name, target_of
from loracli.adapters.on_base import fused_experts, older_expert_places
from loracli.errors import BaseModelMismatch

Value = TypeVar("Value")

WRAPPER = "language_model"
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
        modules |= fused_experts(adapter.reference, parameter, of_parameter, base.get(parameter))
    if len(modules) == len(adapter.modules) and all(modules.get(n) is m for n, m in adapter.modules.items()):
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
    names = {
        target: target if modules[0].kind == "experts" else f"{target}.weight"
        for target, modules in adapter.targets.items()
    }
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
    kinds = [{m[0].kind == "experts" for n, m in a.targets.items() if "experts" in n.split(".")} for a in adapters]
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
    return ".".join(word for word in name.split(".") if word != WRAPPER)


def recorded_places(places: Mapping[str, BasePlace]) -> dict[str, RecipePlace]:
    """The same for a document: one entry for all layers and experts, whose numbers are `*`, where that says it all."""
    short: dict[str, RecipePlace] = {}
    for name, place in places.items():
        base = place.target if place.expert is None else numbered_name(place.target, place.expert)
        same = _NUMBER.findall(name) == _NUMBER.findall(base)
        words = [_NUMBER.sub(_ANY_NUMBER, word) if same else word for word in (name, base)]
        short[words[0]] = RecipePlace(words[1], place.part, place.parts, place.turned)
    if read_places(short, places) == places:
        return short
    return {
        name: RecipePlace(
            place.target if place.expert is None else numbered_name(place.target, place.expert),
            place.part,
            place.parts,
            place.turned,
        )
        for name, place in places.items()
    }


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
    return older_expert_places(names, base)


def _target(moved: Mapping[str, BasePlace], name: str) -> str:
    return moved[name].target if name in moved else name


def _of_kind(module: LoraModule, name: str, base: BaseModule | None, *, turned: bool) -> LoraModule:
    """A matrix of a parameter is a layer's where the base has a layer there, and the other way round."""
    kind = module.kind
    if base is not None and {kind, base.kind} == {"linear", "parameter"}:
        kind = "parameter" if base.kind == "parameter" else "linear"
    factors = TurnedExpert(module.factors) if turned else module.factors
    same = (name, kind) == (module.name, module.kind) and not turned
    return module if same else replace(module, name=name, kind=kind, factors=factors)


def _twice(adapter: LoraAdapter, target: str, name: str) -> BaseModelMismatch:
    return BaseModelMismatch(f"{adapter.reference} adapts {target} twice, once as {name}")
