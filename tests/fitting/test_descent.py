"""The steps of a descent: how many there are, what each holds, and that it can be broken off anywhere."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loracli.calibration.dataset import Batch
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.descent import AdamW, Descent, Plan, Ran, plan_steps
from loracli.fitting.engine import Engine
from tests.fitting.least_squares import LeastSquares, engine_of, level, random_examples

SIZES = (16, 17, 31, 64, 100, 500, 2000, 20_000)


def lengths_of(shape: str, count: int) -> list[int]:
    """Tokens of each record; `outlier` has one record as long as twenty, `halves` leaves half of a batch empty."""
    generator = random.Random(count)
    return {
        "equal": [12] * count,
        "uniform": [generator.randint(2, 40) for _ in range(count)],
        "lognormal": [min(200, max(2, int(generator.lognormvariate(2.7, 0.8)))) for _ in range(count)],
        "outlier": [10] * (count - 1) + [200],
        "halves": [104] * count,
    }[shape]


def fake(lengths: list[int]) -> list[Example]:
    return [Example(f"val.jsonl:{i}", (5,) * n, (False,) + (True,) * (n - 1)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("shape", ["equal", "uniform", "lognormal", "outlier", "halves"])
def test_a_pass_has_64_to_128_steps_for_any_number_of_records(shape: str) -> None:
    for count in SIZES:
        plan = plan_steps(fake(lengths_of(shape, count)), batch_tokens=200, seed=0)
        assert min(64, count) <= plan.steps_a_pass <= 128, count
        assert plan.steps_a_pass == -(-len(plan.batches) // plan.batches_a_step)
        longest = max(len(example.input_ids) for example in plan.examples)
        assert max(batch.tokens for batch in plan.batches) <= max(200, longest)
        assert (plan.batches_a_step > 1) == (len(plan.batches) > 128)


def test_fewer_records_than_steps_are_a_step_each() -> None:
    for count in (1, 2, 9, 15):
        plan = plan_steps(fake([30] * count), batch_tokens=200, seed=0)
        assert plan.steps_a_pass == count and plan.batches_a_step == 1


def test_a_batch_budget_below_every_record_gives_a_batch_for_each() -> None:
    plan = plan_steps(fake([30] * 500), batch_tokens=1, seed=0)
    assert len(plan.batches) == 500 and plan.batches_a_step == 4 and plan.steps_a_pass == 125


@pytest.mark.parametrize("count", [9, 100, 777])
def test_every_pass_visits_every_record_once_in_an_order_of_its_own(count: int) -> None:
    examples = fake(lengths_of("uniform", count))
    plan = plan_steps(examples, batch_tokens=60, seed=4)
    orders = []
    for order in range(3):
        numbers = range(order * plan.steps_a_pass, (order + 1) * plan.steps_a_pass)
        visited = [i for number in numbers for batch in plan.step(number).batches for i in batch.indices]
        assert sorted(visited) == list(range(count))
        orders.append(visited)
    assert orders[0] != orders[1] != orders[2]
    assert [b.indices for b in plan.step(1).batches] != [
        b.indices for b in plan_steps(examples, batch_tokens=60, seed=5).step(1).batches
    ]
    assert max(len(plan.step(number).batches) for number in range(plan.steps_a_pass)) == plan.batches_a_step
    assert (plan.batches_a_step > 1) == (count == 777)


@pytest.mark.parametrize("count", [20, 300])
def test_the_steps_of_a_pass_add_up_to_the_full_gradient(count: int) -> None:
    """And each, times its scale, stands for the gradient of the mean: their mean is that, by number of batches."""
    engine, mixing = engine_of(LeastSquares(torch.ones(1))), level("module")
    examples = random_examples([5 + i % 13 for i in range(count)])
    plan = plan_steps(examples, batch_tokens=24, seed=0)
    theta = mixing.constant([0.4, 0.7])
    nats, full = engine.total(mixing, theta, plan.batches, examples)
    scored = sum(sum(example.scored) for example in examples)
    sums, mean, gradient = 0.0, torch.zeros_like(full), torch.zeros_like(full)
    for number in range(plan.steps_a_pass):
        step = plan.step(number)
        more, part = engine.total(mixing, theta, step.batches, examples)
        sums, gradient = sums + more, gradient + part
        mean += len(step.batches) / len(plan.batches) * step.scale * part
    assert sums == pytest.approx(nats, rel=1e-12)
    torch.testing.assert_close(gradient, full, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mean, full / scored, rtol=1e-11, atol=1e-11)
    assert plan.batches_a_step == (1 if count == 20 else 2)


@pytest.mark.parametrize("shape", ["uniform", "outlier"])
def test_the_cost_of_steps_is_known_before_they_are_taken(shape: str) -> None:
    examples = random_examples(lengths_of(shape, 40))
    plan = plan_steps(examples, batch_tokens=100, seed=1)
    assert plan.tokens_of(range(plan.steps_a_pass)) == plan.tokens
    for tokens in (0, 40.5, plan.tokens - 1, plan.tokens, 2.7 * plan.tokens):
        for first in (0, 7):
            count = plan.steps_within(tokens, first=first)
            assert (
                plan.tokens_of(range(first, first + count)) <= tokens < plan.tokens_of(range(first, first + count + 1))
            )
    assert plan.steps_within(-5.0) == 0
    engine, mixing = engine_of(LeastSquares(torch.ones(1))), level("module")
    descent_on(engine, plan, mixing.constant([1.0, 1.0]), 21).run(21)
    assert engine.meter.spent == 2 * plan.tokens_of(range(21))


def descent_on(engine: Engine, plan: Plan, start: Tensor, steps: int) -> Descent:
    adam = AdamW(start, steps=steps, rate=0.05, warm_up=2)
    return Descent(engine, level("module"), plan.examples, plan.step, adam, start)


def test_what_is_shared_is_told_apart_by_its_schedule() -> None:
    """Eight steps of a schedule of 10 and of one of 40: the rates differ, and so does where they lead."""
    start = level("module").constant([0.2, 0.5])
    plan = plan_steps(random_examples([9] * 30), batch_tokens=18, seed=0)
    ends = {}
    for shared in (False, True):
        engine = engine_of(LeastSquares(torch.ones(1)), shared=shared)
        descents = {whole: descent_on(engine, plan, start, whole) for whole in (10, 40)}
        for whole, descent in descents.items():
            descent.run(8, key=f"schedule of {whole}")
        ends[shared] = [descent.theta for descent in descents.values()]
    assert not torch.equal(*ends[False])
    assert all(torch.equal(one, other) for one, other in zip(ends[False], ends[True], strict=True))


def test_a_run_averages_its_last_quarter_and_scores_its_later_half_before_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, start = engine_of(LeastSquares(torch.ones(1))), level("module").constant([0.2, 0.5])
    plan = plan_steps(random_examples([9] * 30), batch_tokens=18, seed=0)
    seen: list[tuple[Tensor, float, float]] = []
    total = engine.total

    def spied(
        mixing: Any, theta: Tensor, batches: tuple[Batch, ...], examples: Any, **key: Any
    ) -> tuple[float, Tensor]:
        nats, gradient = total(mixing, theta, batches, examples, **key)
        seen.append((theta, nats, sum(batch.scored_tokens for batch in batches)))
        return nats, gradient

    monkeypatch.setattr(engine, "total", spied)
    descent = descent_on(engine, plan, start, 18)
    first, second = descent.run(7), descent.run(11)
    thetas = [theta for theta, _, _ in seen[1:]] + [descent.theta]  # after each step
    for ran, begin, end in ((first, 0, 7), (second, 7, 18)):
        quarter = thetas[end - max((end - begin) // 4, 1) : end]
        torch.testing.assert_close(ran.average, torch.stack(quarter).mean(dim=0), rtol=1e-14, atol=1e-14)
        later = seen[begin + (end - begin) // 2 : end]
        assert (ran.nats, ran.tokens) == (sum(nats for _, nats, _ in later), sum(tokens for _, _, tokens in later))
    assert engine.steps == 18


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_step_goes_down_the_mean_loss_and_the_ridge(ridge: float) -> None:
    """Against torch's own AdamW on the sum of both, with autograd's gradient of the closed formula."""
    objective = LeastSquares(torch.ones(1))
    plan = plan_steps(random_examples([9] * 40), batch_tokens=18, seed=0)
    start = level("module").constant([0.2, 0.5])
    descent = descent_on(engine_of(objective), plan, start, 20)
    descent.run(20, ridge)
    theta = start.clone().requires_grad_(True)
    theirs = torch.optim.AdamW([theta], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for number in range(1, 21):
        theirs.param_groups[0]["lr"] = 0.05 * (number / 2 if number <= 2 else (21 - number) / 18)
        labels = torch.cat([batch.labels for batch in plan.step(number - 1).batches])
        residual = objective._features[labels] @ (theta - objective.truth) - objective._noise[labels]
        loss = (1 + residual.square() / 2).mean() + ridge / 2 * (theta - start).square().sum()
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    torch.testing.assert_close(descent.theta, theta.detach(), rtol=1e-11, atol=1e-11)


def test_theta_stays_at_the_last_step_whose_loss_was_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = LeastSquares(torch.ones(1))
    plan = plan_steps(random_examples([9] * 30), batch_tokens=18, seed=0)
    start = level("module").constant([0.2, 0.5])
    healthy = descent_on(engine_of(objective), plan, start, 10)
    healthy.run(6)
    place = plan.examples[plan.step(6).batches[0].indices[0]].place
    nats, calls = objective.nats, Counter[str]()

    def broken(batch: Batch) -> Tensor:
        calls["nats"] += 1
        return nats(batch) * (torch.nan if calls["nats"] == 7 else 1.0)

    monkeypatch.setattr(objective, "nats", broken)
    descent = descent_on(engine_of(objective), plan, start, 10)
    with pytest.raises(NonFiniteLoss, match=place):
        descent.run(10)
    assert torch.equal(descent.theta, healthy.theta)


class Stopped(Exception):
    """Stands for the kill signal."""


def stop_after(calls: int, work: Callable[..., Any], counted: Counter[str]) -> Callable[..., Any]:
    def stopping(*args: Any, **kwargs: Any) -> Any:
        if counted["calls"] == calls:
            raise Stopped
        result = work(*args, **kwargs)
        counted["calls"] += 1
        return result

    return stopping


def program(engine: Engine, dtype: torch.dtype) -> tuple[list[Ran], list[Tensor], int, int]:
    """Two starts, some steps from each, then on from the second under another ridge, as a level does it."""
    plan = plan_steps(random_examples([7] * 150), batch_tokens=7, seed=0)
    assert plan.batches_a_step == 2
    starts = [level("module").constant(point).to(dtype) for point in ([0.2, 0.5], [1.0, 1.0])]
    descents = [descent_on(engine, plan, start, 9) for start in starts]
    runs = [descent.run(4, 0.01, key=f"start {i}") for i, descent in enumerate(descents)]
    runs.append(descents[1].run(5, 0.0, key="on from start 1"))
    states = [tensor for descent in descents for tensor in descent._adam.state().values()]
    return runs, states, engine.steps, engine.meter.spent


def same(one: tuple[list[Ran], list[Tensor], int, int], other: tuple[list[Ran], list[Tensor], int, int]) -> bool:
    ran = all(
        torch.equal(a.average, b.average) and (a.nats, a.tokens) == (b.nats, b.tokens)
        for a, b in zip(one[0], other[0], strict=True)
    )
    return ran and all(map(torch.equal, one[1], other[1])) and one[2:] == other[2:]


STEPS = 4 + 4 + 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_descent_broken_off_at_any_step_ends_in_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """And takes no step twice."""
    whole = program(engine_of(LeastSquares(torch.ones(1))), dtype)
    assert whole[1][0].dtype == dtype
    for calls in range(STEPS):
        folder = tmp_path / str(calls)
        folder.mkdir()
        counted = Counter[str]()
        engine = engine_of(LeastSquares(torch.ones(1)), folder)
        engine.total = stop_after(calls, engine.total, counted)  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            program(engine, dtype)
        again = engine_of(LeastSquares(torch.ones(1)), folder)
        rest = Counter[str]()
        again.total = stop_after(-1, again.total, rest)  # type: ignore[method-assign]
        assert same(program(again, dtype), whole)
        assert (counted["calls"], rest["calls"]) == (calls, STEPS - calls)


def test_a_descent_broken_off_within_a_step_and_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    """At one micro-batch after the other, of two a step; no micro-batch is run twice."""
    whole = program(engine_of(LeastSquares(torch.ones(1))), torch.float64)
    for first in range(0, 2 * STEPS, 3):
        folder = tmp_path / str(first)
        folder.mkdir()
        left = 2 * STEPS
        for calls in (first, 3):
            objective, counted = LeastSquares(torch.ones(1)), Counter[str]()
            objective.nats = stop_after(calls, objective.nats, counted)  # type: ignore[method-assign]
            if calls < left:
                with pytest.raises(Stopped):
                    program(engine_of(objective, folder), torch.float64)
                left -= calls
        objective, counted = LeastSquares(torch.ones(1)), Counter[str]()
        objective.nats = stop_after(-1, objective.nats, counted)  # type: ignore[method-assign]
        assert same(program(engine_of(objective, folder), torch.float64), whole)
        assert counted["calls"] == left
