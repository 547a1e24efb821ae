"""The weights of a method that searches for them, outside a comparison: what an export of it needs."""

from __future__ import annotations

from collections.abc import Sequence

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.saved_modules import SavedModules
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.calibration.dataset import Dataset
from loracli.calibration.records import DataPaths, parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.composition.fitted import TASK, Calibration, search_weights
from loracli.fitting.mixing import make_layout
from loracli.fitting.settings import FitSettings
from loracli.model.attach import replace_modules
from loracli.model.base import check_fits, find_base, load_base
from loracli.model.placement import memory_errors
from loracli.progress import SILENT, Progress


def searched_weights(
    method: Method,
    options: MethodOptions,
    adapters: Sequence[LoraAdapter],
    fit_data: DataPaths,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    saved: SavedModules | None = None,
    progress: Progress = SILENT,
) -> tuple[float, ...]:
    """One weight for each adapter, found on calibration records with the base model as `loracat compare` finds it.

    Args:
        method: that searches.
        options: of it.
        adapters: to compose.
        fit_data: calibration JSONL.
        base: a Hub id or directory, None for what the adapters name.
        base_revision: of a base on the Hub.
        saved: modules that replace the base's.
        progress: told how far it is.
    Raises:
        InputError: of the kind that fits, if base or records are rejected.
        UsageError: if the method needs an extra that is not installed.
    """
    settings = FitSettings(seed=options.seed)
    files = tuple(read_records(source, progress=progress) for source in parse_sources(fit_data))
    training = tuple(record for file in files for record in file.records)
    with memory_errors():
        model = load_base(find_base(adapters, base, revision=base_revision, progress=progress), progress=progress)
        check_fits(model, adapters)
        replace_modules(model.model, saved)
        examples = tuple(
            example
            for file in files
            for example in render_file(
                file, model.tokenizer, max_length=settings.max_length, progress=progress
            ).examples
        )
        calibration = Calibration(model, Dataset(files, (), training, ()), examples, settings, progress)
        progress.begin(TASK, None, "tokens")
        try:
            found = search_weights(method, options, calibration, adapters, make_layout(adapters))
        finally:
            progress.finish(TASK)
    progress.note(f"{method.name}: {found.note}")
    assert found.weights is not None
    return found.weights
