"""What a value on a line must be, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loracli.calibration.file_forms import FileForm

WayOut = Callable[[FileForm], str]  # the hint that mends a whole file of such lines


class LineError(Exception):
    """`path: reason` of one bad line; the caller adds the place.

    Args:
        reason: with the path.
        way_out: what else than mending the line by hand helps, where something does.
    """

    def __init__(self, reason: str, *, way_out: WayOut | None = None) -> None:
        super().__init__(reason)
        self.way_out = way_out


def check_text(value: Any, path: str, *, may_be_empty: bool) -> str:
    """The value, if it is a string, and not only white space unless it may be empty."""
    if not isinstance(value, str):
        raise LineError(f"{path}: expected a string, got {kind_of(value)}")
    if not may_be_empty and not value.strip():
        raise LineError(f"{path}: empty")
    return value


def kind_of(value: Any) -> str:
    """`a string`, `a number`, `null`, ..., as JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else kinds[type(value)]


def shown(value: Any) -> str:
    """The value for a message: a string as JSON has it, cut to a length; of anything that holds others, its kind."""
    if isinstance(value, (list, dict)):
        return kind_of(value)
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


_EMPTY = ("", "[]", "{}", "null")  # as a table of texts keeps them


def is_nothing(value: Any) -> bool:
    """Whether a field says nothing: null, false, an empty text, one of an empty list or object, or such in a list."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, (list, dict)):
            left += item.values() if isinstance(item, dict) else item
        elif item is not None and item is not False and not (isinstance(item, str) and item.strip() in _EMPTY):
            return False
    return True
