"""JSON as strangers write it: what Python's parser lets pass and would bite later is refused.

Refused: duplicate keys (Python keeps the last), NaN, Infinity and numbers too large for a float, nesting that exhausts
the stack, here or in what is done with the value, integers of thousands of digits, and lone surrogates (they crash a
tokenizer later).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from loracli.errors import LoracatError, MalformedAdapter
from loracli.system.files import open_regular

_MAX_DEPTH = 100  # objects and lists within each other
_QUOTED = 1000  # characters of a key in a message
_NESTING = (dict, list)


class StrictJsonError(ValueError):
    """Raised with the reason, for the caller to add the place."""


def parse_json(data: bytes | str) -> Any:
    """The value of one JSON document.

    Args:
        data: UTF-8 bytes, or text.
    Raises:
        StrictJsonError: with the reason, and the column where there is one.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise StrictJsonError(f"not valid JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    except ValueError as error:
        raise StrictJsonError(str(error)) from None
    _check_depth(value)
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise StrictJsonError("a lone surrogate (\\ud800 to \\udfff) in a string") from None
    return value


def read_object(path: Path, most: int, refused: Callable[[str], LoracatError] | None = None) -> dict[str, Any]:
    """The JSON object of a regular file.

    Args:
        path: of the file.
        most: how many bytes of it are read.
        refused: makes the caller's error of the reason: `it is larger than 1048576 bytes`, `it is not a JSON object`,
            what `parse_json` says, or what the system says when it is opened; None for MalformedAdapter.
    Raises:
        MalformedAdapter, or what `refused` makes: for any of these reasons.
        LoracatError: if the disk fails while it is read.
    """
    with open_regular(path, refused) as file:
        data = file.read(most + 1)
    try:
        value = parse_json(data) if len(data) <= most else None
        reason = f"it is larger than {most} bytes" if len(data) > most else "it is not a JSON object"
    except StrictJsonError as error:
        value, reason = None, str(error)
    if not isinstance(value, dict):
        raise refused(reason) if refused else MalformedAdapter(reason, where=str(path))
    return value


def _check_depth(value: Any) -> None:
    """Raises StrictJsonError if the value is nested deeper than any document is: level by level, without recursion."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = (outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, _NESTING))
        level = [inner for part in parts for inner in part if isinstance(inner, _NESTING)]
        if not level:
            return
    raise StrictJsonError("nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError(f"the key {key[:_QUOTED]!r} appears twice in one object")
            seen.add(key)
    return result


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise StrictJsonError(f"{text[:40]} is too large for a number")
    return value


def _constant(name: str) -> NoReturn:
    raise StrictJsonError(f"{name} is not a JSON number")
