"""The search for mixing weights: screen, fit N numbers, then the rung asked for from more than one start.

1. SCREEN   base, each adapter alone, uniform and sum on a subset of the fitting records, forward only.
2. ADAPTER  one weight for each adapter by BFGS on the subset, from the best screened point.
3. RUNG     from the solution of 2 and from the sum: 2 can be a trap, where one adapter is switched off and nothing
            leads back. Some steps from each; the start with the lower loss on records not yet descended on goes on,
            along a path of falling ridge. At the end of each stage the average of its last quarter is scored on the
            validation records, and the best of these and the starts is the answer.

Everything is chosen inside the training records; held-out records are not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.calibration.batches import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.calibration.split import shuffled
from loracli.errors import NonFiniteLoss
from loracli.evaluation.held_out import static_points
from loracli.fitting.optimise import WARM_UP, AdamW, Minimum, bfgs, peak_rate
from loracli.fitting.problem import Problem
from loracli.fitting.settings import FitSettings

RIDGE_PATH = (1e-2, 1e-3, 0.0)
SCREEN_SHARE = 0.3  # of the budget, for steps 1 and 2
PROBE_SHARE = 0.12  # of the budget, for the first steps from each start; at most one pass
ADAPTER_EVALUATIONS = 7
SUBSET_RECORDS = 256
STEPS_A_PASS = 16  # at least, where there are as many records
SAME_START = 0.05  # starts closer than this are one


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Args:
        theta: (G, N).
        start: where the search that found it began, (G, N).
        starts: each start's name, with its loss on the validation records before and after the first steps (0 without
            such records), and the loss that chose between starts: on validation records after the first steps together
            with the later half of those steps' batches, each scored before it was descended on.
        chosen: the name of the start that won.
        ridge: of the stage that won; None if a start itself was never beaten, or there was no path.
    """

    theta: Tensor
    start: Tensor
    starts: tuple[dict[str, str | float], ...]
    chosen: str
    ridge: float | None


def search(problem: Problem, references: Sequence[str], settings: FitSettings) -> Found:
    """Finds theta within the budget of `settings.passes`."""
    budget = settings.passes * 2 * _tokens([*problem.fitting, *problem.validation])
    subset = _subset(problem.fitting, len(references), settings)
    per_adapter = _fit_adapters(problem, references, subset, settings)
    starts = {"adapter": problem.mixing.constant(per_adapter.theta.tolist())}
    total = problem.mixing.constant([1.0] * len(references))
    if float((starts["adapter"] - total).abs().max()) > SAME_START:
        starts["sum"] = total
    if settings.mixing == "adapter":
        return _refine_adapters(problem, starts, budget, settings)
    return _Rung(problem, starts, budget, settings).run()


