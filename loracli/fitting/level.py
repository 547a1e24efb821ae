"""One kind of mixing, a level of the ladder: what is tried and what comes of it.

Above `adapter`: some steps from each start, then on from the better; for `rank` and `core` along a path of falling
ridge, for `layer` and `module` in rounds for as long as these gain.

The solution of the level below can be a trap, where one adapter is switched off and nothing leads back; so the sum,
each adapter at full strength, is a start too. The start whose loss is lower on records that were not yet descended on
goes on. At the end of each stage of the path the average of its last quarter is scored on the validation records; the
best of these and the starts is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.basis import canonical_stack, mixing_in_file_basis
from loracli.calibration.dataset import plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.criterion import LEAST_GAIN, Criterion, Fold, gain
from loracli.fitting.descent import WARM_UP, AdamW, Descent, Plan, Ran, plan_steps
from loracli.fitting.engine import Engine
from loracli.fitting.mixing import DiagonalMixing, Mixing, TrainedFactors
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Scores
from loracli.recipe.record import LevelRecord, MixingKind, RecipeMixing, StageRecord, StartRecord, weights_digest
from loracli.recipe.tensors import tensor_mixing
from loracli.system.display import count_text


@dataclass(frozen=True)
class Task:
    """Everything that is the same for all levels.

    Args:
        engine: the attached model.
        folds: K >= 1 divisions of the training records; one alone may have no validation records.
        criterion: that chooses.
        settings: of the fit.
        references: of the adapters.
        chooses_by_loss: whether the criterion is the loss, so that batches scored before the step on them can be pooled
            with it.
        unit: of the criterion's costs.
        least_gain: in that unit, that `auto` climbs for.
        spent_before: tokens that the engine's meter counted before this fit.
        judged: the fold whose validation records choose nothing, as they are held out; None where all choose.
    """

    engine: Engine
    folds: tuple[Fold, ...]
    criterion: Criterion
    settings: FitSettings
    references: tuple[str, ...]
    chooses_by_loss: bool = True
    unit: str = "nats per token"
    least_gain: float = LEAST_GAIN
    spent_before: int = 0
    judged: int | None = None

    @property
    def budget(self) -> float:
        """Passes over the training records that may be spent, forward and backward."""
        return self.settings.budget(len(self.folds), self._records)

    @property
    def _records(self) -> int:
        return len({example.place for fold in self.folds for example in (*fold.fitting, *fold.validation)})

    @property
    def first_passes(self) -> float:
        """Passes over the fitting records until `layer` and `module` are first judged."""
        return self.settings.first_passes(len(self.folds), self._records)

    @property
    def spent(self) -> int:
        """Tokens that were spent on it, a forward counting 1 and a backward 1."""
        return self.engine.meter.spent - self.spent_before

    @property
    def validated(self) -> bool:
        return bool(self.folds[0].validation)

    @property
    def choosing(self) -> int:
        """Records that choose."""
        return sum(len(fold.validation) for number, fold in enumerate(self.folds) if number != self.judged)

    def check(self, mixing: Mixing, thetas: Sequence[Tensor], key: str) -> Scores | None:
        """Each fold's theta on its validation records, of the folds that choose; None without such records. The key
        says what is checked.

        Raises:
            NonFiniteLoss: if the loss there is not finite.
        """
        if not self.validated:
            return None
        scores = [
            self.criterion(mixing, theta, fold.validation, f"{key}, fold {number}")
            for number, (theta, fold) in enumerate(zip(thetas, self.folds, strict=True))
        ]
        return _joined([part for number, part in enumerate(scores) if number != self.judged])


@dataclass(frozen=True)
class Solution:
    """What was found on one kind of mixing, on every fold; at the end of a search one for all folds.

    Args:
        mixing: the kind.
        thetas: (P,) by fold.
        anchors: (P,) by fold, the start that won, which the ridge pulls towards.
        scores: by the criterion, on the validation records of all folds; None without such records.
        starts: what they were.
        chosen: the name of the start that won.
        ridge: of the stage that won; None if the start was never beaten, or there was no path.
        stopped: why the search ended early, None if it did not.
        stages: the descents, in order; at the end those of all kinds.
        rungs: at the end, all kinds that were tried.
        refitted: whether it was fitted once more on all training records.
        dropped: places of the adapters whose weights are 0, as they could not be told from it.
        passes: over the fitting records: of the level's whole schedule, and until the solution was taken.
        halves: of `HalfOfEach`, the solutions that it is half of.
    """

    mixing: Mixing
    thetas: tuple[Tensor, ...]
    anchors: tuple[Tensor, ...]
    scores: Scores | None
    starts: tuple[StartRecord, ...]
    chosen: str
    ridge: float | None
    stopped: str | None = None
    stages: tuple[StageRecord, ...] = ()
    rungs: tuple[LevelRecord, ...] = ()
    refitted: bool = False
    dropped: tuple[int, ...] = ()
    passes: tuple[float, float] = (0.0, 0.0)
    halves: tuple[Solution, ...] = ()

    @property
    def theta(self) -> Tensor:
        """(P,) for all folds: the mean of theirs."""
        return _mean(self.thetas)

    @property
    def anchor(self) -> Tensor:
        """(P,) likewise."""
        return _mean(self.anchors)

    @property
    def moved(self) -> bool:
        """Whether it is anything else than its start."""
        return any(not torch.equal(t, a) for t, a in zip(self.thetas, self.anchors, strict=True))


def _mean(thetas: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(thetas)).mean(dim=0) if len(thetas) > 1 else thetas[0]


def nats_per_token(scores: Scores | None) -> float | None:
    """None where nothing was scored."""
    return None if scores is None else scores.nats_per_token


def tokens_of(examples: Sequence[Example]) -> int:
    """Tokens of the examples, scored or not."""
    return sum(len(example.input_ids) for example in examples)


def padded_tokens(examples: Sequence[Example], batch_tokens: int) -> int:
    """Tokens of the micro-batches that hold the examples, padding included."""
    return sum(batch.tokens for batch in plan_batches(examples, batch_tokens=batch_tokens))


def left_out(name: str, before: float | None, error: NonFiniteLoss) -> StartRecord:
    """A start that the search did not go on from."""
    return StartRecord(name, before, None, None, str(error))


_RIDGE_PATH = (1e-2, 1e-3, 0.0)  # from strong to none
_WITHOUT_RIDGE = ("layer", "module")  # few numbers, which overfit little
# Thousands of numbers for one mixing weight fit a few records in a few passes, whatever the ridge: what holds trained
# factors is a short schedule, of which the validation records choose how much.
FACTOR_PASSES = 4
FACTOR_STEPS = 32  # at least: where there are few records, passes are short


# A round of `layer` and `module` after the first. The first is enough for most; where it is not, the next one shows it.
_ROUND = 0.5  # of the steps of the first
_ROUND_RATE = 0.6  # of the rate of so many steps


def probe_share(kind: MixingKind, folds: int, asked: str) -> float:
    """The share of a level's first steps that are taken from each start, a pass at most: for the mixing that is asked
    for. In folds every record tells which start is better, and where they are few, steps are dear."""
    return 0.1 if kind in _WITHOUT_RIDGE and (folds > 1 or kind != asked) else 0.15


def in_rounds(settings: FitSettings, *, validated: bool) -> bool:
    """Whether `layer` or `module` ends when it gains nothing more, and not when its share of the budget is spent. Below
    other kinds, which start from it, it takes its share."""
    return validated and settings.mixing in _WITHOUT_RIDGE


def ridge_path(settings: FitSettings, kind: str, *, validated: bool) -> tuple[float, ...]:
    """The ridge of each stage of a descent, in nats per token. `layer` and `module` have none: among several ridges a
    few validation records choose by chance, and a wrong one costs more than none. Without such records nothing can say
    when to stop, so the ridge stays at its strongest."""
    if kind == "factors":
        return (settings.ridge or 0.0,) * FACTOR_PASSES
    if settings.ridge is not None:
        return (settings.ridge,)
    if not validated:
        return _RIDGE_PATH[:1]
    return (0.0,) if kind in _WITHOUT_RIDGE else _RIDGE_PATH


def rate_for(task: Task, mixing: Mixing, steps: int) -> float:
    """The peak rate of a descent of so many steps."""
    return task.settings.learning_rate or min(_peak_rate(steps), mixing.rate)


def solve_level(task: Task, mixing: Mixing, starts: Mapping[str, Sequence[Tensor]], budget: float) -> Solution:
    """Finds theta on every fold within the budget.

    Args:
        task: what is fitted.
        mixing: the kind.
        starts: theta of each fold, by the name of the start.
        budget: tokens, a forward counting 1 and a backward 1.
    Raises:
        NonFiniteLoss: if no start is finite.
    """
    return _Level(task, mixing, {name: tuple(thetas) for name, thetas in starts.items()}, budget).solve()


@dataclass(frozen=True)
class _Steps:
    """Of one fold: its plan, the steps from each start, those after the choice, and how many rounds may follow."""

    plan: Plan
    probe: int
    rest: int
    rounds: int

    def part(self, stage: int, stages: int) -> int:
        return self.rest // stages + (stage < self.rest % stages)

    def passes(self, steps: int) -> float:
        """Over the fitting records."""
        return steps / self.plan.steps_a_pass


class _Level:
    def __init__(self, task: Task, mixing: Mixing, starts: Mapping[str, tuple[Tensor, ...]], budget: float) -> None:
        self._task, self._mixing, self._starts = task, mixing, starts
        self._path = ridge_path(task.settings, mixing.kind, validated=task.validated)
        self._in_rounds = in_rounds(task.settings, validated=task.validated)
        self._steps = [self._plan(fold_index, budget / len(task.folds)) for fold_index in range(len(task.folds))]
        self._best: Solution | None = None
        self._failure: NonFiniteLoss | None = None
        self._reports: list[StartRecord] = []
        self._stages: list[StageRecord] = []

    def _plan(self, fold_index: int, budget: float) -> _Steps:
        fold, settings = self._task.folds[fold_index], self._task.settings
        plan = plan_steps(fold.fitting, batch_tokens=settings.batch_tokens, seed=settings.seed)
        check = padded_tokens(fold.validation, settings.batch_tokens)
        most = (budget - (2 * len(self._starts) + len(self._path)) * check) / 2  # forward and backward
        tokens = min(most, self._task.first_passes * plan.tokens) if self._in_rounds else most
        share = probe_share(self._mixing.kind, len(self._task.folds), settings.mixing)
        probe = max(1, min(plan.steps_a_pass, plan.steps_within(share * tokens)))
        rest = plan.steps_within(tokens - len(self._starts) * plan.tokens_of(range(probe)), first=probe)
        if self._mixing.kind == "factors":
            most = max(FACTOR_PASSES * plan.steps_a_pass, FACTOR_STEPS)
            fewest = FACTOR_STEPS if settings.passes is None else 0
            probe = min(probe, most)
            rest = min(max(rest, fewest - probe), most - probe)
        rest = max(rest, len(self._path))
        a_round = plan.tokens_of(range(_round(probe + rest))) + check / 2
        return _Steps(plan, probe, rest, int((most - tokens) / a_round) if self._in_rounds else 0)

    def solve(self) -> Solution:
        descents = {}
        for name in self._starts:
            descent = self._probe(name)
            if descent is not None:
                descents[name] = descent
        if descents:
            chosen = min((r for r in self._reports if r.name in descents), key=lambda report: report.unseen or 0.0).name
            self._walk(chosen, descents[chosen])
        elif self._best is not None:  # no start can be descended from, but one of them has a finite loss
            self._best = replace(self._best, stopped=str(self._failure))
        elif self._failure is not None:
            raise self._failure
        assert self._best is not None
        return replace(self._best, starts=tuple(self._reports), stages=tuple(self._stages))

    def _probe(self, name: str) -> list[Descent] | None:
        """The first steps from a start; None if the loss is not finite there."""
        starts, before = self._starts[name], None
        key = self._stage(name, "probe", None)
        try:
            before = self._task.check(self._mixing, starts, f"{key}, before")
            if before is not None:
                self._offer(name, starts, before, None)
            descents = [
                self._descent(start, start, steps.plan, steps.probe + steps.rest)
                for start, steps in zip(starts, self._steps, strict=True)
            ]
            ran = [
                descent.run(steps.probe, self._path[0], key=f"{key}, fold {fold}")
                for fold, (descent, steps) in enumerate(zip(descents, self._steps, strict=True))
            ]
            after = self._task.check(self._mixing, [descent.theta for descent in descents], f"{key}, after")
        except NonFiniteLoss as error:
            self._reports.append(left_out(name, nats_per_token(before), error))
            self._failure = error
            return None
        self._keep(name, "probe", self._path[0], ran, after)
        if after is not None:  # few steps may have been enough
            taken = self._steps[0].probe
            self._offer(name, tuple(descent.theta for descent in descents), after, self._path[0], taken)
        pooled = after is None or (self._task.chooses_by_loss and len(descents) == 1)
        unseen = _unseen(ran, after) if pooled else after.nats_per_token  # type: ignore[union-attr]
        self._reports.append(StartRecord(name, nats_per_token(before), nats_per_token(after), unseen))
        return descents

    def _walk(self, name: str, descents: Sequence[Descent]) -> None:
        """The path of falling ridge; ends where the solution gets clearly worse."""
        taken = self._steps[0].probe
        for stage, ridge in enumerate(self._path):
            counts = [steps.part(stage, len(self._path)) for steps in self._steps]
            taken += counts[0]
            best = self._best.scores if self._best is not None else None
            ended = self._run(name, f"part {stage}", descents, counts, ridge, taken)
            if ended is None:
                return
            thetas, scores = ended
            if scores is not None and best is not None and gain(scores, best).clear and not self._in_rounds:
                return
        if self._in_rounds:
            assert scores is not None
            self._go_on(name, thetas, scores, taken)

    def _go_on(self, name: str, thetas: tuple[Tensor, ...], scores: Scores, taken: int) -> None:
        """Rounds from the average of the one before, for as long as one gains more than chance and `task.least_gain`,
        and the budget lasts."""
        task, ridge = self._task, self._path[-1]
        counts = [_round(steps.probe + steps.rest) for steps in self._steps]
        for number in range(min(steps.rounds for steps in self._steps)):
            descents = [
                self._descent(theta, anchor, steps.plan, count, _ROUND_RATE)
                for theta, anchor, steps, count in zip(thetas, self._starts[name], self._steps, counts, strict=True)
            ]
            taken += counts[0]
            ended = self._run(name, f"round {number}", descents, counts, ridge, taken)
            if ended is None or ended[1] is None:
                return
            gained = gain(scores, ended[1])
            if not gained.clear or gained.mean <= task.least_gain:
                return
            thetas, scores = ended[0], ended[1]

    def _run(
        self, name: str, what: str, descents: Sequence[Descent], counts: Sequence[int], ridge: float, taken: int
    ) -> tuple[tuple[Tensor, ...], Scores | None] | None:
        """So many steps on each fold, by when `taken` were taken on the first; what they come to is offered. None if
        the loss is not finite."""
        key = f"{self._stage(name, 'descent', ridge)}, {what}"
        try:
            ran = [
                descent.run(count, ridge, key=f"{key}, fold {fold}")
                for fold, (descent, count) in enumerate(zip(descents, counts, strict=True))
            ]
            thetas = tuple(r.average for r in ran)
            scores = self._task.check(self._mixing, thetas, f"{key}, after")
        except NonFiniteLoss as error:
            self._stop(name, descents, str(error))
            return None
        self._keep(name, "descent", ridge, ran, scores)
        self._offer(name, thetas, scores, ridge, taken)
        return thetas, scores

    def _offer(
        self, name: str, thetas: tuple[Tensor, ...], scores: Scores | None, ridge: float | None, taken: int = 0
    ) -> None:
        """Keeps a solution if it is the best so far; without validation records the last is."""
        best = self._best
        if best is not None and best.scores is not None and scores is not None:
            if scores.nats_per_token >= best.scores.nats_per_token:
                return
        steps = self._steps[0]
        passes = steps.passes(steps.probe + steps.rest), steps.passes(taken)
        self._best = Solution(self._mixing, thetas, self._starts[name], scores, (), name, ridge, passes=passes)

    def _stop(self, name: str, descents: Sequence[Descent], why: str) -> None:
        """A loss that is not finite ends the search; the best solution until then is kept."""
        if not self._task.validated:
            self._offer(name, tuple(descent.theta for descent in descents), None, self._path[0])
        assert self._best is not None
        self._best = replace(self._best, stopped=why)

    def _keep(self, name: str, stage: str, ridge: float, ran: Sequence[Ran], scores: Scores | None) -> None:
        self._stages.append(ran[0].recorded(self._mixing.kind, name, stage, ridge, nats_per_token(scores)))

    def _descent(self, start: Tensor, anchor: Tensor, plan: Plan, steps: int, share: float = 1.0) -> Descent:
        """A schedule of so many steps, at a share of the rate of as many."""
        rate = share * rate_for(self._task, self._mixing, steps)
        adam = AdamW(start, steps=steps, rate=rate, warm_up=max(1, round(WARM_UP * steps)))
        return Descent(self._task.engine, self._mixing, plan.examples, plan.step, adam, anchor)

    def _stage(self, name: str, what: str, ridge: float | None) -> str:
        """Tells of what follows; the key of it."""
        kind = self._mixing.kind
        words = f"fitting {count_text(self._mixing.numbers, 'weight')}"
        self._task.engine.meter.stage(words, rung=kind, start=name, stage=what, ridge=ridge)
        return f"{kind} from {name}, {what}" + ("" if ridge is None else f", ridge {ridge:g}")


def _round(steps: int) -> int:
    """The steps of a round after a first of so many."""
    return max(1, round(_ROUND * steps))


def _unseen(ran: Sequence[Ran], after: Scores | None) -> float:
    """Loss on what the first steps had not descended on."""
    nats, tokens = sum(r.nats for r in ran), sum(r.tokens for r in ran)
    if after is not None:
        nats, tokens = nats + float(after.nats.sum()), tokens + float(after.tokens.sum())
    return nats / tokens


def recipe_mixing(adapters: Sequence[LoraAdapter], modules: Sequence[str], found: Solution) -> RecipeMixing:
    """The mixing as the files' factors take it: what was fitted in the canonical basis is brought back from there."""
    mixing = found.mixing
    if isinstance(mixing, DiagonalMixing) and mixing.kind != "rank":
        weights = mixing.by_group(mixing.weights(found.theta))
        return RecipeMixing(mixing.kind, weights, mixing.numbers, weights_sha256=weights_digest(weights))
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(mixing, TrainedFactors):
        for module, (lora_A, lora_B) in zip(modules, mixing.factors(found.theta), strict=True):
            tensors |= {f"{module}.lora_A": lora_A, f"{module}.lora_B": lora_B}
    else:
        for module, matrix in zip(modules, mixing.matrices(found.theta), strict=True):
            updates = [adapter.modules[module].factors for adapter in adapters if module in adapter.modules]
            tensors[f"{module}.mixing"] = mixing_in_file_basis(canonical_stack(updates), matrix)
    return tensor_mixing(mixing.kind, tensors, adapters, numbers=mixing.numbers)


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several groups of records as one."""
    return Scores(torch.cat([part.nats for part in parts]), torch.cat([part.tokens for part in parts]))


def _peak_rate(steps: int) -> float:
    """clip(8 / steps, 0.01, 0.1): Adam moves about the rate in a step, and a weight should be able to travel about 4 in
    all."""
    return min(max(8.0 / steps, 0.01), 0.1)
