"""The command line of a benchmark, with `--quick`, and time taken in turns. Imports nothing but Python."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUICK = "--quick"
_SAME: Any = object()


class BenchmarkParser(argparse.ArgumentParser):
    """A parser whose options may have another default with `--quick`.

    `--quick` runs all of a benchmark's code in seconds, with small inputs that are made on the spot, and downloads
    nothing. Its figures say that the benchmark works and nothing else. tests/benchmarks runs every file here with it.
    """

    def __init__(self, description: str | None) -> None:
        self.quick = QUICK in sys.argv[1:]
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        super().add_argument(QUICK, action="store_true", help="small inputs made on the spot: does it still run?")

    def add_argument(self, *names: str, quick: Any = _SAME, **settings: Any) -> argparse.Action:  # type: ignore[override]
        """As of argparse. With `--quick` the default is `quick`, where it is given, and nothing is required."""
        if self.quick and quick is not _SAME:
            settings |= {"default": quick}
            settings |= {"required": False} if names[0].startswith("-") else {"nargs": "?"}
        return super().add_argument(*names, **settings)


def left_out(what: str) -> None:
    """Says what a run could not do here, in a line of its own."""
    print(f"Left out: {what}.\n", flush=True)


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock, and of the processor in this process and those that it has waited for."""

    seconds: float
    processor: float


def children_seconds() -> float:
    """The processor's, in all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor_seconds() -> float:
    return time.process_time() + children_seconds()


def spent_by(work: Callable[[], object]) -> Spent:
    """What one call takes."""
    started, before = time.perf_counter(), processor_seconds()
    work()
    return Spent(time.perf_counter() - started, processor_seconds() - before)


def in_turns(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Spent]]:
    """Calls each once a round, so that a machine that is slow for a while is slow for all of them."""
    found: dict[str, list[Spent]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            found[name].append(spent_by(call))
    return found


def median(found: Sequence[Spent]) -> Spent:
    """Of the clock and of the processor, each by itself."""
    return Spent(
        statistics.median(spent.seconds for spent in found), statistics.median(spent.processor for spent in found)
    )
