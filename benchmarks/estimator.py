"""What comes out of few records: `module`, `auto` and a new LoRA on 8, 24 and 96 of them, by seeds. Prints Markdown.

    python benchmarks/estimator.py                                        the embedded example
    python benchmarks/estimator.py OUT --base BASE --adapters MATH CODE --data CALIB.jsonl --test TEST.jsonl

Each seed draws the calibration records from `--data` and fits on them; all are scored on the same other records, those
of `--test`, or else the ones of `--data` that no calibration draws. A cell is the held-out loss in nats per token; the
second table says how much more `auto` costs than the better of `module` and the new LoRA.

Every cell ends in a file of OUT, and what is there is not done again, so it goes on where it was stopped. --quick takes
one size, one seed and a few records of the embedded example.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import BenchmarkParser
from loracli.comparison.compare import run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.settings import FRESH_LORA, CompareSettings, Controls
from loracli.demo.run import example_folder
from loracli.fitting.settings import FitSettings
from loracli.model.placement import Placement

METHODS = ("adapter", "module", "auto")


@dataclass(frozen=True)
class Cell:
    """Held-out nats per token by the name of the row, and how long all of them took."""

    losses: dict[str, float]
    seconds: float


def main() -> None:
    example = example_folder()
    parser = BenchmarkParser(__doc__)
    parser.add_argument("out", type=Path, nargs="?", quick=None, help="a folder that keeps what is done")
    parser.add_argument("--base", default=str(example / "base"))
    parser.add_argument("--adapters", nargs="+", default=[str(example / "know"), str(example / "form")])
    files = [example / "calibration.jsonl", example / "test.jsonl"]
    parser.add_argument("--data", type=Path, nargs="+", default=files)
    parser.add_argument("--test", type=Path, help="records to score on; default: those that no calibration draws")
    parser.add_argument("--test-records", type=int, default=64, quick=4)
    parser.add_argument("--records", type=int, nargs="+", default=[8, 24, 96], quick=[8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], quick=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, quick=["module"], choices=METHODS)
    parser.add_argument("--passes", type=float, help="of a fit, in each fold; default: as many as `loracat fit` takes")
    parser.add_argument("--ridge", type=float, help="of a fit; default: as `loracat fit` has it")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(arguments, arguments.out or Path(scratch))


def report(arguments: argparse.Namespace, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [*arguments.methods, FRESH_LORA]
    found: dict[int, list[Cell]] = {}
    for count in arguments.records:
        found[count] = [cell for seed in arguments.seeds for cell in measured(arguments, out, count, seed)]
    print(f"\n| records | seed | uniform | {' | '.join(rows)} | seconds |\n|--:|--:|{'--:|' * (len(rows) + 2)}")
    for count, cells in found.items():
        for seed, cell in zip(arguments.seeds, cells, strict=True):
            losses = " | ".join(f"{cell.losses[name]:.4f}" for name in ("uniform", *rows))
            print(f"| {count} | {seed} | {losses} | {cell.seconds:.0f} |")
        means = " | ".join(f"{mean(cells, name):.4f}" for name in ("uniform", *rows))
        print(f"| {count} | mean | {means} | |")
    if "auto" in rows and "module" in rows:
        print("\n| records | auto minus the better of module and the new LoRA, worst seed | mean |\n|--:|--:|--:|")
        for count, cells in found.items():
            more = [c.losses["auto"] - min(c.losses["module"], c.losses[FRESH_LORA]) for c in cells]
            print(f"| {count} | {max(more):+.4f} | {sum(more) / len(more):+.4f} |")


def mean(cells: Sequence[Cell], name: str) -> float:
    return sum(cell.losses[name] for cell in cells) / len(cells)


def measured(arguments: argparse.Namespace, out: Path, count: int, seed: int) -> Iterator[Cell]:
    """The comparison of this size and seed, from its file if that has all methods, or done now."""
    path = out / f"{count}-{seed}.json"
    if not path.exists() or not set(arguments.methods) <= set(json.loads(path.read_text())["losses"]):
        fit_data, test = drawn(arguments, out, count, seed)
        settings = FitSettings(seed=seed, passes=arguments.passes, ridge=arguments.ridge)
        started = time.monotonic()
        inputs = prepare_comparison(
            test,
            adapters=arguments.adapters,
            fit_data=fit_data,
            base=arguments.base,
            settings=CompareSettings(
                methods=tuple(arguments.methods), fit=settings, controls=Controls(fresh_lora=True)
            ),
        )
        comparison = run_comparison(inputs, placement=Placement(arguments.dtype))
        cell = {row.name: row.nats_per_token for row in comparison.rows}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"losses": cell, "seconds": time.monotonic() - started}, indent=2) + "\n")
        partial.rename(path)
    kept = json.loads(path.read_text())
    yield Cell(kept["losses"], kept["seconds"])


def drawn(arguments: argparse.Namespace, out: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Files of the calibration records and of the ones to score on; these are the same for all sizes and seeds."""
    lines = [line for path in arguments.data for line in path.read_text().splitlines() if line.strip()]
    random.Random(0).shuffle(lines)
    test = lines[: arguments.test_records]
    if arguments.test is None:
        lines = lines[arguments.test_records :]
    else:
        test = arguments.test.read_text().splitlines()[: arguments.test_records]
    random.Random(seed).shuffle(lines)
    if len(lines) < count:
        raise SystemExit(f"--records {count}: only {len(lines)} are there to draw from")
    files = out / f"calibration-{count}-{seed}.jsonl", out / "test.jsonl"
    for path, records in zip(files, (lines[:count], test), strict=True):
        path.write_text("".join(f"{line}\n" for line in records))
    return files


if __name__ == "__main__":
    main()
