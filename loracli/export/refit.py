"""Refitting a cut: the k x k core of every module, on calibration records.

The cores of a cut that was refitted, and the file that keeps them beside the export.

    dW' = B' M A'        A' (k, in), B' (out, k) of the cut; M (k, k), fitted on calibration records

Only B' M and A' can be seen in the adapter's own file, and B' alone can be computed again from the ingredients: with M
at hand `loracat verify` computes both. The file is a safetensors file, `<module>.core` in float64, whose name does not
end that way, as servers read every file of a directory that does.

A cut that is refitted: k x k numbers of each module, found on calibration records by the search of a fit.

    dW' = B' M A'        one adapter A' (k, in), B' (out, k) on the base, the level `core`, from M = I

The ridge holds M at the identity, and a fifth of the training records choose how strong it is. What is found is then
fitted once more on all of them. Where it is not better than the cut by more than a standard error, the cut is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, LoraModule, kernels_of
from loracli.adapters.names import is_numbered
from loracli.algebra.factors import Factors
from loracli.calibration.dataset import HOLDOUT, Dataset, Examples, read_dataset
from loracli.calibration.records import DataPaths, parse_sources
from loracli.calibration.render import Example
from loracli.composition.attached import of_factors
from loracli.composition.composition import Composition
from loracli.errors import IntegrityError, MalformedAdapter, NonFiniteLoss, UnsupportedAdapter, UsageError
from loracli.evaluation.statistics import paired_interval, units_of
from loracli.export.method import base_to_run
from loracli.export.module import refitted_factors
from loracli.fitting.criterion import FEWEST_TO_VALIDATE, Fold, Gain, gain, loss_criterion, one_fold
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import FitInputs, render_inputs
from loracli.fitting.journal import Meter
from loracli.fitting.level import Task, solve_level, tokens_of
from loracli.fitting.mixing import CoreMixing, make_layout
from loracli.fitting.plan import announce, measured_pace
from loracli.fitting.run import opening_of, reached
from loracli.fitting.search import REFIT_SHARE, refit
from loracli.fitting.settings import FitSettings
from loracli.fitting.work import REFIT, Work, cost_of
from loracli.hub.references import Named
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.model.session import Session, open_session, settle_memory
from loracli.progress import SILENT, Progress
from loracli.system.tensor_file import open_tensor_file, write_tensors

_METADATA = {"format": "loracat_refit"}
_SUFFIX = ".core"


@dataclass(frozen=True)
class RefitFile:
    """A file of the records: name, sha256, and how many of its records there are."""

    name: str
    sha256: str
    records: int


@dataclass(frozen=True)
class RefitLoss:
    """Nats per scored token on held-out records, which neither fitted nor chose.

    Args:
        records: how many.
        scored_tokens: in them.
        composition: of the exact composition.
        truncated: of the cut, rounded as it is written.
        refitted: of what is written: the refitted cut, or the cut itself where it was kept.
        interval: 95 % bootstrap interval of refitted minus truncated over records.
    """

    records: int
    scored_tokens: int
    composition: float
    truncated: float
    refitted: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class RefitRecord:
    """How the cores were found.

    Args:
        data: the files that were fitted on, or divided.
        divided: whether the held-out records are a share of them.
        held_out: the files that the held-out records come from.
        kept: what is written: `refit`, or `truncation` where the refit was not clearly better.
        numbers: how many were fitted.
        gain: of the refit over the cut on the validation records, nats per token.
        standard_error: of the gain, paired over records.
        ridge: towards the identity, of the stage that won; None where none beat the identity.
        passes: over the training records that were spent.
        loss: on the held-out records.
        stopped: why the search ended early, None if it did not.
    """

    data: tuple[RefitFile, ...]
    divided: bool
    held_out: str
    kept: str
    numbers: int
    gain: float
    standard_error: float
    ridge: float | None
    passes: float
    loss: RefitLoss
    stopped: str | None = None


@dataclass(frozen=True)
class Refitted:
    """What a refit found: M (k, k) in float64 of each module, none where the cut itself is kept."""

    record: RefitRecord
    cores: Mapping[str, Tensor]


class Refit(Protocol):
    """Fits the cores of a cut."""

    def __call__(self, source: Composition, cut: Mapping[str, Factors], dtype: torch.dtype) -> Refitted:
        """`cut` is the cut of each module, sqrt(S) on both sides, and `dtype` that of the output."""


def check_refittable(source: Composition) -> None:
    """Refuses a composition whose cut has no core of its own to fit.

    Raises:
        UsageError: naming what stands in the way.
    """
    biased = next((adapter.reference for adapter in source.adapters if adapter.config.lora_bias), None)
    if biased is not None:
        raise UsageError(f"{biased} has lora_bias, which --refit cannot weigh", hint="leave out --refit")
    convolution = next(iter(kernels_of(source.adapters)), None)
    if convolution is not None:
        raise UsageError(f"the convolution {convolution} has no core that --refit fits", hint="leave out --refit")
    expert = next((name for name in source.names() if is_numbered(name)), None)
    if expert is not None:
        raise UsageError(f"the expert {expert} has no core of its own for --refit", hint="leave out --refit")
    if source.merges is not None:
        raise UsageError(
            f"--refit is for a recipe or a weighted sum, and {source.merges.name} merges the factors themselves",
            hint="leave out --refit, or fit a recipe and refit that",
        )


def write_cores(path: Path, cores: Mapping[str, Tensor]) -> str:
    """Writes the file, with the same bytes for the same cores; returns its sha256."""
    shapes = {name + _SUFFIX: tuple(core.shape) for name, core in cores.items()}
    write_tensors(path, shapes, torch.float64, lambda name: cores[name.removesuffix(_SUFFIX)], metadata=_METADATA)
    return open_tensor_file(path).sha256


def read_cores(path: Path) -> dict[str, Tensor]:
    """The cores of an export by module.

    Raises:
        IntegrityError: if the file cannot be read.
    """
    try:
        file = open_tensor_file(path)
        with file.reader() as reader:
            return {name.removesuffix(_SUFFIX): reader.read(name).double() for name in file.shapes}
    except (MalformedAdapter, UnsupportedAdapter) as error:
        raise IntegrityError(f"the cores of its refit cannot be read: {error.what}", where=str(path)) from None


_TASK = "refit"
_START = "truncation"
_LOSSES, _COMPARED = "losses", 3  # the last stage, and what it scores


@dataclass(frozen=True)
class RefitOnRecords:
    """A `loracli.export.refit.Refit` on calibration records.

    Args:
        data: to fit on, and held out.
        base: a Hub id or directory, None for the recipe's, or the one that all adapters name.
        base_revision: of a base on the Hub.
        placement: where and how the base runs.
        progress: told what happens.
    """

    data: Dataset
    base: Named | None = None
    base_revision: str | None = None
    placement: Placement = Placement()  # noqa: RUF009  # frozen
    progress: Progress = SILENT

    def __call__(self, source: Composition, cut: Mapping[str, Factors], dtype: torch.dtype) -> Refitted:
        """Loads the base, attaches the cut and fits its cores.

        Raises:
            OutOfResources: if the weights of base and adapters do not fit in memory, before they are loaded.
            InputError: of the kind that fits, if base or records are rejected.
            UsageError: if there are too few records to choose with.
            NonFiniteLoss: if the cut, or what it is compared with, has no finite loss.
        """
        base, placement = base_to_run(
            source.adapters,
            source.recorded,
            base=self.base,
            revision=self.base_revision,
            placement=self.placement,
            progress=self.progress,
        )
        adapter = _as_adapter(source, cut)
        inputs = FitInputs(
            adapters=(adapter,),
            references=(_START,),
            base=base,
            data=self.data,
            layout=make_layout([adapter]),
            settings=FitSettings(mixing="core"),
            folder=Path(),
            saved=source.saved,
        )
        opening = settle_memory(opening_of(inputs, placement), progress=self.progress)
        with open_session(replace(opening, adapters=source.adapters), progress=self.progress) as session:
            return _run(inputs, session, source, dtype)


def refit_on(
    fit_data: DataPaths | None,
    data: DataPaths | None,
    *,
    base: Named | None = None,
    base_revision: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress = SILENT,
) -> RefitOnRecords:
    """A refit on the records of these files, which are read and divided as those of a fit.

    Args:
        fit_data: calibration files; None for those of `data`, of which a share is held out.
        data: all of them held out, where there is `fit_data`; None for a share of that.
        base, base_revision, placement, progress: as in `RefitOnRecords`.
    Raises:
        UsageError, CalibrationError: as `read_dataset`.
    """
    settings = FitSettings()
    fitted, held_out = (fit_data, data) if fit_data is not None else (data, None)
    assert fitted is not None
    sources = parse_sources(fitted)
    share = HOLDOUT if held_out is None else None
    records = read_dataset(sources, held_out, holdout=share, seed=settings.seed, progress=progress)
    return RefitOnRecords(records, base, base_revision, placement, progress)


def _as_adapter(source: Composition, cut: Mapping[str, Factors]) -> LoraAdapter:
    """The cut as the one adapter of a fit."""
    kinds = {name: module.kind for adapter in source.adapters for name, module in adapter.modules.items()}
    modules = {name: LoraModule(name, kinds[name], factors) for name, factors in sorted(cut.items())}
    return replace(source.adapters[0], modules=modules)


def _run(inputs: FitInputs, session: Session, source: Composition, dtype: torch.dtype) -> Refitted:
    settings, progress = inputs.settings, session.progress
    examples = render_inputs(inputs, session.tokenizer, max_length=session.max_length, progress=progress)
    training, held_out = examples.training, examples.held_out
    fold = one_fold(training, inputs.data.training, seed=settings.seed + 1)
    if not fold.validation:
        raise UsageError(
            f"--refit cannot choose with {len(training)} training records",
            hint=f"give more records: at least {FEWEST_TO_VALIDATE} different ones are left when some are held out",
        )
    session.check_causal(held_out)
    with session.attached(inputs.adapters, inputs.layout.modules, held_out) as objective:
        engine = Engine(objective, Meter(progress, task=_TASK), progress=progress)
        before, scored = cost_of(session.batches(fold.validation)), cost_of(session.batches(held_out))
        after = {_LOSSES: before + scored * _COMPARED}
        work = Work((fold,), training, settings, inputs.references, after, ladder={"core": 1.0})
        pace = measured_pace(engine, inputs, session, examples, (fold,))
        announce(engine, inputs, session, examples, work, pace)
        with engine.meter.counted(work.stages, work.effort_left(pace), overhead=pace.overhead):
            reached(engine, session, training)
            found = _search(engine, inputs, fold, examples)
            passes = round(engine.meter.spent / (2 * tokens_of(training)), 2)
            cut = {name: module.factors for name, module in inputs.adapters[0].modules.items()}
            engine.meter.enter(_LOSSES)
            loss = _losses(engine, session, source, cut, found.cores, dtype, held_out)
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
    budget = task.budget * 2 * tokens_of(examples.training)
    engine.meter.enter("core")
    engine.meter.stage("scoring the cut")
    before = criterion(mixing, identity, fold.validation, None)
    solved = solve_level(task, mixing, {_START: [identity]}, budget * (1 - REFIT_SHARE) - engine.meter.spent)
    assert solved.scores is not None
    compared = gain(before, solved.scores)
    if not solved.moved or not compared.clear:
        return _Found({}, compared, solved.ridge, solved.stopped)
    theta, stopped = solved.theta, solved.stopped
    if stopped is None:
        engine.meter.enter(REFIT)
        try:
            again = refit(task, [solved], examples.training, min(REFIT_SHARE * budget, budget - engine.meter.spent))
            theta = theta if again is None else again.theta
        except NonFiniteLoss as error:
            stopped = str(error)
    cores = dict(zip(inputs.layout.modules, (core.clone() for core in mixing.matrices(theta)), strict=True))
    return _Found(cores, compared, solved.ridge, stopped)


def _losses(
    engine: Engine,
    session: Session,
    source: Composition,
    cut: dict[str, Factors],
    cores: dict[str, Tensor],
    dtype: torch.dtype,
    held: Sequence[Example],
) -> RefitLoss:
    """Of the composition, the cut and the refitted cut, the last two rounded to `dtype`, on the held-out records."""
    batches = session.batches(held)

    def score(what: str, factors: dict[str, Factors]) -> Scores:
        engine.meter.stage(f"scoring the {what}")
        point = of_factors(factors)
        return engine.score(point.mixing, point.theta, batches, held).pooled(units_of(held))

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
