"""The search finds weights that are known to be there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting import search as search_module
from loracli.fitting.level import Solution, Task
from loracli.fitting.mixing import DiagonalMixing, FactorMixing, FreshLora, Layout, Mixing, make_diagonal, make_layout
from loracli.fitting.pool import without_idle
from loracli.fitting.published import _with_prompts, fit_as_published
from loracli.fitting.settings import FitSettings
from loracli.model.attach import AttachedModel
from loracli.model.loss import Scores
from tests.fitting.least_squares import LeastSquares, engine_of, one_task, random_examples
from tests.fitting.planted import different_by_layer, held_out_losses, make_engine, planted, run_search
from tests.tiny import make_adapter


@pytest.fixture
def adapters(two_adapters: tuple[Path, Path]) -> list[LoraAdapter]:
    return [read_adapter(str(path)) for path in two_adapters]


def test_planted_adapter_weights_are_recovered_to_one_hundredth(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    truth = torch.tensor([[0.6, 1.3]])
    with planted(tiny_base, adapters, truth, count=2000) as (attached, examples, held):
        settings = FitSettings(mixing="adapter", passes=8, batch_tokens=4096)
        found, _ = run_search(attached, adapters, examples, settings)
        assert (found.theta - truth).abs().max() < 1e-2
        losses = held_out_losses(attached, adapters, held, found)
    assert losses["fit"] < min(losses[name] for name in ("first", "second", "uniform", "sum", "base")) - 0.02


@pytest.mark.parametrize("kind", ["module", "layer"])
def test_planted_weights_that_differ_by_layer_beat_every_static_mixing(
    tiny_base: Path, adapters: list[LoraAdapter], kind: str
) -> None:
    truth = different_by_layer(adapters)
    with planted(tiny_base, adapters, truth, count=250) as (attached, examples, held):
        found, spent = run_search(attached, adapters, examples, FitSettings(mixing=kind))
        losses = held_out_losses(attached, adapters, held, found)
        attached.set_weights(truth)
        at_truth = make_engine(attached, held).objective.score(plan_batches(held, batch_tokens=2048), len(held))
    assert losses["fit"] < min(losses[name] for name in ("first", "second", "uniform", "sum", "base")) - 0.05
    assert losses["fit"] < at_truth.nats_per_token + 0.05
    assert spent <= 8.0


@pytest.mark.parametrize("kind", ["adapter", "module", "core", "factors", "auto"])
@pytest.mark.parametrize("passes", [3.0, 6.0])
def test_the_budget_of_passes_is_kept(tiny_base: Path, adapters: list[LoraAdapter], kind: str, passes: float) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=60, canonical=True) as (attached, examples, _):
        _, spent = run_search(attached, adapters, examples, FitSettings(mixing=kind, passes=passes))
    assert (0.1 if kind == "auto" else 0.4) * passes < spent <= passes  # auto may see early that nothing is to gain


def test_a_search_repeats_to_the_bit(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=40) as (attached, examples, _):
        runs = [run_search(attached, adapters, examples, FitSettings())[0] for _ in range(2)]
    assert torch.equal(runs[0].theta, runs[1].theta)
    assert runs[0].rungs == runs[1].rungs


def test_a_strong_ridge_holds_the_weights_at_their_start(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, different_by_layer(adapters), count=40) as (attached, examples, _):

        def move(ridge: float) -> float:
            found, _ = run_search(attached, adapters, examples, FitSettings(ridge=ridge))
            return float((found.theta - found.anchor).abs().mean())

        assert move(1e3) < 0.2 * move(0.0)


def published(
    attached: AttachedModel, adapters: list[LoraAdapter], examples: list[Example], rate: float | None
) -> Solution:
    mixing = make_diagonal(make_layout(adapters), "module", softmax=True)
    engine = make_engine(attached, examples)
    return fit_as_published(engine, mixing, examples, FitSettings(paper=True, learning_rate=rate))


def test_the_published_recipe_leaves_its_random_start_only_at_a_higher_rate(
    tiny_base: Path, adapters: list[LoraAdapter]
) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.0]]), count=600) as (attached, examples, _):
        moves = []
        for rate in (None, 1e-1):
            found = published(attached, adapters, examples, rate)
            assert isinstance(found.mixing, DiagonalMixing)
            moves.append(float((found.mixing.weights(found.theta) - found.mixing.weights(found.anchor)).abs().max()))
    assert 0 < moves[0] <= 0.04
    assert moves[1] > 0.1


def test_the_published_weights_sum_to_one_over_the_adapters_present(adapters: list[LoraAdapter]) -> None:
    mixing = make_diagonal(make_layout(adapters), "module", softmax=True)
    theta = torch.randn(mixing.numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = mixing.by_group(mixing.weights(theta))
    assert any(None in row for row in weights.values())
    for row in weights.values():
        assert sum(w for w in row if w is not None) == pytest.approx(1.0, abs=1e-12)


def test_the_published_recipe_scores_the_prompt_too() -> None:
    assert _with_prompts(Example("val.jsonl:1", (5, 6, 7), (False, False, True))).scored == (False, True, True)


def test_a_loss_that_is_not_finite_names_its_records(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=40) as (attached, examples, _):
        engine = make_engine(attached, examples)
        attached.model.lm_head.weight[3] = float("nan")
        batch = plan_batches(examples[:2], batch_tokens=512)[0]
        mixing = make_diagonal(make_layout(adapters), "module")
        with pytest.raises(NonFiniteLoss, match=r"records at val\.jsonl:0, val\.jsonl:1"):
            engine.total(mixing, mixing.constant([1.0, 1.0]), [batch], examples)


def test_adapters_that_change_nothing_are_dropped_and_cost_no_weight(tmp_path: Path, tiny_base: Path) -> None:
    """Of three, the truth uses the first alone; the weights of the others are exactly 0 in the end, at no loss."""
    paths = [make_adapter(tmp_path / str(seed), tiny_base, seed=seed) for seed in (1, 2, 3)]
    adapters = [read_adapter(str(path)) for path in paths]
    truth = torch.tensor([[1.0, 0.0, 0.0]])
    with planted(tiny_base, adapters, truth, count=200) as (attached, examples, held):
        found, _ = run_search(attached, adapters, examples, FitSettings(mixing="adapter"))
        losses = held_out_losses(attached, adapters, held, found)
        attached.set_weights(truth.expand(len(make_layout(adapters).modules), -1))
        at_truth = make_engine(attached, held).objective.score(plan_batches(held, batch_tokens=2048), len(held))
    assert found.dropped == (1, 2)
    mixing = found.mixing
    assert isinstance(mixing, DiagonalMixing) and mixing.weights(found.theta)[1:].tolist() == [0.0, 0.0]
    assert losses["fit"] < at_truth.nats_per_token + 0.005


def test_of_two_adapters_none_is_dropped(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.0]]), count=60) as (attached, examples, _):
        found, _ = run_search(attached, adapters, examples, FitSettings(mixing="adapter"))
    assert found.dropped == () and float(found.theta[1]) != 0.0


def test_idle_adapters_are_left_out_together_once_the_others_are_fitted_without_them() -> None:
    """Eight with the same direction, of which one has most of the weight: each other can go alone, and all together
    only where the first takes over."""
    layout, theta = Layout(("layers.0.proj",), ((1,) * 8,)), torch.tensor([0.86, *[0.02] * 7], dtype=torch.float64)
    model = LeastSquares(torch.tensor(1.0), noise=1.2)
    model._features, model.truth = model._features[:, :1].repeat(1, 8), torch.eye(8, dtype=torch.float64)[0]
    engine, mixing = engine_of(model), make_diagonal(layout, "module")
    task = replace(one_task(engine, random_examples([20] * 60), FitSettings()), references=tuple("abcdefgh"))
    scores = task.check(mixing, (theta,), "found")
    found = Solution(mixing, (theta,), (torch.zeros_like(theta),), scores, (), "", 0.0, passes=(1.0, 1.0))
    left, stages = without_idle(task, found, 1e9)
    assert left.dropped == (1, 2, 3, 4, 5, 6, 7) and stages
    together = task.check(left.mixing, (theta,), "without a fit")
    assert scores is not None and left.scores is not None and together is not None
    assert together.nats_per_token > scores.nats_per_token + 0.01
    assert left.scores.nats_per_token < scores.nats_per_token + 0.005
    assert left.theta[0] == pytest.approx(1.0, abs=0.1) and left.theta[1:].tolist() == [0.0] * 7


def test_auto_keeps_a_third_of_what_it_has_for_factors_for_a_new_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the trained factors would take."""

    class Factors(FactorMixing):
        def __init__(self) -> None:
            pass

        def lift(self, lower: Mixing, theta: torch.Tensor) -> torch.Tensor:
            return theta

        def from_nothing(self, *, seed: int) -> FreshLora:
            return cast(FreshLora, SimpleNamespace(start=torch.zeros(1)))

    task, budgets = SimpleNamespace(spent=0.0, folds=(), settings=FitSettings(mixing="auto")), list[float]()

    def all_of_it(_: object, mixing: object, starts: object, budget: float) -> Solution:
        budgets.append(budget)
        task.spent += budget
        scores = Scores(torch.ones(1), torch.ones(1))
        return Solution(cast(Mixing, mixing), (torch.ones(1),), (torch.ones(1),), scores, (), "", None)

    monkeypatch.setattr(search_module, "solve_level", all_of_it)
    below = Solution(cast(Mixing, SimpleNamespace(kind="core")), (torch.ones(1),), (), None, (), "", None)
    search_module.solve_next(cast(Task, task), Factors(), below, 300.0)
    assert budgets == pytest.approx([200.0, 100.0])
    task.settings = FitSettings(mixing="factors")
    search_module.solve_next(cast(Task, task), Factors(), below, 300.0)
    assert budgets[2:] == pytest.approx([300.0])


