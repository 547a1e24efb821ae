"""A whole fit: adapters, base model and data in, a recipe out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from torch import Tensor

from loracli._version import __version__
from loracli.calibration.dataset import tokens_sha256
from loracli.calibration.records import DataPaths
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss, StateMismatch, UsageError
from loracli.evaluation.scorer import Scorer, make_scorer
from loracli.evaluation.statistics import FIT, held_out_table
from loracli.fitting.activations import fit_activations
from loracli.fitting.certificate import can_certify, certificate_tokens, certified
from loracli.fitting.control import as_memory_allows, controls
from loracli.fitting.criterion import (
    LEAST_ANSWERS,
    Fold,
    loss_criterion,
    metric_criterion,
)
from loracli.fitting.engine import Engine, Pace
from loracli.fitting.inputs import FitInputs, prepare_fit, render_inputs
from loracli.fitting.journal import Entry, Journal, Meter, StepLog
from loracli.fitting.judging import cross_fitted, fresh_scores, static_scores
from loracli.fitting.level import Solution, Task, recipe_mixing, tokens_of
from loracli.fitting.mixing import DiagonalMixing, Mixing, make_diagonal, make_mixing
from loracli.fitting.plan import (
    ACTIVATIONS,
    SCORING,
    announce,
    divide_training,
    fit_work,
    held_out_parts,
    measured_pace,
    part_stage,
)
from loracli.fitting.processes import ALONE, Processes
from loracli.fitting.published import fit_as_published
from loracli.fitting.reach import Reach, find_reach
from loracli.fitting.search import LADDERS, search
from loracli.fitting.settings import AUTO, FRESH_LORA, FitSettings
from loracli.fitting.work import CERTIFICATE, REACH, Work
from loracli.hub.fetch import Fetched
from loracli.hub.references import Named
from loracli.model.base import BaseModel
from loracli.model.loss import Scores
from loracli.model.modules import base_modules
from loracli.model.placement import Placement
from loracli.model.session import Opening, Session, open_session, settle_memory
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.recipe.ingredients import identity_of
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import (
    INLINE_KINDS,
    FitCertificate,
    FitRecord,
    HeldOut,
    RecipeActivations,
    RecipeBase,
    RecipeData,
)
from loracli.system.document import dtype_name

_BEGUN = "what a fit has begun with"  # that another day, or other free memory, would have otherwise


@takes_bar
def fit_mixing(
    adapters: Sequence[Named | Fetched],
    data: DataPaths,
    *,
    eval_data: DataPaths | None = None,
    base: Named | None = None,
    base_revision: str | None = None,
    settings: FitSettings | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress | Bar = SILENT,
) -> Recipe:
    """Fits the mixing weights of some adapters on calibration data.

    Args:
        adapters: N >= 1 references or fetched adapters; their order is kept.
        data: calibration JSONL, one path or several, each `FILE`, `FILE:WEIGHT` (every scored token counts WEIGHT
            times), or `-` for standard input.
        eval_data: held-out records likewise; without it a share of each file of `data` is held out.
        base: the base model, a Hub id or a directory; None for the one that all adapters name.
        base_revision: its branch, tag or commit on the Hub.
        settings: what changes the result.
        placement: where and how the base model runs.
        progress: told what happens.
    Returns:
        the recipe, with a table on the held-out records; local adapters are named relative to the folder that the
        process runs in, and once it is saved to that of its file.
    Raises:
        LoracatError: of the kind that fits, when an input is rejected or the loss is not finite.
    """
    progress = drawn(progress)
    inputs = prepare_fit(
        adapters,
        data,
        eval_data=eval_data,
        base=base,
        base_revision=base_revision,
        placement=placement,
        settings=settings,
        progress=progress,
    )
    return run_fit(inputs, placement=placement, progress=progress)


def run_fit(
    inputs: FitInputs,
    *,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    processes: Processes = ALONE,
    journal: Journal | None = None,
    log: StepLog | None = None,
    progress: Progress = SILENT,
) -> Recipe:
    """The second half of `fit_mixing`: loads the base model, searches, and scores the held-out records.

    Args:
        inputs: from `prepare_fit`, the same on all processes.
        placement: where and how the base model runs.
        processes: that share the work; all call this.
        journal: where the state is kept, on the first process.
        log: takes a line for each step, on the first process.
        progress: told what happens.
    Raises:
        LoracatError: as `fit_mixing`.
        StateMismatch: if the journal is of a fit whose records rendered to other tokens.
    """
    if placement.shard and inputs.settings.metric is not None:
        raise UsageError(
            "answers cannot be generated with a base that is shared out over processes",
            hint="leave out --select-by and --metric-command, or --shard",
        )
    if placement.shard and inputs.saved is not None:
        raise UsageError(
            "modules_to_save cannot replace modules of a base that is shared out over processes",
            hint="leave --shard out",
        )
    opening = settle_memory(
        opening_of(inputs, placement, processes.world_size), agree=processes.from_first, progress=progress
    )
    journal = journal or Journal()
    begun = processes.from_first(lambda: journal.recall(_BEGUN))
    agree = processes.from_first if begun is None else lambda _: bool(begun.values["room"])
    inputs = as_memory_allows(inputs, opening, agree=agree, progress=progress)
    with open_session(opening, progress=progress) as session:
        return _run(inputs, session, processes, journal, log, begun)


def opening_of(inputs: FitInputs, placement: Placement, world_size: int = 1) -> Opening:
    """The base of a fit, as each of its processes opens it."""
    settings = inputs.settings
    return Opening(
        inputs.base,
        inputs.adapters,
        settings.batch_tokens,
        settings.max_length,
        inputs.saved,
        placement,
        processes=world_size,
        trains_factors="factors" in LADDERS[settings.mixing] or settings.control == FRESH_LORA,
    )


def _run(
    inputs: FitInputs,
    session: Session,
    processes: Processes,
    journal: Journal,
    log: StepLog | None,
    begun: Entry | None,
) -> Recipe:
    settings, progress = inputs.settings, session.progress
    examples = render_inputs(inputs, session.tokenizer, max_length=session.max_length, progress=progress)
    training, held_out = examples.training, examples.held_out
    folds = divide_training(inputs, training)
    parts = held_out_parts(inputs, training)
    session.check_tokens((*training, *held_out))
    beginning = Entry(values={"room": inputs.room, "tokens": tokens_sha256((*training, *held_out))})
    if begun is not None and begun != beginning:
        raise StateMismatch(
            "the records render to other tokens than those that the interrupted fit began with",
            hint="a chat template that writes the date does so on another day: start over with --force in place of "
            "--resume",
        )
    session.check_causal(held_out)
    session.say_likelier_orders(inputs.adapters, training)
    canonical = settings.mixing not in INLINE_KINDS
    with session.attached(inputs.adapters, inputs.layout.modules, held_out, canonical=canonical) as objective:
        meter = Meter(progress, log)
        shared = bool(parts) and bool(folds[0].validation)
        engine = Engine(objective, meter, processes=processes, journal=journal, progress=progress, shared=shared)
        work = fit_work(inputs, examples, folds)
        pace = measured_pace(engine, inputs, session, examples, folds)
        announce(engine, inputs, session, examples, work, pace)
        with meter.counted(work.stages, work.effort_left(pace), overhead=pace.overhead):
            reach = reached(engine, session, training)
            journal.write(_BEGUN, beginning)
            found, certificate = _solve(engine, inputs, session, folds, training)
            passes = engine.meter.spent / (2 * tokens_of(training))
            meter.enter(SCORING)
            training_loss = _training_loss(engine, session, found, certificate, training)
            scores = static_scores(engine, session, inputs, held_out)
            if parts:
                scores[FIT] = _judged(engine, inputs, session, work, pace)
            else:
                batches = session.batches(held_out)
                scores[FIT] = engine.score(found.mixing, found.theta, batches, held_out, key="held out, the fit")
            meter.enter(ACTIVATIONS)
            activations = fit_activations(
                engine, inputs.adapters, found.mixing, found.theta, training, seed=settings.seed, progress=progress
            )
            fresh = fresh_scores(engine, inputs, session, examples, parts) if controls(work) else None
    table = held_out_table(
        scores,
        inputs.references,
        controls={} if fresh is None else {FRESH_LORA: fresh},
        examples=held_out,
        name=inputs.data.held_out_name,
        seed=settings.seed,
        parts=len(parts),
    )
    record = _fit_record(
        settings,
        found,
        certificate,
        training_loss=training_loss,
        passes=passes,
        halvings=engine.halvings,
        folds=len(folds) if folds[0].validation else 0,
    )
    return _make_recipe(
        inputs, session.base, examples.data, found, record=record, table=table, activations=activations, reach=reach
    )


def reached(engine: Engine, session: Session, training: Sequence[Example]) -> Reach:
    """As `find_reach`, the first stage of a fit."""
    engine.meter.enter(REACH)
    engine.meter.stage("finding the modules that the records reach")
    return find_reach(engine, session, training)


def find_mixing(
    engine: Engine,
    inputs: FitInputs,
    folds: tuple[Fold, ...],
    training: Sequence[Example],
    session: Session,
    judged: int | None = None,
) -> Solution:
    """The search of `inputs.settings` on an attached model.

    Args:
        engine: of the attached model, in the canonical basis if the kind of mixing needs it.
        inputs: of the fit.
        folds: from `divide_training`.
        training: all records of the folds.
        session: of the base.
        judged: the fold that is held out of what the others choose, None for the choice of all.
    """
    settings, attached = inputs.settings, engine.objective.attached
    if settings.paper:
        engine.meter.enter("module")
        return fit_as_published(engine, make_diagonal(inputs.layout, "module", softmax=True), training, settings)
    reserved = 0  # which level `auto` ends on is not known, and so is what it leaves of the budget
    if settings.mixing != AUTO:
        target = make_mixing(attached, inputs.layout, settings.mixing)  # type: ignore[arg-type]
        reserved = certificate_tokens(target, training, settings, settings.budget(len(folds), len(training)))
    task = _task(engine, inputs, folds, session, judged)
    return search(task, lambda kind: make_mixing(attached, inputs.layout, kind), training, reserved)


def _solve(
    engine: Engine, inputs: FitInputs, session: Session, folds: tuple[Fold, ...], training: Sequence[Example]
) -> tuple[Solution, FitCertificate | None]:
    """The whole procedure on some training records: the search, and the certificate with the steps that end it."""
    settings, before = inputs.settings, engine.meter.spent
    found = find_mixing(engine, inputs, folds, training, session)
    mixing = found.mixing
    if not isinstance(mixing, DiagonalMixing) or not can_certify(mixing) or found.stopped:
        return found, None
    engine.meter.enter(CERTIFICATE)
    budget = settings.budget(len(folds), len(training))
    left = budget * 2 * tokens_of(training) - (engine.meter.spent - before)
    left = min(left, certificate_tokens(mixing, training, settings, budget))  # what the search left is not for this
    theta, certificate = certified(
        engine, mixing, found.theta, found.anchor, found.ridge or 0.0, training, settings, left
    )
    return replace(found, thetas=(theta,)), certificate


def _task(engine: Engine, inputs: FitInputs, folds: tuple[Fold, ...], session: Session, judged: int | None) -> Task:
    """What is fitted, and what chooses: the loss, or the task metric of the settings."""
    settings, metric = inputs.settings, inputs.settings.metric
    by_loss = loss_criterion(engine, batch_tokens=settings.batch_tokens)
    task = Task(engine, folds, by_loss, settings, inputs.references, spent_before=engine.meter.spent, judged=judged)
    if metric is None:
        return task

    def scorer_of(examples: Sequence[Example]) -> Scorer:
        return make_scorer(
            metric,
            inputs.data.files,
            [example.place for example in examples],
            session.tokenizer,
            max_length=session.max_length,
            window=session.window,
            batch_tokens=settings.batch_tokens,
        )

    return replace(
        task,
        criterion=metric_criterion(engine, scorer_of, batch_tokens=settings.batch_tokens),
        chooses_by_loss=False,
        unit=metric.name,
        least_gain=LEAST_ANSWERS / task.choosing,
    )


def _training_loss(
    engine: Engine,
    session: Session,
    found: Solution,
    certificate: FitCertificate | None,
    training: Sequence[Example],
) -> float | None:
    """As a certificate has it, less what the ridge adds; None where the search stopped at records whose loss is not
    finite."""
    if certificate is not None:
        return certificate.loss - certificate.ridge / 2 * float((found.theta - found.anchor).square().sum())
    engine.meter.stage("scoring the training records")
    try:
        return engine.score(
            found.mixing, found.theta, session.batches(training), training, key="training loss"
        ).nats_per_token
    except NonFiniteLoss:
        if found.stopped is None:
            raise
        return None


def _judged(engine: Engine, inputs: FitInputs, session: Session, work: Work, pace: Pace) -> Scores:
    """Each record's score by weights that it neither fitted nor chose.

    Where the folds choose, each is held out of what the others choose; else there is nothing to choose, and a fit on
    all other records is as good.

    Raises:
        NonFiniteLoss: naming the records.
    """
    training, folds = tuple(work.training), tuple(work.folds)

    def solve(number: int, part: Fold) -> tuple[Mixing, Tensor]:
        if folds[0].validation:
            found = find_mixing(engine, inputs, folds, training, session, number)
        else:
            found, _ = _solve(engine, inputs, session, (Fold(part.fitting, ()),), part.fitting)
        return found.mixing, found.theta

    left = replace(work, after={}, judged=True).effort_left(pace)
    return cross_fitted(engine, session, held_out_parts(inputs, training), training, part_stage, solve, left)


def _make_recipe(
    inputs: FitInputs,
    base: BaseModel,
    data: tuple[RecipeData, ...],
    found: Solution,
    *,
    record: FitRecord,
    table: HeldOut,
    activations: RecipeActivations | None,
    reach: Reach,
) -> Recipe:
    """The recipe of a fit.

    Args:
        inputs: of the fit.
        base: the loaded base model.
        data: the calibration files, with their counts.
        found: by the search.
        record: how it was found, from `_fit_record`.
        table: on the held-out records.
        activations: what the records show of the adapters' inputs, None if that is not kept.
        reach: which modules the records did not reach.
    """
    return Recipe(
        base=RecipeBase(
            base.reference.id,
            base.reference.commit,
            base.config_sha256,
            None if base.quantisation is None else base.quantisation.form,
        ),
        adapters=tuple(
            identity_of(adapter, reference)
            for adapter, reference in zip(inputs.adapters, inputs.references, strict=True)
        ),
        data=data,
        fit=record,
        mixing=replace(
            recipe_mixing(inputs.adapters, inputs.layout.modules, found),
            unreached=reach.unreached,
            bypassed=reach.bypassed,
        ),
        modules=base_modules(base.model, inputs.adapters),
        dtype=dtype_name(base.dtype),
        held_out=table,
        versions={
            "loracat": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({} if base.quantisation is None else base.quantisation.versions),
        },
        activations=activations,
        folder=inputs.folder,
    )


def _fit_record(
    settings: FitSettings,
    found: Solution,
    certificate: FitCertificate | None,
    *,
    training_loss: float | None,
    passes: float,
    halvings: int,
    folds: int,
) -> FitRecord:
    """How a fit went.

    Args:
        settings: of the fit.
        found: by the search.
        certificate: of the weights, None if there is none.
        training_loss: nats per token on all training records, None if not finite.
        passes: that were used.
        halvings: of micro-batches.
        folds: that were chosen with, 0 for none.
    """
    return FitRecord(
        recipe="paper" if settings.paper else "cat",
        settings=settings.recorded(),
        criterion="nats per token" if settings.metric is None else settings.metric.name,
        rungs=found.rungs,
        stages=found.stages,
        folds=folds,
        refitted=found.refitted,
        passes=round(passes, 2),
        largest_move=_largest_move(found),
        training_nats_per_token=training_loss,
        certificate=certificate,
        halvings=halvings,
        stopped=found.stopped,
        dropped=found.dropped,
    )


def _largest_move(found: Solution) -> float:
    mixing = found.mixing
    if isinstance(mixing, DiagonalMixing):
        return float((mixing.weights(found.theta) - mixing.weights(found.anchor)).abs().max())
    return float((found.theta - found.anchor).abs().max())
