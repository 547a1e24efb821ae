"""Pools: of three adapters and more, those that cannot be told from zero are left out.

Who names two wants both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from loracli.errors import NonFiniteLoss
from loracli.fitting.criterion import Fold, gain
from loracli.fitting.engine import GRADIENT_COST
from loracli.fitting.level import Solution, Task, padded_tokens, solve_level, tokens_of
from loracli.fitting.mixing import DiagonalMixing
from loracli.model.loss import Scores
from loracli.recipe.record import StageRecord

IDLE = "idle"  # the stage
POOL = 3  # adapters, from which on some may be idle


def without_idle(task: Task, found: Solution, most: float) -> tuple[Solution, tuple[StageRecord, ...]]:
    """The solution without the adapters that cannot be told from zero, and the descents that this took.

    Leaving them out costs no more on the validation records than one standard error, and `task.least_gain`: each alone
    as it is, and all together after the weights of the others were fitted anew, as these are what they are beside them.
    One check an adapter, cheapest first, and as many fits as halving them takes: not one for each set of them. They
    come on top of the default passes: one that was cut short cost more than the pool. With `--passes` they have what is
    left of `most` tokens.

    Args:
        task: what is fitted.
        found: theta (P,) by fold; returned as it is where two adapters are named, or its kind has no weight to drop.
        most: tokens of the budget, spent ones included, a forward counting 1 and a backward 1.
    """
    mixing, adapters = found.mixing, len(task.references)
    if adapters < POOL or found.scores is None or not isinstance(mixing, DiagonalMixing) or mixing.kind == "rank":
        return found, ()
    task.engine.meter.enter(IDLE)
    task.engine.meter.stage("looking for adapters that change nothing")
    scores = found.scores

    def without(places: Sequence[int]) -> DiagonalMixing:
        return replace(mixing, kept=~torch.isin(mixing.adapter_of, torch.tensor(places)))

    def cost_of(left: Scores | None) -> float:
        """Infinite where it would be noticed."""
        assert left is not None
        cost = gain(left, scores)
        return math.inf if cost.clear or cost.mean > task.least_gain else cost.mean

    def alone(place: int) -> float:
        try:
            return cost_of(task.check(without([place]), found.thetas, f"without adapter {place}"))
        except NonFiniteLoss:
            return math.inf

    costs = {place: alone(place) for place in range(adapters)}
    idle = sorted((place for place in costs if costs[place] < math.inf), key=lambda place: (costs[place], place))
    idle, stages = idle[: adapters - 1], list[StageRecord]()  # one stays
    budget = sum(idle_tokens(fold, task.first_passes, task.settings.batch_tokens) for fold in task.folds)
    most = math.inf if task.settings.passes is None else most
    while idle:
        less, name = without(idle), f"without {len(idle)} adapters"
        # The numbers of those left out mean nothing now, and stand where the ridge wants them.
        starts = [
            torch.where(less.kept, theta, anchor)  # type: ignore[arg-type]
            for theta, anchor in zip(found.thetas, found.anchors, strict=True)
        ]
        try:
            again = solve_level(task, less, {name: starts}, min(budget, most - task.spent))
            stages += again.stages
            if cost_of(again.scores) < math.inf and not again.stopped:
                kept = replace(
                    found, mixing=less, thetas=again.thetas, scores=again.scores, dropped=tuple(sorted(idle))
                )
                return kept, tuple(stages)
        except NonFiniteLoss:
            pass
        idle = idle[: len(idle) // 2]
    return found, tuple(stages)


def idle_tokens(fold: Fold, passes: float, batch_tokens: int) -> float:
    """Tokens that a fold has for a fit without some adapters, a forward counting 1 and a backward 1: so many passes,
    and the checks."""
    return GRADIENT_COST * passes * tokens_of(fold.fitting) + 3 * padded_tokens(fold.validation, batch_tokens)
