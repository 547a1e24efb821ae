"""How often each fault is tried, and what a command must look like afterwards, whatever was done to it.

Every test here is there twice: with a few trials, as part of the ordinary tests, and with many, marked `faults`, for
`make faults`. All choices are drawn from seeded generators. LORACAT_FAULTS is a share of the many: 0.1 for a tenth.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.faults.fork_server import HUNG, Ended

SHARE = float(os.environ.get("LORACAT_FAULTS", "1"))
CODES = frozenset({0, 1, 2, 3, 4, 5, 6, 7})  # of commands that nobody stopped


def trials(quick: int, full: int) -> pytest.MarkDecorator:
    """Parametrizes `count`: so many trials in the ordinary tests, so many with `make faults`."""
    return pytest.mark.parametrize("count", [param for *_, param in _params(quick, full)])


def trials_of(**counts: tuple[int, int]) -> pytest.MarkDecorator:
    """Parametrizes `name` and `count`: for each command what `trials` has for all."""
    return pytest.mark.parametrize(
        ("name", "count"),
        [
            pytest.param(name, count, id=f"{name}-{how}", marks=param.marks)
            for name, (quick, full) in counts.items()
            for how, count, param in _params(quick, full)
        ],
    )


def _params(quick: int, full: int) -> Iterator[tuple[str, int, ParameterSet]]:
    if quick:
        yield "quick", quick, pytest.param(quick, id="quick")
    many = max(1, round(full * SHARE))
    yield "full", many, pytest.param(many, id="full", marks=pytest.mark.faults)


@dataclass
class Tally:
    """Trials by row, and how they ended."""

    rows: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, row: str, outcome: str | int, trials: int = 1) -> None:
        self.rows.setdefault(row, Counter())[str(outcome)] += trials

    def lines(self) -> list[str]:
        width = max(map(len, self.rows), default=0)
        return [
            f"{row:<{width}}  {counts.total():>6}  "
            + ", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items()))
            for row, counts in sorted(self.rows.items())
        ]


def check_manners(ended: Ended, codes: Collection[int] = CODES, *, silent: bool = False) -> None:
    """A documented code and no traceback; after a failure one error on stderr, or none if that may not be writable."""
    assert ended.code != HUNG, "it hangs"
    assert ended.code in codes, ended
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr, ended
    errors = len(re.findall(r"^error: \S", ended.stderr, re.MULTILINE))
    assert errors == (1 if 0 < ended.code < 128 else 0) or (silent and not errors), ended


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every name below the folder with its bytes; None for a directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
