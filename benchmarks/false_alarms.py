"""How often a fit is called better where there is nothing to compose; prints Markdown for docs/results.md.

    python benchmarks/false_alarms.py --seeds 20 --worlds 4

`better` is the verdict: clearly better than the best adapter alone and than a fresh LoRA trained on the same records.
How often the first alone holds is counted beside it.

First the embedded example with random adapters in place of its two, whose |dW| in every module is the true ones': they
know nothing, so what a fit gains on them comes from the calibration records alone.

Then two hops, which weights cannot join: one adapter is trained to know who lives next door to whom, the other in which
city the neighbours live, and the task asks for the city of a person's neighbour. Calibration and test ask about
different people; their neighbours, and so the cities, are the same twenty. `right` is the share of greedy answers that
are right to the letter. `a guess among the cities` is what someone would get who knows which cities there are and how
to answer, and nothing else: ln 20 nats a record, and one of twenty right.

All people and facts are invented. --quick takes few records, one seed and two epochs of training.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.made_inputs import part_of_example
from benchmarks.measuring import BenchmarkParser
from benchmarks.paper.tasks import EVERY_LINEAR, Training
from benchmarks.paper.training import train
from loracli.comparison.candidates import random_adapters
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.demo.run import example_folder
from loracli.evaluation.comparison import Comparison, interval_text
from loracli.evaluation.metrics import TaskMetric
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.run import fit_mixing, run_fit
from loracli.fitting.settings import FRESH_LORA, FitSettings
from loracli.model.base import load_base
from loracli.model.placement import Placement
from loracli.model.reference import find_base
from loracli.recipe.record import HeldOut

PLACEMENT = Placement("float32", "cpu")
EXACT = TaskMetric("exact", max_new_tokens=12)
NEIGHBOURS = ("Who lives next door to {who}?", "Which neighbour does {who} have?", "Who is at home beside {who}?")
CITIES = ("Where does {who} live?", "Which city is {who} at home in?", "What city does {who} call home?")
TASK = "Where does the neighbour of {who} live?"
HOPS = ("neighbours", "cities")
HOMES = 20  # neighbours, each in a city of its own
Answers = dict[str, str]  # of people


def fits_of_nothing(example: Path, seeds: int, settings: FitSettings) -> tuple[HeldOut, list[HeldOut]]:
    """What held-out records say of the fit of the true adapters, and of random ones, a draw a seed."""
    inputs = prepare_fit(
        [str(example / name) for name in ("know", "form")],
        example / "calibration.jsonl",
        eval_data=example / "test.jsonl",
        base=str(example / "base"),
        settings=settings,
    )
    drawn = (tuple(random_adapters(inputs.adapters, seed=seed)) for seed in range(seeds))
    tables = [
        run_fit(replace(inputs, adapters=some), placement=PLACEMENT).held_out for some in (inputs.adapters, *drawn)
    ]
    return tables[0], tables[1:]


def print_fits(true: HeldOut, drawn: Sequence[HeldOut]) -> None:
    print(f"\n{true.records} records, {len(drawn)} draws.\n")
    print("| adapters | called better | better than the best adapter | fit | fresh LoRA | best adapter | base |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for name, tables in (("true", [true]), ("random", drawn)):
        better = sum(table.verdict == "better" for table in tables)
        than_best = sum(table.row("fit").interval[1] < 0 for table in tables)
        ways = ["fit", "fresh-lora", None, "base"]
        cells = [spread([loss_of(table, way or table.best_ingredient) for table in tables]) for way in ways]
        counts = f"{better} of {len(tables)} | {than_best} of {len(tables)}"
        print(f"| {name} | {counts} | {' | '.join(cells)} |", flush=True)


def loss_of(table: HeldOut, name: str) -> float:
    return next(row for row in table.lines if row.name == name).nats_per_token


def spread(losses: Sequence[float]) -> str:
    """The mean, and of several the lowest and the highest."""
    ends = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{ends}"


def draw_people(example: Path, count: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """New people, from names that the base's tokenizer has, and the cities of the example."""
    records = [
        json.loads(line)
        for name in ("calibration", "test")
        for line in (example / f"{name}.jsonl").read_text().splitlines()
    ]
    known = {name for record in records for name in re.findall("[A-Z][a-z]+ [A-Z][a-z]+", record["prompt"])}
    firsts, lasts = ({name.split()[place] for name in known} for place in (0, 1))
    others = sorted({f"{first} {last}" for first in firsts for last in lasts} - known)
    cities = {json.loads(record["completion"]).get("city") for record in records} - {None}
    return rng.sample(others, count), sorted(cities)


