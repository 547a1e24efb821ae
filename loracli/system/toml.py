"""TOML as strangers write it: a parser's work and memory grow with the square of the dots in a key, and Python reads no
whole number of thousands of digits; both are refused before they cost anything.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_DOTS = 8  # in a key
_QUOTED = 60  # characters of a key in a message

# Of TOML, what tells where its keys are: strings of four kinds, comments, dots, and what stands between keys. What
# is not closed reaches to the end, where the parser would stop too. No alternative fails once it has begun, so nothing
# is tried twice; possessive groups, which would say so, go wrong in Python 3.11.2.
_TOKENS = re.compile(
    r'"{3}(?:[^"\\]+|\\.?|"(?!""))*(?:"{3,5}|\Z)'
    r"|'{3}.*?(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]+|\\.?)*"?'
    r"|'[^'\n]*+'?"
    r"|\#[^\n]*+|[.=\[\]{},\n]",
    re.DOTALL,
)
_BETWEEN = frozenset("=[]{},\n")


class TomlError(ValueError):
    """Raised with the reason, for the caller to add the place."""


class TomlTooLarge(TomlError):
    """Raised for TOML that costs more to read than it can be worth."""


def parse_toml(data: bytes) -> dict[str, Any]:
    """The tables of one TOML document.

    Args:
        data: UTF-8.
    Raises:
        TomlTooLarge: for a key of more than 8 dots outside of quotes, or a whole number of thousands of digits.
        TomlError: for what is not TOML.
    """
    try:
        text = data.decode("utf-8-sig")
        _check_dots(text)
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TomlError(str(error)) from None
    except TomlError:
        raise
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise TomlTooLarge("a whole number of thousands of digits") from None


def _check_dots(text: str) -> None:
    """Raises TomlTooLarge if a key or the header of a table has too many parts.

    Counted are the dots outside of strings and comments from one of `= [ ] { } ,` or the end of a line to the next.
    """
    begin = dots = 0
    for found in _TOKENS.finditer(text):
        token = found.group()
        if token == ".":
            dots += 1
            if dots > MAX_DOTS:
                key = text[begin : found.end()].strip()[:_QUOTED]
                line = text.count("\n", 0, begin) + 1
                raise TomlTooLarge(f"line {line}: the key {key!r}... has more than {MAX_DOTS} dots")
        elif token in _BETWEEN:
            begin, dots = found.end(), 0
