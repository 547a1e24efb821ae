"""A whole fit: adapters, base model and data in, a recipe out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracli.calibration.batches import Batch, plan_batches
from loracli.calibration.dataset import Examples
from loracli.calibration.records import DataPaths
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss, UsageError
from loracli.evaluation.scorer import Scorer, make_scorer
from loracli.evaluation.statistics import FIT, held_out_table, static_points
from loracli.fitting.activations import chosen_records, fit_activations
from loracli.fitting.certificate import NO_FINISH, can_certify, certified, plan_finish
from loracli.fitting.criterion import LEAST_ANSWERS, Fold, cross_folds, loss_criterion, metric_criterion, one_fold
from loracli.fitting.descent import plan_steps
from loracli.fitting.engine import Engine
from loracli.fitting.expert_orders import say_likelier_orders
from loracli.fitting.inputs import FitInputs, prepare_fit, render_inputs
from loracli.fitting.journal import Journal
from loracli.fitting.meter import TASK, Meter, StepLog
from loracli.fitting.mixing import DiagonalMixing, Mixing, make_diagonal, make_mixing
from loracli.fitting.paper import fit_as_published
from loracli.fitting.processes import ALONE, Processes
from loracli.fitting.reach import find_reach
from loracli.fitting.recording import dtype_name, make_recipe
from loracli.fitting.rung import Task, tokens_of
from loracli.fitting.search import LADDERS, Found, search
from loracli.fitting.settings import AUTO, FitSettings
from loracli.hub.fetch import Fetched
from loracli.model.attach import AttachedModel, attach, replace_modules
from loracli.model.base import BaseModel, BasePlan, check_fits, load_base, plan_base
from loracli.model.loss import Scores, check_causal, make_objective
from loracli.model.placement import Placement, available_memory, checkpointed, memory_errors
from loracli.model.preflight import MemoryDecision, MemoryEstimate, decide_memory, estimate_memory
from loracli.progress import SILENT, WORK, Progress, duration_text
from loracli.recipe.mixing import INLINE_KINDS
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import FitCertificate


def fit_mixing(
    adapters: Sequence[str | Fetched],
    data: DataPaths,
    *,
    eval_data: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    settings: FitSettings | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    checkpointing: bool = False,
    folder: str | Path = ".",
    progress: Progress = SILENT,
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
        dtype: of the base model, `auto` or float32, bfloat16, float16, float64.
        device: `auto`, or a torch device.
        device_map: `auto` to spread the base over all devices of this machine, in place of `device`.
        checkpointing: run layers again in the backward pass, for less memory; without it the estimate decides.
        folder: of the recipe to be; local adapters are named relative to it.
        progress: told what happens.
    Returns:
        the recipe, with a table on the held-out records.
    Raises:
        LoracatError: of the kind that fits, when an input is rejected or the loss is not finite.
    """
    inputs = prepare_fit(
        adapters,
        data,
        eval_data=eval_data,
        base=base,
        base_revision=base_revision,
        settings=settings,
        folder=folder,
        progress=progress,
    )
    return run_fit(inputs, placement=Placement(dtype, device, device_map, checkpointing), progress=progress)


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
    decision = memory_decision(inputs, placement, processes)
    (progress.warn if decision.tight else progress.note)(decision.note)
    with memory_errors():
        base = load_base(
            inputs.base,
            dtype=placement.dtype,
            device=placement.device,
            device_map=placement.device_map,
            shard=processes.world_size if placement.shard else None,
            progress=progress,
        )
        with checkpointed(base.model) if placement.checkpointing or decision.checkpointing else nullcontext():
            return _run(inputs, base, processes, journal, log, progress)


def memory_decision(inputs: FitInputs, placement: Placement, processes: Processes) -> MemoryDecision:
    """What the estimate says, before any weight is loaded; the first process decides for all."""
    plan = plan_base(inputs.base, dtype=placement.dtype, device=placement.device)
    estimate = memory_estimate(inputs, plan, placement, processes.world_size)
    return processes.from_first(lambda: decision_on(estimate, plan, placement, processes.world_size))


def memory_estimate(inputs: FitInputs, plan: BasePlan, placement: Placement, world_size: int) -> MemoryEstimate:
    """The memory of one of `world_size` processes, before any weight is loaded."""
    settings = inputs.settings
    return estimate_memory(
        plan,
        inputs.adapters,
        batch_tokens=settings.batch_tokens,
        max_length=settings.max_length,
        shards=world_size if placement.shard else 1,
        factors="factors" in LADDERS[settings.mixing],
    )


def decision_on(estimate: MemoryEstimate, plan: BasePlan, placement: Placement, world_size: int) -> MemoryDecision:
    """What the estimate says beside the memory that is free now.

    Raises:
        OutOfResources: if the weights alone need more.
    """
    return decide_memory(
        estimate,
        available_memory(plan.device, every=placement.device_map is not None),
        plan,
        processes=world_size if plan.device == "cpu" else 1,
        sharded=placement.shard,
    )


