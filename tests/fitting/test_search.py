"""The search finds weights that are known to be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.batches import plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss, UsageError
from loracli.evaluation.held_out import static_points
from loracli.fitting.attach import AttachedModel, attach
from loracli.fitting.loss import make_objective
from loracli.fitting.mixing import make_mixing
from loracli.fitting.paper import fit_as_published, with_prompts
from loracli.fitting.problem import Meter, Problem
from loracli.fitting.search import Found, search
from loracli.fitting.settings import FitSettings
from loracli.progress import SILENT

REFERENCES = ("first", "second")


def sampled_examples(model: object, count: int, length: int, seed: int) -> list[Example]:
    """Sequences drawn token by token from the model as it stands: random first token, all others scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (count, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            p = torch.softmax(model(input_ids=ids).logits[:, -1].double(), dim=-1)  # type: ignore[operator]
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    flags = (False, *(True,) * (length - 1))
    return [Example(f"val.jsonl:{line}", tuple(row), flags) for line, row in enumerate(ids.tolist())]


@contextmanager
def planted(
    base: Path, adapters: list[LoraAdapter], truth: torch.Tensor, *, count: int, seed: int = 0
) -> Iterator[tuple[AttachedModel, list[Example], list[Example]]]:
    """A model with adapters attached, and examples that it generated itself at `truth`: to fit on, and held out."""
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    modules = make_mixing(adapters, "module").modules
    with attach(model, adapters, modules) as attached:
        attached.set_weights(truth if len(truth) == len(modules) else truth.expand(len(modules), -1))
        examples = sampled_examples(model, count + 60, 24, seed)
        yield attached, examples[:count], examples[count:]


def make_problem(attached: AttachedModel, adapters: list[LoraAdapter], examples: list[Example], kind: str) -> Problem:
    held = len(examples) // 5
    objective = make_objective(attached, plan_batches(examples, batch_tokens=256)[0])
    mixing = make_mixing(adapters, kind, softmax=False)  # type: ignore[arg-type]
    return Problem(objective, mixing, tuple(examples[held:]), tuple(examples[:held]), Meter(SILENT))


def held_out_losses(problem: Problem, held: list[Example], theta: torch.Tensor) -> dict[str, float]:
    batches = plan_batches(held, batch_tokens=2048)
    modules = len(problem.mixing.modules)
    points = {name: torch.tensor(p).expand(modules, -1) for name, p in static_points(REFERENCES).items()}
    points["fit"] = problem.mixing.expand(theta)
    return {name: problem.score(weights, batches, held).nats_per_token for name, weights in points.items()}


def different_by_layer(adapters: list[LoraAdapter]) -> torch.Tensor:
    """Weights (L, 2) that no static mixing comes near."""
    by_layer = torch.tensor([[1.5, -0.4], [0.2, 1.4], [1.2, 0.3]])
    return torch.stack([by_layer[int(name.split(".")[2])] for name in make_mixing(adapters, "module").modules])


@pytest.fixture
def adapters(two_adapters: tuple[Path, Path]) -> list[LoraAdapter]:
    return [read_adapter(str(path)) for path in two_adapters]


def test_planted_adapter_weights_are_recovered_to_one_hundredth(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    truth = torch.tensor([[0.6, 1.3]])
    with planted(tiny_base, adapters, truth, count=2000) as (attached, examples, held):
        problem = make_problem(attached, adapters, examples, "adapter")
        found = search(problem, REFERENCES, FitSettings(mixing="adapter", passes=12, batch_tokens=4096))
        assert (found.theta - truth).abs().max() < 1e-2
        losses = held_out_losses(problem, held, found.theta)
    assert losses["fit"] < min(losses[name] for name in ("first", "second", "uniform", "sum", "base")) - 0.02


@pytest.mark.parametrize("kind", ["module", "layer"])
def test_planted_weights_that_differ_by_layer_beat_every_static_mixing(
    tiny_base: Path, adapters: list[LoraAdapter], kind: str
) -> None:
    truth = different_by_layer(adapters)
    with planted(tiny_base, adapters, truth, count=250) as (attached, examples, held):
        problem = make_problem(attached, adapters, examples, kind)
        found = search(problem, REFERENCES, FitSettings(mixing=kind))  # type: ignore[arg-type]
        spent = problem.meter.spent / (2 * sum(len(e.input_ids) for e in examples))
        losses = held_out_losses(problem, held, found.theta)
        at_truth = problem.score(truth, plan_batches(held, batch_tokens=2048), held).nats_per_token
    assert losses["fit"] < min(losses[name] for name in ("first", "second", "uniform", "sum", "base")) - 0.05
    assert losses["fit"] < at_truth + 0.05
    assert spent <= 8.0


def test_the_budget_of_passes_is_kept(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=60) as (attached, examples, _):
        total = 2 * sum(len(e.input_ids) for e in examples)
        for passes in (3.0, 6.0):
            problem = make_problem(attached, adapters, examples, "module")
            search(problem, REFERENCES, FitSettings(passes=passes))
            assert 0.7 * passes < problem.meter.spent / total <= passes


def test_a_search_repeats_to_the_bit(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=40) as (attached, examples, _):
        runs = [
            search(make_problem(attached, adapters, examples, "module"), REFERENCES, FitSettings()) for _ in range(2)
        ]
    assert torch.equal(runs[0].theta, runs[1].theta)
    assert runs[0].starts == runs[1].starts


def test_a_strong_ridge_holds_the_weights_at_their_start(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, different_by_layer(adapters), count=40) as (attached, examples, _):

        def move(ridge: float) -> float:
            found = search(make_problem(attached, adapters, examples, "module"), REFERENCES, FitSettings(ridge=ridge))
            return float((found.theta - found.start)[problem.mixing.present].abs().mean())

        problem = make_problem(attached, adapters, examples, "module")
        assert move(1e3) < 0.2 * move(0.0)


def published(
    attached: AttachedModel, adapters: list[LoraAdapter], examples: list[Example], rate: float | None
) -> Found:
    objective = make_objective(attached, plan_batches(examples, batch_tokens=256)[0])
    mixing = make_mixing(adapters, "module", softmax=True)
    problem = Problem(objective, mixing, tuple(examples), (), Meter(SILENT))
    return fit_as_published(problem, FitSettings(paper=True, learning_rate=rate))


def test_the_published_recipe_leaves_its_random_start_only_at_a_higher_rate(
    tiny_base: Path, adapters: list[LoraAdapter]
) -> None:
    mixing = make_mixing(adapters, "module", softmax=True)
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.0]]), count=600) as (attached, examples, _):
        moves = []
        for rate in (None, 1e-1):
            found = published(attached, adapters, examples, rate)
            moves.append(float((mixing.expand(found.theta) - mixing.expand(found.start)).abs().max()))
    assert 0 < moves[0] <= 0.04
    assert moves[1] > 0.1


