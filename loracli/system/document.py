"""Frozen dataclasses to JSON and back, with every problem of a document found at once.

A field that came later (`added`) is left out of the document where it has its default. So a document says no more than
it has to, older readers take what holds nothing new, and `schema_of` gives the first schema that has all of it.

What is decoded is a stranger's: the work is linear in its size, and of its text a problem quotes a beginning.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_PROBLEMS = 1000  # of one document that are listed
_QUOTED = 60  # characters of a value in a problem
_QUOTED_KEY = 200  # and of a key in a path
_SINCE = "since"  # in the metadata of a field


@dataclasses.dataclass(frozen=True)
class Matches:
    """Of text, in `Annotated`: what it has to be, as a regular expression for all of it, and in words."""

    pattern: re.Pattern[str]
    what: str


@dataclasses.dataclass(frozen=True)
class AtMost:
    """Of a list or an object, in `Annotated`: how many items it may have."""

    items: int


def _document_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that belong to its document: those by which two values are compared."""
    return [field for field in dataclasses.fields(kind) if field.compare]


def added(since: int, default: Any) -> Any:
    """A field that documents have from the schema `since` on, and only where it is not the default."""
    return dataclasses.field(default=default, metadata={_SINCE: since})


def schema_of(value: Any, first: int) -> int:
    """The first schema, `first` or later, that has every field of the value's document."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        written = _written(value)
        return max([first, *(int(f.metadata.get(_SINCE, first)) for f in written),
                    *(schema_of(getattr(value, f.name), first) for f in written)])  # fmt: skip
    if isinstance(value, (dict, tuple, list)):
        items = value.values() if isinstance(value, dict) else value
        return max((schema_of(item, first) for item in items), default=first)
    return first


def encode(value: Any) -> Any:
    """The value in JSON's own types; a path as its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in _written(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def document_sha256(document: Any) -> str:
    """sha256 of a document as JSON with sorted keys and without white space, in UTF-8: the order of keys and the layout
    of a file do not change it, and a float counts by its value."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()


def dtype_name(dtype: object) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def decode(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The value as `kind`: dataclasses, tuples, string-keyed dicts, unions, literals and JSON's own types.

    Args:
        kind: the type wanted; `Annotated` with `Matches` or `AtMost` for more than a type says.
        value: as JSON gives it.
        path: of the value in the document, for the problems.
        problems: takes `path: reason` of everything that does not fit; what is returned is of use only if it stays
            empty.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        if _keeps(arguments[1], value, path, problems):
            return decode(arguments[0], value, path, problems)
        return value
    if dataclasses.is_dataclass(kind):
        return _fields(kind, value, path, problems)
    if origin in (Union, types.UnionType):
        fitting = next((option for option in arguments if _fits(option, value)), arguments[0])
        return decode(fitting, value, path, problems)
    if origin is Literal:
        if value not in arguments:
            _say(problems, f"{path}: expected one of {', '.join(map(repr, arguments))}, got {repr(value)[:_QUOTED]}")
        return value
    if not _fits(kind, value):
        _say(problems, f"{path}: expected {_name(kind)}, got {json.dumps(value)[:_QUOTED]}")
        return value
    if origin is dict:
        keys, items = arguments
        return {
            decode(keys, key, f"a key of {path}", problems): decode(
                items, item, f"{path}[{_short(key, _QUOTED_KEY)}]", problems
            )
            for key, item in value.items()
        }
    if origin is tuple:
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        if not repeated and len(arguments) != len(value):
            _say(problems, f"{path}: expected {len(arguments)} values, got {len(value)}")
            return value
        kinds = [arguments[0]] * len(value) if repeated else arguments
        return tuple(decode(k, v, f"{path}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    return float(value) if kind is float else value


def _keeps(limit: Any, value: Any, path: str, problems: list[str]) -> bool:
    """Whether a value is within the limit; one of another type is left to `decode`."""
    if isinstance(limit, AtMost) and isinstance(value, (list, dict)) and len(value) > limit.items:
        _say(problems, f"{path}: {len(value)} items; at most {limit.items} are read")
        return False
    if isinstance(limit, Matches) and isinstance(value, str) and not limit.pattern.fullmatch(value):
        _say(problems, f"{path}: expected {limit.what}, got {_short(value, _QUOTED)}")
        return False
    return True


def _say(problems: list[str], problem: str) -> None:
    """Adds a problem; after many of them there is no use in more."""
    if len(problems) < MAX_PROBLEMS:
        problems.append(problem)


def _short(text: str, most: int) -> str:
    """The text in quotes, or a beginning of it, so that no path grows with a stranger's keys."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _fields(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        _say(problems, f"{path or 'the document'}: expected an object, got {json.dumps(value)[:_QUOTED]}")
        return value
    hints = _hints(kind)
    names = {f.name: _SINCE in f.metadata for f in _document_fields(kind)}  # and whether it may be left out
    prefix = f"{path}." if path else ""
    missing = [name for name, added in names.items() if name not in value and not added]
    for name in missing:
        _say(problems, f"{prefix}{name}: missing")
    for name in value:
        if name not in names:
            _say(problems, f"{prefix}{name[:_QUOTED_KEY]}: unknown")
    if missing:
        return value
    there = [name for name in names if name in value]
    return kind(**{name: decode(hints[name], value[name], f"{prefix}{name}", problems) for name in there})


def _written(value: Any) -> list[dataclasses.Field[Any]]:
    """The fields that stand in a value's document."""
    return [f for f in _document_fields(value) if _SINCE not in f.metadata or getattr(value, f.name) != f.default]


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Annotated:
        return _fits(get_args(kind)[0], value)
    plain = get_origin(kind) or kind
    if plain is types.NoneType:
        return value is None
    if plain is bool or isinstance(value, bool):
        return plain is bool and isinstance(value, bool)
    if plain is float and isinstance(value, int):
        return abs(value) < 1 << 53  # a larger one would change, or not fit at all
    accepted = {float: (int, float), tuple: (list,), dict: (dict,), int: (int,), str: (str,)}
    return isinstance(value, accepted.get(plain, ()))


def _name(kind: Any) -> str:
    plain = get_origin(kind) or kind
    names = {tuple: "a list", dict: "an object", str: "text", bool: "true or false", float: "a number"}
    return names.get(plain, "a whole number" if plain is int else str(kind))
