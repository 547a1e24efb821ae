"""LoRA Soups' claim, measured again: two skills composed, beside everything else that could be done. Prints Markdown.

    python benchmarks/skills/run.py BASE OUT [--pairs closed-book math-code] [--seeds 0 1 2]
        [--calibrate skills 8 24 96] [--fitted NAME ...] [--math-code-data DIR] [--base-id NAME]
    python benchmarks/skills/run.py BASE OUT --test-records 24 --calibrate skills 8 --fitted lorahub paper module \
        --controls fresh-lora

For each pair and seed: the data, an adapter for each skill and one trained on the data of both (as many tokens as the
two together); then every way to compose, on test records that no calibration record touches, calibrated on the
skills' own data, which is the paper's setting, and on 8, 24 and 96 composite records, or as many as there are. Loss
with its paired interval against the best single adapter; for the closed book also the share of answers that are right
to the letter.

Every stage ends in a file or folder of OUT, and what is there is not done again, so it goes on where it was stopped. On
one core of a CPU and a model of 135 million weights a pair takes some hours, the second command minutes, once the
adapters are there. An adapter in OUT/<pair>-<seed>/<name> is taken as it is. --quick takes the base of the embedded
example, some of the records, and a folder that is deleted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.measuring import BenchmarkParser
from benchmarks.skills import closed_book, math_code
from benchmarks.skills.training import say, train
from loracli.comparison.compare import run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.settings import CompareSettings, Controls
from loracli.demo.run import example_folder
from loracli.evaluation.comparison import Comparison, ComparisonRow
from loracli.evaluation.metrics import TaskMetric
from loracli.fitting.settings import FitSettings
from loracli.model.base import load_base
from loracli.model.placement import Placement
from loracli.model.reference import find_base
from loracli.progress import Silent
from loracli.system.document import decode, encode

SKILLS = "skills"
CALIBRATIONS = (SKILLS, "8", "24", "96")
CONTROLS = ("fresh-lora", "random")
FITTED = ("task-arithmetic", "lorahub", "paper", "adapter", "module", "core", "auto")
FOLDED_BELOW = 40  # records, with four folds


@dataclass(frozen=True)
class Pair:
    """Two skills and their composite.

    Args:
        name: of the pair.
        recipe: the module that makes its data and says how to train.
        metric: of the answers, None where a model of this size has none right.
    """

    name: str
    recipe: ModuleType
    metric: TaskMetric | None


PAIRS = {
    "closed-book": Pair("closed-book", closed_book, TaskMetric("exact", max_new_tokens=24)),
    "math-code": Pair("math-code", math_code, None),
}


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("base", quick=str(example_folder() / "base"), help="a directory, or a Hub id")
    parser.add_argument("out", type=Path, quick=None)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=["closed-book"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=CALIBRATIONS,
        quick=("4",),
        help="on the skills' own data, or on so many composite records",
    )
    parser.add_argument(
        "--controls", nargs="*", choices=CONTROLS, default=CONTROLS, quick=(), help="beside what is fitted"
    )
    parser.add_argument("--fitted", nargs="+", default=FITTED, quick=("module",), help="methods that are fitted")
    parser.add_argument("--test-records", type=int, quick=2, help="the first so many of the test")
    parser.add_argument("--records", type=int, quick=4, help="the first so many of each file of data; default: all")
    parser.add_argument("--math-code-data", type=Path, help="folder of the files that math_code.py names")
    parser.add_argument("--base-id", help="the name of the base in the adapters' configs; default: as it was given")
    parser.add_argument("--dtype", default="auto", help="of the base's weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        for name in arguments.pairs:
            for seed in arguments.seeds:
                run(PAIRS[name], seed, out, arguments)


def run(pair: Pair, seed: int, out: Path, arguments: argparse.Namespace) -> None:
    folder = out / f"{pair.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    make_data(pair, folder, seed, arguments)
    make_adapters(pair, folder, seed, arguments)
    test = head(folder / "composite_test.jsonl", arguments.test_records)
    suffix = "" if test.name == "composite_test.jsonl" else f"-{test.stem}"
    found = {"": compared(pair, folder, test, None, folder / f"static{suffix}.json", seed, arguments)}
    calibrations: dict[str, Path] = {}
    composite = folder / "composite_calib.jsonl"
    most = len(composite.read_text().splitlines())
    for word in arguments.calibrate:
        if word == SKILLS:
            calibrations["the skills' own records"] = folder / "skills_calib.jsonl"
        else:
            count = min(int(word), most)
            calibrations[f"{count} composite records"] = head(composite, count)
    for name, calibration in calibrations.items():
        output = folder / f"fitted-{calibration.stem}{suffix}.json"
        found[name] = compared(pair, folder, test, calibration, output, seed, arguments)
    report(pair, seed, found)


def make_data(pair: Pair, folder: Path, seed: int, arguments: argparse.Namespace) -> None:
    if (folder / "composite_test.jsonl").exists():
        return
    say(f"{folder.name}: data")
    if pair.recipe is math_code:
        if arguments.math_code_data is None:
            raise SystemExit("--math-code-data is needed for the pair math-code")
        math_code.write_data(folder, arguments.math_code_data, seed)
    else:
        closed_book.write_data(folder, seed)
    for path in folder.glob("*.jsonl") if arguments.records else ():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: arguments.records]))


def make_adapters(pair: Pair, folder: Path, seed: int, arguments: argparse.Namespace) -> None:
    """One for each skill, and one for the data of both."""
    skills = pair.recipe.ADAPTERS
    for index, name in enumerate((*skills, "datamix")):
        if (folder / name).exists():
            continue
        reference = find_base((), arguments.base)
        base = load_base(reference, dtype=arguments.dtype)
        files = [folder / f"{skill}_train.jsonl" for skill in (skills if name == "datamix" else (name,))]
        identity = arguments.base_id or reference.id
        train(name, files, pair.recipe.TRAINING[name], base, folder / name, seed=seed + index, base_id=identity)


def head(path: Path, count: int | None) -> Path:
    """The first records of a file, in a file of their own."""
    lines = path.read_text().splitlines(keepends=True)
    if count is None or count >= len(lines):
        return path
    part = path.with_name(f"{path.stem}_{count}.jsonl")
    part.write_text("".join(lines[:count]))
    return part


def compared(
    pair: Pair,
    folder: Path,
    test: Path,
    calibration: Path | None,
    output: Path,
    seed: int,
    arguments: argparse.Namespace,
) -> Comparison:
    """The comparison of this stage: what needs no data, or what is fitted on a calibration file."""
    if output.exists():
        problems: list[str] = []
        kept: Comparison = decode(Comparison, json.loads(output.read_text()), "", problems)
        if problems:
            raise SystemExit(f"{output}: {problems[0]}")
        return kept
    say(f"{folder.name}: {output.stem}")
    records = 0 if calibration is None else len(calibration.read_text().splitlines())
    fit = FitSettings(seed=seed, cv=4 if 0 < records < FOLDED_BELOW else None)
    if calibration is None:
        methods, controls = ("data-free",), Controls(datamix=str(folder / "datamix"))
    else:
        methods = tuple(arguments.fitted)
        wanted = arguments.controls
        controls = Controls(fresh_lora="fresh-lora" in wanted, random="random" in wanted)
    inputs = prepare_comparison(
        test,
        adapters=[str(folder / name) for name in pair.recipe.ADAPTERS],
        fit_data=calibration,
        base=arguments.base,
        settings=CompareSettings(methods=methods, fit=fit, controls=controls),
    )
    found = run_comparison(inputs, placement=Placement(arguments.dtype), metric=pair.metric, progress=Told())
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(encode(found), indent=2) + "\n")
    partial.rename(output)
    return found


def report(pair: Pair, seed: int, found: dict[str, Comparison]) -> None:
    first = found[""]
    print(f"### {pair.name}, seed {seed}\n")
    size = f"{first.records} test records, {first.scored_tokens} scored tokens"
    print(f"{size}; against `{short(first.best_ingredient)}`.\n")
    for name, comparison in found.items():
        if name:
            print(f"\nCalibrated on {name}:\n")
        rows = comparison.rows if not name else [r for r in comparison.rows if fitted(r)]
        right = " right |" if pair.metric else ""
        print(f"| | nats per token | difference | 95 % interval |{right}\n|---|--:|--:|---|{'--:|' if right else ''}")
        for row in rows:
            print(line(row))
    print(flush=True)


def fitted(row: ComparisonRow) -> bool:
    return row.kind == "control" or (row.kind == "method" and row.name != "uniform")


def line(row: ComparisonRow) -> str:
    low, high = row.interval
    note = f" ({row.note})" if row.name == "auto" and row.note else ""
    cells = [
        f"{short(row.name)}{note}",
        f"{row.nats_per_token:.4f}",
        f"{row.difference:+.4f}",
        f"{low:+.4f} to {high:+.4f}",
    ]
    if row.metric is not None:
        cells.append(f"{row.metric.mean:.1%}")
    return f"| {' | '.join(cells)} |"


def short(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[2]


class Told(Silent):
    """Notes and warnings on stderr."""

    def note(self, message: str) -> None:
        say(f"  {message}")

    def warn(self, message: str) -> None:
        say(f"  warning: {message}")


if __name__ == "__main__":
    main()