def write(path: Path, questions: Sequence[str], answers: Answers) -> Path:
    """Every question about every person."""
    lines = [
        json.dumps({"prompt": f"{question.format(who=who)}\n", "completion": answer})
        for who, answer in answers.items()
        for question in questions
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def two_hops(folder: Path, seed: int, epochs: int, people: int, settings: FitSettings) -> tuple[HeldOut, Comparison]:
    """What held-out records say of the fit, and the comparison on them; prints what each adapter knows of its own
    hop."""
    rng = random.Random(seed)
    example = example_folder()
    everyone, cities = draw_people(example, people + HOMES, rng)
    asked, neighbours = everyone[:people], everyone[people:]
    rng.shuffle(cities)
    home = dict(zip(neighbours, cities, strict=True))
    beside = {who: neighbours[place % len(neighbours)] for place, who in enumerate(asked)}
    taught = {
        "neighbours": write(folder / "neighbours.jsonl", NEIGHBOURS, beside),
        "cities": write(folder / "cities.jsonl", CITIES, home),
    }
    names = [str(folder / name) for name in HOPS]
    for place, name in enumerate(HOPS):
        passes = epochs if name == "neighbours" else epochs * len(beside) // len(home)  # as many steps for both
        training = Training(16, EVERY_LINEAR, 2e-3, max(1, passes), 32)
        base = load_base(find_base([], str(example / "base")), dtype="float32", device="cpu")
        train(name, [taught[name]], training, base, folder / name, seed=seed + place, base_id="loracat/demo-base")
    whole = {who: home[beside[who]] for who in asked}
    third = len(asked) // 3
    calibration = write(folder / "calibration.jsonl", [TASK], {who: whole[who] for who in asked[:third]})
    test = write(folder / "test.jsonl", [TASK], {who: whole[who] for who in asked[third:]})
    recipe = fit_mixing(
        names, calibration, eval_data=test, base=str(example / "base"), settings=settings, placement=PLACEMENT
    )
    recipe.save(folder / "recipe.json")

    def scored(data: Path, **what: object) -> Comparison:
        options = CompareSettings(("uniform", "sum"))
        return compare_adapters(  # type: ignore[call-overload, no-any-return]
            data, base=str(example / "base"), settings=options, metric=EXACT, placement=PLACEMENT, **what
        )

    own = [right(scored(taught[name], adapters=[adapter]), adapter) for name, adapter in zip(HOPS, names, strict=True)]
    print(f"\nTwo hops, seed {seed}: of its own hop {HOPS[0]} answers {own[0]} right, {HOPS[1]} {own[1]}.", end=" ")
    return recipe.held_out, scored(test, recipe=folder / "recipe.json")


def right(found: Comparison, name: str) -> str:
    metric = found.row(name).metric
    assert metric is not None
    return f"{metric.mean:.0%}"


def print_hops(held_out: HeldOut, found: Comparison) -> None:
    best, [control] = Path(found.best_ingredient).name, held_out.controls
    print(f"The fit is called {held_out.verdict} ({found.records} records).\n")
    print(f"| | nats per token | minus {best} | 95 % interval | right |\n|---|--:|--:|---|--:|")
    for row in found.rows:
        cells = f"{row.nats_per_token:.3f} | {row.difference:+.3f} | {interval_text(row.interval, digits=3)}"
        print(f"| {Path(row.name).name} | {cells} | {right(found, row.name)} |")
    fresh, interval = control.row, interval_text(control.row.interval, digits=3)
    print(f"| fresh LoRA | {fresh.nats_per_token:.3f} | {fresh.difference:+.3f} | {interval} | |")
    guess = math.log(HOMES) * found.records / found.scored_tokens
    to_best = guess - found.row(found.best_ingredient).nats_per_token
    print(f"| a guess among the cities | {guess:.3f} | {to_best:+.3f} | | {1 / HOMES:.0%} |")
    minus = f"{control.difference:+.3f}, {interval_text(control.interval, digits=3)}"
    print(f"\nThe fit minus the fresh LoRA: {minus}.", flush=True)


def print_worlds(tables: Sequence[HeldOut]) -> None:
    better = sum(table.verdict == "better" for table in tables)
    than_best = sum(table.row("fit").interval[1] < 0 for table in tables)
    minus = [table.controls[0].difference for table in tables]
    less = f"{statistics.mean(minus):+.3f} ({min(minus):+.3f} to {max(minus):+.3f})"
    print(f"\nOf {len(tables)} worlds of two hops the fit is called better in {better}, and is better than the best")
    print(f"adapter in {than_best}; the fit minus the fresh LoRA: {less}.")


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--seeds", type=int, default=20, quick=2, help="draws of random adapters")
    parser.add_argument("--worlds", type=int, default=1, help="seeds of people, facts and training")
    parser.add_argument("--people", type=int, default=120, quick=30, help="that have a neighbour")
    parser.add_argument("--epochs", type=int, default=40, quick=2, help="over who lives next door to whom")
    parser.add_argument("--passes", type=float, quick=2.0, help="of a fit")
    arguments = parser.parse_args()
    settings = FitSettings(passes=arguments.passes, control=FRESH_LORA)
    with tempfile.TemporaryDirectory() as scratch:
        example = example_folder()
        if arguments.quick:
            example = part_of_example(Path(scratch) / "part", calibration=4, test=4)
        print_fits(*fits_of_nothing(example, arguments.seeds, settings))
        tables = []
        for seed in range(arguments.worlds):
            folder = Path(scratch) / f"world{seed}"
            folder.mkdir()
            held_out, found = two_hops(folder, seed, arguments.epochs, arguments.people, settings)
            print_hops(held_out, found)
            tables.append(held_out)
        print_worlds(tables)


if __name__ == "__main__":
    main()
