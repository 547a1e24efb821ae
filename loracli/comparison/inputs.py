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
from loracli.calibration.dataset import Dataset, check_shape, read_dataset, warn_of_copies
from loracli.calibration.records import CalibrationFile, DataPaths, parse_sources, read_records
from loracli.comparison.recipes import ComparedRecipe, load_recipes
from loracli.comparison.settings import ALL, DATAMIX, FITTED_MIXINGS, RANDOM, WEIGHTS, CompareSettings
from loracli.composition.fitted import check_own_records, owners_of
from loracli.composition.weights import ModuleWeights, check_numbers, weights_of_modules
from loracli.errors import UsageError
from loracli.fitting.mixing import Layout, make_layout
from loracli.fitting.settings import FRESH_LORA
from loracli.hub.fetch import fetch_adapter
from loracli.hub.references import Named
from loracli.model.base import on_base
from loracli.model.placement import Placement
from loracli.model.reference import BaseReference, find_base
from loracli.model.session import as_fitted, runs_here
from loracli.progress import SILENT, Progress
from loracli.recipe.ingredients import recorded_policy
from loracli.recipe.recipe import OTHER_ROWS, Recipe
from loracli.recipe.record import FINGERPRINT, RecipeBase

_OTHER_NAMES = {  # of rows that are no adapter's
    *OTHER_ROWS, *METHODS, *FITTED_MIXINGS, FRESH_LORA, RANDOM, DATAMIX, WEIGHTS
}  # fmt: skip


@dataclass(frozen=True)
class CompareInputs:
    """Everything a comparison needs, checked.

    Args:
        adapters: N adapters that can be composed.
        references: the names of their rows.
        recipes: whose fits are compared too.
        base: where the base model is.
        test: the files of the records that everything is compared on.
        guard: files of records that must not get worse.
        calibration: records to fit with, None without any; its held-out records are those of `test`.
        owners: of its files, from `owners_of`.
        datamix: the control adapter, None without one.
        layout: of the adapters.
        settings: of the comparison.
        repeated: how many test records stand in the calibration data, as far as that is known.
        saved: modules that replace the base's in every row, None without any.
        weights: by hand, None without.
    """

    adapters: tuple[LoraAdapter, ...]
    references: tuple[str, ...]
    recipes: tuple[ComparedRecipe, ...]
    base: BaseReference
    test: tuple[CalibrationFile, ...]
    guard: tuple[CalibrationFile, ...]
    calibration: Dataset | None
    datamix: LoraAdapter | None
    layout: Layout
    settings: CompareSettings
    repeated: int
    owners: tuple[int | None, ...] = ()
    saved: SavedModules | None = None
    weights: ModuleWeights | None = None

    def as_fitted(self, placement: Placement, *, progress: Progress = SILENT) -> Placement:
        """With the quantisation of the base that the recipes were fitted with, see `loracli.model.session.as_fitted`.

        Raises:
            UsageError: as there.
        """
        return as_fitted(placement, self.base, _fits(self.recipes), progress=progress)


def prepare_comparison(
    data: DataPaths,
    *,
    recipe: Recipe | str | Path | Sequence[str | Path] | None = None,
    adapters: Sequence[Named] = (),
    fit_data: DataPaths | None = None,
    guard: DataPaths | None = None,
    base: Named | None = None,
    base_revision: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    settings: CompareSettings | None = None,
    progress: Progress = SILENT,
) -> CompareInputs:
    """Reads and checks all inputs; fetches what is not local.

    Args:
        data: JSONL that everything is compared on, one path or several, as in a fit.
        recipe: whose ingredients and fit are compared, or its file; several files for the ingredients and fits of all.
        adapters: without a recipe the adapters to compose; with one or more, where their ingredients are now, each
            once, in the order in which the recipes name them first.
        fit_data: calibration JSONL for what has to be fitted here.
        guard: JSONL of what must not get worse.
        base: the base model; None for the recipe's, or the one that all adapters name.
        base_revision: its branch, tag or commit on the Hub.
        placement: where and how it will run.
        settings: of the comparison.
        progress: told what happens.
    Raises:
        UsageError: if nothing is to be composed, a fit was asked for by name and there are no records for it, an option
            has no use, or recipes cannot be compared on the same records.
        InputError: of the kind that fits, if an input is rejected.
    """
    settings = settings or CompareSettings()
    compared = [recipe] if isinstance(recipe, (str, Path)) else recipe or ()
    if not compared and not adapters:
        raise UsageError("nothing to compare", hint="name a recipe, or adapters")
    settings.check_used(fit_data=fit_data is not None, guard=guard is not None)
    test, calibration = _read_data(data, fit_data, settings, progress)
    guarded = () if guard is None else _read_files(guard, "guard", settings, progress)
    recipes: tuple[ComparedRecipe, ...] = ()
    if not compared:
        read = tuple(read_adapter(fetch_adapter(one, progress=progress), progress=progress) for one in adapters)
        references = tuple(_row_name(adapter.reference) for adapter in read)
        warn_of_open_orders(read, progress)
    else:
        recipes, ingredients = load_recipes(compared)
        references = tuple(_row_name(adapter.reference) for adapter in ingredients.recorded)
        if len(recipes) > 1:
            _check_rows([one.row for one in recipes], references)
            _check_one_kind(recipes, settings)
        read = ingredients.read(adapters, progress)
    check_numbers(settings.weights, len(read))
    check_distinct(read, references, progress)
    check_language_models(read, "a comparison")
    asked = base or next((one.recipe.base.claim for one in recipes if one.recipe.base.claim is not None), None)
    check_composable(read, base_given=asked is not None)
    policy = settings.fit.modules_to_save
    if recipes and policy == REFUSE:
        policy = recorded_policy(recipes[0].recipe)
    policy = settled_policy(policy, read, references)
    check = runs_here(placement, read, _fits(recipes))
    found = find_base(read, asked, revision=base_revision, check=check, progress=progress)
    read = on_base(read, found)
    check_composable(read, base_given=asked is not None, base_known=True)
    saved = saved_modules(policy, read, progress=progress)
    datamix = settings.controls.datamix
    owners = () if calibration is None else _owners(calibration, read, references, settings)
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
        recipes=recipes,
        base=found,
        test=test,
        guard=guarded,
        calibration=calibration,
        datamix=mixed,
        layout=make_layout(read),
        settings=settings,
        repeated=_repeated(test, recipes, calibration, progress),
        owners=owners,
        saved=saved,
        weights=None if settings.weights is None else weights_of_modules(settings.weights, read),
    )


