"""How long a command takes that does no work: `--help`, `--version`, a usage error, a completion.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 40

In turns with `python -c pass`, which nothing in Python goes below, and with `python -c "import typer"`, which nothing
with Typer goes below. Printed, as Markdown, are the medians of the clock and of the processor's seconds, which a busy
machine changes less, the ratio of each to `python -c pass` by the processor, and how many modules are loaded.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.measuring import BenchmarkParser, children_seconds

LORACAT = ("-m", "loracli")
COMPLETION = {"_LORACAT_COMPLETE": "complete_bash", "COMP_WORDS": "loracat fit --adapters o", "COMP_CWORD": "3"}
COUNT = "import atexit, sys; atexit.register(lambda: print(len(sys.modules), file=sys.stderr)); "


@dataclass
class Case:
    """A command line and what it took, round by round."""

    name: str
    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def run(self) -> None:
        before, started = children_seconds(), time.perf_counter()
        subprocess.run(
            [sys.executable, *self.arguments], env=os.environ | self.variables, capture_output=True, check=False
        )
        self.clock.append(time.perf_counter() - started)
        self.processor.append(children_seconds() - before)

    def modules(self) -> int:
        """How many are loaded at its end."""
        if self.arguments[0] == "-c":
            program, arguments = self.arguments[1], []
        else:
            program, arguments = "from loracli.cli import main; main()", list(self.arguments[2:])
        done = subprocess.run(
            [sys.executable, "-c", COUNT + program, *arguments],
            env=os.environ | self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return int(done.stderr.split()[-1])


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, quick=1)
    arguments = parser.parse_args()
    cases = [
        Case("python -c pass", ("-c", "pass")),
        Case('python -c "import typer"', ("-c", "import typer")),
        Case("loracat --version", (*LORACAT, "--version")),
        Case("loracat --help", (*LORACAT, "--help")),
        Case("loracat fit --help", (*LORACAT, "fit", "--help")),
        Case("loracat fit --no-such-option", (*LORACAT, "fit", "--no-such-option")),
        Case("completion of an adapter", LORACAT, COMPLETION),
    ]
    for case in () if arguments.quick else cases:  # the first of each compiles and fills the system's cache
        case.run()
        case.clock.clear()
        case.processor.clear()
    for _ in range(arguments.rounds):
        for case in cases:
            case.run()
    least = statistics.median(cases[0].processor)
    print("| | clock | processor | ratio | modules |\n|---|--:|--:|--:|--:|")
    for case in cases:
        clock, processor = statistics.median(case.clock), statistics.median(case.processor)
        print(f"| {case.name} | {clock:.3f} s | {processor:.3f} s | {processor / least:.1f} | {case.modules()} |")


if __name__ == "__main__":
    main()
