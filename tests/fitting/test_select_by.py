"""A task metric chooses starts, ridges and kinds of mixing: against the loss, through interruptions, on processes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loracli.calibration.render import Example
from loracli.errors import MetricError, UsageError
from loracli.fitting.criterion import metric_criterion
from loracli.fitting.run import fit_mixing
from loracli.fitting.search import LADDERS, search
from loracli.fitting.settings import FitSettings
from loracli.recipe.recipe import load_recipe
from tests.faults.fork_server import ForkServer
from tests.fitting.least_squares import LAYOUT, LeastSquares, engine_of, level, one_task, random_examples
from tests.fitting.test_fit_processes import SmallFit
from tests.fitting.test_journal import Fit, Power, power
from tests.fitting.test_level import TRUTH, TwoWells
from tests.tiny import make_adapter, random_records, write_jsonl

__all__ = ["power"]  # a fixture

EXACT = FitSettings(passes=3, cv=2, select_by="contains", max_new_tokens=4, control="none")


def near_zero(objective: Any) -> Tensor:
    """Every record is right where the first adapter's mean weight is below a half."""
    m = float(objective._c[LAYOUT.owner == 0].mean())
    return torch.full((4,), float(m < 0.5), dtype=torch.float64)


def test_the_well_that_the_metric_wants_wins_over_the_one_with_the_lower_loss() -> None:
    examples = random_examples([20] * 20)
    settings = FitSettings(mixing="adapter")
    by_loss = one_task(engine_of(TwoWells(TRUTH)), examples, settings)
    assert float(search(by_loss, level, examples).theta[0]) > 1.2
    engine = engine_of(TwoWells(TRUTH))
    task = replace(
        one_task(engine, examples, settings),
        criterion=metric_criterion(engine, lambda _: near_zero, batch_tokens=1024),
        chooses_by_loss=False,
    )
    found = search(task, level, examples)
    assert abs(float(found.theta[0])) < 0.2
    screened, total = found.rungs[0].starts
    assert screened.after is not None and total.after is not None
    assert screened.after < 1e-3 and 1 <= total.after < 1 + 1e-3


def test_a_cost_is_what_is_not_right_and_the_loss_decides_between_equals() -> None:
    engine = engine_of(LeastSquares(TRUTH))
    examples = random_examples([5, 9, 30])
    right = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    asked: list[int] = []

    def scorer_of(some: Sequence[Example]) -> Any:
        asked.append(len(some))
        return lambda objective: right

    criterion = metric_criterion(engine, scorer_of, batch_tokens=1024)
    far, near = (criterion(level("adapter"), level("adapter").constant([w, w]), examples, None) for w in (9.0, 1.0))
    for scores in (far, near):
        assert (scores.nats - (1 - right)).min() >= 0 and (scores.nats - (1 - right)).max() <= 1e-4
        assert scores.tokens.tolist() == [1.0] * 3
    assert near.nats_per_token < far.nats_per_token
    assert asked == [3]  # the scorer of the same records is made once


def test_auto_climbs_for_half_an_answer_and_not_for_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every answer right from the first level on there is nothing to climb for, whatever the loss does."""
    monkeypatch.setitem(LADDERS, "auto", {"adapter": 0.3, "module": 0.7})
    examples = random_examples([20] * 40)
    task = one_task(engine_of(LeastSquares(TRUTH)), examples, FitSettings(mixing="auto"))
    assert search(task, level, examples).mixing.kind == "module"
    engine = engine_of(LeastSquares(TRUTH))
    always = metric_criterion(engine, lambda some: lambda _: torch.ones(len(some)).double(), batch_tokens=1024)
    task = replace(
        one_task(engine, examples, FitSettings(mixing="auto")),
        criterion=always,
        chooses_by_loss=False,
        unit="exact",
        least_gain=0.5 / 8,
    )
    found = search(task, level, examples)
    assert found.mixing.kind == "adapter"
    assert "exact over adapter" in found.rungs[1].why


@pytest.fixture
def fit(tmp_path: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]) -> Fit:
    data = write_jsonl(tmp_path / "val.data", random_records(30))
    return Fit(tmp_path, [str(path) for path in two_shallow_adapters], data, str(shallow_base), EXACT)


def test_the_recipe_says_what_chose_and_the_fit_repeats(fit: Fit) -> None:
    """With the control that a fit has by default."""
    fit = replace(fit, settings=replace(EXACT, control=None))
    fit.run("one.json")
    fit.run("two.json")
    assert fit.written("one") == fit.written("two")
    recipe = load_recipe(fit.folder / "one.json")
    assert recipe.fit.criterion == "contains" and recipe.fit.settings["select_by"] == "contains"
    costs = [s.after for r in recipe.fit.rungs for s in r.starts] + [r.validation for r in recipe.fit.rungs]
    assert all(cost is not None and 0 <= cost <= 1 + 1e-4 for cost in costs)


def test_a_fit_that_is_stopped_among_its_answers_ends_in_the_same_bytes(
    fit: Fit, power: Power, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that were given are not asked for again."""
    from loracli.evaluation import scorer

    asked: list[int] = []
    answers = scorer.greedy_answers

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(1)
        return answers(*args, **kwargs)

    monkeypatch.setattr(scorer, "greedy_answers", counted)
    stop = -1
    fit.run("whole.json")
    whole, stop = len(asked), 5
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        fit.run("broken.json")
    stop = -1
    fit.run("broken.json", resume=True)
    assert len(asked) == whole > 8
    assert fit.written("whole") == fit.written("broken")


