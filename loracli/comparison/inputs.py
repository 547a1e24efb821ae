"""Everything a comparison needs, read and checked before the base model's weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.claims import check_language_models
from loracli.adapters.compatible import check_composable, check_distinct
from loracli.adapters.on_base import warn_of_open_orders
from loracli.adapters.saved_modules import REFUSE, SavedModules, saved_modules, settled_policy
from loracli.algebra.methods import METHODS
from loracli.calibration.dataset import Dataset, check_shape, read_dataset
from loracli.calibration.records import CalibrationFile, DataPaths, parse_sources, read_records
from loracli.comparison.settings import FITTED_MIXINGS, WEIGHTS, CompareSettings
from loracli.composition.weights import ModuleWeights, weights_of_modules
from loracli.errors import UsageError
from loracli.fitting.mixing import Layout, make_layout
from loracli.hub.fetch import fetch_adapter
from loracli.model.base import on_base
from loracli.model.reference import BaseReference, find_base
from loracli.progress import SILENT, Progress
from loracli.recipe.ingredients import read_ingredients, recorded_policy
from loracli.recipe.recipe import OTHER_ROWS, Recipe, load_recipe
from loracli.recipe.record import FINGERPRINT


@dataclass(frozen=True)
class CompareInputs:
    """Everything a comparison needs, checked.

    Args:
        adapters: N adapters that can be composed.
        references: the names of their rows.
        recipe: whose fit is compared too, None without one.
        base: where the base model is.
        test: the files of the records that everything is compared on.
        guard: files of records that must not get worse.
        calibration: records to fit with, None without any; its held-out records are those of `test`.
        datamix: the control adapter, None without one.
        layout: of the adapters.
        settings: of the comparison.
        repeated: how many test records stand in the calibration data, as far as that is known.
        saved: modules that replace the base's in every row, None without any.
        weights: by hand, None without.
    """

    adapters: tuple[LoraAdapter, ...]
    references: tuple[str, ...]
    recipe: Recipe | None
    base: BaseReference
    test: tuple[CalibrationFile, ...]
    guard: tuple[CalibrationFile, ...]
    calibration: Dataset | None
    datamix: LoraAdapter | None
    layout: Layout
    settings: CompareSettings
    repeated: int
    saved: SavedModules | None = None
    weights: ModuleWeights | None = None


def prepare_comparison(
    data: DataPaths,
    *,
    recipe: str | Path | None = None,
    adapters: Sequence[str] = (),
    fit_data: DataPaths | None = None,
    guard: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    settings: CompareSettings | None = None,
    progress: Progress = SILENT,
) -> CompareInputs:
    """Reads and checks all inputs; fetches what is not local.

    Args:
        data: JSONL that everything is compared on, one path or several, as in a fit.
        recipe: whose ingredients and fit are compared.
        adapters: without a recipe the adapters to compose; with one, where its ingredients are now.
        fit_data: calibration JSONL for what has to be fitted here.
        guard: JSONL of what must not get worse.
        base: the base model; None for the recipe's, or the one that all adapters name.
        base_revision: its branch, tag or commit on the Hub.
        settings: of the comparison.
        progress: told what happens.
    Raises:
        UsageError: if nothing is to be composed, a control needs calibration data and there are none, or an option has
            no use.
        InputError: of the kind that fits, if an input is rejected.
    """
    settings = settings or CompareSettings()
    if recipe is None and not adapters:
        raise UsageError("nothing to compare", hint="give a RECIPE, or --adapters")
    needing = settings.controls.fitted
    if needing and fit_data is None:
        raise UsageError(f"--control {needing[0]} has to be fitted", hint="give calibration records with --fit-data")
    settings.check_used(fit_data=fit_data is not None, guard=guard is not None)
    test, calibration = _read_data(data, fit_data, settings, progress)
    guarded = () if guard is None else _read_files(guard, settings, progress)
    loaded = None if recipe is None else load_recipe(recipe)
    if loaded is None:
        read = tuple(read_adapter(fetch_adapter(one, progress=progress), progress=progress) for one in adapters)
        references = tuple(_row_name(adapter.reference) for adapter in read)
        warn_of_open_orders(read, progress)
    else:
        read = tuple(a.loaded() for a in read_ingredients(loaded, relocated=adapters, progress=progress))
        references = tuple(_row_name(adapter.reference) for adapter in loaded.adapters)
    check_distinct(read, references)
    check_language_models(read, "a comparison")
    asked = base or (None if loaded is None else loaded.base.claim)
    check_composable(read, base_given=asked is not None)
    policy = settings.fit.modules_to_save
    if loaded is not None and policy == REFUSE:
        policy = recorded_policy(loaded)
    policy = settled_policy(policy, read, references)
    found = find_base(read, asked, revision=base_revision, progress=progress)
    read = on_base(read, found)
    check_composable(read, base_given=asked is not None, base_known=True)
    saved = saved_modules(policy, read, progress=progress)
    datamix = settings.controls.datamix
    mixed = None
    if datamix is not None:
        mixed = on_base([read_adapter(fetch_adapter(datamix, progress=progress), progress=progress)], found)[0]
    if mixed is not None and (mixed.saved or saved is not None):
        raise UsageError(
            "datamix cannot be compared where modules are replaced whole", hint="leave --control datamix out"
        )
    return CompareInputs(
        adapters=read,
        references=references,
        recipe=loaded,
        base=found,
        test=test,
        guard=guarded,
        calibration=calibration,
        datamix=mixed,
        layout=make_layout(read),
        settings=settings,
        repeated=_repeated(test, loaded, calibration, progress),
        saved=saved,
        weights=None if settings.weights is None else weights_of_modules(settings.weights, read),
    )


def _read_data(
    data: DataPaths, fit_data: DataPaths | None, settings: CompareSettings, progress: Progress
) -> tuple[tuple[CalibrationFile, ...], Dataset | None]:
    if fit_data is None:
        return _read_files(data, settings, progress), None
    fit = settings.fit
    dataset = read_dataset(
        fit_data,
        data,
        holdout=0.0,
        seed=fit.seed,
        shape=fit.format,
        fields=fit.fields,
        skip_bad=fit.skip_bad,
        progress=progress,
    )
    return dataset.eval_files, dataset


def _read_files(data: DataPaths, settings: CompareSettings, progress: Progress) -> tuple[CalibrationFile, ...]:
    fit, shape = settings.fit, check_shape(settings.fit.format)
    return tuple(
        read_records(source, shape=shape, fields=fit.fields, skip_bad=fit.skip_bad, progress=progress)
        for source in parse_sources(data)
    )


def _row_name(reference: str) -> str:
    """The reference, unless a row of another kind goes by that name: then as a path."""
    taken = {*OTHER_ROWS, *METHODS, *FITTED_MIXINGS, WEIGHTS, "fresh-lora", "random", "datamix"}
    return f"./{reference}" if reference in taken else reference


def _repeated(
    test: Sequence[CalibrationFile], recipe: Recipe | None, calibration: Dataset | None, progress: Progress
) -> int:
    """How many test records were calibrated on. A recipe keeps the fingerprints of its records."""
    known = set() if calibration is None else {r.fingerprint[:FINGERPRINT] for r in calibration.training}
    if recipe is not None:
        known |= {fingerprint for data in recipe.data for fingerprint in data.fingerprints()}
    count = sum(record.fingerprint[:FINGERPRINT] in known for file in test for record in file.records)
    if count and recipe is not None:
        progress.warn(
            f"{count} of the test records stand in the calibration data too; the table flatters what was fitted"
        )
    return count