def test_the_published_weights_sum_to_one_over_the_adapters_present(adapters: list[LoraAdapter]) -> None:
    mixing = make_mixing(adapters, "module", softmax=True)
    theta = torch.randn(len(mixing.groups), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = mixing.expand(theta)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(mixing.modules), dtype=torch.float64))
    assert not weights[~mixing.present].any()


def test_the_published_recipe_scores_the_prompt_too() -> None:
    assert with_prompts(Example("val.jsonl:1", (5, 6, 7), (False, False, True))).scored == (False, True, True)


def test_a_loss_that_is_not_finite_names_its_records(tiny_base: Path, adapters: list[LoraAdapter]) -> None:
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=40) as (attached, examples, _):
        problem = make_problem(attached, adapters, examples, "module")
        attached.model.lm_head.weight[3] = float("nan")
        batch = plan_batches(examples[:2], batch_tokens=512)[0]
        with pytest.raises(NonFiniteLoss, match="records val.jsonl:0, val.jsonl:1"):
            problem.gradient(problem.mixing.constant([1.0, 1.0]), batch, examples)


@pytest.mark.parametrize("kind", ["rank", "core", "factors", "auto"])
def test_rungs_of_later_versions_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UsageError, match=f"--mixing {kind} is not in this version"):
        FitSettings(mixing=kind)  # type: ignore[arg-type]
