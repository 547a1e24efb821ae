"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them but without compiling a stranger's regular
expression.

PEFT takes the first key with `re.match(rf"(.*\\.)?({key})$", module)` (peft/utils/other.py, get_pattern_key). Of that
language the keys that occur are read: a name or the end of one, with `^` for the beginning, `\\.` for a dot and `.` for
any character, and `.*\\.` in front, as PEFT writes it for experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, TypeVar

Value = TypeVar("Value")

Start = Literal["beginning", "component", "below"]  # of the name, of any component, of any but the first

_PARENT = r".*\."
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_\-]|\\?\.)+\$?")


def parse_pattern(key: str) -> tuple[Start, str] | None:
    """Where a key may begin, and its characters, of which "\\0" stands for any; None if it is another regular
    expression."""
    body = key.removeprefix(_PARENT)
    if not _PATTERN.fullmatch(body) or (body != key and body.startswith("^")):
        return None
    start: Start = "below" if body != key else "beginning" if key.startswith("^") else "component"
    body = body.removeprefix("^").removesuffix("$")
    return start, body.replace("\\.", "\\").replace(".", "\0").replace("\\", ".")


def lookup(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key that matches `module`, as PEFT would look it up."""
    for key, value in pattern.items():
        parsed = parse_pattern(key)
        if parsed is not None and _matches(*parsed, module):
            return value
    return default


def _matches(start: Start, characters: str, module: str) -> bool:
    place = len(module) - len(characters)
    if place < 0 or (place > 0 and (start == "beginning" or module[place - 1] != ".")):
        return False
    if place == 0 and start == "below":
        return False
    return all(expected in ("\0", found) for expected, found in zip(characters, module[place:], strict=True))
