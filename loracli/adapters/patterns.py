"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them but without compiling a stranger's regular
expression.

PEFT takes the first key with `re.match(rf"(.*\\.)?({key})$", module)` (peft/utils/other.py, get_pattern_key). Of that
language the keys that occur are read: a name or the end of one, with `^` for the beginning, `\\.` for a dot and `.` for
any character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_\-]|\\?\.)+\$?")


def parse_pattern(key: str) -> tuple[bool, str] | None:
    """(anchored, characters) of a key, where "\\0" stands for any character; None if it is another regular
    expression."""
    if not _PATTERN.fullmatch(key):
        return None
    body = key.removeprefix("^").removesuffix("$")
    return key.startswith("^"), body.replace("\\.", "\\").replace(".", "\0").replace("\\", ".")


def lookup(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key that matches `module`, as PEFT would look it up."""
    for key, value in pattern.items():
        parsed = parse_pattern(key)
        if parsed is not None and _matches(*parsed, module):
            return value
    return default


def _matches(anchored: bool, characters: str, module: str) -> bool:
    start = len(module) - len(characters)
    if start < 0 or (start > 0 and (anchored or module[start - 1] != ".")):
        return False
    return all(expected in ("\0", found) for expected, found in zip(characters, module[start:], strict=True))
