"""The composition that a request asks for: of a recipe, of weights by hand, or of a method, with the search for its
weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter, open_adapter
from loracli.adapters.claims import agreed_task, check_language_models, checked_task, say_other_bases
from loracli.adapters.compatible import check_composable, check_distinct
from loracli.adapters.on_base import warn_of_open_orders
from loracli.adapters.saved_modules import REFUSE, SavedModules, saved_modules, settled_policy
from loracli.algebra.methods.method import Method
from loracli.calibration.dataset import Dataset
from loracli.calibration.records import CalibrationFile, parse_sources, read_records
from loracli.composition.base_table import BaseTable, base_table
from loracli.composition.composition import (
    Composition,
    base_of_config,
    from_method,
    from_moments,
    from_recipe,
    from_weights,
    task_of_recipe,
)
from loracli.composition.fitted import (
    Calibration,
    check_own_records,
    moments_cost,
    own_moments,
    owners_of,
    search_cost,
    search_weights,
)
from loracli.composition.weights import weights_of_modules
from loracli.errors import UsageError
from loracli.export.gguf import LlamaCppBase, find_llama_cpp_base
from loracli.export.request import ExportRequest
from loracli.fitting.activations import check_weighable
from loracli.fitting.mixing import make_layout
from loracli.fitting.reach import find_reach, warn_of_merging
from loracli.fitting.settings import FitSettings
from loracli.hub.fetch import fetch_adapter
from loracli.hub.references import BaseClaim, Named
from loracli.model.placement import Placement
from loracli.model.reference import BaseReference, find_base
from loracli.model.session import Opening, as_fitted, open_session, runs_here
from loracli.progress import SILENT, WORK, Progress, begun
from loracli.recipe.ingredients import read_ingredients, recorded_policy
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.recipe.record import EDITED, MAX_ADAPTERS, RecipeBase, other_bases_of
from loracli.system.machine import in_order, one_thread_each


def read_to_compose(
    adapters: Sequence[Named],
    recipe: str | Path | Recipe | None,
    *,
    base_given: bool = False,
    progress: Progress = SILENT,
) -> tuple[tuple[LoraAdapter, ...], Recipe | None]:
    """The adapters to compose: those of a recipe, or the ones that are named.

    Raises:
        UsageError: if there are none, or one is named twice.
        InputError: of the kind that fits, if they cannot be read or composed.
    """
    if recipe is not None:
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        return read_ingredients(loaded, relocated=adapters, progress=progress), loaded
    if not adapters:
        raise UsageError("nothing to export", hint="name a recipe, or adapters")
    if len(adapters) > MAX_ADAPTERS:
        raise UsageError(f"{len(adapters)} adapters are given, and a record holds at most {MAX_ADAPTERS}")
    fetched = (fetch_adapter(reference, progress=progress) for reference in adapters)
    with one_thread_each() as threads:
        read = tuple(in_order(open_adapter, fetched, workers=threads))
    for warning in (warning for adapter in read for warning in adapter.warnings):
        progress.warn(warning)
    check_distinct(read, [adapter.reference for adapter in read], progress)
    warn_of_open_orders(read, progress)
    check_composable(read, base_given=base_given)
    return read, None


def compose_recipe(request: ExportRequest, progress: Progress) -> tuple[Composition, LlamaCppBase | None]:
    """What the recipe of a request composes, and how llama.cpp has its base where a GGUF file is asked for.

    Raises:
        IntegrityError: if an ingredient is not the file that the weights were fitted for.
        InputError: of the kind that fits, if recipe, adapters or the base's config are rejected.
    """
    assert request.recipe is not None
    recipe = request.recipe if isinstance(request.recipe, Recipe) else load_recipe(request.recipe)
    read = read_ingredients(recipe, relocated=request.adapters, progress=progress)
    if request.fit_data is None and not request.refit:  # which look for the base, and say so
        say_other_bases(recipe.base.id, other_bases_of(recipe.base.id, recipe.adapters), progress)
    found = None
    if request.gguf:
        named, config = base_of_config(recipe.base, request.base), recipe.base.config_sha256
        found = find_llama_cpp_base(
            named, read, revision=request.base_revision, config_sha256=config, progress=progress
        )
    composition = from_recipe(recipe, read, saved_modules(recorded_policy(recipe), read))
    if recipe.mixing.edited:
        progress.note(f"{EDITED}: what it measured is left out of the card")
    if recipe.mixing.bypassed:
        warn_of_merging(recipe.base.id, recipe.mixing.bypassed, progress)
    return composition, found


@dataclass(frozen=True)
class _Ingredients:
    """What is composed without a fit.

    Args:
        adapters: by the names of the base as far as they are known.
        recipe: that names them, None without one.
        base: what is known of the base model.
        saved: modules that replace the base's.
        task_type: of the result.
    """

    adapters: tuple[LoraAdapter, ...]
    recipe: Recipe | None
    base: BaseTable
    saved: SavedModules | None
    task_type: str | None


def _read_ingredients(request: ExportRequest, progress: Progress) -> _Ingredients:
    base, revision = request.base, request.base_revision
    read, recipe = read_to_compose(request.adapters, request.recipe, base_given=base is not None, progress=progress)
    task = None if request.task_type is None else checked_task(request.task_type)
    if task is None:
        task = agreed_task(read, option="--task-type") if recipe is None else task_of_recipe(read)
    check_fitted(request, read)
    policy = request.modules_to_save or (REFUSE if recipe is None else recorded_policy(recipe))
    policy = settled_policy(policy, read, [adapter.reference for adapter in read])
    if recipe is None:
        table, read = base_table(read, base, revision=revision, task=task, progress=progress)
        check_composable(read, base_given=base is not None, base_known=True)
    else:
        table = BaseTable(recipe.base.id, recipe.modules, recipe.mixing.bypassed)
    if table.bypassed:
        warn_of_merging(table.id, table.bypassed, progress)
    return _Ingredients(read, recipe, table, saved_modules(policy, read, progress=progress), task)


def check_fitted(request: ExportRequest, adapters: Sequence[LoraAdapter]) -> None:
    """Raises UnsupportedAdapter if something is fitted or scored on records, and an adapter is not of a language
    model."""
    if request.fit_data is not None or request.refit:
        check_language_models(adapters, "what is fitted on records")
    if request.scored:
        check_language_models(adapters, "scoring records", way_out="leave --data out")


def llama_cpp_base(
    request: ExportRequest,
    adapters: Sequence[LoraAdapter],
    base_id: str,
    recipe: Recipe | None = None,
    *,
    progress: Progress = SILENT,
) -> LlamaCppBase | None:
    """How llama.cpp has the base of adapters, None where no GGUF file is asked for.

    Args:
        request: what is asked for.
        adapters: that are composed.
        base_id: the base by their own word.
        recipe: that names them, None without one.
        progress: told of a download.
    """
    if not request.gguf:
        return None
    base = request.base or BaseClaim(base_id, None) if recipe is None else base_of_config(recipe.base, request.base)
    return find_llama_cpp_base(base, adapters, revision=request.base_revision, progress=progress)


def compose_weights(request: ExportRequest, progress: Progress = SILENT) -> Composition:
    """The sum of adapters with the weights of a request.

    Raises:
        InputError: of the kind that fits, if adapters or base are rejected.
        UsageError: if the weights cannot be honoured.
    """
    assert request.weights is not None
    given = _read_ingredients(request, progress)
    weights = weights_of_modules(request.weights, given.adapters)
    composition = from_weights(weights, given.adapters, given.base, saved=given.saved, task_type=given.task_type)
    return replace(composition, task_asked=request.task_type is not None)


def compose_method(
    request: ExportRequest, method: Method, progress: Progress
) -> tuple[Composition, LlamaCppBase | None]:
    """What a method makes of adapters, its weights found on records where it searches for them; else as
    `compose_recipe`.

    Raises:
        InputError: of the kind that fits, if adapters, recipe, base or records are rejected.
        UsageError: if the method cannot honour these adapters.
    """
    given = _read_ingredients(request, progress)
    read, recipe, saved = given.adapters, given.recipe, given.saved
    recorded = None if recipe is None else recipe.base
    found, weights = llama_cpp_base(request, read, given.base.id, recipe, progress=progress), None
    if method.needs_records:
        assert request.fit_data is not None
        if method.regress is not None:
            composition = _regressed(method, given, request, progress)
            return replace(composition, task_asked=request.task_type is not None, recorded=recorded), found
        weights = searched_weights(request, method, read, recorded=recorded, saved=saved, progress=progress)
    cut = request.rank
    if cut is None and request.merge and not request.rank_rule:
        cut = max(max(adapter.ranks) for adapter in read)
    options = replace(request.method_options, rank=cut) if method.cuts else request.method_options
    composition = from_method(
        method, read, given.base, options=options, weights=weights, saved=saved, task_type=given.task_type
    )
    return replace(composition, task_asked=request.task_type is not None, recorded=recorded), found


def base_to_run(
    adapters: Sequence[LoraAdapter],
    recorded: RecipeBase | None,
    *,
    base: Named | None,
    revision: str | None,
    placement: Placement,
    progress: Progress,
) -> tuple[BaseReference, Placement]:
    """The base that the user names, else that of the recipe, else what the adapters agree on; and where it runs, with
    the numbers that the recipe was fitted on.

    Args:
        adapters: that are run in it.
        recorded: of the recipe that names them, None without one.
        base: that the user named.
        revision: of a base on the Hub.
        placement: that was asked for.
        progress: told of a download.
    Raises:
        InputError, UsageError: as `find_base` and `as_fitted`.
    """
    asked = base or (None if recorded is None else recorded.claim)
    fits = {} if recorded is None else {"the recipe": recorded}
    check = runs_here(placement, adapters, fits)
    reference = find_base(adapters, asked, revision=revision, check=check, progress=progress)
    return reference, as_fitted(placement, reference, fits, progress=progress)


def searched_weights(
    request: ExportRequest,
    method: Method,
    adapters: Sequence[LoraAdapter],
    *,
    recorded: RecipeBase | None = None,
    saved: SavedModules | None = None,
    progress: Progress = SILENT,
) -> tuple[float, ...]:
    """One weight for each adapter, found on calibration records with the base model as `loracat compare` finds it.

    Args:
        request: with options, records, and the base and its placement.
        method: that searches.
        adapters: to compose.
        recorded: the base of the recipe that names the adapters, None without one.
        saved: modules that replace the base's.
        progress: told how far it is.
    Raises:
        InputError: of the kind that fits, if base or records are rejected.
    """
    assert request.fit_data is not None
    files = tuple(read_records(source, progress=progress) for source in parse_sources(request.fit_data))
    with _calibration(method, files, adapters, request, recorded, saved, progress) as calibration:
        found = search_weights(method, request.method_options, calibration, adapters, make_layout(adapters))
    progress.note(f"{method.name}: {found.note}")
    assert found.weights is not None
    return found.weights


def _regressed(method: Method, given: _Ingredients, request: ExportRequest, progress: Progress) -> Composition:
    """What a method makes of adapters and of what their own records show.

    Raises:
        InputError, UsageError: as `compose_method`.
    """
    assert request.fit_data is not None
    read = given.adapters
    sources, names = parse_sources(request.fit_data, owned=True), [adapter.reference for adapter in read]
    weighed = next((source for source in sources if source.weight != 1), None)
    if weighed is not None:
        raise UsageError(
            f"{method.name} has no use for the weight of {weighed}: an adapter's records count once",
            hint="leave it out",
        )
    owners = owners_of(sources, read, names)
    check_own_records(method.name, owners, names)
    check_weighable(read, hint="choose another --method")
    files = tuple(read_records(source, progress=progress) for source in sources)
    recorded = None if given.recipe is None else given.recipe.base
    with _calibration(method, files, read, request, recorded, given.saved, progress) as calibration:
        moments = own_moments(calibration, owners, read, make_layout(read))
    return from_moments(method, read, given.base, moments, saved=given.saved, task_type=given.task_type)


@contextmanager
def _calibration(
    method: Method,
    files: tuple[CalibrationFile, ...],
    adapters: Sequence[LoraAdapter],
    request: ExportRequest,
    recorded: RecipeBase | None,
    saved: SavedModules | None,
    progress: Progress,
) -> Iterator[Calibration]:
    """The records of some files to calibrate on, with the base opened as `loracat compare` does."""
    base, placement = base_to_run(
        adapters,
        recorded,
        base=request.base,
        revision=request.base_revision,
        placement=request.placement,
        progress=progress,
    )
    settings = FitSettings(seed=request.method_options.seed)
    training = tuple(record for file in files for record in file.records)
    opening = Opening(base, tuple(adapters), settings.batch_tokens, settings.max_length, saved, placement)
    with open_session(opening, progress=progress) as session:
        examples = session.render(files)
        session.check_causal(examples)
        calibration = Calibration(session, Dataset(files, (), training, ()), examples, settings, task=method.name)
        cost = moments_cost(calibration, len(adapters)) if method.search is None else search_cost(method, calibration)
        with calibration.engine(adapters, make_layout(adapters).modules) as engine:
            find_reach(engine, session, examples)
        with begun(progress, method.name, cost.effort(calibration.pace), WORK):
            yield calibration
