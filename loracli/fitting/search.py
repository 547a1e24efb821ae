"""The search: from one weight for each adapter up the kinds of mixing, as far as the records carry.

The lowest level, one weight for each adapter: screen the points that need no fit, then BFGS.

1. SCREEN  base, each adapter alone, uniform and sum on a subset of the fitting records, forward only.
2. BFGS    from the best of them; where this level is the one asked for, from the sum too, and on all fitting records.

    adapter -> layer
    adapter -> module -> rank
    adapter -> module -> core
    adapter -> module -> factors
    adapter -> module -> core -> factors        `auto`: the best of them; a level is better than the best below where
                                                the gain exceeds one standard error, and 0.005; two of `factors` and
                                                where there are few records, and nothing for `module`. Its factors
                                                are trained from the best below and from nothing, and half of
                                                each is tried

Everything is chosen inside the training records, on those of each fold that its solution was not fitted to; held-out
records are not seen here. What was chosen is then fitted once more on all training records.

Cross-fitting judges the whole procedure by the folds that it chooses with: a fold's records are held out of what the
other folds choose (`Task.judged`), at the weights of that fold, which were not fitted to them. So each record is scored
by weights that neither saw it nor were chosen by it, after Tsamardinos et al. 2018 (10.1007/s10994-018-5714-4), who
draw by bootstrap what we take fold by fold. What the folds were fitted to is known by then, and where the others choose
as all did, nothing is done twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from loracli.calibration.dataset import plan_batches, shuffled
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.evaluation.statistics import static_points
from loracli.fitting.criterion import Gain, gain
from loracli.fitting.descent import WARM_UP, AdamW, Descent, Minimum, Plan, bfgs, plan_steps
from loracli.fitting.engine import GRADIENT_COST
from loracli.fitting.level import (
    Solution,
    Task,
    in_rounds,
    left_out,
    nats_per_token,
    padded_tokens,
    rate_for,
    solve_level,
    tokens_of,
)
from loracli.fitting.mixing import FactorMixing, HalfOfEach, Mixing, TrainedFactors
from loracli.fitting.pool import without_idle
from loracli.fitting.settings import AUTO, FitSettings, last_passes
from loracli.model.loss import Scores
from loracli.recipe.record import HALVES, NOTHING, LevelRecord, MixingKind, StageRecord, StartRecord
from loracli.system.display import count_text

EVALUATIONS = 4  # of BFGS where the level is only a start for the next
_SUBSET_RECORDS = 256
SCREEN_SHARE = 0.1  # of the budget, where the level is the one asked for
_SCREENED = "screened"
_SUM = "sum"
START, AGAIN = "finding a start", "fitting on all records"  # what is told of these stages


def _solve_adapters(task: Task, mixing: Mixing, budget: float, *, alone: bool) -> Solution:
    """Finds theta (N,) on every fold.

    Args:
        task: what is fitted.
        mixing: the kind `adapter`.
        budget: tokens, a forward counting 1 and a backward 1.
        alone: whether this level is the one asked for.
    Raises:
        NonFiniteLoss: if no point is finite.
    """
    share, before_screen = budget / len(task.folds), task.spent
    points = len(static_points(task.references))
    wanted = share * SCREEN_SHARE / points if alone else share / (points + 2 * EVALUATIONS)
    screens = [subset(fold.fitting, wanted, task.settings) for fold in task.folds]
    bests = [_screen(task, mixing, screen, f"adapter, screen, fold {fold}") for fold, screen in enumerate(screens)]
    left = share - (task.spent - before_screen) / len(task.folds)
    starts = {_SCREENED: [mixing.constant(static_points(task.references)[name]) for name in bests]}
    total = mixing.constant([1.0] * len(task.references))
    if alone and not all(torch.equal(theta, total) for theta in starts[_SCREENED]):
        starts[_SUM] = [total] * len(task.folds)
    reports: list[StartRecord] = []
    ends: dict[str, tuple[list[Minimum], Scores | None]] = {}
    for name, thetas in starts.items():
        key = f"adapter from {name}"
        words = f"fitting {count_text(mixing.numbers, 'weight')}" if alone else START
        task.engine.meter.stage(words, rung="adapter", start=name)
        before = None
        try:
            before = nats_per_token(task.check(mixing, thetas, f"{key}, before"))
            minima = []
            for number, (fold, screen, theta) in enumerate(zip(task.folds, screens, thetas, strict=True)):
                examples = fold.fitting if alone else screen
                most = _affordable(task, left / len(starts), fold.validation, examples)
                allowed = most if alone else EVALUATIONS
                minima.append(_minimise(task, mixing, theta, examples, allowed, f"{key}, fold {number}"))
            after = task.check(mixing, [minimum.theta for minimum in minima], f"{key}, after")
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
    return Solution(mixing, found, tuple(starts[chosen]), scores, tuple(reports), chosen, None)


def _minimise(
    task: Task, mixing: Mixing, theta: Tensor, examples: Sequence[Example], evaluations: int, key: str
) -> Minimum:
    """BFGS on the mean loss of the examples; the key says which this is.

    Raises:
        NonFiniteLoss: if the loss at theta is not finite.
    """
    batches = plan_batches(examples, batch_tokens=task.settings.batch_tokens)
    numbers = count()

    def evaluate(at: Tensor) -> tuple[float, Tensor]:
        named = f"{key}, evaluation {next(numbers)}"
        return task.engine.mean_and_gradient(mixing, at, batches, examples, key=named)

    return bfgs(evaluate, theta, evaluations=evaluations)


def _cost(minima: Sequence[Minimum], scores: Scores | None) -> float:
    """What chooses between the starts: without validation records, the loss on what was fitted."""
    return sum(minimum.value for minimum in minima) if scores is None else scores.nats_per_token


def _affordable(task: Task, budget: float, validation: Sequence[Example], examples: Sequence[Example]) -> int:
    """How many evaluations of the examples, after two checks."""
    checked, evaluated = (padded_tokens(part, task.settings.batch_tokens) for part in (validation, examples))
    return max(1, int((budget - 2 * checked) / (2 * evaluated)))


def subset(examples: Sequence[Example], wanted: float, settings: FitSettings) -> list[Example]:
    """Records of about so many tokens, in an order that depends on the seed; at least one."""
    chosen: list[Example] = []
    for example in shuffled(examples, seed=settings.seed)[:_SUBSET_RECORDS]:
        if chosen and tokens_of(chosen) + len(example.input_ids) > wanted:
            break
        chosen.append(example)
    return chosen


def _screen(task: Task, mixing: Mixing, examples: Sequence[Example], key: str) -> str:
    """The name of the best point that needs no fit.

    Raises:
        NonFiniteLoss: if none is finite.
    """
    task.engine.meter.stage(START, rung="adapter", start="")
    batches = plan_batches(examples, batch_tokens=task.settings.batch_tokens)
    losses: dict[str, float] = {}
    failure: NonFiniteLoss | None = None
    for name, point in static_points(task.references).items():
        try:
            scores = task.engine.score(mixing, mixing.constant(point), batches, examples, key=f"{key}, point {name!r}")
            losses[name] = scores.nats_per_token
        except NonFiniteLoss as error:  # no point to start from
            losses[name], failure = math.inf, error
    best = min(losses, key=lambda name: losses[name])
    if failure is not None and losses[best] == math.inf:
        raise failure
    return best


# Levels with the share of the search's budget that each may take.
LADDERS: dict[str, Mapping[MixingKind, float]] = {
    "adapter": {"adapter": 1.0},
    "layer": {"adapter": 0.05, "layer": 0.95},
    "module": {"adapter": 0.05, "module": 0.95},
    "rank": {"adapter": 0.2, "module": 0.35, "rank": 0.45},
    "core": {"adapter": 0.2, "module": 0.35, "core": 0.45},
    "factors": {"adapter": 0.2, "module": 0.35, "factors": 0.45},
    "auto": {"adapter": 0.08, "module": 0.32, "core": 0.3, "factors": 0.4},
}
_SAME_START = 0.05  # starts closer than this are one
_NEW_SHARE = 1 / 3  # of what `auto` has for factors: for a new LoRA, which soon has what it learns
REFIT_SHARE = 0.4  # of the budget
_REFIT_RATE = 0.6  # of the rate of the search, whose solution is near already


def refit_share(mixing: str, folds: int) -> float:
    """The share of the budget that the last fit has, on all records: no more than a fold had, as few records are fitted
    by many passes whatever the validation records said. A mixing weight for each module is soon there."""
    return min(0.3 if mixing in ("layer", "module", AUTO) else REFIT_SHARE, 1 / folds)


def search(
    task: Task, make_mixing: Callable[[MixingKind], Mixing], training: Sequence[Example], reserved: int = 0
) -> Solution:
    """Finds a mixing within the budget of `settings.passes`.

    Args:
        task: what is fitted.
        make_mixing: a kind of mixing by its name.
        training: all records of the folds.
        reserved: tokens of the budget for what comes after.
    Raises:
        NonFiniteLoss: if no start is finite.
    """
    whole = task.budget * 2 * tokens_of(training) - reserved
    refitting = task.validated and task.settings.mixing != "adapter"
    share = refit_share(task.settings.mixing, len(task.folds)) * refitting
    solved, levels, stages = _climb(task, make_mixing, whole * (1 - share))
    winner = solved[-1]
    if task.judged is not None:  # what the others choose, as it is: the records of this fold are not fitted to
        theta, anchor = winner.thetas[task.judged], winner.anchors[task.judged]
        return replace(winner, thetas=(theta,), anchors=(anchor,), rungs=levels, stages=stages)
    found = replace(_for_all_folds(task, winner), rungs=levels, stages=stages)
    if winner.stopped or not refitting:
        return found
    task.engine.meter.enter("refit")
    try:
        again = refit(task, solved, training, min(share * whole, whole - task.spent))
    except NonFiniteLoss as error:
        return replace(found, stopped=str(error))
    if again is None:
        return found
    return replace(found, thetas=again.thetas, stages=(*stages, *again.stages), refitted=True)


def _for_all_folds(task: Task, found: Solution) -> Solution:
    """One theta in the place of each fold's: their mean. Of trained factors, where the mean of A and that of B do not
    give the mean of B A, that of the fold with the lowest cost on its validation records."""
    if not isinstance(found.mixing, TrainedFactors) or found.scores is None:
        return replace(found, thetas=(found.theta,), anchors=(found.anchor,))
    sizes = [len(fold.validation) for fold in task.folds]
    parts = zip(torch.split(found.scores.nats, sizes), torch.split(found.scores.tokens, sizes), strict=True)
    costs = [float(nats.sum() / tokens.sum()) for nats, tokens in parts]
    best = costs.index(min(costs))
    return replace(found, thetas=(found.thetas[best],), anchors=(found.anchors[best],))


def _climb(
    task: Task, make_mixing: Callable[[MixingKind], Mixing], budget: float
) -> tuple[list[Solution], tuple[LevelRecord, ...], tuple[StageRecord, ...]]:
    """The solutions up to the level asked for, or with `auto` to the best one, and what is reported of all."""
    asked = task.settings.mixing
    solutions: list[Solution] = []
    records: list[LevelRecord] = []
    stages: list[StageRecord] = []
    for kind in LADDERS[asked]:
        task.engine.meter.enter(kind)
        best = solutions[-1] if solutions else None
        solved = solve_next(task, make_mixing(kind), best, budget - task.spent)
        compared = _compare(best, solved)
        gained = compared is not None and compared.mean > least_gain(task, kind, compared)
        climbed = best is None or asked != AUTO or gained
        stages += solved.stages
        records.append(_record(task, solved, compared, best, climbed))
        if climbed:
            solutions.append(solved)
        if solved.stopped:
            solutions[-1] = replace(solutions[-1], stopped=solved.stopped)
            break
    winner = solutions[-1].mixing.kind
    if not solutions[-1].stopped:
        solutions[-1], more = without_idle(task, solutions[-1], budget)
        stages += more
    return solutions, tuple(replace(record, won=record.kind == winner) for record in records), tuple(stages)


def share_of(shares: Mapping[MixingKind, float], kind: MixingKind) -> float:
    """The share of what is left that a level may take, of a ladder."""
    kinds = list(shares)
    return shares[kind] / sum(shares[other] for other in kinds[kinds.index(kind) :])


def solve_next(task: Task, mixing: Mixing, below: Solution | None, left: float) -> Solution:
    """One level, from the solution below and from the sum.

    Args:
        task: what is fitted.
        mixing: its kind.
        below: the solution of the level below, None for the first.
        left: tokens that this level and those above may spend together.
    Raises:
        NonFiniteLoss: if no start is finite.
    """
    asked, kind = task.settings.mixing, mixing.kind
    budget = left * share_of(LADDERS[asked], kind)
    if below is None:
        return _solve_adapters(task, mixing, budget, alone=kind == asked)
    starts: dict[str, list[Tensor]] = {below.mixing.kind: [mixing.lift(below.mixing, theta) for theta in below.thetas]}
    if isinstance(mixing, FactorMixing):  # they go on from the best there is
        if asked != AUTO:
            return solve_level(task, mixing, starts, budget)
        before, solved = task.spent, solve_level(task, mixing, starts, (1 - _NEW_SHARE) * budget)
        return _or_from_nothing(task, mixing, solved, budget - (task.spent - before))
    total = mixing.constant([1.0] * len(task.references))
    if any(float((start - total).abs().max()) > _SAME_START for start in starts[below.mixing.kind]):
        starts[_SUM] = [total] * len(task.folds)
    return solve_level(task, mixing, starts, budget)


def _or_from_nothing(task: Task, mixing: FactorMixing, solved: Solution, left: float) -> Solution:
    """Trained factors, a new LoRA on the same records, or half of each: what has the lowest loss on the validation
    records, half of each by more than `task.least_gain`, as it costs both ranks. What the adapters know may be of no
    use here; and two that were trained apart err apart. No new LoRA is trained where `left` tokens are less than a pass
    of each fold."""
    if solved.stopped or solved.scores is None or left < GRADIENT_COST * sum(tokens_of(f.fitting) for f in task.folds):
        return solved
    fresh = mixing.from_nothing(seed=task.settings.seed)
    try:
        new = solve_level(task, fresh, {NOTHING: [fresh.start] * len(task.folds)}, left)
    except NonFiniteLoss as error:
        return replace(solved, starts=(*solved.starts, left_out(NOTHING, None, error)))
    best = min(solved, new, key=_validation)
    starts, stages = (*solved.starts, *new.starts), (*solved.stages, *new.stages)
    if solved.moved and new.moved:
        try:
            half = _half_of_each(task, solved, new)
            starts = (*starts, *half.starts)
            best = half if _validation(half) < _validation(best) - task.least_gain else best
        except NonFiniteLoss as error:
            starts = (*starts, left_out(HALVES, None, error))
    return replace(best, starts=starts, stages=stages)


def _validation(solution: Solution) -> float:
    return math.inf if solution.scores is None else solution.scores.nats_per_token


def _half_of_each(task: Task, trained: Solution, new: Solution) -> Solution:
    assert isinstance(trained.mixing, TrainedFactors) and isinstance(new.mixing, TrainedFactors)
    mixing = HalfOfEach(trained.mixing, new.mixing)
    thetas = tuple(torch.cat(both) for both in zip(trained.thetas, new.thetas, strict=True))
    anchors = tuple(torch.cat(both) for both in zip(trained.anchors, new.anchors, strict=True))
    scores = task.check(mixing, thetas, f"{mixing.kind}, {HALVES}")
    start = StartRecord(HALVES, nats_per_token(scores), None, None)
    return Solution(mixing, thetas, anchors, scores, (start,), HALVES, None, halves=(trained, new))


def _compare(best: Solution | None, solved: Solution) -> Gain | None:
    if best is None or best.scores is None or solved.scores is None:
        return None
    return gain(best.scores, solved.scores)


_FEW = 16  # records, whose standard error is itself a guess


def least_gain(task: Task, kind: MixingKind, compared: Gain) -> float:
    """What a level of `auto` has to gain over the best below: nothing for `module`, which is what a fit takes unless
    something is better; for those above, which overfit more easily, one standard error, or two of `factors` and where
    there are few records, and `task.least_gain`: where the loss is close to nothing, so is the standard error."""
    if kind == "module" and task.chooses_by_loss:
        return 0.0
    times = 2 if kind == "factors" or task.choosing < _FEW else 1
    return max(times * compared.standard_error, task.least_gain)


def _record(task: Task, solved: Solution, compared: Gain | None, best: Solution | None, climbed: bool) -> LevelRecord:
    asked, kind = task.settings.mixing, solved.mixing.kind
    if best is None or compared is None:
        why = "the first kind of mixing" if best is None else "not compared: there are no validation records"
    else:
        over = f"a gain of {compared.mean:.4f} {task.unit} over {best.mixing.kind}"
        why = (
            f"{over} is {'above' if compared.clear else 'not above'} one standard error, {compared.standard_error:.4f}"
        )
        if asked == AUTO and compared.clear and not climbed:
            least = least_gain(task, kind, compared)
            why += f", but below {least:.2g}, too little for {solved.mixing.numbers} numbers"
        elif asked == AUTO and climbed and not compared.clear:
            why += ", and taken as what a fit takes unless something is better"
    if kind == asked:
        why += "; asked for"
    if solved.chosen == NOTHING:
        why += "; a new LoRA, trained from nothing, which has nothing of the adapters"
    if solved.chosen == HALVES:
        why += "; the mean of factors that started from the adapters' and of a new LoRA"
    return LevelRecord(
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


def refit(task: Task, solved: Sequence[Solution], training: Sequence[Example], budget: float) -> Solution | None:
    """The last solution fitted once more, on all training records, with that stage alone; None if there is nothing to
    fit, or no budget.

    Where a level did not beat the solution of the one below, that one is fitted.

    Raises:
        NonFiniteLoss: naming the records of a batch.
    """
    last = solved[-1]
    if last.mixing.kind == "adapter":
        return _minimise_again(task, last, training, budget)
    if last.halves:
        return _refit_halves(task, solved, training, budget)
    if not last.moved:
        if len(solved) == 1 or last.chosen != solved[-2].mixing.kind:
            return None
        below = refit(task, solved[:-1], training, budget)
        if below is None:
            return None
        return replace(last, thetas=(last.mixing.lift(below.mixing, below.theta),), stages=below.stages)
    plan = plan_steps(training, batch_tokens=task.settings.batch_tokens, seed=task.settings.seed + 1)
    most = plan.steps_within(budget / 2)
    if most == 0:
        return None
    kind, (start, whole, steps, rate) = last.mixing.kind, _last_schedule(task, last, plan, most)
    adam = AdamW(start, steps=whole, rate=rate, warm_up=max(1, round(WARM_UP * whole)))
    task.engine.meter.stage(AGAIN, rung=kind, start="", stage="refit", ridge=last.ridge)
    descent = Descent(task.engine, last.mixing, training, plan.step, adam, last.anchor)
    ran = descent.run(steps, last.ridge or 0.0, key=f"{kind} from {last.chosen} on all records")
    stage = ran.recorded(kind, last.chosen, "refit", last.ridge or 0.0)
    # Where the rate has come to nothing, the end of hundreds of weights is nearer the optimum than their average.
    end = descent.theta if in_rounds(task.settings, validated=task.validated) else ran.average
    return replace(last, thetas=(end,), stages=(stage,))


def _refit_halves(
    task: Task, solved: Sequence[Solution], training: Sequence[Example], budget: float
) -> Solution | None:
    last, before, again = solved[-1], task.spent, list[Solution]()
    for left, half in zip((2, 1), last.halves, strict=True):
        found = refit(task, [*solved[:-1], half], training, (budget - (task.spent - before)) / left)
        if found is None:
            return None
        again.append(found)
    theta = torch.cat([half.theta for half in again])
    return replace(last, thetas=(theta,), stages=tuple(stage for half in again for stage in half.stages))


def _last_schedule(task: Task, last: Solution, plan: Plan, most: int) -> tuple[Tensor, int, int, float]:
    """Where the last descent starts, the steps of its schedule, how many of them are taken, and its peak rate.

    Args:
        task, last: what is fitted once more.
        plan: of all training records.
        most: steps that the budget has room for.
    """
    if last.mixing.kind == "factors":
        # Once more as they were found, from where the folds began them: more steps from there, or another fit of the
        # level below before, would only fit the records.
        whole, taken = (max(1, round(passes * plan.steps_a_pass)) for passes in last.passes)
        return last.anchor, whole, min(most, taken), rate_for(task, last.mixing, whole)
    steps = most
    if len(task.folds) > 1 and last.mixing.kind == "core":
        steps = min(most, max(1, round(last.passes[0] * plan.steps_a_pass)))
    elif in_rounds(task.settings, validated=task.validated):
        passes = last_passes(last.passes[1], len(task.folds))
        steps = min(most, max(1, round(passes * plan.steps_a_pass)))
    return last.theta, steps, steps, _REFIT_RATE * rate_for(task, last.mixing, steps)


def _minimise_again(task: Task, last: Solution, training: Sequence[Example], budget: float) -> Solution | None:
    """The lowest level as the start of others is found on a few records in a few evaluations; where it is the answer,
    on all of them."""
    evaluations = int(budget / (GRADIENT_COST * padded_tokens(training, task.settings.batch_tokens)))
    if evaluations < 2:  # the first one is of what there is
        return None
    task.engine.meter.stage(AGAIN, rung="adapter", start="", stage="refit", ridge=0.0)
    minimum = _minimise(task, last.mixing, last.theta, training, evaluations, "adapter on all records")
    losses = tuple(float(f"{value:.6g}") for value in minimum.values)
    stage = StageRecord("adapter", last.chosen, "refit", 0.0, minimum.evaluations, None, losses)
    return replace(last, thetas=(minimum.theta,), stages=(stage,))