def _run(
    inputs: FitInputs,
    base: BaseModel,
    processes: Processes,
    journal: Journal | None,
    log: StepLog | None,
    progress: Progress,
) -> Recipe:
    settings = inputs.settings
    check_fits(base, inputs.adapters)
    replace_modules(base.model, inputs.saved)
    examples = render_inputs(inputs, base.tokenizer, max_length=usable_length(base, settings), progress=progress)
    folds = divide_training(inputs, examples.training)
    held_batches = plan_batches(examples.held_out, batch_tokens=settings.batch_tokens)
    check_causal(base.model, base.reference.id, held_batches[0])
    say_likelier_orders(
        base.model, inputs.adapters, examples.training, batch_tokens=settings.batch_tokens, progress=progress
    )
    canonical = settings.mixing not in INLINE_KINDS
    with attach(base.model, inputs.adapters, inputs.layout.modules, canonical=canonical) as attached:
        objective = make_objective(attached, held_batches[0])
        meter = Meter(progress, log, tokens=tokens_of(examples.training))
        engine = Engine(objective, meter, processes=processes, journal=journal, progress=progress)
        training = plan_batches(examples.training, batch_tokens=settings.batch_tokens)
        reach = find_reach(engine, training, examples.training, base.reference, progress)
        work = _work(inputs, examples, held_batches)
        announce(engine, inputs, base, examples, folds, work, progress)
        progress.begin(TASK, work, WORK)
        try:
            found = find_mixing(engine, attached, inputs, folds, examples.training, base.tokenizer)
            found, certificate = _certified(engine, found, examples.training, settings)
            passes = engine.meter.spent / (2 * tokens_of(examples.training))
            training_loss = _training_loss(engine, found, examples.training, settings)
            scores = _held_out_scores(engine, inputs, found, held_batches, examples.held_out, progress)
            activations = fit_activations(
                engine,
                inputs.adapters,
                found.mixing,
                found.theta,
                examples.training,
                seed=settings.seed,
                progress=progress,
            )
        finally:
            progress.finish(TASK)
    table = held_out_table(
        scores,
        inputs.references,
        examples=examples.held_out,
        name=inputs.data.held_out_name,
        seed=settings.seed,
    )
    validated = len(folds) if folds[0].validation else 0
    return make_recipe(
        inputs,
        base,
        examples.data,
        found,
        table,
        training_loss,
        certificate,
        activations,
        passes=passes,
        reach=reach,
        halvings=engine.halvings,
        folds=validated,
    )


def divide_training(inputs: FitInputs, training: Sequence[Example]) -> tuple[Fold, ...]:
    """How the training records are divided to choose; not at all with `--paper`.

    Raises:
        UsageError: if there are too few of them for the folds, or for `auto` or a task metric to choose with.
    """
    settings, records = inputs.settings, inputs.data.training
    if settings.paper:
        return (Fold(tuple(training), ()),)
    if settings.cv is not None:
        return cross_folds(training, records, settings.cv, seed=settings.seed + 1)
    fold = one_fold(training, records, seed=settings.seed + 1)
    if not fold.validation and (settings.mixing == AUTO or settings.metric is not None):
        option = "--mixing auto" if settings.mixing == AUTO else "--select-by"
        raise UsageError(
            f"{option} cannot choose with {len(training)} training records",
            hint="add --cv 4, or give more records, or name --mixing adapter or module, and let the loss choose",
        )
    return (fold,)


