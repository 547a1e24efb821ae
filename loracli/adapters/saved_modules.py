"""Modules that adapters saved whole (PEFT's modules_to_save): which of them the composition has.

Such a module replaces the base's, so several cannot be added up. A policy decides:

    refuse       adapters that have any are refused; the default
    pick:NAME    those of one adapter; what others saved is left out, and said
    average      of each tensor the plain mean over the adapters that saved it, in float64, rounded once

A recipe keeps `pick:#2` for its second adapter, whatever that one is called later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, SavedTensor, widest_dtype
from loracli.errors import IncompatibleAdapters, UnsupportedAdapter, UsageError
from loracli.progress import SILENT, Progress

REFUSE, AVERAGE, PICK = "refuse", "average", "pick:"
_PLACE = re.compile(r"#([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class SavedModules:
    """The modules that replace the base's.

    Args:
        policy: that chose them.
        modules: their paths in the base, sorted.
        sources: of each parameter, by its path, the adapters that it comes from and their tensors.
    """

    policy: str
    modules: tuple[str, ...]
    sources: Mapping[str, tuple[tuple[LoraAdapter, SavedTensor], ...]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter."""
        return {name: sources[0][1].shape for name, sources in self.sources.items()}

    @property
    def dtype(self) -> torch.dtype:
        """That holds what was saved without loss."""
        return widest_dtype([tensor.dtype for sources in self.sources.values() for _, tensor in sources])

    def read(self, parameter: str) -> Tensor:
        """A parameter: as it was saved where it comes from one adapter, else the mean in float64."""
        (adapter, tensor), *others = self.sources[parameter]
        first = adapter.read_saved(tensor)
        if not others:
            return first
        total = first.double()
        for adapter, tensor in others:
            total += adapter.read_saved(tensor)
        return total / (1 + len(others))


def check_policy(text: str) -> None:
    """Raises UsageError unless `text` is `refuse`, `average` or `pick:` and a name."""
    if text not in (REFUSE, AVERAGE) and not (text.startswith(PICK) and len(text) > len(PICK)):
        raise UsageError(f"--modules-to-save {text} is not one of {REFUSE}, {AVERAGE}, {PICK}NAME")


def settled_policy(text: str, adapters: Sequence[LoraAdapter], names: Sequence[str]) -> str:
    """The policy with the picked adapter by its place, as a recipe keeps it.

    Args:
        text: as it was typed.
        adapters: N adapters.
        names: what each is called in tables.
    Raises:
        UsageError: if it is no policy, there is nothing for it to decide, or the name is no adapter's or several ones'.
        UnsupportedAdapter: with `refuse`, if an adapter has such modules.
    """
    check_policy(text)
    having = [adapter for adapter in adapters if adapter.saved]
    if text == REFUSE:
        if having:
            raise UnsupportedAdapter(
                f"{having[0].reference} has modules_to_save: {', '.join(having[0].saved)}",
                hint=f"say which modules the composition has: --modules-to-save {PICK}NAME, or {AVERAGE}",
            )
        return text
    if not having:
        raise UsageError("no adapter has modules_to_save", hint="leave --modules-to-save out")
    if text == AVERAGE:
        return text
    place = _place_of(text.removeprefix(PICK), adapters, names)
    if not adapters[place].saved:
        raise UsageError(f"{names[place]} has no modules_to_save", hint=_choices(adapters, names))
    return f"{PICK}#{place + 1}"


def saved_modules(policy: str, adapters: Sequence[LoraAdapter], *, progress: Progress = SILENT) -> SavedModules | None:
    """What a settled policy makes of these adapters; None if no module is replaced.

    Raises:
        UsageError, UnsupportedAdapter: as `settled_policy`, for a policy that does not fit the adapters.
        IncompatibleAdapters: if tensors to be averaged differ in shape, or an adapter changes what is replaced.
    """
    policy = settled_policy(policy, adapters, [adapter.reference for adapter in adapters])
    if policy == REFUSE:
        return None
    chosen = adapters if policy == AVERAGE else [adapters[int(policy.removeprefix(f"{PICK}#")) - 1]]
    replaced = {module for adapter in chosen for module in adapter.saved}
    modules = sorted(replaced)
    for adapter in adapters:
        left_out = sorted(adapter.saved.keys() - replaced)
        if left_out:
            progress.note(f"modules_to_save of {adapter.reference} left out: {', '.join(left_out)}")
        clash = next((name for name in adapter.modules if not replaced.isdisjoint(_within(name))), None)
        if clash is not None:
            owner = next(one for one in chosen if not one.saved.keys().isdisjoint(_within(clash)))
            who, without = ("it", "it") if owner is adapter else (owner.reference, "one of the two")
            raise IncompatibleAdapters(
                f"{adapter.reference} adapts {clash}, which {who} replaces as one of its modules_to_save",
                hint=f"pick an adapter that does not replace it, or compose without {without}",
            )
    sources: dict[str, tuple[tuple[LoraAdapter, SavedTensor], ...]] = {}
    for module in modules:
        owners = [adapter for adapter in chosen if module in adapter.saved]
        shapes = [{name: t.shape for name, t in owner.saved[module].items()} for owner in owners]
        other = next((place for place, shape in enumerate(shapes) if shape != shapes[0]), None)
        if other is not None:
            raise IncompatibleAdapters(
                f"{owners[0].reference} and {owners[other].reference} saved {module} with other tensors or shapes",
                hint=f"choose one of them: --modules-to-save {PICK}NAME",
            )
        for name in sorted(shapes[0]):
            sources[name] = tuple((owner, owner.saved[module][name]) for owner in owners)
    return SavedModules(policy, tuple(modules), sources)


def _within(module: str) -> Iterator[str]:
    """The module and every module around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _place_of(name: str, adapters: Sequence[LoraAdapter], names: Sequence[str]) -> int:
    numbered = _PLACE.fullmatch(name)
    if numbered:
        if int(numbered[1]) > len(adapters):
            raise UsageError(f"there is no adapter {name}", hint=_choices(adapters, names))
        return int(numbered[1]) - 1
    called = [{n, a.reference, a.path.name if a.source.path else n} for n, a in zip(names, adapters, strict=True)]
    places = [place for place, own in enumerate(called) if name in own]
    if len(places) != 1:
        problem = "is none of the adapters" if not places else "names several of the adapters"
        raise UsageError(f"--modules-to-save {PICK}{name}: {name} {problem}", hint=_choices(adapters, names))
    return places[0]


def _choices(adapters: Sequence[LoraAdapter], names: Sequence[str]) -> str:
    having = [f"{n} (#{i + 1})" for i, (n, a) in enumerate(zip(names, adapters, strict=True)) if a.saved]
    return f"adapters with modules_to_save: {', '.join(having)}"
