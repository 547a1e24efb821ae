"""Everything a fit needs, read and checked before the base model's weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.claims import check_language_models
from loracli.adapters.compatible import check_composable, check_distinct
from loracli.adapters.on_base import warn_of_open_orders
from loracli.adapters.saved_modules import SavedModules, saved_modules, settled_policy
from loracli.calibration.dataset import (
    Dataset,
    Examples,
    check_shape,
    read_dataset,
    render_dataset,
    tokenizer_differences,
)
from loracli.calibration.records import DataPaths, parse_sources
from loracli.errors import UsageError
from loracli.evaluation.scorer import check_answerable
from loracli.fitting.mixing import Layout, check_mixing, count_numbers, make_layout, parameter_of_experts
from loracli.fitting.settings import AUTO, FRESH_LORA, FitSettings
from loracli.hub.fetch import Fetched, fetch_adapter
from loracli.hub.references import Named, parse_reference
from loracli.model.base import on_base
from loracli.model.placement import Placement
from loracli.model.reference import BaseReference, find_base
from loracli.model.session import runs_here
from loracli.progress import SILENT, Progress
from loracli.recipe.recipe import local_reference
from loracli.recipe.record import MAX_ADAPTERS
from loracli.system.display import count_text

_FEW_RECORDS = 10  # to fit; with fewer the start is most of what comes out


@dataclass(frozen=True)
class FitInputs:
    """Everything a fit needs, checked, before the base model's weights are loaded.

    Args:
        adapters: N adapters that can be composed.
        references: how each is called in tables and in the recipe; local ones relative to the recipe's folder.
        base: where the base model is.
        data: the calibration files, and which of their records are held out.
        layout: which rank rows of which adapter stand in which module.
        settings: of the fit.
        folder: the recipe's folder.
        saved: modules that replace the base's, None without any.
        room: whether the memory is there for a fresh LoRA beside the fit that nobody asked for.
    """

    adapters: tuple[LoraAdapter, ...]
    references: tuple[str, ...]
    base: BaseReference
    data: Dataset
    layout: Layout
    settings: FitSettings
    folder: Path
    saved: SavedModules | None = None
    room: bool = True

    @property
    def numbers(self) -> int | None:
        """How many numbers will be fitted; None where the search decides it."""
        if self.settings.mixing == AUTO:
            return None
        return count_numbers(self.adapters, self.layout, self.settings.mixing)  # type: ignore[arg-type]


def check_typed(adapters: Sequence[Named], *data: DataPaths, shape: str | None) -> None:
    """What can be told of inputs before anything is read or fetched, and so before an output is found in the way.

    Args:
        adapters: references.
        data: calibration files, and held-out files if any.
        shape: of their records.
    Raises:
        AdapterNotFound: if a reference is neither a directory that holds an adapter nor one to the Hub.
        CalibrationError: if a file is not there.
        UsageError: if a file or the shape cannot be understood.
    """
    check_shape(shape)
    for adapter in adapters:
        parse_reference(adapter)
    for source in [source for files in data for source in parse_sources(files)]:
        source.check_there()


def prepare_fit(
    adapters: Sequence[Named | Fetched],
    data: DataPaths,
    *,
    eval_data: DataPaths | None = None,
    base: Named | None = None,
    base_revision: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    settings: FitSettings | None = None,
    folder: str | Path = ".",
    progress: Progress = SILENT,
) -> FitInputs:
    """Reads and checks all inputs of a fit; fetches what is not local, but no base that cannot run there.

    Raises:
        UsageError: if no adapter is given, or one twice.
        InputError: of the kind that fits, if an adapter, the data, or their combination is rejected.
    """
    settings = settings or FitSettings()
    if not adapters:
        raise UsageError("a fit needs at least one adapter")
    if len(adapters) > MAX_ADAPTERS:
        raise UsageError(f"{len(adapters)} adapters are given, and a recipe holds at most {MAX_ADAPTERS}")
    dataset = read_dataset(
        parse_sources(data),
        eval_data,
        holdout=settings.holdout,
        seed=settings.seed,
        shape=settings.format,
        fields=settings.fields,
        skip_bad=settings.skip_bad,
        progress=progress,
    )
    if settings.metric is not None:
        check_answerable(settings.metric, dataset.training)
    read = tuple(
        read_adapter(fetch_adapter(source, progress=progress) if isinstance(source, str) else source, progress=progress)
        for source in adapters
    )
    folder = Path(folder)
    references = tuple(_reference_from(adapter, folder) for adapter in read)
    check_distinct(read, references, progress)
    check_language_models(read, "a fit")
    warn_of_open_orders(read, progress)
    check_composable(read, base_given=base is not None)
    check_mixing(read, settings.mixing)  # before anything is fetched, and below by the base's names
    settings = replace(settings, modules_to_save=settled_policy(settings.modules_to_save, read, references))
    found = find_base(read, base, revision=base_revision, check=runs_here(placement, read), progress=progress)
    read = on_base(read, found)
    check_composable(read, base_given=base is not None, base_known=True)
    check_mixing(read, settings.mixing)
    if settings.control == FRESH_LORA and (experts := parameter_of_experts(read)) is not None:
        raise UsageError(
            f"a new LoRA cannot be trained on the experts of {experts}", hint="leave --control fresh-lora out"
        )
    saved = saved_modules(settings.modules_to_save, read, progress=progress)
    layout = make_layout(read)
    _say_how_little(read, dataset, layout, settings, progress)
    for adapter in read:
        if settings.paper and adapter.config.lora_dropout:
            progress.warn(f"{adapter.reference} was trained with dropout; --paper leaves it off")
    return FitInputs(
        adapters=read,
        references=references,
        base=found,
        data=dataset,
        layout=layout,
        settings=settings,
        folder=folder,
        saved=saved,
    )


def _say_how_little(
    adapters: tuple[LoraAdapter, ...], dataset: Dataset, layout: Layout, settings: FitSettings, progress: Progress
) -> None:
    """Warns of so few records that weights are hardly theirs, and says what is left to fit of one adapter."""
    if len(adapters) == 1:
        each = f" in each {settings.mixing}" if settings.mixing in ("layer", "module") else ""
        progress.note(f"one adapter alone: only its scale{each} is fitted, by --mixing {settings.mixing}")
    records = len(dataset.training)
    if settings.mixing == AUTO or records >= _FEW_RECORDS:
        return
    numbers = count_numbers(adapters, layout, settings.mixing)  # type: ignore[arg-type]
    if numbers > records:
        fewer = "" if settings.mixing == "adapter" else ", or fit one weight for each adapter with --mixing adapter"
        progress.warn(f"{count_text(records, 'training record')} for {count_text(numbers, 'weight')}: give more{fewer}")


def render_inputs(inputs: FitInputs, tokenizer: Any, *, max_length: int, progress: Progress = SILENT) -> Examples:
    """The data as the base model sees it, once its tokenizer is there.

    Raises:
        CalibrationError: if records cannot be rendered, or too many have nothing scored within `max_length` tokens.
    """
    say_tokenizer_differences(inputs.adapters, inputs.references, tokenizer, progress)
    return render_dataset(
        inputs.data,
        tokenizer,
        max_length=max_length,
        allow_truncation=inputs.settings.allow_truncation,
        skip_bad=inputs.settings.skip_bad,
        progress=progress,
    )


def say_tokenizer_differences(
    adapters: Sequence[LoraAdapter], references: Sequence[str], tokenizer: Any, progress: Progress
) -> None:
    """Warns of adapters that come with another chat template or other tokens than the base model's."""
    for adapter, reference in zip(adapters, references, strict=True):
        for difference in tokenizer_differences(adapter.path, tokenizer):
            progress.warn(f"{reference}: {difference}")


def _reference_from(adapter: LoraAdapter, folder: Path) -> str:
    """The adapter's name in tables and recipe: as typed for the Hub, relative to the recipe's folder for a
    directory."""
    if adapter.source.path is None:
        return adapter.reference
    return local_reference(adapter.path, folder)