def usable_length(base: BaseModel | BasePlan, settings: FitSettings) -> int:
    """Tokens of a record that are used: as many as were asked for, and no more than the model takes."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return min(limit, settings.max_length) if isinstance(limit, int) else settings.max_length


def _work(inputs: FitInputs, examples: Examples, held_batches: Sequence[Batch]) -> int:
    """Tokens forward plus tokens backward of the whole fit, for the bar and the estimate."""
    tokens = tokens_of(examples.training)
    methods = len(static_points(inputs.references)) + 1
    once = tokens + tokens_of(chosen_records(examples.training, seed=inputs.settings.seed))
    return round(2 * inputs.settings.budget * tokens) + once + methods * sum(batch.tokens for batch in held_batches)


def announce(
    engine: Engine,
    inputs: FitInputs,
    base: BaseModel,
    examples: Examples,
    folds: Sequence[Fold],
    work: int,
    progress: Progress,
) -> None:
    """Says what will be done and, from one timed batch, about how long it takes."""
    settings, layout = inputs.settings, inputs.layout
    batches = plan_steps(folds[0].fitting, batch_tokens=settings.batch_tokens, seed=settings.seed).batches
    batch = batches[len(batches) // 2]
    module = make_diagonal(layout, "module")
    rate = 2 * batch.tokens / engine.seconds(module, module.constant([0.0] * layout.adapters), batch)
    what = "climbing from adapter to factors" if settings.mixing == AUTO else f"{inputs.numbers} numbers"
    progress.note(
        f"base {base.reference.id} in {dtype_name(base.dtype)} on {engine.objective.attached.device}; "
        f"mixing {settings.mixing}, {what} over {len(layout.modules)} modules"
    )
    choosing = f", {len(folds)} folds" if len(folds) > 1 else f", {len(folds[0].validation)} of them to choose with"
    passes = "one pass" if settings.paper else f"up to {settings.budget:g} passes"
    about = duration_text(work / rate) + ("" if settings.metric is None else "; the answers that choose come on top")
    progress.note(
        f"{len(examples.training)} training records{choosing if folds[0].validation else ''}, "
        f"{len(examples.held_out)} held out; {passes} at {rate / 2:.0f} tok/s: about {about}"
    )


def find_mixing(
    engine: Engine,
    attached: AttachedModel,
    inputs: FitInputs,
    folds: tuple[Fold, ...],
    training: Sequence[Example],
    tokenizer: Any,
) -> Found:
    """The search of `inputs.settings` on an attached model.

    Args:
        engine: of the attached model.
        attached: in the canonical gauge if the rung needs it.
        inputs: of the fit.
        folds: from `divide_training`.
        training: all records of the folds.
        tokenizer: the base model's.
    """
    settings = inputs.settings
    if settings.paper:
        return fit_as_published(engine, make_diagonal(inputs.layout, "module", softmax=True), training, settings)
    finish = NO_FINISH  # which rung `auto` ends on is not known, and so is what it leaves of the budget
    if settings.mixing != AUTO:
        target = make_mixing(attached, inputs.layout, settings.mixing)  # type: ignore[arg-type]
        finish = plan_finish(target, training, settings)
    task = _task(engine, inputs, folds, tokenizer)
    return search(task, lambda kind: make_mixing(attached, inputs.layout, kind), training, finish)


def _task(engine: Engine, inputs: FitInputs, folds: tuple[Fold, ...], tokenizer: Any) -> Task:
    """What is fitted, and what chooses: the loss, or the task metric of the settings."""
    settings, metric = inputs.settings, inputs.settings.metric
    if metric is None:
        criterion = loss_criterion(engine, batch_tokens=settings.batch_tokens)
        return Task(engine, folds, criterion, settings, inputs.references)

    def scorer_of(examples: Sequence[Example]) -> Scorer:
        return make_scorer(
            metric,
            inputs.data.files,
            [example.place for example in examples],
            tokenizer,
            max_length=settings.max_length,
            batch_tokens=settings.batch_tokens,
        )

    return Task(
        engine,
        folds,
        metric_criterion(engine, scorer_of, batch_tokens=settings.batch_tokens),
        settings,
        inputs.references,
        chooses_by_loss=False,
        unit=metric.name,
        least_gain=LEAST_ANSWERS / sum(len(fold.validation) for fold in folds),
    )


def _certified(
    engine: Engine, found: Found, training: Sequence[Example], settings: FitSettings
) -> tuple[Found, FitCertificate | None]:
    mixing = found.mixing
    if not isinstance(mixing, DiagonalMixing) or not can_certify(mixing) or found.stopped:
        return found, None
    ridge = found.ridge or 0.0
    theta, certificate = certified(engine, mixing, found.theta, found.anchor, ridge, training, settings)
    return replace(found, theta=theta), certificate


def _training_loss(engine: Engine, found: Found, training: Sequence[Example], settings: FitSettings) -> float | None:
    """None where the search stopped at records whose loss is not finite."""
    engine.meter.stage("training loss")
    batches = plan_batches(training, batch_tokens=settings.batch_tokens)
    try:
        return engine.score(found.mixing, found.theta, batches, training).nats_per_token
    except NonFiniteLoss:
        if found.stopped is None:
            raise
        return None


def _held_out_scores(
    engine: Engine,
    inputs: FitInputs,
    found: Found,
    batches: Sequence[Batch],
    examples: Sequence[Example],
    progress: Progress,
) -> dict[str, Scores]:
    """Every point that needs no fit, and the fit; a point whose loss is not finite is left out, and said.

    Raises:
        NonFiniteLoss: if it is the fit, or every adapter alone.
    """
    engine.meter.stage("held out")
    adapters: Mixing = make_diagonal(inputs.layout, "adapter")
    scores: dict[str, Scores] = {}
    for name, point in static_points(inputs.references).items():
        try:
            scores[name] = engine.score(adapters, adapters.constant(point), batches, examples)
        except NonFiniteLoss as error:
            progress.warn(f"{name} is left out of the held-out table: {error}")
            if name == inputs.references[-1] and not any(reference in scores for reference in inputs.references):
                raise
    scores[FIT] = engine.score(found.mixing, found.theta, batches, examples)
    return scores
