"""Where records come from: `FILE`, `FILE:WEIGHT`, or `-` for standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loracli.errors import CalibrationError, UsageError

DataPaths: TypeAlias = str | Path | Sequence[str | Path]

STDIN = "-"
WEIGHTS = (1e-6, 1e6)  # least and greatest; losses are multiplied in float32


@dataclass(frozen=True)
class DataSource:
    """A file of records.

    Args:
        path: None for standard input.
        weight: how many times each scored token counts.
    """

    path: Path | None
    weight: float = 1.0

    def __str__(self) -> str:
        """As messages call it, so that an editor can open `file:line`."""
        return "<stdin>" if self.path is None else str(self.path)

    @property
    def name(self) -> str:
        """As recipes call it: without its folder."""
        return "<stdin>" if self.path is None else self.path.name

    def read(self) -> bytes:
        """Everything in it.

        Raises:
            CalibrationError: if it cannot be read.
        """
        try:
            return sys.stdin.buffer.read() if self.path is None else self.path.read_bytes()
        except OSError as error:
            raise CalibrationError(f"{self} cannot be read: {error.strerror}") from None


def parse_source(text: str | Path) -> DataSource:
    """`FILE`, `FILE:WEIGHT` or `-`; where a file of exactly that name exists, it is the file.

    Raises:
        UsageError: for a weight that is not between 1e-6 and 1e6.
    """
    text = str(text)
    file, colon, number = text.rpartition(":")
    weight = _number(number)
    if not colon or not file or weight is None or Path(text).exists():
        return DataSource(None if text == STDIN else Path(text))
    if not WEIGHTS[0] <= weight <= WEIGHTS[1]:  # also refuses NaN
        raise UsageError(f"the weight of {text} is not between {WEIGHTS[0]:g} and {WEIGHTS[1]:g}")
    return DataSource(None if file == STDIN else Path(file), weight)


def parse_sources(data: DataPaths) -> tuple[DataSource, ...]:
    """One source or several.

    Raises:
        UsageError: if there is none, or one is given twice.
    """
    texts = [data] if isinstance(data, (str, Path)) else list(data)
    sources = tuple(parse_source(text) for text in texts)
    if not sources:
        raise UsageError("no data file is given")
    seen: set[Path | None] = set()
    for source in sources:
        place = source.path and source.path.resolve()
        if place in seen:
            raise UsageError(f"{source} is given twice", hint=f"to count it twice, give it a weight: {source}:2")
        seen.add(place)
    return sources


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
