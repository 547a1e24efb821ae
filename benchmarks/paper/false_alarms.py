"""How often a fit is called better where there is nothing to compose.

`better` is the verdict: clearly better than the best adapter alone and than a fresh LoRA trained on the same records.
How often the first alone holds is counted beside it.

First the embedded example with random adapters in place of its two, whose |dW| in every module is the true ones': they
know nothing, so what a fit gains on them comes from the calibration records alone.

Then two hops, which weights cannot join: one adapter is trained to know who lives next door to whom, the other in which
city the neighbours live, and the task asks for the city of a person's neighbour. Calibration and test ask about
different people; their neighbours, and so the cities, are the same twenty. `right` is the share of greedy answers that
are right to the letter. `a guess among the cities` is what someone would get who knows which cities there are and how
to answer, and nothing else: ln 20 nats a record, and one of twenty right. All people and facts are invented.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.made_inputs import part_of_example
from benchmarks.paper.tasks import EVERY_LINEAR, Experiment, Part, Training, Unit
from benchmarks.paper.training import train
from loracli.comparison.candidates import random_adapters
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.demo.run import example_folder
from loracli.evaluation.comparison import Comparison
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.sentences import interval_text
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.run import fit_mixing, run_fit
from loracli.fitting.settings import FRESH_LORA, FitSettings
from loracli.model.base import load_base
from loracli.model.placement import Placement
from loracli.model.reference import find_base
from loracli.recipe.record import HeldOut
from loracli.system.document import decode, encode

PLACEMENT = Placement("float32", "cpu")
EXACT = TaskMetric("exact", max_new_tokens=12)
NEIGHBOURS = ("Who lives next door to {who}?", "Which neighbour does {who} have?", "Who is at home beside {who}?")
CITIES = ("Where does {who} live?", "Which city is {who} at home in?", "What city does {who} call home?")
TASK = "Where does the neighbour of {who} live?"
HOPS = ("neighbours", "cities")
HOMES = 20  # neighbours, each in a city of its own
TRUE, RANDOM, WORLD = "true", "random", "world"  # units: the last two with the number of a draw
Answers = dict[str, str]  # of people


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        draws: of random adapters.
        worlds: of two hops.
        records: of the example, to fit on and to score, None for all.
        people: that have a neighbour.
        epochs: over who lives next door to whom.
        passes: of a fit.
    """

    draws: int = 20
    worlds: int = 20
    records: int | None = None
    people: int = 120
    epochs: int = 40
    passes: float | None = None


FULL, QUICK = Size(), Size(draws=1, worlds=1, records=4, people=12, epochs=1, passes=2.0)


def units(_: Sequence[int], quick: bool) -> list[Unit]:
    """Draws and worlds have seeds of their own, from 0 on."""
    size = QUICK if quick else FULL
    shrunk = 0.1 if quick else 1.0
    wanted = [(TRUE, None, 25.0), *((f"{RANDOM}-{seed}", seed, 25.0) for seed in range(size.draws))]
    found = [
        Unit(name, encode(size), seconds * shrunk, partial(fit_of_nothing, seed, size))
        for name, seed, seconds in wanted
    ]
    return found + [
        Unit(f"{WORLD}-{seed}", encode(size), 240.0 * shrunk, partial(two_hops, seed, size))
        for seed in range(size.worlds)
    ]


def settings_of(size: Size) -> FitSettings:
    return FitSettings(passes=size.passes, control=FRESH_LORA)


def fit_of_nothing(seed: int | None, size: Size) -> Any:
    """What held-out records say of the fit of the true adapters, or of a draw of random ones."""
    with tempfile.TemporaryDirectory() as scratch:
        example = example_folder()
        if size.records is not None:
            example = part_of_example(Path(scratch) / "part", calibration=size.records, test=size.records)
        inputs = prepare_fit(
            [str(example / name) for name in ("know", "form")],
            example / "calibration.jsonl",
            eval_data=example / "test.jsonl",
            base=str(example / "base"),
            settings=settings_of(size),
        )
        if seed is not None:
            inputs = replace(inputs, adapters=tuple(random_adapters(inputs.adapters, seed=seed)))
        return encode(run_fit(inputs, placement=PLACEMENT).held_out)


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


def two_hops(seed: int, size: Size) -> Any:
    """What held-out records say of the fit, the comparison on them, and what each adapter knows of its own hop."""
    with tempfile.TemporaryDirectory() as scratch:
        return _two_hops(Path(scratch), seed, size)


