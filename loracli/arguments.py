"""What comes from Python, held against the types that a public function or a dataclass of settings declares.

The command line hands over what it has parsed. From Python anything may come, and some of it would go far before it
fails, or not fail at all: one text where several are meant is taken letter by letter, and 2.5 folds are counted to.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from loracli.errors import UsageError

_Result = TypeVar("_Result")

_NUMBERS: tuple[type, ...] = (int, float)
_QUOTED = 60  # characters of a value in a message
_NAMES: dict[Any, tuple[str, str]] = {  # one, and several
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "True and False"),
    os.PathLike: ("a path", "paths"),
    Path: ("a path", "paths"),
    Mapping: ("a mapping", "mappings"),
    types.NoneType: ("None", "None"),
}


class _Other(Exception):
    """A value is of another type."""


def check_declared(value: Any) -> None:
    """Of a frozen dataclass, in its `__post_init__`: every field is of its type, numbers of other libraries as Python's
    own and several values in the kind of sequence that is declared.

    Raises:
        UsageError: for the first field that is not.
    """
    hints = _hints(value.__class__)
    for field in fields(value):
        given = getattr(value, field.name)
        declared = as_declared(hints[field.name], given, field.name)
        if declared is not given:
            object.__setattr__(value, field.name, declared)


def call_declared(function: Callable[..., _Result], args: Sequence[Any], options: Mapping[str, Any]) -> _Result:
    """Calls a function with arguments that are of the types it declares.

    Raises:
        TypeError: if it has not such arguments.
        UsageError: if one is of another type.
    """
    bound = _signature(function).bind(*args, **options)
    hints = _hints(function)
    for name, given in bound.arguments.items():
        if bound.signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = as_declared(hints.get(name, Any), given, name)
    return function(*bound.args, **bound.kwargs)


def as_declared(kind: Any, value: Any, name: str) -> Any:
    """The value as a type; what is no such type, but Python's own reading of it, is converted.

    Raises:
        UsageError: if it is of another type.
    """
    try:
        return _taken(kind, value)
    except _Other:
        expected = _said(kind)
        hint = _example(kind, value)
        several = value if isinstance(value, (list, tuple)) else [value]
        if name.endswith("data") and any(isinstance(record, Mapping) for record in several):
            hint = "of records in memory write a file, json.dumps(record) a line, and give its path"
        elif isinstance(value, str) and "a list" in expected:
            parts = [part.strip() for part in value.split(",")]
            hint = f"for {'one' if len(parts) == 1 else 'several'} of them give {parts}"
        raise UsageError(f"{name} is {repr(value)[:_QUOTED]}, but should be {expected}", hint=hint) from None


def _example(kind: Any, value: Any) -> str | None:
    """The call of a class of settings that was meant: by its first field, by the names of its fields, or by words for
    what it turns on; None where it takes none of these."""
    wanted: Any = next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), None)
    words = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((value,) if isinstance(value, (str, Path)) else (), {}),
        ((), value if isinstance(value, dict) else {}),
        ((), {str(word).replace("-", "_"): True for word in words}),
    ]
    for args, options in ways if wanted is not None else ():
        if not (args or options):
            continue
        try:
            wanted(*args, **options)
        except (TypeError, UsageError):
            continue
        said = ", ".join([*map(repr, args), *(f"{name}={given!r}" for name, given in options.items())])
        return f"for example {wanted.__name__}({said})"
    return None


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


_signature = lru_cache(inspect.signature)


def _taken(kind: Any, value: Any) -> Any:
    plain, arguments = get_origin(kind) or kind, get_args(kind)
    if plain is Annotated:
        return _taken(arguments[0], value)
    if plain in (Union, types.UnionType):
        return _first_taken(arguments, from_home(value) if Path in arguments else value)
    if plain is Literal:
        return _kept(value, fits=value in arguments)
    if plain is bool or isinstance(value, bool):
        return _kept(value, fits=isinstance(value, bool) and plain in (bool, Any, object))
    if plain is int and isinstance(value, Integral):
        return int(value)
    if plain is float and isinstance(value, Real):
        return value if type(value) in _NUMBERS else float(value)
    if plain is Path and isinstance(value, (str, os.PathLike)):
        value = from_home(value)
        return value if isinstance(value, Path) else Path(value)
    if plain in (Sequence, tuple, Iterable):
        return _taken_each(plain, arguments, value)
    checked = isinstance(plain, type) and plain is not Any and not getattr(plain, "_is_protocol", False)
    return _kept(value, fits=not checked or isinstance(value, plain))


def from_home(value: Any) -> Any:
    """A path that begins with `~/` in the user's home, as a shell would have given it; anything else as it is."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text.startswith("~/"):
        return value
    return type(value)(os.path.expanduser(text)) if isinstance(value, (str, Path)) else os.path.expanduser(text)


def _kept(value: Any, *, fits: bool) -> Any:
    if not fits:
        raise _Other
    return value


def _first_taken(kinds: Iterable[Any], value: Any) -> Any:
    for kind in kinds:
        try:
            return _taken(kind, value)
        except _Other:
            continue
    raise _Other


def _taken_each(plain: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """Several values; one text is none, though Python would go through its letters."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _Other
    if plain is Iterable:
        return value  # which may be waited for, one by one
    items = tuple(_taken(arguments[0], item) for item in value)
    same = isinstance(value, plain) and all(one is other for one, other in zip(items, value, strict=True))
    return value if same else items


def _said(kind: Any, *, several: bool = False) -> str:
    """What is expected, in words."""
    plain, arguments = get_origin(kind) or kind, get_args(kind)
    if plain is Annotated:
        return _said(arguments[0], several=several)
    if plain in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(option, several=several) for option in arguments))
    if plain is Literal:
        return " or ".join(map(repr, arguments))
    if plain in (Sequence, tuple, Iterable):
        return f"a list of {_said(arguments[0], several=True)}"
    if hasattr(plain, "said_as"):  # a class that is not public
        plain = plain.said_as
    return _NAMES[plain][several] if plain in _NAMES else plain.__name__