def test_one_and_two_processes_choose_the_same(
    server: ForkServer, tmp_path: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]
) -> None:
    small = SmallFit(server, tmp_path, shallow_base, two_shallow_adapters)
    options = ("--select-by", "contains", "--max-new-tokens", "4", "--passes", "2")
    for count in (1, 2):
        small.run(count, *options, "-o", f"{count}.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    refused = small.run(2, *options, "--shard", "-o", "3.json", code=2)
    assert "answers cannot be generated with a base that is shared out" in refused.stderr


def test_the_users_own_command_chooses_and_its_words_stay_out_of_the_recipe(
    tmp_path: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]
) -> None:
    scorer = tmp_path / "secret_scorer.py"
    scorer.write_text("import json, sys\nfor line in sys.stdin:\n    print(len(json.loads(line)['output']) / 100)\n")
    command = shlex.join([sys.executable, str(scorer)])
    data = write_jsonl(tmp_path / "val.jsonl", random_records(30))
    settings = FitSettings(passes=2, metric_command=command, max_new_tokens=4, holdout=0.2)
    adapters = [str(path) for path in two_shallow_adapters]
    recipe = fit_mixing(adapters, data, base=str(shallow_base), settings=settings)
    assert recipe.fit.criterion == "command" and "secret_scorer" not in recipe.to_json()
    scorer.write_text("raise SystemExit('broken')\n")
    with pytest.raises(MetricError, match="ended with the code 1"):
        fit_mixing(adapters, data, base=str(shallow_base), settings=settings)


def test_what_a_metric_cannot_choose_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    for fields in (
        {"select_by": "exact", "paper": True},
        {"select_by": "exact", "metric_command": "grade"},
        {"select_by": "bleu"},
        {"select_by": "exact", "max_new_tokens": 0},
        {"max_new_tokens": 8},
        {"tolerance": 0.1},
    ):
        with pytest.raises(UsageError):
            FitSettings(**fields)  # type: ignore[arg-type]
    adapter = make_adapter(tmp_path / "a", tiny_base)
    few = write_jsonl(tmp_path / "few.jsonl", random_records(4))
    held = write_jsonl(tmp_path / "held.jsonl", random_records(4, seed=3))
    with pytest.raises(UsageError, match="--select-by cannot choose with 4 training records"):
        fit_mixing([str(adapter)], few, eval_data=held, base=str(tiny_base), settings=FitSettings(select_by="exact"))
    texts = write_jsonl(tmp_path / "text.jsonl", [{"text": r["prompt"] * 3} for r in random_records(40)])
    with pytest.raises(Exception, match="texts without prompts"):
        fit_mixing([str(adapter)], texts, base=str(tiny_base), settings=FitSettings(select_by="exact"))


def test_the_curve_of_a_descent_and_its_ridges_are_in_the_recipe(
    tmp_path: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]
) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(80))
    log = tmp_path / "steps.jsonl"
    fit = Fit(
        tmp_path,
        [str(p) for p in two_shallow_adapters],
        data,
        str(shallow_base),
        FitSettings(mixing="rank", passes=6, holdout=0.2, control="none"),
    )
    fit.run("r.json", log="steps.jsonl")
    stages = load_recipe(tmp_path / "r.json").fit.stages
    assert [s.stage for s in stages][-1] == "refit" and {"probe", "descent"} <= {s.stage for s in stages}
    ridges = [(s.rung, s.ridge) for s in stages if s.stage == "descent"]
    assert ridges[:2] == [("module", 0.0), ("rank", 0.01)] and ridges == sorted(ridges, key=lambda r: (r[0], -r[1]))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(s.steps for s in stages) == len(lines)
    done = 0
    for stage in stages:
        losses = torch.tensor([line["loss"] for line in lines[done : done + stage.steps]], dtype=torch.float64)
        means = [float(part.mean()) for part in losses.tensor_split(min(48, stage.steps))]
        assert list(stage.losses) == pytest.approx(means, rel=1e-5)
        done += stage.steps