def _two_hops(folder: Path, seed: int, size: Size) -> Any:
    rng = random.Random(seed)
    example = example_folder()
    everyone, cities = draw_people(example, size.people + HOMES, rng)
    asked, neighbours = everyone[: size.people], everyone[size.people :]
    rng.shuffle(cities)
    home = dict(zip(neighbours, cities, strict=True))
    beside = {who: neighbours[place % len(neighbours)] for place, who in enumerate(asked)}
    taught = {
        "neighbours": write(folder / "neighbours.jsonl", NEIGHBOURS, beside),
        "cities": write(folder / "cities.jsonl", CITIES, home),
    }
    names = [str(folder / name) for name in HOPS]
    for place, name in enumerate(HOPS):
        passes = size.epochs if name == "neighbours" else size.epochs * len(beside) // len(home)  # as many steps
        training = Training(16, EVERY_LINEAR, 2e-3, max(1, passes), 32)
        base = load_base(find_base([], str(example / "base")), dtype="float32", device="cpu")
        train(name, [taught[name]], training, base, folder / name, seed=seed + place, base_id="loracat/demo-base")
    whole = {who: home[beside[who]] for who in asked}
    third = len(asked) // 3
    calibration = write(folder / "calibration.jsonl", [TASK], {who: whole[who] for who in asked[:third]})
    test = write(folder / "test.jsonl", [TASK], {who: whole[who] for who in asked[third:]})
    settings = settings_of(size)
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
    found = scored(test, recipe=folder / "recipe.json")
    short = {name: Path(name).name for name in names}
    return {"own": own, "held_out": encode(recipe.held_out), "comparison": encode(found.renamed(short))}


def right(found: Comparison, name: str) -> str:
    metric = found.row(name).metric
    assert metric is not None
    return f"{metric.mean:.0%}"


def parts(found: Mapping[str, Any]) -> tuple[Part, ...]:
    """The fits of nothing, one world in full, and all worlds."""
    problems: list[str] = []

    def held_out(document: Any) -> HeldOut:
        return decode(HeldOut, document, "", problems)  # type: ignore[no-any-return]

    drawn = {name: held_out(one) for name, one in found.items() if name.startswith((TRUE, RANDOM))}
    worlds = {name: one for name, one in found.items() if name.startswith(WORLD)}
    tables = {name.rpartition("-")[2]: held_out(one["held_out"]) for name, one in worlds.items()}
    first = next(iter(worlds.values()))
    comparison: Comparison = decode(Comparison, first["comparison"], "", problems)
    if problems:
        raise SystemExit(f"a cell of false-alarms: {problems[0]}; remove it, and it is measured again")
    return (_nothing(drawn), _world(next(iter(tables.values())), comparison, first["own"]), _worlds(tables))


def _nothing(tables: Mapping[str, HeldOut]) -> Part:
    rows = []
    random_ones = [table for name, table in tables.items() if name != TRUE]
    for name, those in (("true", [tables[TRUE]]), ("random", random_ones)):
        better = sum(table.verdict == "better" for table in those)
        than_best = sum(table.row("fit").interval[1] < 0 for table in those)
        ways = ("fit", FRESH_LORA, None, "base")
        losses = [spread([loss_of(table, way or table.best_ingredient) for table in those]) for way in ways]
        rows.append((name, f"{better} of {len(those)}", f"{than_best} of {len(those)}", *losses))
    heads = ("adapters", "called better", "better than the best adapter", "fit", "fresh LoRA", "best adapter", "base")
    return Part(f"{tables[TRUE].records} records, {len(random_ones)} draws of random adapters:", heads, tuple(rows))


def _world(held_out: HeldOut, found: Comparison, own: Sequence[str]) -> Part:
    best, [control] = found.best_ingredient, held_out.controls

    def line(name: str, nats: float, difference: float, interval: tuple[float, float]) -> tuple[str, ...]:
        return name, f"{nats:.3f}", f"{difference:+.3f}", interval_text(interval, digits=3)

    rows = [
        (*line(row.name, row.nats_per_token, row.difference, row.interval), right(found, row.name))
        for row in found.rows
    ]
    fresh = control.row
    rows.append((*line("fresh LoRA", fresh.nats_per_token, fresh.difference, fresh.interval), ""))
    guess = math.log(HOMES) * found.records / found.scored_tokens
    to_best = guess - found.row(best).nats_per_token
    rows.append(("a guess among the cities", f"{guess:.3f}", f"{to_best:+.3f}", "", f"{1 / HOMES:.0%}"))
    title = (
        f"Two hops, the first world: of its own hop {HOPS[0]} answers {own[0]} right, {HOPS[1]} {own[1]}. The fit is "
        f"called {held_out.verdict} ({found.records} records):"
    )
    return Part(title, ("", "nats per token", f"minus {best}", "95 % interval", "right"), tuple(rows))


def _worlds(tables: Mapping[str, HeldOut]) -> Part:
    rows = []
    for seed, table in tables.items():
        [control] = table.controls
        rows.append(
            (
                seed,
                f"{loss_of(table, 'fit'):.3f}",
                f"{loss_of(table, FRESH_LORA):.3f}",
                f"{control.difference:+.3f}",
                interval_text(control.interval, digits=3),
                table.verdict,
            )
        )
    heads = ("seed", "fit", "fresh LoRA", "fit minus fresh LoRA", "95 % interval", "called")
    return Part("All worlds of two hops:", heads, tuple(rows))


FALSE_ALARMS = Experiment(
    "false-alarms",
    "How often is a fit called `better` where there is nothing to compose? The verdict asks that it be clearly better "
    "than the best adapter and than a fresh LoRA trained on the same records; how often the first alone holds stands "
    "beside it.",
    units,
    parts,
)
