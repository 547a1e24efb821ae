"""Adapters that were trained inside a model of text and images, on a base that is the text model alone.

There a module of the text model has one component more in its path, `model.language_model.layers.0` or
`language_model.model.layers.0` for `model.layers.0`. Only the base tells which of the two it is, so nothing is renamed
without its names, and then all modules of an adapter or none.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TypeVar

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import target_of

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
