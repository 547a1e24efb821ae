"""The levels of the ladder: starts, basins, what ends a search early, and who may see which records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting import level as rung_module
from loracli.fitting.certificate import certificate_tokens
from loracli.fitting.criterion import LEAST_GAIN, Fold, Gain, loss_criterion
from loracli.fitting.descent import AdamW, Descent, Ran, plan_steps
from loracli.fitting.engine import Engine
from loracli.fitting.level import _RIDGE_PATH, Solution, Task, padded_tokens, ridge_path, solve_level
from loracli.fitting.mixing import DiagonalMixing, Mixing, make_diagonal, make_layout, make_mixing
from loracli.fitting.search import _solve_adapters, least_gain, search
from loracli.fitting.settings import FitSettings
from loracli.model.attach import AttachedModel, attach
from loracli.model.loss import Scores
from loracli.recipe.record import MixingKind
from tests.fitting import two_basins
from tests.fitting.least_squares import (
    LAYOUT,
    LeastSquares,
    engine_of,
    level,
    one_task,
    random_examples,
    task_of,
)
from tests.fitting.planted import held_out_losses, make_engine, planted, run_search, sampled_examples
from tests.tiny import make_adapter, make_base

# Two basins, on a real architecture.


@dataclass(frozen=True)
class TwoBasins:
    """What the adapter level finds, what the module level finds from there alone, and what the search finds."""

    adapter: Solution
    alone: Solution
    found: Solution
    losses: dict[str, float]  # on held-out records, `alone` and `truth` among them


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> TwoBasins:
    base, adapters, truth = two_basins.make_two_basins(tmp_path_factory.mktemp("basins"))
    settings = FitSettings()
    with planted(base, adapters, truth, count=200) as (attached, examples, held):
        engine, layout = make_engine(attached, examples), make_layout(adapters)
        task = task_of(engine, (Fold(tuple(examples[40:]), tuple(examples[:40])),), settings)
        budget = 2.0 * settings.budget(1, len(examples)) * sum(len(example.input_ids) for example in examples)
        lowest, module = make_diagonal(layout, "adapter"), make_diagonal(layout, "module")
        adapter = _solve_adapters(task, lowest, 0.2 * budget, alone=False)
        start = [module.lift(lowest, theta) for theta in adapter.thetas]
        alone = solve_level(task, module, {"adapter": start}, 0.8 * budget)
        found, _ = run_search(attached, adapters, examples, settings)
        losses = held_out_losses(attached, adapters, held, found)
        batches = plan_batches(held, batch_tokens=2048)
        losses["alone"] = engine.score(module, alone.thetas[0], batches, held).nats_per_token
        attached.set_weights(truth)
        losses["truth"] = engine.objective.score(batches, len(held)).nats_per_token
    return TwoBasins(adapter, alone, found, losses)


def weights_of(mixing: Mixing, theta: Tensor, *modules: str) -> list[float]:
    """Of the first adapter in these modules."""
    assert isinstance(mixing, DiagonalMixing)
    return [mixing.by_group(theta)[module][0] or 0.0 for module in modules]


def test_one_weight_for_each_adapter_switches_the_first_off(solved: TwoBasins) -> None:
    first, second = solved.adapter.thetas[0].tolist()
    assert abs(first) < 0.1 and abs(second - 1) < 0.1


def test_from_there_alone_the_module_fit_stays_in_the_trap(solved: TwoBasins) -> None:
    """It finds what a small step leads to, the third module's sign, and nothing of the other two."""
    up, down, third = weights_of(
        solved.alone.mixing, solved.alone.thetas[0], two_basins.UP, two_basins.DOWN, two_basins.THIRD
    )
    assert abs(up) < 0.2 and abs(down) < 0.2 and third < -0.2
    assert solved.losses["alone"] > solved.losses["truth"] + 1.5


def test_from_the_sum_the_search_finds_the_better_basin_and_says_so(solved: TwoBasins) -> None:
    up, down, third = weights_of(
        solved.found.mixing, solved.found.theta, two_basins.UP, two_basins.DOWN, two_basins.THIRD
    )
    assert abs(up - 1) < 0.15 and abs(down - 1) < 0.15 and third < 0
    assert solved.losses["fit"] < min(solved.losses["truth"] + 0.2, solved.losses["alone"] - 1.5)
    adapter, module = solved.found.rungs
    assert (module.kind, module.chosen, module.won) == ("module", "sum", True)
    assert [start.name for start in module.starts] == ["adapter", "sum"]
    below, total = module.starts
    # The sum begins far above, and was not left out for it.
    assert total.before is not None and below.before is not None and total.before > below.before + 0.3
    assert total.unseen is not None and below.unseen is not None and total.unseen < below.unseen
    assert below.before == adapter.validation
    assert module.gain is not None and module.standard_error is not None and module.gain > 1.5
    assert torch.equal(solved.found.anchor, solved.found.mixing.constant([1.0, 1.0]))


