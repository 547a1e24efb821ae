"""Fit, export and reload on a real model; prints Markdown for docs/results.md.

    python benchmarks/real_model.py --base DIR --adapters MATH CODE --datamix DIR \\
        --data composite_calib.jsonl --eval-data composite_dev.jsonl

Calibrates on --data, scores everything on --eval-data: base, each adapter alone, uniform, sum, the fit, an adapter
trained on both skills' data at once, the published recipe at its own rate and at a higher one, and the exported
directories as stock PEFT loads them. Differences are paired over records, with 95 % bootstrap intervals. Any model,
adapters and data will do; --quick takes a part of the embedded example, and one of its adapters as the data mix.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from benchmarks.made_inputs import part_of_example
from benchmarks.measuring import BenchmarkParser
from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import read_records
from loracli.calibration.render import render_file
from loracli.evaluation.statistics import paired_interval, static_points
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.mixing import make_layout
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach
from loracli.model.base import BaseModel, load_base
from loracli.model.loss import Scores, make_objective
from loracli.model.placement import Placement
from loracli.model.reference import find_base
from loracli.progress import Silent
from loracli.recipe.recipe import Recipe

HIGHER_RATE = 1e-2  # for the published recipe, whose own 1e-4 cannot move the weights


class _Talk(Silent):
    """Says on stderr what the fit says."""

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)


@dataclass
class Held:
    """The held-out records, and every method's scores on them."""

    path: Path
    scores: dict[str, Scores]
    seconds: dict[str, float]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        yield
        self.seconds[name] = time.monotonic() - started

    def score_attached(self, base: BaseModel, adapters: list[LoraAdapter], points: dict[str, torch.Tensor]) -> None:
        """Scores mixing weights (L, N) on the attached model."""
        examples = render_file(read_records(self.path), base.tokenizer, max_length=1024).examples
        batches = plan_batches(examples, batch_tokens=1024)
        with attach(base.model, adapters, make_layout(adapters).modules) as attached:
            objective = make_objective(attached, batches[0])
            for name, weights in points.items():
                with self.timed(name):
                    attached.set_weights(weights)
                    self.scores[name] = objective.score(batches, len(examples))

    def score_exported(self, name: str, base: BaseModel, directory: Path) -> None:
        """Scores a directory as stock PEFT loads it; the base is left as it was."""
        examples = render_file(read_records(self.path), base.tokenizer, max_length=1024).examples
        batches = plan_batches(examples, batch_tokens=1024)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), directory).eval()
        with self.timed(name), attach(loaded, (), ()) as attached:
            self.scores[name] = make_objective(attached, batches[0]).score(batches, len(examples))

    def table(self, reference: str) -> str:
        """Every method against `reference`, as Markdown."""
        lines = [f"| | nats per token | minus {reference} | 95 % interval |", "|---|--:|--:|---|"]
        other = self.scores[reference]
        for name, score in self.scores.items():
            difference = score.nats - other.nats
            low, high = paired_interval(difference, other.tokens)
            mean = float(difference.sum() / other.tokens.sum())
            lines.append(f"| {name} | {score.nats_per_token:.4f} | {mean:+.4f} | {low:+.4f} to {high:+.4f} |")
        return "\n".join(lines)


def matrix(recipe: Recipe, modules: tuple[str, ...]) -> torch.Tensor:
    """The weights of a recipe, (L, N)."""
    return torch.tensor([[w or 0.0 for w in recipe.weights_of(name)] for name in modules], dtype=torch.float64)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        parser = BenchmarkParser(__doc__)
        example = part_of_example(Path(scratch) / "part", calibration=12, test=12) if parser.quick else Path()
        parser.add_argument("--base", required=True, quick=str(example / "base"))
        parser.add_argument(
            "--adapters", nargs="+", required=True, quick=[str(example / "know"), str(example / "form")]
        )
        parser.add_argument(
            "--datamix", quick=str(example / "form"), help="an adapter trained on the data of all skills"
        )
        parser.add_argument("--data", type=Path, required=True, quick=example / "calibration.jsonl")
        parser.add_argument("--eval-data", type=Path, required=True, quick=example / "test.jsonl")
        parser.add_argument("--dtype", default="auto", help="of the fit and of all scores but the last two")
        parser.add_argument("--passes", type=float, default=None, quick=2.0)
        run(parser.parse_args())


