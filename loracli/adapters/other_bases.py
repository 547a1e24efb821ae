"""Adapters that name another base than the one they are composed for. Names are all there is to go by: what the user
asked for is done, shapes are checked, and each adapter that names something else is said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loracli.hub.references import is_hub_id
from loracli.progress import Progress

# What the names of quantised copies end in: unsloth/NAME-unsloth-bnb-4bit, mlx-community/NAME-8bit, TheBloke/NAME-GPTQ.
_QUANTISED = re.compile(r"((-unsloth)?(-bnb)?-[48]bit|-gptq|-awq)$")


@dataclass(frozen=True)
class OtherBase:
    """What one adapter names.

    Args:
        adapter: its reference.
        model: the base that it names.
        copy_of: the base, or what another adapter names, if by the names that is the same model and one of the two is
            quantised; None otherwise.
        harmless: whether it is such a copy of the base itself.
    """

    adapter: str
    model: str
    copy_of: str | None
    harmless: bool

    def __str__(self) -> str:
        said = "" if self.copy_of is None else f", by its name the same model as {self.copy_of}, quantised"
        return f"{self.adapter} names {self.model}{said}"


def other_bases(
    base: str, claims: Mapping[str, str | None], *, directory: bool = False, saved_as: str | None = None
) -> tuple[OtherBase, ...]:
    """The adapters that name another base than this one, in their order. A path, which only its author has, is no name.

    A directory may be called anything: adapters that name a model of its last name mean it, and so do adapters that all
    name one model where nothing says what is in the directory.

    Args:
        base: a Hub id, or the name of a directory.
        claims: what each adapter names, by its reference.
        directory: whether `base` is only that.
        saved_as: the Hub id that a directory's config names, None without one.
    """
    stated = {adapter: model for adapter, model in claims.items() if model and is_hub_id(model)}
    own = [name for name in (base, saved_as) if name]
    taken = directory and saved_as is None and len({_plain(model) for model in stated.values()}) == 1
    found = []
    for adapter, model in stated.items():
        quantised = _is_quantised(model)
        meant = directory and (_last(model) == _last(base) or (taken and not quantised))
        if meant or model.lower() in (name.lower() for name in own):
            continue
        same = [
            name
            for name in (*own, *(stated.values() if quantised else ()))
            if _plain(name) == _plain(model) and name != model
        ]
        copies = [name for name in same if quantised != _is_quantised(name)] or ([base] if taken else [])
        copy_of = copies[0] if copies else None
        found.append(OtherBase(adapter, model, copy_of, taken or copy_of in own))
    return tuple(found)


def say_other_bases(base: str, others: Sequence[OtherBase], progress: Progress) -> None:
    """One warning for all that name another model, and one note for those that name a quantised copy of the base."""
    said = {harmless: "; ".join(str(o) for o in others if o.harmless == harmless) for harmless in (False, True)}
    if said[False]:
        progress.warn(f"adapters of other bases than {base}: {said[False]}; only shapes are checked")
    if said[True]:
        progress.note(f"the base is {base}; {said[True]}")


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _plain(name: str) -> str:
    """The last part of a name without what quantised copies end in."""
    return _QUANTISED.sub("", _last(name))


def _is_quantised(name: str) -> bool:
    return _plain(name) != _last(name)
