"""Everything a fit needs, read and checked before the base model's weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.compatibility import check_composable
from loracli.adapters.hub import Fetched, fetch_adapter
from loracli.calibration.records import CalibrationFile, Record, read_records
from loracli.calibration.split import MIN_HELD_OUT, held_out_count, split_records
from loracli.errors import CalibrationError, UsageError
from loracli.fitting.base import BaseReference, find_base
from loracli.fitting.mixing import Mixing, make_mixing
from loracli.fitting.settings import FitSettings
from loracli.progress import SILENT, Progress
from loracli.recipe import local_reference


@dataclass(frozen=True)
class FitInputs:
    """Everything a fit needs, checked, before the base model's weights are loaded.

    Args:
        adapters: N adapters that can be composed.
        references: how each is called in tables and in the recipe; local ones relative to the recipe's folder.
        base: where the base model is.
        data: the calibration file.
        held_out_file: the file that the held-out records come from, which may be `data`.
        training: records to fit on and to choose with.
        held_out: records that are read once, at the end.
        mixing: the parametrisation.
        settings: of the fit.
        folder: the recipe's folder.
    """

    adapters: tuple[LoraAdapter, ...]
    references: tuple[str, ...]
    base: BaseReference
    data: CalibrationFile
    held_out_file: CalibrationFile
    training: tuple[Record, ...]
    held_out: tuple[Record, ...]
    mixing: Mixing
    settings: FitSettings
    folder: Path


def prepare_fit(
    adapters: Sequence[str | Fetched],
    data: str | Path,
    *,
    eval_data: str | Path | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    settings: FitSettings | None = None,
    folder: str | Path = ".",
    progress: Progress = SILENT,
) -> FitInputs:
    """Reads and checks all inputs of a fit; fetches what is not local.

    Raises:
        UsageError: if no adapter is given, or one twice.
        InputError: of the kind that fits, if an adapter, the data, or their combination is rejected.
    """
    settings = settings or FitSettings()
    if not adapters:
        raise UsageError("a fit needs at least one adapter")
    read = tuple(
        read_adapter(fetch_adapter(source, progress=progress) if isinstance(source, str) else source)
        for source in adapters
    )
    folder = Path(folder)
    references = tuple(_reference_from(adapter, folder) for adapter in read)
    twice = next((r for r in references if references.count(r) > 1), None)
    if twice is not None:
        raise UsageError(f"the adapter {twice} is given twice")
    check_composable(read, base_given=base is not None)
    for adapter in read:
        if settings.paper and adapter.config.lora_dropout:
            progress.warn(f"{adapter.reference} was trained with dropout; --paper leaves it off")
    file = read_records(data)
    held_out_file = file if eval_data is None else read_records(eval_data)
    for source in {id(f): f for f in (file, held_out_file)}.values():
        if source.ignored_keys:
            progress.note(f"{source.name}: these keys are not read: {', '.join(source.ignored_keys)}")
    training, held_out = _split(file, None if eval_data is None else held_out_file, settings, progress)
    found = find_base(read, base, revision=base_revision, progress=progress)
    return FitInputs(
        adapters=read,
        references=references,
        base=found,
        data=file,
        held_out_file=held_out_file,
        training=tuple(training),
        held_out=tuple(held_out),
        mixing=make_mixing(read, settings.mixing, softmax=settings.paper),
        settings=settings,
        folder=folder,
    )


def _reference_from(adapter: LoraAdapter, folder: Path) -> str:
    """The adapter's name in tables and recipe: as typed for the Hub, relative to the recipe's folder for a
    directory."""
    if adapter.source.path is None:
        return adapter.reference
    return local_reference(adapter.path, folder)


def _split(
    file: CalibrationFile, held_out: CalibrationFile | None, settings: FitSettings, progress: Progress
) -> tuple[list[Record], list[Record]]:
    """Records to train on, and records held out."""
    if held_out is None:
        if settings.holdout == 0:
            raise UsageError("--holdout 0 leaves nothing to score on", hint="give held-out records with --eval-data")
        count = held_out_count(len(file.records), settings.holdout)
        training, held = split_records(file.records, count, seed=settings.seed)
        if not training or not held:
            raise CalibrationError(
                f"{file.name} has {len(file.records)} different records, too few to hold some out",
                hint="give held-out records with --eval-data",
            )
    else:
        training, held = list(file.records), list(held_out.records)
        known = {record.fingerprint for record in training}
        common = sum(record.fingerprint in known for record in held)
        if common:
            progress.warn(f"{common} records of {held_out.name} stand in {file.name} too; the table flatters the fit")
    if len(held) < MIN_HELD_OUT:
        progress.warn(f"only {len(held)} records are held out: too few for a verdict (at least {MIN_HELD_OUT})")
    return training, held
