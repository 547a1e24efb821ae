"""What a fit is about to do: which records choose and which are held out of what others choose, how much work that is,
and how long it takes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loracli.calibration.dataset import MIN_HELD_OUT, Examples, plan_batches
from loracli.calibration.render import Example
from loracli.errors import CalibrationError, UsageError
from loracli.evaluation.statistics import static_points
from loracli.fitting.activations import chosen_records
from loracli.fitting.control import control_stage, fresh_training
from loracli.fitting.criterion import FEWEST_TO_VALIDATE, Fold, cross_folds, divided, set_aside
from loracli.fitting.descent import plan_steps
from loracli.fitting.engine import Engine, Pace
from loracli.fitting.inputs import FitInputs
from loracli.fitting.level import tokens_of
from loracli.fitting.mixing import make_diagonal, parameter_of_experts
from loracli.fitting.settings import AUTO, FRESH_LORA
from loracli.fitting.work import REACH, Work, cost_of
from loracli.model.session import Session
from loracli.progress import duration_text
from loracli.recipe.record import INLINE_KINDS
from loracli.system.display import count_text

SCORING, ACTIVATIONS = "scoring", "activations"  # stages after the search


def part_stage(number: int) -> str:
    """The stage of one of the fits of cross-fitting."""
    return f"part {number}"


def held_out_parts(inputs: FitInputs, training: Sequence[Example]) -> tuple[Fold, ...]:
    """Cross-fitting: what each of its fits may see, and what is held out of it; none where records are set apart.

    Raises:
        CalibrationError: if too few records are left to fit and to hold out.
    """
    if inputs.data.parts and inputs.settings.cv is not None:
        return cross_folds(training, inputs.data.training, inputs.settings.cv, seed=inputs.settings.seed + 2)
    kept = tuple(fold for part in inputs.data.parts if (fold := set_aside(training, part)).validation)
    if inputs.data.parts and len(kept) < 2:
        raise CalibrationError(
            "only one different record is left, too few to hold some out",
            hint="give more records or held-out records with --eval-data, or raise --max-length",
        )
    return kept


def divide_training(inputs: FitInputs, training: Sequence[Example]) -> tuple[Fold, ...]:
    """How the training records are divided to choose: as they are to be judged where all are held out in their turn;
    not at all with `--paper`.

    Raises:
        UsageError: if there are too few of them for the folds, or for `auto` or a task metric to choose with.
    """
    settings = inputs.settings
    if settings.paper:
        return (Fold(tuple(training), ()),)
    if inputs.data.parts and (settings.cv is not None or len(training) >= FEWEST_TO_VALIDATE):
        return held_out_parts(inputs, training)
    folds = divided(training, inputs.data.training, settings.cv, seed=settings.seed + 1)
    if not folds[0].validation and (settings.mixing == AUTO or settings.metric is not None):
        option = "--mixing auto" if settings.mixing == AUTO else "--select-by"
        raise UsageError(
            f"{option} cannot choose with {len(training)} training records",
            hint="give more records, or name --mixing adapter or module, and let the loss choose",
        )
    return folds


def fit_work(inputs: FitInputs, examples: Examples, folds: Sequence[Fold]) -> Work:
    """What a whole fit does, stage by stage."""
    training, settings = examples.training, inputs.settings
    scored = cost_of(plan_batches(training, batch_tokens=settings.batch_tokens))
    held_out = cost_of(plan_batches(examples.held_out, batch_tokens=settings.batch_tokens))
    activations = cost_of(plan_batches(chosen_records(training, seed=settings.seed), batch_tokens=1))
    certifies = not settings.paper and settings.mixing in (*INLINE_KINDS, AUTO)
    work = Work(folds, training, settings, inputs.references, certifies=certifies)
    parts = held_out_parts(inputs, training)
    after = {SCORING: scored + held_out * (len(static_points(inputs.references)) + (not parts))}
    for number, part in enumerate(parts, 1):
        unseen = cost_of(plan_batches(part.validation, batch_tokens=settings.batch_tokens))
        if not folds[0].validation:  # a fit of its own
            unseen += replace(work, folds=(Fold(part.fitting, ()),), training=part.fitting).left(REACH)
        after[part_stage(number)] = unseen
    work = replace(work, after={**after, ACTIVATIONS: activations})
    fresh = {
        control_stage(number): fresh_training(inputs, part.fitting).cost
        + cost_of(plan_batches(part.validation, batch_tokens=settings.batch_tokens))
        for number, part in enumerate(parts or (Fold(training, examples.held_out),), 1 if parts else 0)
    }
    wanted = settings.control == FRESH_LORA
    if settings.control is None and inputs.room and parameter_of_experts(inputs.adapters) is None:
        # Below so many records there is no verdict that it could change.
        cheaper = sum(cost.tokens for cost in fresh.values()) < _shortest(work).left(REACH).tokens
        wanted = cheaper and len(examples.held_out) >= MIN_HELD_OUT
    return replace(work, after={**work.after, **fresh}) if wanted else work


def _shortest(work: Work) -> Work:
    """The same fit where more passes do not pay."""
    return replace(work, settings=work.settings.shortest(len(work.folds), len(work.training)))


def measured_pace(
    engine: Engine, inputs: FitInputs, session: Session, examples: Examples, folds: Sequence[Fold]
) -> Pace:
    """How fast the attached model takes the steps of a fit, and its largest micro-batch."""
    settings, module = inputs.settings, make_diagonal(inputs.layout, "module")
    steps = plan_steps(folds[0].fitting, batch_tokens=settings.batch_tokens, seed=settings.seed).batches
    every = (*session.batches(examples.training), *session.batches(examples.held_out))
    largest = max(every, key=lambda batch: batch.tokens)
    return engine.pace(module, module.constant([0.0] * inputs.layout.adapters), steps, largest)


def announce(engine: Engine, inputs: FitInputs, session: Session, examples: Examples, work: Work, pace: Pace) -> None:
    """Says what will be done and about how long it takes."""
    folds = work.folds
    settings, layout, base, progress = inputs.settings, inputs.layout, session.base, session.progress
    numbers = "climbing from adapter to factors" if inputs.numbers is None else count_text(inputs.numbers, "weight")
    progress.note(
        f"base {base.reference.id} in {base.runs_in} on {engine.objective.attached.device}; "
        f"mixing {settings.mixing}, {numbers} over {count_text(len(layout.modules), 'module')}"
    )
    choosing = f", {len(folds)} folds" if len(folds) > 1 else f", {len(folds[0].validation)} of them to choose with"
    passes = "one pass" if settings.paper else f"up to {work.passes:.3g} passes"
    least, longest = (each.left(REACH).seconds(pace) for each in (_shortest(work), work))
    about = duration_text(least)
    about += f", up to {duration_text(longest)} while more passes pay" if longest > least else ""
    about += "" if settings.metric is None else "; the answers that choose come on top"
    parts = inputs.data.parts
    if parts and folds[0].validation:
        about += "; longer where the folds would choose differently without one of them"
    records = count_text(len(examples.training), "training record")
    held = "each record held out once" if parts else f"{len(examples.held_out)} held out"
    if folds[0].validation:
        records += choosing
    progress.note(f"{records}, {held}; {passes} over the records: about {about}")
    limited = tokens_of(examples.training) > settings.batch_tokens
    if limited and engine.objective.attached.device.type != "cpu" and pace.overhead > settings.batch_tokens:
        progress.note(
            f"a micro-batch takes as long as {pace.overhead} tokens whatever its size: a larger --batch-tokens than "
            f"{settings.batch_tokens} is faster, as far as memory goes"
        )
