"""A fit as a job: planned up to the moment where weights would be loaded, run on one process or many, kept on disk
while it runs, and taken up again after a stop.

A fit that ends in a file: on one process or many, kept on disk while it runs, and taken up again after a stop.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from loracli.adapters.adapter import LoraAdapter
from loracli.calibration.dataset import Examples
from loracli.calibration.records import CalibrationFile
from loracli.errors import InputError, OutputExists, UsageError
from loracli.fitting.control import as_memory_allows, controls
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import FitInputs, render_inputs
from loracli.fitting.journal import Journal, Meter, StepLog, is_step_log, open_state, remove_state, state_folder
from loracli.fitting.level import tokens_of
from loracli.fitting.plan import divide_training, fit_work, held_out_parts, measured_pace
from loracli.fitting.processes import Processes, connect, process_device
from loracli.fitting.reach import foresee_bypassed
from loracli.fitting.run import opening_of, run_fit
from loracli.fitting.work import REACH, Work
from loracli.model.base import BasePlan, load_tokenizer, settled
from loracli.model.experts import check_experts
from loracli.model.modules import check_shapes
from loracli.model.placement import Placement
from loracli.model.preflight import MemoryDecision, MemoryEstimate
from loracli.model.reference import BaseReference, stored_quantisation
from loracli.model.session import Opening, open_session, usable_length
from loracli.progress import SILENT, Progress
from loracli.recipe.recipe import Recipe, check_recipe_path
from loracli.recipe.record import activations_path, kept_path, tensors_path
from loracli.recipe.tensors import check_kept_path
from loracli.system.document import dtype_name
from loracli.system.files import locked_directory, same_file, translate_disk_errors
from loracli.system.machine import Launch


@dataclass(frozen=True)
class FitPlan:
    """What a fit would do.

    Args:
        inputs: that it was planned for.
        base: how the base model would be loaded.
        training_records: with something to score.
        validation_records: of them, that choose among starts, ridges and kinds of mixing; with folds those of the
            first one.
        held_out_records: with something to score.
        parts: of cross-fitting, 0 where records are set apart.
        passes: at most, of the fit on all training records.
        controls: whether a new LoRA is trained beside the fit.
        training_tokens: of the training records, prompts included.
        scored_tokens: of them, that count in the loss.
        longest_record: in tokens, of all records.
        cut: training records longer than what is used of one.
        dropped: records without anything to score in what is used.
        memory: of one process.
        decision: what follows from the memory that is free now.
        seconds: at most, about, without answers that choose; None with a base that is shared out, which no process has
            alone.
    """

    inputs: FitInputs
    base: BasePlan
    training_records: int
    validation_records: int
    held_out_records: int
    parts: int
    passes: float
    controls: bool
    training_tokens: int
    scored_tokens: int
    longest_record: int
    cut: int
    dropped: int
    memory: MemoryEstimate
    decision: MemoryDecision
    seconds: float | None


def plan_fit(inputs: FitInputs, *, placement: Placement, world_size: int = 1, progress: Progress = SILENT) -> FitPlan:
    """Checks the adapters against the base model's shapes, tokenizes the data, estimates the memory, and loads the base
    to time it on two micro-batches.

    Args:
        inputs: from `prepare_fit`.
        placement: where and how the base model would run.
        world_size: how many processes would share the work.
        progress: told what is found.
    Raises:
        BaseModelMismatch: if a module of an adapter is not in the base, in another shape, or one of experts that
            compute in a way of their own; or if the base bypasses all of them.
        CalibrationError: as `render_inputs`.
        UsageError: if there are too few records to choose with, or too few processes for `shard`.
        OutOfResources: if the weights alone need more memory than there is.
    """
    placement.check_processes(world_size)
    opening = opening_of(inputs, placement, world_size)
    base = opening.plan()
    check_shapes(base.skeleton, inputs.adapters)
    check_experts(base.skeleton, inputs.adapters)
    foresee_bypassed(inputs.layout.modules, inputs.base, progress)
    length = usable_length(base, inputs.settings.max_length)
    examples = render_inputs(inputs, load_tokenizer(inputs.base), max_length=length, progress=progress)
    folds = divide_training(inputs, examples.training)
    memory, decision = opening.memory(base)
    again = placement.checkpointing or decision.checkpointing
    opening = replace(opening, placement=replace(placement, checkpointing=again))
    inputs = as_memory_allows(inputs, opening, progress=progress)
    work = fit_work(inputs, examples, folds)
    every = (*examples.training, *examples.held_out)
    return FitPlan(
        inputs=inputs,
        base=base,
        training_records=len(examples.training),
        validation_records=len(folds[0].validation),
        held_out_records=len(examples.held_out),
        parts=len(held_out_parts(inputs, examples.training)),
        passes=work.passes,
        controls=controls(work),
        training_tokens=tokens_of(examples.training),
        scored_tokens=sum(data.scored_tokens for data in examples.data),
        longest_record=max(len(example.input_ids) for example in every),
        cut=sum(data.cut for data in examples.data),
        dropped=sum(data.dropped for data in examples.data),
        memory=memory,
        decision=decision,
        seconds=None if placement.shard else _seconds(inputs, opening, examples, work, world_size),
    )


def _seconds(
    inputs: FitInputs,
    opening: Opening,
    examples: Examples,
    work: Work,
    world_size: int,
) -> float:
    with (
        open_session(opening) as session,
        session.attached(inputs.adapters, inputs.layout.modules, examples.held_out) as objective,
    ):
        pace = measured_pace(Engine(objective, Meter(SILENT)), inputs, session, examples, work.folds)
    return work.left(REACH).seconds(pace) / world_size


class Prepare(Protocol):
    """Of `prepare_fit`, all but where the base will run."""

    def __call__(self, *, placement: Placement) -> FitInputs: ...


_VERSIONS = ("loracat", "torch", "transformers")


def fit_to_file(
    prepare: Prepare,
    output: Path,
    *,
    placement: Placement,
    launch: Launch,
    resume: bool = False,
    log: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Recipe | None:
    """Fits and writes a recipe, with the state of the fit beside it while it runs.

    Args:
        prepare: reads and checks the inputs, for a base that runs there; called by the first process before the
            others, so that what it fetches is there for them.
        output: of the recipe.
        placement: where and how the base model runs.
        launch: which process this is.
        resume: go on where an interrupted fit of the same inputs was; without its state the fit starts over, and says
            so.
        log: takes one JSON object for each step.
        force: replace the log, and the recipe, of which a copy is kept as `recipe.bak.json`; drop what an interrupted
            fit has done.
        progress: told what happens.
    Returns:
        the recipe, as it was written; None on all processes but the first.
    Raises:
        LoracatError: as `fit_mixing`, on all processes.
        OutputExists: if the recipe, the log, or what an interrupted fit has done is there and `force` is not set (nor,
            for the last, `resume`); or the log is none that could be replaced or gone on with.
        UsageError: if the recipe or the log would be a file that is read.
        StateMismatch: if the state belongs to a fit of other inputs.
    """
    placement.check_processes(launch.world_size)
    placement = replace(placement, device=process_device(launch, placement.device))
    with connect(launch, placement.device, sharded=placement.shard) as processes, ExitStack() as held:
        inputs = _one_after_the_other(processes, lambda: prepare(placement=placement))
        kind = inputs.settings.mixing
        processes.from_first(lambda: check_recipe_path(output, force=force, kind=kind))
        processes.from_first(lambda: check_kept_path(output) if output.is_file() else None)
        processes.from_first(lambda: _check_places(output, log, inputs))
        processes.from_first(lambda: check_log(log, force=force, resume=resume))
        folder = state_folder(output)
        processes.from_first(lambda: held.enter_context(locked_directory(folder, output)))
        resumed = processes.from_first(
            lambda: open_state(folder, _identity(inputs, placement), resume=resume, force=force, progress=progress)
        )
        journal = Journal(folder if processes.first else None)
        with _said(folder, processes, resumed, progress):
            processes.from_first(lambda: check_log(log, force=force, resume=resumed))
            with _step_log(log, processes, resumed) as steps:
                recipe = run_fit(
                    inputs, placement=placement, processes=processes, journal=journal, log=steps, progress=progress
                )
        processes.from_first(lambda: _save(recipe, output, force=force, progress=progress))
        processes.from_first(lambda: remove_state(folder))
    return recipe if processes.first else None


def _save(recipe: Recipe, output: Path, *, force: bool, progress: Progress) -> None:
    kept = recipe.save(output, force=force, keep=True)
    if kept is not None:
        progress.note(f"the recipe that was in {output} is kept in {kept}")


def _one_after_the_other(processes: Processes, prepare: Callable[[], FitInputs]) -> FitInputs:
    if processes.first:
        inputs = prepare()
        processes.barrier()
        return inputs
    processes.barrier()
    return prepare()


def _check_places(output: Path, log: Path | None, inputs: FitInputs) -> None:
    """Raises UsageError if what is written would be what is read, or each other, under any name."""
    recipes = [output, *([kept_path(output)] if output.is_file() else [])]
    outputs = [path for one in recipes for path in (one, tensors_path(one), activations_path(one))]
    written = {"-o": outputs, "--log": [] if log is None else [log]}
    if log is not None and any(same_file(log, path) for path in (*written["-o"], state_folder(output))):
        raise UsageError(f"--log {log} is written as the recipe too", hint="choose another name with --log")
    data = (*inputs.data.files, *inputs.data.eval_files)
    read = {str(file.source): file.source.path for file in data if file.source.path is not None}
    folders = {f"the adapter {a.reference}": a.path for a in inputs.adapters} | {"the base model": inputs.base.path}
    read |= {f"{entry.name} of {name}": entry for name, folder in folders.items() for entry in sorted(folder.iterdir())}
    for option, paths in written.items():
        for path in paths:
            name = next((name for name, other in read.items() if same_file(path, other)), None)
            if name is not None:
                same = "" if str(path) == name else f", which is {name}"
                raise UsageError(
                    f"{option} {path}{same}: this fit reads it, and would overwrite it",
                    hint=f"choose another name with {option}",
                )


def check_log(log: Path | None, *, force: bool, resume: bool) -> None:
    """Raises OutputExists for what may not be replaced, and is no log to go on with."""
    if log is None or not os.path.lexists(log):
        return
    if log.is_symlink() or not log.is_file():
        raise OutputExists(f"{log} is not a regular file", hint="choose another name with --log")
    if not force and not (resume and is_step_log(log)):
        raise OutputExists(f"{log} exists", hint="choose another name with --log, or replace it with --force")


@contextmanager
def _step_log(path: Path | None, processes: Processes, resumed: bool) -> Iterator[StepLog | None]:
    if path is None or not processes.first:
        yield None
        return
    with translate_disk_errors(path):
        log = StepLog(path, resume=resumed)
    try:
        yield log
        log.cut()
    finally:
        log.close()


@contextmanager
def _said(folder: Path, processes: Processes, resumed: bool, progress: Progress) -> Iterator[None]:
    """After a stop the state stays, and this says so; after a rejected input there is nothing in it to keep."""
    try:
        yield
    except (InputError, UsageError):
        if processes.first and not resumed:
            remove_state(folder)
        raise
    except BaseException as error:
        if processes.first:
            error.add_note(f"what was done is kept in {folder}: the same command with --resume goes on from there")
            progress.warn(error.__notes__[-1])
        raise


def _identity(inputs: FitInputs, placement: Placement) -> dict[str, str]:
    files = {"data file": inputs.data.files, "held-out file": inputs.data.eval_files}
    shared = identity_of(inputs.base, dict(zip(inputs.references, inputs.adapters, strict=True)), files, placement)
    return shared | settings_identity(inputs.settings.recorded()) | {"--shard": str(placement.shard)}


def identity_of(
    base: BaseReference,
    adapters: Mapping[str, LoraAdapter],
    files: Mapping[str, Sequence[CalibrationFile]],
    placement: Placement,
) -> dict[str, str]:
    """What numbers of a base with adapters on records depend on besides settings, by what a user would call it.

    Args:
        base: the model.
        adapters: by their references, in order.
        files: of records, by what they are for.
        placement: of the base; what `auto` is on this machine counts.
    """
    dtype, device = settled(base, dtype=placement.dtype, device=placement.device)
    quantised = placement.form is not None or stored_quantisation(base.id, base.path) is not None
    return {
        "base model": _base_identity(base),
        **{f"adapter {reference}": digest(dict(adapter.sha256)) for reference, adapter in adapters.items()},
        "order of the adapters": digest(list(adapters)),
        **{
            f"{part} {number}, {file.source.name}": digest([file.sha256, file.source.weight])
            for part, those in files.items()
            for number, file in enumerate(those, 1)
        },
        "--dtype": dtype_name(dtype),
        "--device": device,
        "--quantise": str(placement.form),
        **{f"version of {name}": version(name) for name in (*_VERSIONS, *(["bitsandbytes"] if quantised else []))},
    }


def settings_identity(values: Mapping[str, object]) -> dict[str, str]:
    """Settings by the options that set them."""
    return {f"--{name.replace('_', '-')}": json.dumps(value) for name, value in values.items()}


def _base_identity(base: BaseReference) -> str:
    """By its commit, or by the size and the time of its files: reading all weights would take as long as loading."""
    if base.commit is not None:
        return digest([base.id, base.commit])
    files = sorted(path for path in base.path.iterdir() if path.is_file())
    return digest([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])


def digest(content: object) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
