"""The lowest rung, one weight for each adapter: screen the points that need no fit, then BFGS.

1. SCREEN  base, each adapter alone, uniform and sum on a subset of the fitting records, forward only.
2. BFGS    from the best of them; where this rung is the one asked for, from the sum too, and on all fitting records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from loracli.calibration.batches import plan_batches
from loracli.calibration.dataset import shuffled
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.evaluation.statistics import static_points
from loracli.fitting.mixing import Mixing
from loracli.fitting.optimise import Minimum, bfgs
from loracli.fitting.solved import Solved, Task, left_out, nats_per_token, padded_tokens, tokens_of
from loracli.model.loss import Scores
from loracli.recipe.record import StartRecord

EVALUATIONS = 4  # of BFGS where the rung is only a start for the next
SUBSET_RECORDS = 256
SCREEN_SHARE = 0.1  # of the budget, where the rung is the one asked for
SCREENED = "screened"
SUM = "sum"


def solve_adapters(task: Task, mixing: Mixing, budget: float, *, alone: bool) -> Solved:
    """Finds theta (N,) on every fold.

    Args:
        task: what is fitted.
        mixing: the rung `adapter`.
        budget: tokens, a forward counting 1 and a backward 1.
        alone: whether this rung is the one asked for.
    Raises:
        NonFiniteLoss: if no point is finite.
    """
    share, before_screen = budget / len(task.folds), task.engine.meter.spent
    points = len(static_points(task.references))
    screens = [
        _subset(fold.fitting, share * SCREEN_SHARE / points if alone else share / (points + 2 * EVALUATIONS), task)
        for fold in task.folds
    ]
    bests = [_screen(task, mixing, screen) for screen in screens]
    left = share - (task.engine.meter.spent - before_screen) / len(task.folds)
    starts = {SCREENED: [mixing.constant(static_points(task.references)[name]) for name in bests]}
    total = mixing.constant([1.0] * len(task.references))
    if alone and not all(torch.equal(theta, total) for theta in starts[SCREENED]):
        starts[SUM] = [total] * len(task.folds)
    reports: list[StartRecord] = []
    ends: dict[str, tuple[list[Minimum], Scores | None]] = {}
    for name, thetas in starts.items():
        task.engine.meter.stage(f"adapter from {name}", rung="adapter", start=name)
        before = None
        try:
            before = nats_per_token(task.check(mixing, thetas))
            minima = []
            for fold, screen, theta in zip(task.folds, screens, thetas, strict=True):
                examples = fold.fitting if alone else screen
                count = _affordable(task, left / len(starts), fold.validation, examples)
                minima.append(minimise(task, mixing, theta, examples, count if alone else EVALUATIONS))
            after = task.check(mixing, [minimum.theta for minimum in minima])
        except NonFiniteLoss as error:
            reports.append(left_out(name, before, error))
            if len(reports) == len(starts) and not ends:
                raise
            continue
        ends[name] = (minima, after)
        mean = nats_per_token(after)
        reports.append(StartRecord(name, before, mean, mean))
    chosen = min(ends, key=lambda name: _cost(*ends[name]))
    minima, scores = ends[chosen]
    found = tuple(minimum.theta for minimum in minima)
    return Solved(mixing, found, tuple(starts[chosen]), scores, tuple(reports), chosen, None)


def minimise(task: Task, mixing: Mixing, theta: Tensor, examples: Sequence[Example], evaluations: int) -> Minimum:
    """BFGS on the mean loss of the examples.

    Raises:
        NonFiniteLoss: if the loss at theta is not finite.
    """
    batches = plan_batches(examples, batch_tokens=task.settings.batch_tokens)
    evaluate = partial(task.engine.mean_and_gradient, mixing, batches=batches, examples=examples)
    return bfgs(evaluate, theta, evaluations=evaluations)


def _cost(minima: Sequence[Minimum], scores: Scores | None) -> float:
    """What chooses between the starts: without validation records, the loss on what was fitted."""
    return sum(minimum.value for minimum in minima) if scores is None else scores.nats_per_token


def _affordable(task: Task, budget: float, validation: Sequence[Example], examples: Sequence[Example]) -> int:
    """How many evaluations of the examples, after two checks."""
    checked, evaluated = (padded_tokens(part, task.settings.batch_tokens) for part in (validation, examples))
    return max(1, int((budget - 2 * checked) / (2 * evaluated)))


def _subset(examples: Sequence[Example], wanted: float, task: Task) -> list[Example]:
    """Records of about so many tokens, in an order that depends on the seed; at least one."""
    chosen: list[Example] = []
    for example in shuffled(examples, seed=task.settings.seed)[:SUBSET_RECORDS]:
        if chosen and tokens_of(chosen) + len(example.input_ids) > wanted:
            break
        chosen.append(example)
    return chosen


def _screen(task: Task, mixing: Mixing, examples: Sequence[Example]) -> str:
    """The name of the best point that needs no fit.

    Raises:
        NonFiniteLoss: if none is finite.
    """
    task.engine.meter.stage("screen", rung="adapter", start="")
    batches = plan_batches(examples, batch_tokens=task.settings.batch_tokens)
    losses: dict[str, float] = {}
    failure: NonFiniteLoss | None = None
    for name, point in static_points(task.references).items():
        try:
            losses[name] = task.engine.score(mixing, mixing.constant(point), batches, examples).nats_per_token
        except NonFiniteLoss as error:  # no point to start from
            losses[name], failure = math.inf, error
    best = min(losses, key=lambda name: losses[name])
    if failure is not None and losses[best] == math.inf:
        raise failure
    return best
