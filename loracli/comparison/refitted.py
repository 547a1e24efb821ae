"""A cut that is refitted: k x k numbers of each module, found on calibration records by the search of a fit.

    dW' = B' M A'        one adapter A' (k, in), B' (out, k) on the base, the rung `core`, from M = I

The ridge holds M at the identity, and a fifth of the training records choose how strong it is. What is found is then
fitted once more on all of them. Where it is not better than the cut by more than a standard error, the cut is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.algebra.factors import Factors
from loracli.calibration.batches import plan_batches
from loracli.calibration.dataset import Dataset, Examples, read_dataset
from loracli.calibration.records import DataPaths
from loracli.composition.attached import of_factors
from loracli.composition.composition import Source, recorded_base
from loracli.errors import NonFiniteLoss, UsageError
from loracli.evaluation.statistics import paired_interval
from loracli.export.module import refitted_factors
from loracli.export.refit import RefitFile, RefitLoss, RefitRecord, Refitted
from loracli.fitting.criterion import FEWEST_TO_VALIDATE, Fold, Gain, gain, loss_criterion, one_fold
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import FitInputs, render_inputs
from loracli.fitting.meter import Meter
from loracli.fitting.mixing import CoreMixing, make_layout
from loracli.fitting.processes import ALONE
from loracli.fitting.run import announce, memory_decision, usable_length
from loracli.fitting.rung import Task, mean_of, solve_rung, tokens_of
from loracli.fitting.search import REFIT_SHARE, refit
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach, replace_modules
from loracli.model.base import BaseModel, check_fits, find_base, load_base
from loracli.model.loss import Scores, check_causal, make_objective
from loracli.model.placement import Placement, checkpointed, memory_errors
from loracli.progress import SILENT, WORK, Progress

TASK = "refit"
START = "truncation"


@dataclass(frozen=True)
class RefitOnRecords:
    """A `loracli.export.refit.Refit` on calibration records.

    Args:
        data: to fit on, and held out.
        base: a Hub id or directory, None for the recipe's, or the one that all adapters name.
        base_revision: of a base on the Hub.
        progress: told what happens.
    """

    data: Dataset
    base: str | None = None
    base_revision: str | None = None
    progress: Progress = SILENT

    def __call__(self, source: Source, cut: Mapping[str, Factors], dtype: torch.dtype) -> Refitted:
        """Loads the base, attaches the cut and fits its cores.

        Raises:
            OutOfResources: if the weights of base and adapters do not fit in memory, before they are loaded.
            InputError: of the kind that fits, if base or records are rejected.
            UsageError: if there are too few records to choose with.
            NonFiniteLoss: if the cut, or what it is compared with, has no finite loss.
        """
        base, revision = recorded_base(source, self.base, self.base_revision)
        adapter = _as_adapter(source, cut)
        inputs = FitInputs(
            adapters=(adapter,),
            references=(START,),
            base=find_base(source.adapters, base, revision=revision, progress=self.progress),
            data=self.data,
            layout=make_layout([adapter]),
            settings=FitSettings(mixing="core"),
            folder=Path(),
            saved=source.saved,
        )
        decision = memory_decision(inputs, Placement(), ALONE)
        (self.progress.warn if decision.tight else self.progress.note)(decision.note)
        with memory_errors():
            model = load_base(inputs.base, progress=self.progress)
            with checkpointed(model.model) if decision.checkpointing else nullcontext():
                return _run(inputs, model, source, dtype, self.progress)


def refit_on(
    fit_data: DataPaths | None,
    data: DataPaths | None,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    progress: Progress = SILENT,
) -> RefitOnRecords:
    """A refit on the records of these files, which are read and divided as those of a fit.

    Args:
        fit_data: calibration files; None for those of `data`, of which a share is held out.
        data: all of them held out, where there is `fit_data`; None for a share of that.
        base, base_revision, progress: as in `RefitOnRecords`.
    Raises:
        UsageError, CalibrationError: as `read_dataset`.
    """
    settings = FitSettings()
    fitted, held_out = (fit_data, data) if fit_data is not None else (data, None)
    assert fitted is not None
    records = read_dataset(fitted, held_out, holdout=settings.holdout, seed=settings.seed, progress=progress)
    return RefitOnRecords(records, base, base_revision, progress)


def _as_adapter(source: Source, cut: Mapping[str, Factors]) -> LoraAdapter:
    """The cut as the one adapter of a fit."""
    kinds = {name: module.kind for adapter in source.adapters for name, module in adapter.modules.items()}
    modules = {name: LoraModule(name, kinds[name], factors) for name, factors in sorted(cut.items())}
    return replace(source.adapters[0], modules=modules)


def _run(inputs: FitInputs, base: BaseModel, source: Source, dtype: torch.dtype, progress: Progress) -> Refitted:
    settings, modules = inputs.settings, inputs.layout.modules
    check_fits(base, source.adapters)
    replace_modules(base.model, inputs.saved)
    examples = render_inputs(inputs, base.tokenizer, max_length=usable_length(base, settings), progress=progress)
    fold = one_fold(examples.training, inputs.data.training, seed=settings.seed + 1)
    if not fold.validation:
        raise UsageError(
            f"--refit cannot choose with {len(examples.training)} training records",
            hint=f"give more records: at least {FEWEST_TO_VALIDATE} different ones are left when some are held out",
        )
    held = plan_batches(examples.held_out, batch_tokens=settings.batch_tokens)
    check_causal(base.model, inputs.base.id, held[0])
    with attach(base.model, inputs.adapters, modules) as attached:
        engine = Engine(make_objective(attached, held[0]), Meter(progress, task=TASK), progress=progress)
        tokens = tokens_of(examples.training)
        work = round(2 * settings.budget * tokens) + 3 * sum(batch.tokens for batch in held)
        announce(engine, inputs, base, examples, (fold,), work, progress)
        progress.begin(TASK, work, WORK)
        try:
            found = _search(engine, inputs, fold, examples)
            passes = round(engine.meter.spent / (2 * tokens), 2)
            cut = {name: module.factors for name, module in inputs.adapters[0].modules.items()}
            loss = _losses(engine, source, cut, found.cores, dtype, examples)
        finally:
            progress.finish(TASK)
    record = RefitRecord(
        data=tuple(RefitFile(file.source.name, file.sha256, len(file.records)) for file in inputs.data.files),
        divided=not inputs.data.eval_files,
        held_out=inputs.data.held_out_name,
        kept="refit" if found.cores else "truncation",
        numbers=CoreMixing(inputs.layout).numbers,
        gain=found.gain.mean,
        standard_error=found.gain.standard_error,
        ridge=found.ridge,
        passes=passes,
        loss=loss,
        stopped=found.stopped,
    )
    return Refitted(record, found.cores)


@dataclass(frozen=True)
class _Found:
    """The cores by module, none where the cut is kept, and what chose."""

    cores: dict[str, Tensor]
    gain: Gain
    ridge: float | None
    stopped: str | None


def _search(engine: Engine, inputs: FitInputs, fold: Fold, examples: Examples) -> _Found:
    settings, mixing = inputs.settings, CoreMixing(inputs.layout)
    identity = mixing.constant([1.0])
    criterion = loss_criterion(engine, batch_tokens=settings.batch_tokens)
    task = Task(engine, (fold,), criterion, settings, inputs.references)
    budget = settings.budget * 2 * tokens_of(examples.training)
    before = criterion(mixing, identity, fold.validation)
    solved = solve_rung(task, mixing, {START: [identity]}, budget * (1 - REFIT_SHARE) - engine.meter.spent)
    assert solved.scores is not None
    compared = gain(before, solved.scores)
    if not solved.moved or not compared.clear:
        return _Found({}, compared, solved.ridge, solved.stopped)
    theta, stopped = mean_of(solved.thetas), solved.stopped
    if stopped is None:
        try:
            again = refit(task, [solved], examples.training, min(REFIT_SHARE * budget, budget - engine.meter.spent))
            theta = theta if again is None else again[0]
        except NonFiniteLoss as error:
            stopped = str(error)
    cores = dict(zip(inputs.layout.modules, (core.clone() for core in mixing.matrices(theta)), strict=True))
    return _Found(cores, compared, solved.ridge, stopped)


def _losses(
    engine: Engine,
    source: Source,
    cut: dict[str, Factors],
    cores: dict[str, Tensor],
    dtype: torch.dtype,
    examples: Examples,
) -> RefitLoss:
    """Of the composition, the cut and the refitted cut, the last two rounded to `dtype`, on the held-out records."""
    held = examples.held_out
    batches = plan_batches(held, batch_tokens=FitSettings().batch_tokens)

    def score(what: str, factors: dict[str, Factors]) -> Scores:
        engine.meter.stage(what)
        composition = of_factors(factors)
        return engine.score(composition.mixing, composition.theta, batches, held)

    composed = score("composition", {name: source.compose(name).factors for name in cut})
    truncated = score("truncation", {name: f.to(dtype) for name, f in cut.items()})
    refitted = truncated
    if cores:
        refitted = score("refit", {name: refitted_factors(f, cores[name]).to(dtype) for name, f in cut.items()})
    return RefitLoss(
        records=len(held),
        scored_tokens=sum(example.scored_tokens for example in held),
        composition=composed.nats_per_token,
        truncated=truncated.nats_per_token,
        refitted=refitted.nats_per_token,
        interval=paired_interval(refitted.nats - truncated.nats, refitted.tokens, seed=FitSettings().seed),
    )
