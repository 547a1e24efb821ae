"""What a fit may cost, said beforehand: never less than what it then does, and not much more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from loracli.demo.run import example_folder
from loracli.fitting.criterion import Fold
from loracli.fitting.engine import GRADIENT_COST, Pace
from loracli.fitting.journal import TASK, Meter
from loracli.fitting.level import tokens_of
from loracli.fitting.run import fit_mixing
from loracli.fitting.search import search
from loracli.fitting.settings import FitSettings
from loracli.fitting.work import REACH, Work
from tests.fitting.least_squares import REFERENCES, LeastSquares, engine_of, level, random_examples, task_of
from tests.heard import Watched
from tests.tiny import random_records, write_jsonl

TRUTH = torch.tensor([0.2, 1.5, -0.3, 0.8, 1.2, 0.1, 0.9, 0.4, 1.4, -0.2, 0.6], dtype=torch.float64)

_OVERHEAD = 40  # tokens, against records of 3 to 200


@pytest.mark.parametrize("lengths", [(8, 9), (3, 200)], ids=str)
@pytest.mark.parametrize("folds", [0, 1, 4])
@pytest.mark.parametrize("passes", [2, 8])
@pytest.mark.parametrize("mixing", ["adapter", "module", "rank"])
def test_a_search_does_at_most_what_is_said_at_every_stage(
    mixing: str, passes: float, folds: int, lengths: tuple[int, ...]
) -> None:
    """On records of any lengths, with few or many passes, and where a micro-batch costs much whatever its size."""
    examples = random_examples([lengths[i % len(lengths)] for i in range(24)])
    settings = FitSettings(mixing=mixing, passes=passes, batch_tokens=256)
    parts = [tuple(examples[i::5]) for i in range(folds)]
    divided = tuple(Fold(tuple(e for e in examples if e not in part), part) for part in parts)
    divided = divided or (Fold(tuple(examples), ()),)
    told = Watched(TASK)
    engine = engine_of(LeastSquares(TRUTH))
    engine.meter = Meter(told)
    work = Work(divided, examples, settings, REFERENCES)
    with engine.meter.counted(work.stages, work.effort_left(Pace(1.0, _OVERHEAD)), overhead=_OVERHEAD):
        search(task_of(engine, divided, settings), level, examples)
    assert 0 < told.done <= told.totals[0] <= 2 * told.done
    assert work.left(REACH).tokens >= engine.meter.spent
    said = work.passes * GRADIENT_COST * tokens_of(examples)
    assert said >= engine.meter.spent * (1 - 1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        FitSettings(),
        FitSettings(passes=8, cv=3),
        FitSettings(mixing="factors", passes=8),
        FitSettings(mixing="auto"),
        FitSettings(paper=True),
    ],
    ids=lambda settings: f"{settings.mixing} {settings.passes} {settings.cv} {settings.paper}",
)
def test_a_whole_fit_fills_its_bar_and_is_said_to_take_less_than_twice_what_it_does(
    settings: FitSettings, tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    told = fitted(settings, tmp_path, tiny_base, two_adapters)
    assert (told.begun, told.finished) == (1, 1)
    goes_on = settings == FitSettings()  # for as long as it pays, which nobody knows before
    assert told.totals[0] <= (3 if goes_on else 2) * told.done and told.done == told.totals[-1]
    numbers = [re.match(r"(\d+)/(\d+) ", stage) for stage in told.stages]
    counted = [int(found[1]) for found in numbers if found]
    assert counted == sorted(counted) and len(counted) == len(told.stages)
    assert {int(found[2]) for found in numbers if found} == {counted[-1]}


def fitted(settings: FitSettings, folder: Path, base: Path, adapters: tuple[Path, Path]) -> Watched:
    data, told = write_jsonl(folder / "val.jsonl", random_records(40)), Watched(TASK)
    fit_mixing([str(path) for path in adapters], data, base=str(base), settings=settings, progress=told)
    return told


def test_the_stages_of_a_fit_are_counted_and_called_by_what_is_done(tmp_path: Path) -> None:
    told, example = Watched(TASK), example_folder()
    adapters = [str(example / name) for name in ("know", "form")]
    settings = FitSettings(passes=12)
    lines = (example / "calibration.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "val.jsonl").write_text("".join(lines[:8]))
    fit_mixing(adapters, tmp_path / "val.jsonl", base=str(example / "base"), settings=settings, progress=told)
    assert told.stages == [
        "1/11 finding the modules that the records reach",
        "2/11 finding a start",
        "3/11 fitting 44 weights",
        "4/11 fitting on all records",
        "5/11 checking how sure the weights are",
        "6/11 scoring the held-out records",
        *(f"{6 + part}/11 part {part}" for part in range(1, 5)),
        "11/11 looking at the adapters' inputs",
    ]
    assert told.places == sorted(told.places) and told.places[0] == 0.0
    assert told.done == told.totals[-1]
