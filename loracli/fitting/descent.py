"""One descent by AdamW over shuffled steps, which can be broken off at any step and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loracli.calibration.batches import Batch, plan_batches
from loracli.calibration.dataset import shuffled
from loracli.calibration.render import Example
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Entry
from loracli.fitting.mixing import Mixing
from loracli.fitting.optimise import AdamW
from loracli.recipe.record import StageRecord

FEWEST_STEPS_A_PASS = 64
MOST_STEPS_A_PASS = 128
MOST_POINTS = 48  # of a curve in a recipe
UNDER_WAY = "descent"  # the key of a run that is not at its end


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
    limit = min(batch_tokens, sum(len(example.input_ids) for example in examples) / FEWEST_STEPS_A_PASS)
    batches = plan_batches(examples, batch_tokens=int(limit))
    while len(batches) < min(FEWEST_STEPS_A_PASS, len(examples)):  # a few long records hold most of the tokens
        limit *= 0.8
        batches = plan_batches(examples, batch_tokens=int(limit))
    return Plan(tuple(examples), tuple(batches), -(-len(batches) // MOST_STEPS_A_PASS), seed)


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
        count = min(MOST_POINTS, len(self.losses))
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
        self._step, self._adam, self._anchor = step, adam, anchor

    @property
    def theta(self) -> Tensor:
        return self._adam.theta

    def run(self, steps: int, ridge: float = 0.0) -> Ran:
        """Takes so many steps; a run that an interrupted fit has made is taken from there.

        Raises:
            NonFiniteLoss: naming the records of a batch; theta stays at the last finite step.
        """
        key = self._engine.next_key()
        entry = self._engine.recall(key)
        if entry is not None:
            return self._restore(entry)[1]
        entry = self._engine.recall(UNDER_WAY, of=key)
        none = Ran(torch.zeros_like(self.theta), 0.0, 0.0, torch.zeros(steps, dtype=torch.float64))
        done, ran = (0, none) if entry is None else self._restore(entry)
        total, nats, tokens, losses = ran.average, ran.nats, ran.tokens, ran.losses
        averaged = max(steps // 4, 1)
        for number in range(done, steps):
            step = self._step(self._adam.step_number)
            more, gradient = self._engine.total(self._mixing, self.theta, step.batches, self._examples)
            scored = sum(batch.scored_tokens for batch in step.batches)
            losses[number] = more / scored
            if number >= steps // 2:
                nats, tokens = nats + more, tokens + scored
            self._adam.step((gradient * step.scale).to(self.theta.dtype) + ridge * (self.theta - self._anchor))
            if number >= steps - averaged:
                total = total + self.theta
            self._engine.stepped(loss=more / scored, rate=self._adam.rate())
            if number + 1 < steps and self._engine.due(UNDER_WAY):
                self._leave(UNDER_WAY, number + 1, Ran(total, nats, tokens, losses), of=key)
        ran = Ran(total / averaged, nats, tokens, losses)
        self._leave(key, steps, ran)
        return ran

    def _leave(self, key: str, done: int, ran: Ran, *, of: str | None = None) -> None:
        values = {"done": done, "nats": ran.nats, "tokens": ran.tokens, "step_number": self._adam.step_number}
        self._engine.remember(
            key, Entry({**self._adam.state(), "average": ran.average, "losses": ran.losses}, values), of=of
        )

    def _restore(self, entry: Entry) -> tuple[int, Ran]:
        done, nats, tokens, number = (entry.values[name] for name in ("done", "nats", "tokens", "step_number"))
        self._adam.restore(entry.tensors, int(number))  # type: ignore[arg-type]
        average, losses = entry.tensors["average"], entry.tensors["losses"]
        return int(done), Ran(average, float(nats), float(tokens), losses)  # type: ignore[arg-type]
