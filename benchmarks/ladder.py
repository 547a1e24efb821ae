"""Every level of the ladder on held-out records, for calibration files of several sizes, and which `auto` takes.

    python benchmarks/ladder.py --base BASE --adapters MATH CODE --data CALIB.jsonl --records 8 24 96 \
        --eval-data DEV.jsonl

One climb a size: adapter, module, core, factors, each from the level below and from the sum, within the budget that
`--mixing auto` gives it, and then fitted once more on all training records as `fit` does. `auto` would stop where the
gain on validation records is not clear; here all levels are climbed, so that the table shows what it passes by.
--quick takes some records of the embedded example.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measuring import BenchmarkParser
from loracli.adapters.adapter import read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import Record, read_records
from loracli.calibration.render import Example, render_file
from loracli.demo.run import example_folder
from loracli.errors import UsageError
from loracli.evaluation.statistics import paired_interval, static_points
from loracli.fitting.criterion import Fold, cross_folds, gain, loss_criterion, one_fold
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.level import Solution, Task, tokens_of
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.fitting.search import LADDERS, REFIT_SHARE, least_gain, refit, solve_next
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach
from loracli.model.base import load_base
from loracli.model.loss import Scores, make_objective
from loracli.model.reference import find_base
from loracli.progress import SILENT


def main() -> None:
    example = example_folder()
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--base", required=True, quick=str(example / "base"))
    parser.add_argument("--adapters", nargs="+", required=True, quick=[str(example / "know"), str(example / "form")])
    parser.add_argument("--data", type=Path, required=True, quick=example / "calibration.jsonl")
    parser.add_argument("--records", type=int, nargs="+", required=True, quick=[4], help="the first so many of --data")
    parser.add_argument("--eval-data", type=Path, required=True, quick=example / "test.jsonl")
    parser.add_argument("--eval-records", type=int, quick=4, help="the first so many of --eval-data")
    parser.add_argument("--passes", type=float, default=20.0, quick=2.0)
    parser.add_argument("--folds-below", type=int, default=40, help="four folds with fewer records than this")
    parser.add_argument("--dtype", default="auto")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    adapters = [read_adapter(reference) for reference in arguments.adapters]
    names = tuple(Path(reference).name for reference in arguments.adapters)
    base = load_base(find_base(adapters, arguments.base), dtype=arguments.dtype)
    records = read_records(arguments.data).records
    held_out = render_file(read_records(arguments.eval_data), base.tokenizer, max_length=1024).examples
    held_out = held_out[: arguments.eval_records]
    training = render_file(read_records(arguments.data), base.tokenizer, max_length=1024).examples
    folds = {count: divided(training[:count], records, arguments.folds_below) for count in arguments.records}
    layout = make_layout(adapters)
    print(f"Base in {base.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()};")
    print(f"{arguments.data.name}, held out: {len(held_out)} records of {arguments.eval_data.name}.\n")
    with attach(base.model, adapters, layout.modules, canonical=True) as attached:
        objective = make_objective(attached, plan_batches(held_out, batch_tokens=1024)[0])
        engine = Engine(objective, Meter(SILENT))
        lowest = make_mixing(attached, layout, "adapter")
        table = {
            name: score(engine, lowest, lowest.constant(point), held_out)
            for name, point in static_points(names).items()
        }
        for count in arguments.records:
            some, few = training[:count], len(folds[count]) > 1
            settings = FitSettings(mixing="auto", passes=arguments.passes, cv=4 if few else None)
            engine = Engine(objective, Meter(SILENT))
            task = Task(engine, folds[count], loss_criterion(engine, batch_tokens=1024), settings, names)
            for name, scores in climbed(task, lambda kind: make_mixing(attached, layout, kind), some, held_out).items():
                table[f"{count} records: {name}"] = scores
    best = min(names, key=lambda name: table[name].nats_per_token)
    print(f"\n| | nats per token | minus {best} | 95 % interval |\n|---|--:|--:|---|")
    for name, scores in table.items():
        difference = scores.nats - table[best].nats
        low, high = paired_interval(difference, scores.tokens)
        mean = float(difference.sum() / scores.tokens.sum())
        print(f"| {name} | {scores.nats_per_token:.4f} | {mean:+.4f} | {low:+.4f} to {high:+.4f} |")


def divided(some: Sequence[Example], records: Sequence[Record], folds_below: int) -> tuple[Fold, ...]:
    """Few records in four folds, of more a fifth set aside; ends the benchmark where none are left to choose with."""
    try:
        if len(some) < folds_below:
            return cross_folds(some, records, 4, seed=1)
        fold = one_fold(some, records, seed=1)
    except UsageError as error:
        raise SystemExit(f"--records {len(some)}: {error}") from None
    if not fold.validation:
        raise SystemExit(f"--records {len(some)}: too few to set some aside; fold them: --folds-below {len(some) + 1}")
    return (fold,)


def score(engine: Engine, mixing: object, theta: torch.Tensor, examples: Sequence[Example]) -> Scores:
    return engine.score(mixing, theta, plan_batches(examples, batch_tokens=1024), examples)  # type: ignore[arg-type]


def climbed(task: Task, make, some: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Scores]:  # type: ignore[no-untyped-def]
    """The held-out scores of every level, the one of `auto` marked; says what each cost and gained."""
    whole = task.budget * 2 * tokens_of(some)
    solved: list[Solution] = []
    found: dict[str, Scores] = {}
    chosen, going, spent = "adapter", True, 0
    for kind in LADDERS["auto"]:
        started, before = time.monotonic(), task.engine.meter.spent
        left = (1 - REFIT_SHARE) * whole - spent
        solved.append(solve_next(task, make(kind), solved[-1] if solved else None, left))
        last = solved[-1]
        spent += task.engine.meter.spent - before
        passes = (task.engine.meter.spent - before) / (2 * tokens_of(some))
        compared = None if len(solved) == 1 else gain(solved[-2].scores, last.scores)  # type: ignore[arg-type]
        if compared is not None and going:
            going = compared.mean > least_gain(task, kind, compared)
            chosen = kind if going else chosen
        again = refit(task, solved, some, REFIT_SHARE * whole)
        found[kind] = score(task.engine, last.mixing, last.theta if again is None else again.theta, held_out)
        said = "" if compared is None else f", validation gain {compared.mean:.4f} +- {compared.standard_error:.4f}"
        print(
            f"- {len(some)} records, {kind}: {last.mixing.numbers} numbers, from {last.chosen}, ridge {last.ridge}, "
            f"{passes:.1f} passes{said}; held out {found[kind].nats_per_token:.4f}; {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return {f"**{kind}** (auto)" if kind == chosen else kind: scores for kind, scores in found.items()}


if __name__ == "__main__":
    main()