@pytest.mark.parametrize(
    ("trained", "new", "half", "chosen"),
    [
        (0.70, 0.60, 0.594, "half"),
        (0.60, 0.70, 0.594, "half"),
        (0.70, 0.60, 0.596, "new"),  # 0.005 is too little for both ranks
        (0.60, 0.70, 0.596, "trained"),
        (0.70, 0.60, 0.65, "new"),
    ],
)
def test_half_of_each_has_to_gain_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, trained: float, new: float, half: float, chosen: str
) -> None:
    def found(name: str, loss: float) -> Solution:
        scores = Scores(torch.tensor([2 * loss]), torch.tensor([2.0]))
        return Solution(cast(Mixing, None), (torch.ones(1),), (torch.zeros(1),), scores, (), name, None)

    monkeypatch.setattr(search_module, "solve_level", lambda *_: found("new", new))
    monkeypatch.setattr(search_module, "_half_of_each", lambda *_: found("half", half))
    task = SimpleNamespace(settings=FitSettings(), folds=(), least_gain=0.005)
    mixing = SimpleNamespace(from_nothing=lambda seed: SimpleNamespace(start=torch.zeros(1)))
    best = search_module._or_from_nothing(cast(Task, task), cast(FactorMixing, mixing), found("trained", trained), 1.0)
    assert best.chosen == chosen
