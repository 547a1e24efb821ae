"""The search: from one weight for each adapter up the kinds of mixing, as far as the records carry.

The lowest rung, one weight for each adapter: screen the points that need no fit, then BFGS.

1. SCREEN  base, each adapter alone, uniform and sum on a subset of the fitting records, forward only.
2. BFGS    from the best of them; where this rung is the one asked for, from the sum too, and on all fitting records.

    adapter -> layer
    adapter -> module -> rank
    adapter -> module -> core
    adapter -> module -> factors
    adapter -> module -> core -> factors        `auto`: climbs while the gain exceeds one standard error, and 0.005

Everything is chosen inside the training records, on those of each fold that its solution was not fitted to; held-out
records are not seen here. What was chosen is then fitted once more on all training records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loracli.calibration.batches import plan_batches
from loracli.calibration.dataset import shuffled
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.evaluation.statistics import static_points
from loracli.fitting.certificate import NO_FINISH, Finish
from loracli.fitting.criterion import Gain, gain
from loracli.fitting.descent import WARM_UP, AdamW, Descent, Minimum, bfgs, plan_steps
from loracli.fitting.engine import GRADIENT_COST
from loracli.fitting.mixing import Mixing
from loracli.fitting.rung import (
    Solved,
    Task,
    left_out,
    mean_of,
    nats_per_token,
    padded_tokens,
    rate_for,
    solve_rung,
    tokens_of,
)
from loracli.fitting.settings import AUTO
from loracli.model.loss import Scores
from loracli.recipe.mixing import MixingKind
from loracli.recipe.record import RungRecord, StageRecord, StartRecord

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


# Rungs with the share of the search's budget that each may take.
LADDERS: dict[str, dict[MixingKind, float]] = {
    "adapter": {"adapter": 1.0},
    "layer": {"adapter": 0.2, "layer": 0.8},
    "module": {"adapter": 0.2, "module": 0.8},
    "rank": {"adapter": 0.2, "module": 0.35, "rank": 0.45},
    "core": {"adapter": 0.2, "module": 0.35, "core": 0.45},
    "factors": {"adapter": 0.2, "module": 0.35, "factors": 0.45},
    "auto": {"adapter": 0.15, "module": 0.3, "core": 0.3, "factors": 0.25},
}
SAME_START = 0.05  # starts closer than this are one
REFIT_SHARE = 0.4  # of the budget
REFIT_RATE = 0.6  # of the rate of the search, whose solution is near already


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Args:
        mixing: the rung that won.
        theta: its numbers.
        anchor: where the search that found them began.
        rungs: all that were tried.
        stages: the descents, in order.
        ridge: towards the anchor, of the stage that won; None if the start was never beaten, or there was none.
        refitted: whether it was fitted once more on all training records.
        stopped: why the search ended early, None if it did not.
    """

    mixing: Mixing
    theta: Tensor
    anchor: Tensor
    rungs: tuple[RungRecord, ...]
    stages: tuple[StageRecord, ...]
    ridge: float | None
    refitted: bool
    stopped: str | None


def search(
    task: Task, make_mixing: Callable[[MixingKind], Mixing], training: Sequence[Example], finish: Finish = NO_FINISH
) -> Found:
    """Finds a mixing within the budget of `settings.passes`.

    Args:
        task: what is fitted.
        make_mixing: a rung by its kind.
        training: all records of the folds.
        finish: what comes after, which takes its part of the budget, and may stand for the last fit.
    Raises:
        NonFiniteLoss: if no start is finite.
    """
    whole = task.settings.budget * 2 * tokens_of(training) - finish.reserved
    refitting = task.validated and not finish.instead_of_refit and task.settings.mixing != "adapter"
    solved, rungs, stages = _climb(task, make_mixing, whole * (1 - REFIT_SHARE * refitting))
    winner = solved[-1]
    found = Found(
        winner.mixing,
        mean_of(winner.thetas),
        mean_of(winner.anchors),
        rungs,
        stages,
        winner.ridge,
        refitted=False,
        stopped=winner.stopped,
    )
    if winner.stopped or not refitting:
        return found
    try:
        again = refit(task, solved, training, min(REFIT_SHARE * whole, whole - task.engine.meter.spent))
    except NonFiniteLoss as error:
        return replace(found, stopped=str(error))
    if again is None:
        return found
    theta, stage = again
    return replace(found, theta=theta, stages=(*stages, stage), refitted=True)


def _climb(
    task: Task, make_mixing: Callable[[MixingKind], Mixing], budget: float
) -> tuple[list[Solved], tuple[RungRecord, ...], tuple[StageRecord, ...]]:
    """The solutions up to the rung asked for, or with `auto` to the best one, and what is reported of all."""
    asked = task.settings.mixing
    solutions: list[Solved] = []
    records: list[RungRecord] = []
    stages: list[StageRecord] = []
    for kind in LADDERS[asked]:
        best = solutions[-1] if solutions else None
        solved = solve_next(task, make_mixing(kind), best, budget - task.engine.meter.spent)
        compared = _compare(best, solved)
        climbed = best is None or asked != AUTO or (compared is not None and worth_climbing(compared, task.least_gain))
        stages += solved.stages
        records.append(_record(task, solved, compared, best, climbed))
        if climbed:
            solutions.append(solved)
        if not climbed or solved.stopped:
            solutions[-1] = replace(solutions[-1], stopped=solved.stopped)
            break
    winner = solutions[-1].mixing.kind
    return solutions, tuple(replace(record, won=record.kind == winner) for record in records), tuple(stages)