def fit_all(arguments: argparse.Namespace, held: Held) -> dict[str, Recipe]:
    """The fit and the published recipe at two rates. Their own tables are kept short: all records are scored later."""
    recipes: dict[str, Recipe] = {}
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        few.write_text("".join(arguments.eval_data.read_text().splitlines(keepends=True)[:20]))
        for name, settings in (
            ("fit", FitSettings(passes=arguments.passes)),
            ("published recipe, rate 1e-4", FitSettings(paper=True)),
            (f"published recipe, rate {HIGHER_RATE:g}", FitSettings(paper=True, learning_rate=HIGHER_RATE)),
        ):
            with held.timed(f"{name} (search)"):
                recipes[name] = fit_mixing(
                    arguments.adapters,
                    arguments.data,
                    eval_data=few,
                    base=arguments.base,
                    settings=settings,
                    progress=_Talk(),
                    placement=Placement(dtype=arguments.dtype),
                )
    return recipes


def run(arguments: argparse.Namespace) -> None:
    held = Held(arguments.eval_data, {}, {})
    recipes = fit_all(arguments, held)
    adapters = [read_adapter(reference) for reference in arguments.adapters]
    base = load_base(find_base(adapters, arguments.base), dtype=arguments.dtype)
    modules = make_layout(adapters).modules
    names = [Path(reference).name for reference in arguments.adapters]
    points = {
        name: torch.tensor(point, dtype=torch.float64).expand(len(modules), -1)
        for name, point in static_points(names).items()
    }
    held.score_attached(base, adapters, points | {name: matrix(recipe, modules) for name, recipe in recipes.items()})
    if arguments.datamix:
        mixed = [read_adapter(arguments.datamix)]
        ones = torch.ones(len(mixed[0].modules), 1)
        held.score_attached(base, mixed, {"data mix": ones})
    best = min(names, key=lambda name: held.scores[name].nats_per_token)
    report_fits(recipes, held, [held.table("fit"), held.table(best)])

    exact = Held(arguments.eval_data, {}, {})
    base = load_base(find_base(adapters, arguments.base), dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        exact.score_attached(base, adapters, {"attached": matrix(recipes["fit"], modules)})
        for name, merge in (("exported", False), ("exported, merged", True)):
            with exact.timed(f"{name} (writing)"):
                export = export_adapter(
                    ExportRequest(recipes["fit"], merge=merge), Path(scratch) / name.replace(", ", "-")
                )
            exact.score_exported(f"{name}, rank {export.layout.rank}, loaded by PEFT", base, export.path)
    print("Exported from the fit's recipe and loaded by stock PEFT, base and adapters in float32:\n")
    print(exact.table("attached") + "\n")
    print("| step | seconds |\n|---|--:|")
    for name, seconds in {**held.seconds, **exact.seconds}.items():
        print(f"| {name} | {seconds:.1f} |")


def report_fits(recipes: dict[str, Recipe], held: Held, tables: list[str]) -> None:
    """Prints the comparison of all methods, and what the fits did."""
    fit = recipes["fit"]
    print(f"Base in {fit.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}.")
    [data] = fit.data
    print(f"Fitted on {data.records} records, {data.scored_tokens} scored tokens, {fit.fit.passes:g} passes;")
    scored = held.scores["fit"].tokens
    print(f"scored on {len(scored)} records, {int(scored.sum())} scored tokens.\n")
    for table in tables:
        print(table + "\n")
    print("| recipe | start that won | largest move of a weight | loss on its training records |")
    print("|---|---|--:|--:|")
    for name, recipe in recipes.items():
        found = recipe.fit
        print(f"| {name} | {found.rungs[-1].chosen} | {found.largest_move:.4f} | {found.training_nats_per_token:.4f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
