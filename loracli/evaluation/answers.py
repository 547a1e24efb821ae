"""Whether an answer is right: by its text, by its last number.

exact      the reference itself, white space at the ends aside
contains   the reference somewhere in it, however written in capitals and spaced
numeric    its last number is the reference's last number, within a relative tolerance
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

# 1,234.5  -3  +2e-4  .5  1200. A comma counts between groups of three digits, a sign where no digit, letter or closing
# bracket stands before it: 5-3 holds 5 and 3.
_SIGN = r"(?:(?<![\w)\]])[-+])?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"{_SIGN}(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
TOLERANCE = 1e-4

Rule = Callable[[str, str], bool]  # of output and reference


def is_exact(output: str, reference: str) -> bool:
    """Whether they are the same text."""
    return output.strip() == reference.strip()


def contains(output: str, reference: str) -> bool:
    """Whether the reference is a part of the output."""
    return _plain(reference) in _plain(output)


def is_same_number(output: str, reference: str, *, tolerance: float = TOLERANCE) -> bool:
    """Whether both have a number, and the last ones differ by at most `tolerance` times the larger; a reference without
    one is answered by nothing."""
    found, wanted = last_number(output), last_number(reference)
    return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=tolerance)


def last_number(text: str) -> float | None:
    """The last number in decimal notation: an optional sign, thousands separators, an exponent. A fraction is read as
    its denominator, a percentage as what stands before the sign."""
    numbers = _NUMBER.findall(text)
    value = float(numbers[-1].replace(",", "")) if numbers else math.nan
    return value if math.isfinite(value) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