def _share(asked: str, kind: MixingKind) -> float:
    """The share of what is left that a rung may take."""
    shares = LADDERS[asked]
    kinds = list(shares)
    return shares[kind] / sum(shares[other] for other in kinds[kinds.index(kind) :])


def solve_next(task: Task, mixing: Mixing, below: Solved | None, left: float) -> Solved:
    """One rung, from the solution below and from the sum.

    Args:
        task: what is fitted.
        mixing: the rung.
        below: the solution of the rung below, None for the first.
        left: tokens that this rung and those above may spend together.
    Raises:
        NonFiniteLoss: if no start is finite.
    """
    asked, kind = task.settings.mixing, mixing.kind
    budget = left * _share(asked, kind)
    if below is None:
        return solve_adapters(task, mixing, budget, alone=kind == asked)
    starts: dict[str, list[Tensor]] = {below.mixing.kind: [mixing.lift(below.mixing, theta) for theta in below.thetas]}
    total = mixing.constant([1.0] * len(task.references))
    if any(float((start - total).abs().max()) > SAME_START for start in starts[below.mixing.kind]):
        starts[SUM] = [total] * len(task.folds)
    return solve_rung(task, mixing, starts, budget)


def _compare(best: Solved | None, solved: Solved) -> Gain | None:
    if best is None or best.scores is None or solved.scores is None:
        return None
    return gain(best.scores, solved.scores)


def worth_climbing(compared: Gain, least: float) -> bool:
    """Where the loss is close to nothing, so is the standard error; a higher rung overfits more easily all the same."""
    return compared.clear and compared.mean > least


def _record(task: Task, solved: Solved, compared: Gain | None, best: Solved | None, climbed: bool) -> RungRecord:
    asked, kind = task.settings.mixing, solved.mixing.kind
    if best is None or compared is None:
        why = "the first rung" if best is None else "not compared: there are no validation records"
    else:
        over = f"a gain of {compared.mean:.4f} {task.unit} over {best.mixing.kind}"
        why = (
            f"{over} is {'above' if compared.clear else 'not above'} one standard error, {compared.standard_error:.4f}"
        )
        if asked == AUTO and compared.clear and not climbed:
            why += f", but below {task.least_gain:g}, too little for {solved.mixing.numbers} numbers"
    if kind == asked:
        why += "; asked for"
    return RungRecord(
        kind=kind,
        numbers=solved.mixing.numbers,
        starts=solved.starts,
        chosen=solved.chosen,
        ridge=solved.ridge,
        validation=nats_per_token(solved.scores),
        gain=None if compared is None else compared.mean,
        standard_error=None if compared is None else compared.standard_error,
        won=climbed,
        why=why,
    )


def refit(
    task: Task, solved: Sequence[Solved], training: Sequence[Example], budget: float
) -> tuple[Tensor, StageRecord] | None:
    """The last solution fitted once more, on all training records; None if there is nothing to fit, or no budget.

    Where a rung did not beat the solution of the rung below, that one is fitted.

    Raises:
        NonFiniteLoss: naming the records of a batch.
    """
    last = solved[-1]
    if last.mixing.kind == "adapter":
        return _minimise_again(task, last, training, budget)
    if not last.moved:
        if len(solved) == 1 or last.chosen != solved[-2].mixing.kind:
            return None
        below = refit(task, solved[:-1], training, budget)
        return None if below is None else (last.mixing.lift(solved[-2].mixing, below[0]), below[1])
    plan = plan_steps(training, batch_tokens=task.settings.batch_tokens, seed=task.settings.seed + 1)
    steps = plan.steps_within(budget / 2)
    if steps == 0:
        return None
    rate = REFIT_RATE * rate_for(task, last.mixing, steps)
    adam = AdamW(mean_of(last.thetas), steps=steps, rate=rate, warm_up=max(1, round(WARM_UP * steps)))
    kind = last.mixing.kind
    task.engine.meter.stage(f"{kind} on all records", rung=kind, start="", stage="refit", ridge=last.ridge)
    descent = Descent(task.engine, last.mixing, training, plan.step, adam, mean_of(last.anchors))
    ran = descent.run(steps, last.ridge or 0.0)
    return ran.average, ran.recorded(kind, last.chosen, "refit", last.ridge or 0.0)


def _minimise_again(
    task: Task, last: Solved, training: Sequence[Example], budget: float
) -> tuple[Tensor, StageRecord] | None:
    """The lowest rung as the start of others is found on a few records in a few evaluations; where it is the answer, on
    all of them."""
    evaluations = int(budget / (GRADIENT_COST * padded_tokens(training, task.settings.batch_tokens)))
    if evaluations < 2:  # the first one is of what there is
        return None
    task.engine.meter.stage("adapter on all records", rung="adapter", start="", stage="refit", ridge=0.0)
    minimum = minimise(task, last.mixing, mean_of(last.thetas), training, evaluations)
    losses = tuple(float(f"{value:.6g}") for value in minimum.values)
    return minimum.theta, StageRecord("adapter", last.chosen, "refit", 0.0, minimum.evaluations, None, losses)
