"""Descent on the mixing weights from one start: BFGS for a handful of numbers, AdamW over shuffled steps for hundreds,
which can be broken off at any step and taken up again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from loracli.calibration.dataset import Batch, plan_batches, shuffled
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Entry
from loracli.fitting.mixing import Mixing
from loracli.recipe.record import StageRecord

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8
WARM_UP = 0.05
_ARMIJO = 1e-4
_BACK = 0.4  # of a step to where the loss is not finite
_SHORTEST, _LONGEST = 0.05, 0.6  # shares of a step that did not descend, between which the next is
_FIRST_MOVE = 0.3  # largest change of a weight in the first step; mixing weights live on the scale of 1
_LARGEST_MOVE = 1.0  # and in any later one


@dataclass(frozen=True)
class Minimum:
    """The best point that a search saw.

    Args:
        theta: of the shape of the start.
        value: there.
        values: of every evaluation, in order; where the loss was not finite there is none.
        evaluations: how many were spent.
    """

    theta: Tensor
    value: float
    values: tuple[float, ...]
    evaluations: int


def bfgs(evaluate: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, *, evaluations: int) -> Minimum:
    """Quasi-Newton descent with a dense inverse Hessian and backtracking; Nocedal and Wright 2006, algorithms 6.1, 3.1.

    Args:
        evaluate: theta to its value and gradient, which has theta's shape.
        start: where to begin; float64.
        evaluations: at most so many calls, at least 1.
    Raises:
        NonFiniteLoss: if `evaluate` does at the start; further on, a step to such a point is shortened.
    """
    shape = start.shape
    theta, (value, gradient) = start.flatten(), evaluate(start)
    gradient, values = gradient.flatten(), [value]
    inverse = torch.eye(theta.numel(), dtype=torch.float64) * (_FIRST_MOVE / max(float(gradient.abs().max()), 1e-12))
    used, scaled = 1, False
    while used < evaluations and float(gradient.abs().max()) > 1e-7:
        direction = -(inverse @ gradient)
        slope = float(direction @ gradient)
        step = min(1.0, _LARGEST_MOVE / float(direction.abs().max()))
        while used < evaluations:
            trial = theta + step * direction
            used += 1
            try:
                new_value, new_gradient = evaluate(trial.view(shape))
            except NonFiniteLoss:  # too far: as any step that climbs
                step *= _BACK
                continue
            new_gradient = new_gradient.flatten()
            values.append(new_value)
            if new_value <= value + _ARMIJO * step * slope:
                break
            step *= _interpolated(value, step * slope, new_value, step * float(new_gradient @ direction))
        else:
            break
        s, y = trial - theta, new_gradient - gradient
        curvature = float(s @ y)
        if curvature > 1e-12:
            if not scaled:
                inverse, scaled = torch.eye(len(theta), dtype=torch.float64) * (curvature / float(y @ y)), True
            rho = 1.0 / curvature
            left = torch.eye(len(theta), dtype=torch.float64) - rho * torch.outer(s, y)
            inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
        theta, value, gradient = trial, new_value, new_gradient
    return Minimum(theta.view(shape), value, tuple(values), used)


def _interpolated(value: float, slope: float, new_value: float, new_slope: float) -> float:
    """The share of a step at which the cubic through both ends, with their slopes along the step, is least; Nocedal and
    Wright 2006, equation 3.59, kept within bounds. With few evaluations to spend, halving would use them all up."""
    first = slope + new_slope - 3 * (new_value - value)
    square = first * first - slope * new_slope
    if square < 0:
        return _SHORTEST
    second = math.sqrt(square)
    bottom = new_slope - slope + 2 * second
    share = 1 - (new_slope + second - first) / bottom if bottom > 0 else _SHORTEST
    return min(max(share, _SHORTEST), _LONGEST)


class AdamW:
    """AdamW without decay (arXiv 1711.05101) on one tensor, under one schedule: warm-up, then linear decay to
    zero.

    Args:
        start: theta at step 0.
        steps: of the whole schedule.
        rate: the peak rate.
        warm_up: steps of linear warm-up.
        betas: decay of the two moments.
    """

    def __init__(
        self, start: Tensor, *, steps: int, rate: float, warm_up: int, betas: tuple[float, float] = _BETAS
    ) -> None:
        self.theta = start.clone()
        self._betas = betas
        self.step_number = 0
        self._steps, self._rate, self._warm_up = steps, rate, warm_up
        self._first, self._second = torch.zeros_like(start), torch.zeros_like(start)

    def state(self) -> dict[str, Tensor]:
        """What, with `step_number`, a step depends on."""
        return {"theta": self.theta, "first": self._first, "second": self._second}

    @property
    def schedule(self) -> dict[str, float]:
        """What else it depends on, where the moments decay as ever."""
        return {"step_number": self.step_number, "steps": self._steps, "rate": self._rate, "warm_up": self._warm_up}

    def restore(self, state: Mapping[str, Tensor], step_number: int) -> None:
        """Goes to where another one was."""
        self.theta, self._first, self._second = (state[name] for name in ("theta", "first", "second"))
        self.step_number = step_number

    def step(self, gradient: Tensor) -> None:
        """One step down the gradient."""
        self.step_number += 1
        first, second = self._betas
        self._first = first * self._first + (1 - first) * gradient
        self._second = second * self._second + (1 - second) * gradient.square()
        mean = self._first / (1 - first**self.step_number)
        square = self._second / (1 - second**self.step_number)
        self.theta = self.theta - self.rate() * mean / (square.sqrt() + _EPSILON)

    def rate(self) -> float:
        """The rate of the current step: as transformers' linear schedule, which the published recipe uses, but counted
        from 1."""
        if self.step_number <= self._warm_up:
            return self._rate * self.step_number / max(self._warm_up, 1)
        return self._rate * max(self._steps - self.step_number + 1, 0) / max(self._steps - self._warm_up, 1)


_FEWEST_STEPS_A_PASS = 64
_MOST_STEPS_A_PASS = 128
_MOST_POINTS = 48  # of a curve in a recipe


@dataclass(frozen=True)
class Step:
    """Micro-batches whose summed gradient, times `scale`, a step goes down."""

    batches: tuple[Batch, ...]
    scale: float


@dataclass(frozen=True)
class Plan:
    """The steps of every pass over some examples.

    Args:
        examples: that are descended on.
        batches: the micro-batches that hold them all.
        batches_a_step: how many of them make a step.
        seed: of their order.
    """

    examples: tuple[Example, ...]
    batches: tuple[Batch, ...]
    batches_a_step: int
    seed: int

    @property
    def steps_a_pass(self) -> int:
        return -(-len(self.batches) // self.batches_a_step)

    @property
    def tokens(self) -> int:
        """Tokens of a pass, padding included."""
        return sum(batch.tokens for batch in self.batches)

    def step(self, number: int) -> Step:
        """The step of this number, counted from 0 over all passes."""
        order, place = divmod(number, self.steps_a_pass)
        first = place * self.batches_a_step
        places = _order(len(self.batches), self.seed + order)[first : first + self.batches_a_step]
        batches = [self.batches[i] for i in places]
        # They stand for all: an unbiased estimate of the gradient of the mean over all scored tokens.
        return Step(tuple(batches), len(self.batches) / len(batches) / sum(b.scored_tokens for b in self.batches))

    def tokens_of(self, numbers: Iterable[int]) -> int:
        """Tokens of the steps of these numbers, padding included."""
        return sum(batch.tokens for number in numbers for batch in self.step(number).batches)

    def steps_within(self, tokens: float, *, first: int = 0) -> int:
        """How many steps, from the `first` on, have at most so many tokens, padding included."""
        steps = 0
        while (tokens := tokens - self.tokens_of([first + steps])) >= 0:
            steps += 1
        return steps


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> list[int]:
    return shuffled(range(count), seed=seed)


def plan_steps(examples: Sequence[Example], *, batch_tokens: int, seed: int) -> Plan:
    """64 to 128 steps a pass where there are as many records: a step has `batch_tokens` tokens, or less where there are
    few, or several micro-batches of them where there are many."""
    limit = min(batch_tokens, sum(len(example.input_ids) for example in examples) / _FEWEST_STEPS_A_PASS)
    batches = plan_batches(examples, batch_tokens=int(limit))
    while len(batches) < min(_FEWEST_STEPS_A_PASS, len(examples)):  # a few long records hold most of the tokens
        limit *= 0.8
        batches = plan_batches(examples, batch_tokens=int(limit))
    return Plan(tuple(examples), tuple(batches), -(-len(batches) // _MOST_STEPS_A_PASS), seed)


@dataclass(frozen=True)
class Ran:
    """What a run of steps saw.

    Args:
        average: mean of theta over the last quarter of the steps.
        nats: of the later half of the steps' batches, each scored before the step on it: in the first pass these are
            records that theta has not been fitted to.
        tokens: scored ones of those batches.
        losses: (steps,) nats per scored token of each step's batches, in float64.
    """

    average: Tensor
    nats: float
    tokens: float
    losses: Tensor

    def recorded(self, rung: str, start: str, stage: str, ridge: float, validation: float | None = None) -> StageRecord:
        """What a recipe keeps of it: the losses to six digits, at most 48, each the mean of a run of steps."""
        count = min(_MOST_POINTS, len(self.losses))
        curve = [float(f"{float(part.mean()):.6g}") for part in self.losses.tensor_split(count)] if count else []
        return StageRecord(rung, start, stage, ridge, len(self.losses), validation, tuple(curve))


class Descent:
    """AdamW on a mixing's theta, with ridge towards an anchor.

        gradient = d/dtheta [ nats per scored token + ridge / 2 |theta - anchor|^2 ]

    Args:
        engine: that gives gradients.
        mixing: what theta means.
        examples: that the steps' batches index.
        step: the step of each number.
        adam: at its start.
        anchor: of the ridge.
    """

    def __init__(
        self,
        engine: Engine,
        mixing: Mixing,
        examples: Sequence[Example],
        step: Callable[[int], Step],
        adam: AdamW,
        anchor: Tensor,
    ) -> None:
        self._engine, self._mixing, self._examples = engine, mixing, examples
        self._step, self._adam, self._home = step, adam, engine.home_of(mixing)
        self._anchor = anchor.to(self._home)
        adam.restore({name: tensor.to(self._home) for name, tensor in adam.state().items()}, adam.step_number)

    @property
    def theta(self) -> Tensor:
        return self._adam.theta.cpu()

    def run(self, steps: int, ridge: float = 0.0, *, key: str | None = None) -> Ran:
        """Takes so many steps, or those that are left of a run that an interrupted fit has under this key.

        Raises:
            NonFiniteLoss: naming the records of a batch; theta stays at the last finite step.
        """
        adam = self._adam
        tensors = {**adam.state(), "anchor": self._anchor}
        numbers = {**adam.schedule, "run": steps, "ridge": ridge}
        same = self._engine.same("descent", self._mixing, tensors, self._examples, **numbers)
        entry = self._engine.recall(key, same)
        none = Ran(torch.zeros_like(adam.theta), 0.0, 0.0, torch.zeros(steps, dtype=torch.float64))
        done, ran = (0, none) if entry is None else self._restore(entry)
        if entry is not None and done == steps:
            self._engine.finished(key, same)
            return replace(ran, average=ran.average.cpu())
        total, nats, tokens, losses = ran.average, ran.nats, ran.tokens, ran.losses
        averaged = max(steps // 4, 1)
        for number in range(done, steps):
            step = self._step(self._adam.step_number)
            within = None if key is None else f"{key}, step {number}"
            theta = self._adam.theta
            more, gradient = self._engine.total(self._mixing, theta, step.batches, self._examples, key=within)
            scored = sum(batch.scored_tokens for batch in step.batches)
            losses[number] = more / scored
            if number >= steps // 2:
                nats, tokens = nats + more, tokens + scored
            self._adam.step((gradient * step.scale).to(theta.dtype) + ridge * (theta - self._anchor))
            if number >= steps - averaged:
                total = total + self._adam.theta
            self._engine.stepped(loss=more / scored, rate=self._adam.rate())
            if number + 1 < steps and self._engine.due(key):
                self._leave(key, number + 1, Ran(total, nats, tokens, losses))
        ran = Ran((total / averaged).cpu(), nats, tokens, losses)
        self._leave(key, steps, ran, same)
        self._engine.finished(key, same)
        return ran

    def _leave(self, key: str | None, done: int, ran: Ran, same: bytes | None = None) -> None:
        if key is None:
            return
        values = {"done": done, "nats": ran.nats, "tokens": ran.tokens, "step_number": self._adam.step_number}
        tensors = {**self._adam.state(), "average": ran.average, "losses": ran.losses}
        entry = Entry({name: tensor.cpu() for name, tensor in tensors.items()}, values)
        self._engine.remember(key, entry, same)

    def _restore(self, entry: Entry) -> tuple[int, Ran]:
        done, nats, tokens, number = (entry.values[name] for name in ("done", "nats", "tokens", "step_number"))
        losses = entry.tensors["losses"]
        home = {name: entry.tensors[name].to(self._home) for name in ("average", *self._adam.state())}
        self._adam.restore(home, int(number))  # type: ignore[arg-type]
        return int(done), Ran(home["average"], float(nats), float(tokens), losses)  # type: ignore[arg-type]