# How far `auto` climbs.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[LoraAdapter]]:
    """Two adapters of rank 1 on the same six modules."""
    folder = tmp_path_factory.mktemp("auto")
    base = make_base(folder / "base")
    paths = [
        make_adapter(folder / str(seed), base, targets=("o_proj", "down_proj"), rank=1, alpha=4, seed=seed)
        for seed in (1, 2)
    ]
    return base, [read_adapter(str(path)) for path in paths]


@contextmanager
def generated(
    base: Path, adapters: list[LoraAdapter], matrices: Sequence[Tensor], count: int
) -> Iterator[tuple[AttachedModel, list[Example], list[Example]]]:
    """Examples that the model generated itself at these mixing matrices: to fit on, and held out."""
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    with attach(model, adapters, make_layout(adapters).modules, canonical=True) as attached:
        attached.set_matrices(matrices)
        examples = sampled_examples(model, count + 60, 24, seed=0)
        yield attached, examples[:count], examples[count:]


def test_auto_stops_where_nothing_is_to_gain(small: tuple[Path, list[LoraAdapter]]) -> None:
    base, adapters = small
    truth = [torch.diag(torch.tensor([1.0, 0.5]))] * len(make_layout(adapters).modules)
    with generated(base, adapters, truth, 160) as (attached, examples, held):
        found, _ = run_search(attached, adapters, examples, FitSettings(mixing="auto", passes=12))
        fit = held_out_losses(attached, adapters, held, found)["fit"]
        attached.set_matrices(truth)
        at_truth = make_engine(attached, held).objective.score(plan_batches(held, batch_tokens=2048), len(held))
    assert found.mixing.kind in ("adapter", "module")
    last = found.rungs[-1]
    assert [r.kind for r in found.rungs] == ["adapter", "module", "core", "factors"]
    assert [r.won for r in found.rungs] == [r.kind == found.mixing.kind for r in found.rungs]
    assert last.gain is not None and last.standard_error is not None and last.gain <= max(last.standard_error, 0.005)
    assert " nats per token over " in last.why
    assert found.refitted and fit < at_truth.nats_per_token + 0.005


def test_auto_climbs_to_where_the_truth_is(small: tuple[Path, list[LoraAdapter]]) -> None:
    """Full cores, whose diagonals differ by module and which pair one adapter's input with the other's output."""
    base, adapters = small
    generator = torch.Generator().manual_seed(0)
    truth = []
    for row, _ in enumerate(make_layout(adapters).modules):
        matrix = 0.5 * torch.randn(2, 2, generator=generator)
        matrix.diagonal().copy_(torch.tensor([1.3, 0.3] if row % 2 else [0.2, 1.2]))
        truth.append(matrix)
    with generated(base, adapters, truth, 200) as (attached, examples, held):
        found, _ = run_search(attached, adapters, examples, FitSettings(mixing="auto"))
        fit = held_out_losses(attached, adapters, held, found)["fit"]
        attached.set_matrices(truth)
        at_truth = make_engine(attached, held).objective.score(plan_batches(held, batch_tokens=2048), len(held))
    assert found.mixing.kind == "core" and found.refitted
    assert [(r.kind, r.won) for r in found.rungs] == [
        ("adapter", False),
        ("module", False),
        ("core", True),
        ("factors", False),
    ]
    for below, level_record in zip(found.rungs, found.rungs[1:], strict=False):
        assert level_record.gain is not None and level_record.standard_error is not None
        assert (level_record.kind == "factors") != (level_record.gain > max(level_record.standard_error, 0.005))
        assert level_record.why.startswith(f"a gain of {level_record.gain:.4f} nats per token over {below.kind} is ")
        if level_record.kind != "factors":
            limit = f"is above one standard error, {level_record.standard_error:.4f}"
            assert level_record.why.endswith(limit)
    assert found.rungs[0].why == "the first kind of mixing"
    assert found.rungs[2].gain is not None and found.rungs[2].gain > 0.2
    assert fit < at_truth.nats_per_token + 0.03


@pytest.mark.parametrize(
    ("kind", "validated", "errors"),
    [("module", 8, 0), ("core", 8, 2), ("core", 16, 1), ("core", 96, 1), ("factors", 8, 2), ("factors", 96, 2)],
)
def test_what_overfits_more_easily_has_to_gain_more_standard_errors(
    kind: MixingKind, validated: int, errors: int
) -> None:
    task: Any = SimpleNamespace(choosing=validated, chooses_by_loss=True, least_gain=0.005)
    for standard_error in (0.02, 0.001):  # and where the loss is close to nothing, more than the least
        least = least_gain(task, kind, Gain(0.1, standard_error))
        assert least == (max(errors * standard_error, 0.005) if errors else 0.0)


