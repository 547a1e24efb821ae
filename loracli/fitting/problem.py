"""What a search minimises: nats per scored token of the attached model as a function of theta, and the meter of its
cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.calibration.batches import Batch
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.evaluation.scores import Scores
from loracli.fitting.loss import Objective
from loracli.fitting.mixing import Mixing
from loracli.progress import Progress

TASK = "fit"


class Meter:
    """Counts what was spent: a token forward is 1, forward and backward 2."""

    def __init__(self, progress: Progress) -> None:
        self.spent = 0
        self._progress = progress
        self._stage = ""
        self._started = time.monotonic()
        self._tokens = 0

    def stage(self, name: str) -> None:
        """Names what the following batches are for."""
        self._stage, self._started, self._tokens = name, time.monotonic(), 0

    def count(self, batch: Batch, *, backward: bool, nats: float | None = None) -> None:
        """One batch is done, at `nats` per token if it was scored alone."""
        cost = batch.tokens * (2 if backward else 1)
        self.spent += cost
        self._tokens += batch.tokens
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        loss = "" if nats is None else f"loss {nats:.3f}, "
        self._progress.advance(TASK, cost, f"{self._stage}: {loss}{rate:.0f} tok/s")


@dataclass(frozen=True)
class Problem:
    """A fit's objective.

    Args:
        objective: the attached model.
        mixing: theta (G, N) to weights (L, N).
        fitting: records that are descended on.
        validation: records that choices are made on; none of the held-out ones.
        meter: of the cost.
    """

    objective: Objective
    mixing: Mixing
    fitting: tuple[Example, ...]
    validation: tuple[Example, ...]
    meter: Meter

    def score(self, weights: Tensor, batches: Sequence[Batch], examples: Sequence[Example]) -> Scores:
        """Nats of each example at weights (L, N); the batches hold them all.

        Raises:
            NonFiniteLoss: naming the first records by their places.
        """
        self.objective.attached.set_weights(weights)
        scores = self.objective.score(
            batches, len(examples), each=lambda batch: self.meter.count(batch, backward=False)
        )
        bad = (~torch.isfinite(scores.nats)).nonzero().flatten().tolist()
        if bad:
            raise _non_finite([examples[i] for i in bad])
        return scores

    def gradient(self, theta: Tensor, batch: Batch, examples: Sequence[Example]) -> tuple[float, Tensor]:
        """Total nats of a batch at theta and their gradient, both in float64.

        Raises:
            NonFiniteLoss: naming the records of the batch by their places.
        """
        leaf = theta.clone().requires_grad_(True)
        self.objective.attached.set_weights(self.mixing.expand(leaf))
        total = self.objective.nats(batch).cpu().double().sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        nats = total.item()
        if not (torch.isfinite(total) and torch.isfinite(gradient).all()):
            raise _non_finite([examples[i] for i in batch.indices])
        self.meter.count(batch, backward=True, nats=nats / batch.scored_tokens)
        return nats, gradient

    def mean_and_gradient(
        self, theta: Tensor, batches: Sequence[Batch], examples: Sequence[Example]
    ) -> tuple[float, Tensor]:
        """Nats per scored token over all batches, and the gradient; sums first, one division."""
        nats, gradient, tokens = 0.0, torch.zeros_like(theta), 0.0
        for batch in batches:
            more, slope = self.gradient(theta, batch, examples)
            nats, gradient, tokens = nats + more, gradient + slope, tokens + batch.scored_tokens
        return nats / tokens, gradient / tokens


def _non_finite(examples: Sequence[Example]) -> NonFiniteLoss:
    places = ", ".join(example.place for example in examples[:20]) + (", ..." if len(examples) > 20 else "")
    return NonFiniteLoss(
        f"the loss is not finite on the records {places}",
        hint="try --dtype float32, or leave these records out",
    )