def _fits(recipes: Sequence[ComparedRecipe]) -> dict[str, RecipeBase]:
    return {one.row: one.recipe.base for one in recipes}


def _read_data(
    data: DataPaths, fit_data: DataPaths | None, settings: CompareSettings, progress: Progress
) -> tuple[tuple[CalibrationFile, ...], Dataset | None]:
    if fit_data is None:
        return _read_files(data, "test", settings, progress), None
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


def _owners(
    calibration: Dataset, adapters: Sequence[LoraAdapter], references: Sequence[str], settings: CompareSettings
) -> tuple[int | None, ...]:
    """Of each file of calibration records whose own they are.

    Raises:
        UsageError: if a method that was asked for by name cannot do with that, or no method goes by it.
    """
    owners = owners_of([file.source for file in calibration.files], adapters, references)
    for method in settings.regressed:
        check_own_records(method, owners, references)
    owned = next((file.source for file in calibration.files if file.source.adapter is not None), None)
    if owned is not None and not settings.regressed and ALL not in settings.methods:
        raise UsageError(
            f"whose records {owned}@{owned.adapter} are has no use here: no method goes by it",
            hint=f"add one: --methods {','.join(settings.methods)},regmean; or leave out @{owned.adapter}",
        )
    return owners


def _read_files(
    data: DataPaths, what: str, settings: CompareSettings, progress: Progress
) -> tuple[CalibrationFile, ...]:
    fit, shape = settings.fit, check_shape(settings.fit.format)
    files = tuple(
        read_records(source, shape=shape, fields=fit.fields, skip_bad=fit.skip_bad, progress=progress)
        for source in parse_sources(data)
    )
    warn_of_copies([record for file in files for record in file.records], what, progress)
    return files


def _row_name(reference: str) -> str:
    """The reference, unless a row of another kind goes by that name: then as a path."""
    return f"./{reference}" if reference in _OTHER_NAMES else reference


def _check_rows(rows: Sequence[str], references: Sequence[str]) -> None:
    """Raises UsageError where the file of a recipe is called like another row."""
    for row in rows:
        if row in _OTHER_NAMES or row in references:
            what = "an adapter" if row in references else "another way to compose"
            raise UsageError(
                f"the row {row} would be both a recipe's fit and {what}", hint="give that recipe's file another name"
            )


def _check_one_kind(recipes: Sequence[ComparedRecipe], settings: CompareSettings) -> None:
    """Raises UsageError where the control `random` would have to be fitted as several kinds of mixing."""
    kinds = sorted({one.recipe.mixing.kind for one in recipes})
    if settings.controls.random and len(kinds) > 1:
        raise UsageError(
            f"--control random fits one kind of mixing, and the recipes' mixings are {' and '.join(kinds)}",
            hint="compare the recipes one at a time, or leave the control out",
        )


def _repeated(
    test: Sequence[CalibrationFile], recipes: Sequence[ComparedRecipe], calibration: Dataset | None, progress: Progress
) -> int:
    """How many test records were calibrated on, for any row. A recipe keeps the fingerprints of its records."""
    known = set() if calibration is None else {r.fingerprint[:FINGERPRINT] for r in calibration.training}
    for one in recipes:
        known |= {fingerprint for data in one.recipe.data for fingerprint in data.fingerprints()}
    count = sum(record.fingerprint[:FINGERPRINT] in known for file in test for record in file.records)
    if count and recipes:
        progress.warn(
            f"{count} of the test records stand in the calibration data too; the table flatters what was fitted"
        )
    return count