def test_factors_are_trained_on_all_records_for_as_many_passes_as_the_validation_records_chose(
    small: tuple[Path, list[LoraAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where the folds began them: the level below is not fitted once more before, which only fits the records."""
    base, adapters = small
    generator = torch.Generator().manual_seed(0)
    truth = [torch.randn(2, 2, generator=generator) for _ in make_layout(adapters).modules]
    with generated(base, adapters, truth, 100) as (attached, examples, _):
        begun: list[Tensor] = []

        def adam(start: Tensor, **settings: Any) -> AdamW:
            begun.append(start)
            return AdamW(start, **settings)

        monkeypatch.setattr("loracli.fitting.search.AdamW", adam)  # of the last fit alone
        found, _ = run_search(attached, adapters, examples, FitSettings(mixing="factors"))
    assert found.moved and len(begun) == 1 and torch.equal(begun[0], found.anchor)
    whole, taken = found.passes
    a_pass = plan_steps(examples, batch_tokens=1024, seed=1).steps_a_pass
    before, last = found.stages[-2:]
    assert [(s.rung, s.stage) for s in (before, last)] == [("factors", "descent"), ("factors", "refit")]
    assert 0 < taken <= whole <= 4 + 1e-9 and last.steps == round(taken * a_pass)


def test_factors_of_folds_that_cannot_be_fitted_once_more_are_those_of_the_best_fold_and_no_mean(
    small: tuple[Path, list[LoraAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two passes over eight records in four folds nothing is left for the last fit."""
    base, adapters = small
    generator, climbed = torch.Generator().manual_seed(0), list[Solution]()
    truth = [torch.randn(2, 2, generator=generator) for _ in make_layout(adapters).modules]

    def again(_: Task, solved: Sequence[Solution], *__: Any) -> None:
        climbed.append(solved[-1])

    monkeypatch.setattr("loracli.fitting.search.refit", again)
    with generated(base, adapters, truth, 8) as (attached, examples, _):
        engine, layout = make_engine(attached, examples), make_layout(adapters)
        parts = [examples[place::4] for place in range(4)]
        folds = [Fold(tuple(e for e in examples if e not in part), tuple(part)) for part in parts]
        settings = FitSettings(mixing="factors", passes=2)
        criterion = loss_criterion(engine, batch_tokens=settings.batch_tokens)
        task = Task(engine, tuple(folds), criterion, settings, ("first", "second"))
        found = search(task, lambda kind: make_mixing(attached, layout, kind), examples)
        thetas = climbed[0].thetas
        losses = [
            criterion(found.mixing, theta, fold.validation, None).nats_per_token
            for theta, fold in zip(thetas, folds, strict=True)
        ]
    assert found.mixing.kind == "factors" and found.moved and not found.refitted
    assert torch.equal(found.theta, thetas[losses.index(min(losses))])


# What does not hang on the model: a sum of squares.

TRUTH = torch.tensor([0.2, 1.5, -0.3, 0.8, 1.2, 0.1, 0.9, 0.4, 1.4, -0.2, 0.6], dtype=torch.float64)


def searched(
    objective: LeastSquares, examples: Sequence[Example], settings: FitSettings, *, validate: bool = True
) -> tuple[Solution, Engine]:
    engine = engine_of(objective)
    return search(one_task(engine, examples, settings, validate=validate), level, examples), engine


def some_examples(count: int = 60) -> list[Example]:
    return random_examples([5 + i % 6 for i in range(count)])


@pytest.mark.parametrize(("folds", "times"), [(1, 2), (4, 1)])
def test_the_last_fit_takes_twice_the_passes_that_found_the_weights_and_in_folds_as_many(
    folds: int, times: int
) -> None:
    examples, settings = some_examples(60), FitSettings(passes=40)
    parts = [set(range(place, 60, max(folds, 4))) for place in range(folds)]
    divided = tuple(
        Fold(
            tuple(e for i, e in enumerate(examples) if i not in part),
            tuple(e for i, e in enumerate(examples) if i in part),
        )
        for part in parts
    )
    found = search(task_of(engine_of(LeastSquares(TRUTH)), divided, settings), level, examples)
    a_pass = plan_steps(examples, batch_tokens=settings.batch_tokens, seed=settings.seed + 1).steps_a_pass
    refit = found.stages[-1]
    assert refit.stage == "refit" and found.passes[1] > 1
    assert refit.steps == round(times * found.passes[1] * a_pass)


def break_at(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, objective: LeastSquares, broken: Callable[[Stage], bool]
) -> None:
    """Makes the loss not a number wherever `broken` says so."""
    stage, nats = Stage({}), objective.nats
    announce = engine.meter.stage

    def announced(text: str, **fields: Any) -> None:
        stage.fields, stage.descended = fields, 0
        announce(text, **fields)

    def breaking(batch: Batch) -> Tensor:
        stage.descending = objective._c.requires_grad
        stage.descended += stage.descending
        return nats(batch) * (torch.nan if broken(stage) else 1.0)

    monkeypatch.setattr(engine.meter, "stage", announced)
    monkeypatch.setattr(objective, "nats", breaking)


@dataclass
class Stage:
    """Where a search is: what it has said, whether a gradient is wanted, and how many there were since it said so."""

    fields: dict[str, Any]
    descending: bool = False
    descended: int = 0


def scores_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MixingKind, float]]:
    """The level and the validation loss of everything that is checked from now on."""
    seen: list[tuple[MixingKind, float]] = []
    check = Task.check

    def checked(task: Task, mixing: Mixing, thetas: Sequence[Tensor], key: str) -> Scores | None:
        scores = check(task, mixing, thetas, key)
        if scores is not None:
            seen.append((mixing.kind, scores.nats_per_token))
        return scores

    monkeypatch.setattr(Task, "check", checked)
    return seen


@pytest.mark.parametrize("bad", ["adapter", "sum"])
@pytest.mark.parametrize("descending", [True, False], ids=["in-the-descent", "on-the-validation-records"])
def test_a_start_that_diverges_is_left_out_and_the_other_goes_on(
    bad: str, descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, examples = LeastSquares(TRUTH), some_examples()
    healthy, _ = searched(objective, examples, FitSettings())
    engine = engine_of(objective)
    break_at(
        monkeypatch,
        engine,
        objective,
        lambda at: (
            (at.fields.get("rung"), at.fields.get("start")) == ("module", bad)
            and at.descending == descending
            and (at.descended > 2 or not descending)
        ),
    )
    found = search(one_task(engine, examples, FitSettings()), level, examples)
    module = found.rungs[1]
    (left_out,) = [start for start in module.starts if start.name == bad]
    (good,) = [start for start in module.starts if start.name != bad]
    assert left_out.left_out is not None and "not finite on the records at val.jsonl:" in left_out.left_out
    assert (left_out.after, left_out.unseen) == (None, None) and (left_out.before is not None) == descending
    assert good.left_out is None and good.unseen is not None
    assert module.chosen == good.name and found.stopped is None and found.refitted
    assert (found.theta - healthy.theta).abs().max() < 0.1  # there is but one basin


def test_a_level_that_cannot_be_descended_keeps_the_better_of_its_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, examples = LeastSquares(TRUTH), some_examples()
    engine = engine_of(objective)
    break_at(monkeypatch, engine, objective, lambda at: at.fields.get("rung") == "module" and at.descending)
    found = search(one_task(engine, examples, FitSettings()), level, examples)
    assert found.stopped is not None and "not finite on the records at val.jsonl:" in found.stopped
    assert found.mixing.kind == "module" and not found.refitted and found.ridge is None
    adapter, module = found.rungs
    assert [start.left_out is None for start in module.starts] == [False, False]
    assert module.validation == min(start.before or 9.0 for start in module.starts)
    assert module.validation == adapter.validation
    assert torch.equal(found.theta, found.anchor) and float((found.theta - found.theta.mean()).abs().max()) > 0


@pytest.mark.parametrize("validate", [True, False])
def test_without_any_finite_start_the_records_are_named(validate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("adapter", "module"):
        objective, examples = LeastSquares(TRUTH), some_examples(20)
        engine = engine_of(objective)
        break_at(monkeypatch, engine, objective, lambda at, kind=kind: at.fields.get("rung") == kind)  # type: ignore[misc]
        with pytest.raises(NonFiniteLoss, match=r"not finite on the records at val\.jsonl:"):
            search(one_task(engine, examples, FitSettings(), validate=validate), level, examples)


def test_a_loss_that_is_not_finite_in_the_middle_keeps_the_best_solution_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the second stage of the path of `rank`: the first one's end is the best, and is what is returned."""
    objective, examples = LeastSquares(TRUTH), some_examples()
    engine = engine_of(objective)
    seen = scores_seen(monkeypatch)
    break_at(
        monkeypatch,
        engine,
        objective,
        lambda at: at.fields.get("ridge") == _RIDGE_PATH[1] and at.descending and at.descended > 3,
    )
    task = one_task(engine, examples, FitSettings(mixing="rank"))
    found = solve_level(task, level("rank"), far_from_the_truth(), 20_000.0)
    assert found.stopped is not None and "not finite on the records at val.jsonl:" in found.stopped
    losses = [loss for kind, loss in seen if kind == "rank"]
    assert found.scores is not None and found.scores.nats_per_token == losses[-1] == min(losses)
    assert len(losses) == 5 and found.ridge == _RIDGE_PATH[0] and found.moved
    scores = one_task(engine_of(LeastSquares(TRUTH)), examples, FitSettings()).check(
        found.mixing, [found.theta], "found"
    )
    assert scores is not None and scores.nats_per_token == losses[-1]


def test_a_loss_that_is_not_finite_in_the_last_fit_keeps_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, examples = LeastSquares(TRUTH), some_examples()
    engine = engine_of(objective)
    break_at(monkeypatch, engine, objective, lambda at: at.fields.get("stage") == "refit" and at.descended > 2)
    found = search(one_task(engine, examples, FitSettings()), level, examples)
    assert found.stopped is not None and not found.refitted
    scores = one_task(engine_of(LeastSquares(TRUTH)), examples, FitSettings()).check(
        found.mixing, [found.theta], "found"
    )
    assert scores is not None and scores.nats_per_token == found.rungs[-1].validation


def test_without_validation_records_the_last_finite_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, examples = LeastSquares(TRUTH), some_examples(7)
    engine = engine_of(objective)
    thetas: list[Tensor] = []
    break_at(monkeypatch, engine, objective, lambda at: at.fields.get("stage") == "descent" and at.descended > 4)
    run = Descent.run

    def watched(descent: Descent, steps: int, ridge: float = 0.0, **key: Any) -> Ran:
        try:
            return run(descent, steps, ridge, **key)
        finally:
            thetas.append(descent.theta)

    monkeypatch.setattr(Descent, "run", watched)
    found = search(one_task(engine, examples, FitSettings(), validate=False), level, examples)
    assert found.stopped is not None and found.mixing.kind == "module"
    assert torch.equal(found.theta, thetas[-1]) and bool(torch.isfinite(found.theta).all())


def ridges_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ridge of every run of every descent from now on."""
    ridges: list[float] = []
    run = Descent.run

    def watched(descent: Descent, steps: int, ridge: float = 0.0, **key: Any) -> Ran:
        ridges.append(ridge)
        return run(descent, steps, ridge, **key)

    monkeypatch.setattr(Descent, "run", watched)
    return ridges


def test_without_validation_records_the_ridge_stays_at_its_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    ridges = ridges_of(monkeypatch)
    found, _ = searched(LeastSquares(TRUTH), some_examples(7), FitSettings(), validate=False)
    assert ridges == [_RIDGE_PATH[0]] * 3  # two starts, one stage, no last fit
    assert found.ridge == _RIDGE_PATH[0] == max(_RIDGE_PATH) and not found.refitted and found.stopped is None
    module = found.rungs[1]
    assert (module.validation, module.gain) == (None, None)
    assert all(start.before is None and start.after is None and start.unseen is not None for start in module.starts)
    assert module.why == "not compared: there are no validation records; asked for"


@pytest.mark.parametrize("kind", ["layer", "module"])
def test_with_validation_records_there_is_no_ridge(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    ridges = ridges_of(monkeypatch)
    found, _ = searched(LeastSquares(TRUTH), some_examples(), FitSettings(mixing=kind))
    assert ridges == [0.0] * 5 and found.ridge == 0.0  # two starts, the first steps, a round more, the last fit


@pytest.mark.parametrize(
    ("rate", "passes", "ends_early"), [(None, None, True), (0.004, None, False), (0.004, 6, False)]
)
def test_module_goes_on_for_as_long_as_a_round_gains_and_the_budget_lasts(
    rate: float | None, passes: float | None, ends_early: bool
) -> None:
    settings = FitSettings(learning_rate=rate, passes=passes)
    examples = some_examples(200)
    found, engine = searched(LeastSquares(TRUTH + 2, noise=0.01), examples, settings)
    losses = [stage.validation for stage in found.stages if stage.stage == "descent" and stage.rung == "module"]
    gains = [before - after for before, after in pairwise(losses)]  # type: ignore[operator]
    budget = settings.budget(1, len(examples)) * 2 * sum(len(example.input_ids) for example in examples)
    assert all(gained > LEAST_GAIN for gained in gains[:-1])
    assert (gains[-1] <= LEAST_GAIN) is ends_early
    assert (engine.meter.spent < 0.6 * budget) is ends_early and engine.meter.spent <= budget
    if ends_early:
        assert len(gains) == 1  # as short as a fit can be; the certificate is not in it
        shortest = (
            budget * settings.shortest(1, len(examples)).budget(1, len(examples)) / settings.budget(1, len(examples))
        )
        assert 0.6 * shortest < engine.meter.spent < shortest


def far_from_the_truth() -> dict[str, list[Tensor]]:
    """Two starts of `rank`."""
    return {name: [level("rank").constant([weight, 0.3])] for name, weight in (("module", 0.3), ("sum", 0.2))}


def test_the_ridge_of_rank_falls_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ridges = ridges_of(monkeypatch)
    task = one_task(engine_of(LeastSquares(TRUTH)), some_examples(), FitSettings(mixing="rank"))
    found = solve_level(task, level("rank"), far_from_the_truth(), 20_000.0)
    assert ridges == [*[_RIDGE_PATH[0]] * 2, *_RIDGE_PATH] and _RIDGE_PATH[-1] == found.ridge == 0.0


def test_a_ridge_that_was_asked_for_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ridges = ridges_of(monkeypatch)
    found, _ = searched(LeastSquares(TRUTH), some_examples(), FitSettings(ridge=0.02))
    assert ridges == [0.02] * 5 and found.ridge == 0.02


@pytest.mark.parametrize(("ridge", "path"), [(None, (0.0,) * 4), (0.02, (0.02,) * 4)])
def test_trained_factors_are_held_by_a_short_schedule_and_not_by_a_ridge(
    ridge: float | None, path: tuple[float, ...]
) -> None:
    assert ridge_path(FitSettings(ridge=ridge), "factors", validated=True) == path
    assert ridge_path(FitSettings(ridge=ridge), "factors", validated=False) == path


def test_a_start_near_the_sum_is_not_tried_twice() -> None:
    found, _ = searched(LeastSquares(torch.ones(1), noise=0.0), some_examples(), FitSettings())
    assert [start.name for start in found.rungs[1].starts] == ["adapter"]
    assert (found.theta - 1).abs().max() < 0.05


def test_the_path_ends_where_the_solution_gets_clearly_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of records by turns: two starts before and after their first steps, then a stage that has lost much."""
    ridges = ridges_of(monkeypatch)
    task = one_task(engine_of(LeastSquares(TRUTH)), some_examples(), FitSettings(mixing="rank"))
    turns = iter([3.0, 2.0, 3.0, 2.5, 3.4, 1.0, 1.0])

    def scripted(mixing: Mixing, theta: Tensor, examples: Sequence[Example], key: str | None) -> Scores:
        tokens = torch.full((len(examples),), 4.0, dtype=torch.float64)
        return Scores(tokens * next(turns) + torch.linspace(-0.1, 0.1, len(examples)), tokens)

    task = Task(task.engine, task.folds, scripted, task.settings, task.references)
    starts = {name: [level("rank").constant([1.0, weight])] for name, weight in (("module", 0.3), ("sum", 1.0))}
    found = solve_level(task, level("rank"), starts, 5000.0)
    assert ridges == [_RIDGE_PATH[0]] * 3  # two starts, and one stage of three
    assert found.scores is not None and found.scores.nats_per_token == pytest.approx(2.0)  # after the first steps
    assert (found.chosen, found.ridge, found.moved) == ("module", _RIDGE_PATH[0], True)


class TwoWells(LeastSquares):
    """Of the first adapter's mean weight m and the second's n: wells at m = 0 and, deeper, at m = 1.4; n wants 1."""

    def nats(self, batch: Batch) -> Tensor:
        m, n = (self._c[LAYOUT.owner == i].mean() for i in range(2))
        wells = torch.stack([-0.7 - 8 * m.square(), -8 * (m - 1.4).square()])
        return (1 - torch.logsumexp(wells, dim=0) + 2 * (n - 1).square()).expand(len(batch.labels))


@pytest.mark.parametrize("validate", [True, False])
def test_the_lowest_level_takes_the_better_of_its_two_ends(validate: bool) -> None:
    """The second adapter alone screens best and ends in the near well; the sum begins higher and ends in the deep one.
    Without validation records the loss on what was fitted says so."""
    found, _ = searched(TwoWells(TRUTH), some_examples(20), FitSettings(mixing="adapter"), validate=validate)
    (only,) = found.rungs
    assert [start.name for start in only.starts] == ["screened", "sum"] and only.chosen == "sum"
    assert (found.theta - torch.tensor([1.4, 1.0], dtype=torch.float64)).abs().max() < 0.15
    if validate:
        screened, total = only.starts
        assert screened.before is not None and total.before is not None and screened.before < total.before


def uneven(count: int, seed: int) -> list[Example]:
    """A few long records among short ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(2.5 + 0.7 * torch.randn(count, generator=generator)).clamp(2, 120).int().tolist()
    return random_examples(lengths, seed=seed)


@pytest.mark.parametrize("kind", ["adapter", "layer", "module", "rank"])
@pytest.mark.parametrize("count", [24, 64, 300])
def test_records_of_uneven_lengths_keep_to_the_budget_and_use_it(kind: MixingKind, count: int) -> None:
    for seed in range(3):
        examples = uneven(count, seed)
        whole = 2 * sum(len(example.input_ids) for example in examples)
        settings = FitSettings(mixing=kind, batch_tokens=128, seed=seed)
        found, engine = searched(LeastSquares(TRUTH), examples, settings)
        budget = settings.budget(1, count) * whole
        assert engine.meter.spent <= budget
        least = {"adapter": 3 / 8, "rank": 5 / 8}.get(kind, 1 / 2)  # BFGS and rounds are done when they are done
        assert engine.meter.spent > least * budget
        assert found.stopped is None


# Cross-validation.

FOLDS = 3


def folds_of(examples: Sequence[Example]) -> tuple[Fold, ...]:
    parts = [tuple(examples[k::FOLDS]) for k in range(FOLDS)]
    return tuple(Fold(tuple(e for e in examples if e not in part), part) for part in parts)


def test_no_fold_descends_on_a_record_that_it_chooses_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient before the last fit is of one fold's fitting records, and all folds take their turns."""
    examples, settings = some_examples(), FitSettings(cv=FOLDS)
    engine = engine_of(LeastSquares(TRUTH))
    folds = folds_of(examples)
    total, announce = engine.total, engine.meter.stage
    stage: list[Any] = [None]
    visited: dict[Any, list[set[str]]] = {}

    def spied(
        mixing: Mixing, theta: Tensor, batches: Sequence[Batch], of: Sequence[Example], **key: Any
    ) -> tuple[float, Tensor]:
        visited.setdefault(stage[0], []).append({of[i].place for batch in batches for i in batch.indices})
        return total(mixing, theta, batches, of, **key)

    def announced(text: str, **fields: Any) -> None:
        stage[0] = (fields.get("rung"), fields.get("stage"))
        announce(text, **fields)

    monkeypatch.setattr(engine, "total", spied)
    monkeypatch.setattr(engine.meter, "stage", announced)
    found = search(task_of(engine, folds, settings), level, examples)
    fitting = [{example.place for example in fold.fitting} for fold in folds]
    every = {example.place for example in examples}
    assert set(visited) == {("adapter", None), ("module", "probe"), ("module", "descent"), ("module", "refit")}
    for (_, what), steps in visited.items():
        if what == "refit":
            assert set().union(*steps) == every
            continue
        assert all(any(step <= part for part in fitting) for step in steps)
        assert set().union(*steps) <= every
    in_descents = visited["module", "probe"] + visited["module", "descent"]
    for fold, part in zip(folds, fitting, strict=True):
        held = {example.place for example in fold.validation}
        assert any(step & held for step in in_descents) and any(step <= part for step in in_descents)
    assert found.refitted and found.rungs[1].standard_error is not None


def test_what_a_fold_finds_does_not_hang_on_the_records_that_it_chooses_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation records of one fold are exchanged for others, and all that choices are made by is played back from
    the first search: that fold's solutions have the same bits throughout, those of the others do not."""
    examples, settings = some_examples(), FitSettings(cv=FOLDS)
    others = random_examples([len(example.input_ids) for example in examples], seed=99)
    unseen = rung_module._unseen

    def checked(examples: Sequence[Example], played: list[Any] | None) -> tuple[list[Tensor], list[Any]]:
        thetas: list[Tensor] = []
        heard: list[Any] = []

        def play(found: Any) -> Any:
            heard.append(found if played is None else played[len(heard)])
            return heard[-1]

        def criterion(mixing: Mixing, theta: Tensor, validation: Sequence[Example], key: str | None) -> Scores:
            thetas.append(theta)
            scores: Scores = play(loss(mixing, theta, validation, key))
            return scores

        task = task_of(engine_of(LeastSquares(TRUTH)), folds_of(examples), settings)
        loss = task.criterion
        with monkeypatch.context() as patched:
            patched.setattr(rung_module, "_unseen", lambda ran, after: play(unseen(ran, after)))
            task = Task(task.engine, task.folds, criterion, settings, task.references)
            low = _solve_adapters(task, level("adapter"), 3000.0, alone=False)
            below = [level("module").lift(low.mixing, theta) for theta in low.thetas]
            total = [level("module").constant([1.0, 1.0])] * FOLDS
            solve_level(task, level("module"), {"adapter": below, "sum": total}, 12_000.0)
        return thetas, heard

    thetas, heard = checked(examples, None)
    assert len(thetas) % FOLDS == 0 and len(thetas) >= 7 * FOLDS
    for exchanged in range(FOLDS):
        changed = [others[i] if i % FOLDS == exchanged else example for i, example in enumerate(examples)]
        again, _ = checked(changed, heard)
        assert len(again) == len(thetas)
        for fold in range(FOLDS):
            same = [torch.equal(a, b) for a, b in zip(thetas[fold::FOLDS], again[fold::FOLDS], strict=True)]
            assert all(same) if fold == exchanged else not any(same[-2:])


def test_the_solutions_of_the_folds_are_averaged_before_the_last_fit() -> None:
    examples, settings = some_examples(), FitSettings(cv=FOLDS, mixing="adapter")
    engine = engine_of(LeastSquares(TRUTH))
    folds = folds_of(examples)
    found = search(task_of(engine, folds, settings), level, examples)
    budget = settings.budget(FOLDS, len(examples)) * 2 * sum(len(example.input_ids) for example in examples)
    solved = _solve_adapters(task_of(engine, folds, settings), level("adapter"), budget, alone=True)
    assert torch.equal(found.theta, torch.stack(solved.thetas).mean(dim=0))
    assert len({tuple(theta.tolist()) for theta in solved.thetas}) == FOLDS


# Cross-fitting: a fold judged by what the others choose.


def judged(
    folds: tuple[Fold, ...], examples: Sequence[Example], mixing: str, engine: Engine, parts: Sequence[int]
) -> list[Solution]:
    """What the search finds with each of these folds held out, in turn and with one engine."""
    found = []
    for part in parts:
        task = replace(task_of(engine, folds, FitSettings(mixing=mixing)), judged=part)
        with engine.within(f"part {part}", lambda _, __: 0):
            found.append(search(replace(task, spent_before=engine.meter.spent), level, examples))
    return found


@pytest.mark.parametrize("mixing", ["adapter", "module", "rank"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_fit_that_shares_its_work_finds_the_same_bits_and_does_nothing_twice(
    mixing: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = some_examples()
    folds = folds_of(examples)
    alone = [judged(folds, examples, mixing, engine_of(LeastSquares(TRUTH)), [part])[0] for part in range(FOLDS)]
    done = list[tuple[bytes, tuple[str, ...]]]()
    engine = engine_of(LeastSquares(TRUTH), tmp_path if on_disk else None, shared=True)
    over = engine._over

    def spied(batches: Sequence[Batch], of: Sequence[Example], what: Any, *rest: Any) -> Tensor:
        places = tuple(of[index].place for batch in batches for index in batch.indices)
        done.append((f"{what.cost} {engine.objective.attached._c.tolist()}".encode(), places))  # type: ignore[attr-defined]
        return over(batches, of, what, *rest)

    search(task_of(engine, folds, FitSettings(mixing=mixing)), level, examples)
    spent = engine.meter.spent
    monkeypatch.setattr(engine, "_over", spied)
    together = judged(folds, examples, mixing, engine, range(FOLDS))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.theta, other.theta) and one.rungs == other.rungs and one.stages == other.stages
    assert engine.meter.spent > spent, "what was shared counts in the budget"
    again = len(done)
    repeated = judged(folds, examples, mixing, engine_with_names(engine), range(FOLDS))
    assert [solution.rungs for solution in repeated] == [solution.rungs for solution in together]
    assert len(done) == again, "everything that they ask for has been done"


def engine_with_names(engine: Engine) -> Engine:
    """The engine for fits that are called otherwise than before."""
    within = engine.within
    engine.within = lambda name, left: within(f"{name} again", left)  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("fold", range(FOLDS))
def test_the_records_that_are_judged_choose_nothing(fold: int) -> None:
    """Whatever they say of a solution, it is found; where they are asked, they do change it."""
    examples, settings = some_examples(), FitSettings(cv=FOLDS)
    folds = folds_of(examples)

    def found(part: int | None, *, upset: bool) -> Solution:
        task = task_of(engine_of(LeastSquares(TRUTH)), folds, settings)
        loss = task.criterion

        def criterion(mixing: Mixing, theta: Tensor, validation: Sequence[Example], key: str | None) -> Scores:
            scores = loss(mixing, theta, validation, key)
            if upset and validation == folds[fold].validation:  # the best is called the worst
                return replace(scores, nats=1000 * scores.tokens - 500 * scores.nats)
            return scores

        return search(replace(task, criterion=criterion, judged=part), level, examples)

    assert torch.equal(found(fold, upset=True).theta, found(fold, upset=False).theta)
    assert not torch.equal(found(None, upset=True).theta, found(None, upset=False).theta)


def test_only_the_records_that_choose_are_counted() -> None:
    folds = folds_of(some_examples())
    task, sizes = (
        task_of(engine_of(LeastSquares(TRUTH)), folds, FitSettings(cv=FOLDS)),
        [len(f.validation) for f in folds],
    )
    assert task.choosing == sum(sizes)
    assert [replace(task, judged=part).choosing for part in range(FOLDS)] == [sum(sizes) - size for size in sizes]


@pytest.mark.parametrize("by_loss", [True, False])
def test_another_criterion_is_not_mixed_with_losses(by_loss: bool) -> None:
    """A criterion in units of its own chooses between the starts by itself; the loss is pooled with unseen batches."""
    examples = some_examples()
    task = replace(one_task(engine_of(LeastSquares(TRUTH)), examples, FitSettings()), chooses_by_loss=by_loss)
    levels = search(task, level, examples).rungs
    alike = [start.unseen == start.after for start in levels[1].starts]
    assert alike == [not by_loss] * len(alike) and alike


@pytest.mark.parametrize(("kind", "records_a_number"), [("adapter", 4), ("layer", 16), ("module", 16)])
def test_with_many_records_for_each_number_the_budget_has_room_for_a_newton_step(
    kind: MixingKind, records_a_number: int
) -> None:
    """Two certificates and a step between them, each certificate a forward and two backward passes; one with less."""
    mixing, settings = level(kind), FitSettings(mixing=kind)
    many = some_examples(records_a_number * mixing.numbers)
    for examples, certificates in ((many, 2), (many[1:], 1)):
        reserved = certificate_tokens(mixing, examples, settings, settings.budget(1, len(examples)))
        assert reserved == 3 * certificates * padded_tokens(examples, settings.batch_tokens)