def step_batches(examples: Sequence[Example], settings: FitSettings) -> list[Batch]:
    """The batches of the descent, one a step: small enough for some 16 steps a pass, never smaller than a record."""
    longest = max(len(example.input_ids) for example in examples)
    tokens = max(min(settings.batch_tokens, _tokens(examples) // STEPS_A_PASS), longest)
    return plan_batches(examples, batch_tokens=tokens)


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _subset(examples: Sequence[Example], adapters: int, settings: FitSettings) -> list[Example]:
    """Records for steps 1 and 2: as many as a share of the budget pays for, in an order that depends on the seed."""
    points = adapters + 3 if adapters > 1 else 2  # as static_points has them
    cost = points / 2 + ADAPTER_EVALUATIONS  # passes over the subset
    share = min(1.0, SCREEN_SHARE * settings.passes / cost)
    wanted = share * _tokens(examples)
    chosen: list[Example] = []
    for example in shuffled(examples, seed=settings.seed)[:SUBSET_RECORDS]:
        if chosen and _tokens(chosen) + len(example.input_ids) > wanted:
            break
        chosen.append(example)
    return chosen


def _fit_adapters(
    problem: Problem, references: Sequence[str], subset: Sequence[Example], settings: FitSettings
) -> Minimum:
    """Steps 1 and 2: theta (N,)."""
    batches = plan_batches(subset, batch_tokens=settings.batch_tokens)
    problem.meter.stage("screen")
    losses = {}
    for name, point in static_points(references).items():
        weights = problem.mixing.constant(point)[problem.mixing.group_of]
        try:
            losses[name] = problem.score(weights, batches, subset).nats_per_token
        except NonFiniteLoss:  # no point to start from
            losses[name] = math.inf
    best = static_points(references)[min(losses, key=lambda name: losses[name])]
    problem.meter.stage("adapter weights")

    def evaluate(theta: Tensor) -> tuple[float, Tensor]:
        value, gradient = problem.mean_and_gradient(theta.expand(len(problem.mixing.groups), -1), batches, subset)
        return value, gradient.sum(dim=0)

    return bfgs(evaluate, torch.tensor(best, dtype=torch.float64), evaluations=ADAPTER_EVALUATIONS)


def _refine_adapters(problem: Problem, starts: dict[str, Tensor], budget: float, settings: FitSettings) -> Found:
    """The rung `adapter`: BFGS on all fitting records from each start; the lower validation loss wins."""
    batches = plan_batches(problem.fitting, batch_tokens=settings.batch_tokens)
    checked = problem.validation or problem.fitting
    checks = plan_batches(checked, batch_tokens=settings.batch_tokens)
    cost = 2 * sum(batch.tokens for batch in batches)
    affordable = (budget - problem.meter.spent - 2 * len(starts) * _tokens(checked)) / cost / len(starts)
    reports: list[dict[str, str | float]] = []
    ends: dict[str, Tensor] = {}
    for name, start in starts.items():
        problem.meter.stage(f"from {name}")
        before = problem.score(problem.mixing.expand(start), checks, checked).nats_per_token
        evaluate = _mean_of(problem, batches)
        ends[name] = bfgs(evaluate, start, evaluations=max(int(affordable), 1)).theta
        after = problem.score(problem.mixing.expand(ends[name]), checks, checked).nats_per_token
        reports.append({"start": name, "before": before, "after": after})
    chosen = min(reports, key=lambda report: report["after"])["start"]
    assert isinstance(chosen, str)
    return Found(ends[chosen], starts[chosen], tuple(reports), chosen, None)


def _mean_of(problem: Problem, batches: Sequence[Batch]) -> Callable[[Tensor], tuple[float, Tensor]]:
    return lambda theta: problem.mean_and_gradient(theta, batches, problem.fitting)


class _Rung:
    """Step 3: descends from each start, then goes on from one."""

    def __init__(self, problem: Problem, starts: dict[str, Tensor], budget: float, settings: FitSettings) -> None:
        self._problem, self._starts, self._settings = problem, starts, settings
        examples = problem.fitting
        self._batches = step_batches(examples, settings)
        self._scored = sum(batch.scored_tokens for batch in self._batches)
        self._checks = plan_batches(problem.validation, batch_tokens=settings.batch_tokens)
        # Without validation records nothing can say when to stop, so the ridge stays at its strongest.
        path = RIDGE_PATH if problem.validation else RIDGE_PATH[:1]
        self._path = path if settings.ridge is None else (settings.ridge,)
        self._probe, self._rest = self._plan(budget - problem.meter.spent)

    def _plan(self, budget: float) -> tuple[int, int]:
        """Steps from each start, and steps after the choice."""
        a_pass = 2 * sum(batch.tokens for batch in self._batches)
        a_step = a_pass / len(self._batches)
        probe = max(1, round(len(self._batches) * min(1.0, PROBE_SHARE * self._settings.passes)))
        checks = (2 * len(self._starts) + len(self._path)) * sum(batch.tokens for batch in self._checks)
        rest = (budget - checks - len(self._starts) * probe * a_step) / a_step
        return probe, max(math.floor(rest) - 1, len(self._path))  # one less: batches differ in size

    def run(self) -> Found:
        best: tuple[float, Tensor, float | None] | None = None
        reports: list[dict[str, str | float]] = []
        descents: dict[str, _Descent] = {}
        for name, start in self._starts.items():
            self._problem.meter.stage(f"from {name}")
            before = self._check(start)
            descent = self._descent(start)
            unseen = descent.run(self._probe, self._path[0])
            after = self._check(descent.theta)
            nats, tokens = unseen[0] + after.nats, unseen[1] + after.tokens
            reports.append({"start": name, "before": before.mean, "after": after.mean, "unseen": nats / tokens})
            descents[name] = descent
            if self._checks and (best is None or before.mean < best[0]):
                best = (before.mean, start, None)
        chosen = str(min(reports, key=lambda report: report["unseen"])["start"])
        descent = descents[chosen]
        for stage, ridge in enumerate(self._path):
            steps = self._rest // len(self._path) + (stage < self._rest % len(self._path))
            self._problem.meter.stage("weights" if len(self._path) == 1 else f"weights, ridge {ridge:g}")
            descent.run(steps, ridge)
            value = self._check(descent.average).mean
            if best is None or value < best[0] or not self._checks:
                best = (value, descent.average, ridge)
        assert best is not None
        return Found(best[1], self._starts[chosen], tuple(reports), chosen, best[2])

    def _descent(self, start: Tensor) -> _Descent:
        steps = self._probe + self._rest
        rate = self._settings.learning_rate or peak_rate(steps)
        adam = AdamW(start, steps=steps, rate=rate, warm_up=max(1, round(WARM_UP * steps)))
        return _Descent(self._problem, adam, self._batches, self._scored, self._settings.seed)

    def _check(self, theta: Tensor) -> _Check:
        """Theta on the validation records."""
        if not self._checks:
            return _Check(0.0, 0)
        weights = self._problem.mixing.expand(theta)
        scores = self._problem.score(weights, self._checks, self._problem.validation)
        return _Check(float(scores.nats.sum()), float(scores.tokens.sum()))


@dataclass(frozen=True)
class _Check:
    """Total nats and scored tokens of the validation records; none without such records."""

    nats: float
    tokens: float

    @property
    def mean(self) -> float:
        return self.nats / self.tokens if self.tokens else 0.0


class _Descent:
    """One run of AdamW over shuffled batches."""

    def __init__(self, problem: Problem, adam: AdamW, batches: Sequence[Batch], scored: float, seed: int) -> None:
        self._problem, self._adam, self._batches, self._scored, self._seed = problem, adam, batches, scored, seed
        self._start = adam.theta
        self._order: list[Batch] = []
        self._pass = 0
        self.average = adam.theta

    @property
    def theta(self) -> Tensor:
        return self._adam.theta

    def run(self, steps: int, ridge: float) -> tuple[float, float]:
        """Takes steps; sets `average` to the mean of the last quarter's iterates.

        Returns:
            nats and scored tokens of the later half of the batches, each scored before the step on it: in the first
            pass these are records that theta has not been fitted to.
        """
        unseen_nats, unseen_tokens = 0.0, 0.0
        total, count = torch.zeros_like(self.theta), 0
        for step in range(steps):
            batch = self._next()
            nats, gradient = self._problem.gradient(self.theta, batch, self._problem.fitting)
            if step >= steps // 2:
                unseen_nats, unseen_tokens = unseen_nats + nats, unseen_tokens + batch.scored_tokens
            # The batch stands for all of them: an unbiased estimate of the gradient of the mean over scored tokens.
            gradient = gradient * len(self._batches) / self._scored + ridge * (self.theta - self._start)
            self._adam.step(gradient)
            if step >= steps - max(steps // 4, 1):
                total, count = total + self.theta, count + 1
        self.average = total / count
        return unseen_nats, unseen_tokens

    def _next(self) -> Batch:
        if not self._order:
            self._order = shuffled(self._batches, seed=self._seed + self._pass)
            self._pass += 1
        return self._order.pop(0)
