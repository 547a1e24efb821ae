"""How much work a fit may be, counted before it is done: for the bar, which must not arrive early, and the time.

    effort = sum over micro-batches of cost (tokens + o)        cost 1 forward, 2 with the backward pass; o: `Pace`

What is said is the most that may be done: of every level its share of what is left of the budget or, where that is
less, what it does however small the share is (two starts, their first steps, a step on each ridge, every check). Where
a level takes less, those after it may take more, but all together not; so the most that is left never grows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.evaluation.statistics import static_points
from loracli.fitting.criterion import Fold
from loracli.fitting.descent import Plan, plan_steps
from loracli.fitting.engine import GRADIENT_COST, Pace
from loracli.fitting.level import FACTOR_PASSES, FACTOR_STEPS, probe_share, ridge_path, tokens_of
from loracli.fitting.pool import IDLE, POOL, idle_tokens
from loracli.fitting.published import published_batches
from loracli.fitting.search import EVALUATIONS, LADDERS, SCREEN_SHARE, refit_share, share_of, subset
from loracli.fitting.settings import AUTO, FitSettings
from loracli.recipe.record import INLINE_KINDS, MixingKind

REACH, REFIT, CERTIFICATE = "reach", "refit", "certificate"
_STARTS = 2  # of a level: the solution of the one below, and the sum


@dataclass(frozen=True)
class Cost:
    """Of micro-batches, each as many times as it is run forward or backward.

    Args:
        tokens: padding included.
        batches: how many.
    """

    tokens: float = 0.0
    batches: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.batches + other.batches)

    def __mul__(self, times: float) -> Cost:
        return Cost(times * self.tokens, times * self.batches)

    def effort(self, pace: Pace) -> int:
        """What the meter counts for them."""
        return math.ceil(self.tokens + pace.overhead * self.batches)

    def seconds(self, pace: Pace) -> float:
        """About how long they take."""
        return self.effort(pace) * pace.token_seconds


def cost_of(batches: Sequence[Batch]) -> Cost:
    """Of one pass forward."""
    return Cost(sum(batch.tokens for batch in batches), len(batches))


def descent_cost(plan: Plan, tokens: float) -> Cost:
    """Of steps with at most so many tokens, forward and backward; with most micro-batches where short ones come
    first."""
    passes, rest = divmod(tokens, plan.tokens)
    shortest = list(accumulate(sorted(batch.tokens for batch in plan.batches)))
    return Cost(tokens, passes * len(shortest) + bisect_right(shortest, rest)) * GRADIENT_COST


@dataclass(frozen=True)
class Work:
    """The stages of a fit with the most that each may take.

    Args:
        folds: from `divide_training`.
        training: all records of the folds.
        settings: of the fit.
        references: of the adapters.
        after: the stages that come after the search, by name.
        certifies: whether a certificate may come before them.
        ladder: the levels with their shares; None for those of the settings.
        judged: whether it is one of cross-fitting, whose solution is not fitted once more.
    """

    folds: Sequence[Fold]
    training: Sequence[Example]
    settings: FitSettings
    references: Sequence[str]
    after: Mapping[str, Cost] = field(default_factory=dict)
    certifies: bool = False
    ladder: Mapping[MixingKind, float] | None = None
    judged: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        """Their names in order: of levels the kinds of mixing."""
        refits = [REFIT] * (self._refits and not self.judged)
        certificate = [CERTIFICATE] * (self.certifies and not self.judged)
        return (REACH, *self._ladder, *[IDLE] * self._prunes, *refits, *certificate, *self.after)

    def left(self, stage: str, spent: int = 0) -> Cost:
        """The most that is to be done when a stage begins.

        Args:
            stage: one of `stages`.
            spent: tokens of the budget by then.
        """
        settings, later = self.settings, self.stages[self.stages.index(stage) :]
        passes = settings.budget(len(self.folds), len(self.training))
        budget = passes * GRADIENT_COST * tokens_of(self.training)
        last = refit_share(settings.mixing, len(self.folds)) * self._refits
        climbing, cost = budget * (1 - last) - spent, Cost()
        for kind in self._ladder:
            if kind in later:
                most = self._most(kind, max(climbing, 0.0) * share_of(self._ladder, kind))
                climbing, cost = climbing - most.tokens, cost + most
        if IDLE in later:
            cost += self._pruning(max(climbing, 0.0))
        if REFIT in later:
            refitting = max(min(last * budget, budget - spent - cost.tokens), 0.0)
            plan = plan_steps(self.training, batch_tokens=settings.batch_tokens, seed=settings.seed + 1)
            tokens = refitting / GRADIENT_COST
            if settings.mixing == "factors":  # no more passes than found them
                passes = max(FACTOR_PASSES, FACTOR_STEPS / self._plan(self.folds[0]).steps_a_pass)
                tokens = min(tokens, (passes + 1 / plan.steps_a_pass) * plan.tokens)
            cost += descent_cost(plan, tokens)
        if CERTIFICATE in later:
            once = cost_of(plan_batches(self.training, batch_tokens=settings.batch_tokens))
            cost += once * (max(budget - spent - cost.tokens, 0.0) / once.tokens)
        return sum((self.after[name] for name in later if name in self.after), cost)

    @property
    def passes(self) -> float:
        """Over the training records, at most, of the search: its budget, or what it does however small that is."""
        budget = self.settings.budget(len(self.folds), len(self.training))
        if self.settings.paper:
            return budget
        return max(budget, replace(self, after={}).left(REACH).tokens / (GRADIENT_COST * tokens_of(self.training)))

    def effort_left(self, pace: Pace) -> Callable[[str, int], int]:
        """The same for the meter."""
        return lambda stage, spent: self.left(stage, spent).effort(pace)

    @property
    def _ladder(self) -> Mapping[MixingKind, float]:
        if self.settings.paper:
            return {"module": 1.0}
        return LADDERS[self.settings.mixing] if self.ladder is None else self.ladder

    @property
    def _refits(self) -> bool:
        return bool(self.folds[0].validation) and self.settings.mixing != "adapter" and not self.settings.paper

    @property
    def _prunes(self) -> bool:
        """Whether adapters that change nothing are looked for."""
        inline = self.settings.mixing in (*INLINE_KINDS, AUTO) and not self.settings.paper and self.ladder is None
        return inline and len(self.references) >= POOL and bool(self.folds[0].validation)

    def _pruning(self, left: float) -> Cost:
        """A check without each of the adapters, and as many fits as halving them takes: with `--passes` within what is
        left, or a step from the start and one on each ridge."""
        left = math.inf if self.settings.passes is None else left
        fits, passes = (
            len(self.references).bit_length(),
            self.settings.first_passes(len(self.folds), len(self.training)),
        )
        steps = 1 + len(ridge_path(self.settings, "adapter", validated=True))
        cost = Cost()
        for fold in self.folds:
            plan, check = self._plan(fold), self._cost_of(fold.validation)
            whole = min(fits * idle_tokens(fold, passes, self.settings.batch_tokens), left / len(self.folds))
            cost += descent_cost(plan, whole / GRADIENT_COST) + descent_cost(plan, fits * steps * self._largest(plan))
            cost += check * (len(self.references) + fits * (1 + steps))
        return cost

    @staticmethod
    def _largest(plan: Plan) -> int:
        """Tokens of a step, at most."""
        return sum(sorted(batch.tokens for batch in plan.batches)[-plan.batches_a_step :])

    def _most(self, kind: MixingKind, budget: float) -> Cost:
        if self.settings.paper:
            return cost_of(published_batches(self.training, self.settings)) * GRADIENT_COST
        of_fold = self._most_of_adapters if kind == "adapter" else self._most_of_level
        return sum((of_fold(fold, kind, budget / len(self.folds)) for fold in self.folds), Cost())

    def _most_of_level(self, fold: Fold, kind: MixingKind, budget: float) -> Cost:
        path = len(ridge_path(self.settings, kind, validated=bool(fold.validation)))
        starts = 1 if kind == "factors" else _STARTS
        again = 1 + (kind == "factors" and self.settings.mixing == AUTO)  # from nothing too
        checks = self._cost_of(fold.validation) * (again * (2 * starts + path) + (again - 1))  # and half of each
        plan = self._plan(fold)
        largest = self._largest(plan)
        tokens = max(budget - checks.tokens, 0.0) / GRADIENT_COST
        probe = probe_share(kind, len(self.folds), self.settings.mixing) * tokens
        least = starts * max(probe, largest) + path * largest
        if kind == "factors":
            shortest = FACTOR_STEPS * largest if self.settings.passes is None else 0.0
            longest = max(FACTOR_PASSES * plan.tokens, FACTOR_STEPS * largest)
            tokens, least = again * min(tokens, longest), again * min(max(least, shortest), longest)
            tokens = min(tokens, max(budget - checks.tokens, 0.0) / GRADIENT_COST)
        return self._or_steps(checks, fold, budget) + descent_cost(plan, max(tokens, least))

    def _most_of_adapters(self, fold: Fold, kind: MixingKind, budget: float) -> Cost:
        alone, points = kind == self.settings.mixing, len(static_points(self.references))
        wanted = budget * SCREEN_SHARE / points if alone else budget / (points + GRADIENT_COST * EVALUATIONS)
        screened = self._cost_of(subset(fold.fitting, wanted, self.settings))
        screen, checks = screened * points, self._cost_of(fold.validation) * 2
        if not alone:
            start = screen + checks + screened * (GRADIENT_COST * EVALUATIONS)
            return self._or_steps(start, fold, budget)
        least = (checks + self._cost_of(fold.fitting) * GRADIENT_COST) * _STARTS
        return screen + least * max((budget - screen.tokens) / least.tokens, 1.0)

    def _or_steps(self, cost: Cost, fold: Fold, budget: float) -> Cost:
        """What of a cost may be saved is within the budget, and goes to later steps, whose micro-batches are small."""
        steps = descent_cost(self._plan(fold), min(cost.tokens, budget) / GRADIENT_COST)
        return Cost(cost.tokens, max(cost.batches, steps.batches))

    def _plan(self, fold: Fold) -> Plan:
        return plan_steps(fold.fitting, batch_tokens=self.settings.batch_tokens, seed=self.settings.seed)

    def _cost_of(self, examples: Sequence[Example]) -> Cost:
        return cost_of(plan_batches(examples, batch_tokens=self.settings.batch_tokens))
