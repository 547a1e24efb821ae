"""Adapters and the name of a method in, one adapter directory out, as of a recipe; with the search for weights where
the method has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter, open_adapter
from loracli.adapters.compatible import check_composable, check_distinct
from loracli.adapters.expert_orders import warn_of_open_orders
from loracli.adapters.saved_modules import REFUSE, SavedModules, saved_modules, settled_policy
from loracli.adapters.tasks import agreed_task, check_language_models, checked_task
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.calibration.batches import plan_batches
from loracli.calibration.dataset import Dataset
from loracli.calibration.records import DataPaths, parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.composition.base_table import BaseTable, base_table
from loracli.composition.composition import MethodSource, base_of_config, identities_of, takes, task_of_recipe
from loracli.composition.fitted import TASK, Calibration, search_weights
from loracli.errors import UsageError
from loracli.export.export import Exported, write_export
from loracli.export.options import ExportOptions
from loracli.export.refit import check_refit
from loracli.fitting.mixing import make_layout
from loracli.fitting.reach import find_reach
from loracli.fitting.settings import FitSettings
from loracli.hub.fetch import fetch_adapter
from loracli.hub.references import BaseClaim
from loracli.model.attach import replace_modules
from loracli.model.base import check_fits, find_base, load_base
from loracli.model.placement import memory_errors
from loracli.progress import SILENT, Progress
from loracli.recipe.ingredients import identity_of, read_ingredients, recorded_policy
from loracli.recipe.mixing import MIXING_KINDS
from loracli.recipe.reading import load_recipe
from loracli.recipe.recipe import MAX_ADAPTERS, Recipe, RecipeAdapter, labels_of
from loracli.system.files import check_free

DEFAULTS = MethodOptions()


def find_method(name: str, options: MethodOptions = DEFAULTS) -> Method:
    """The method of a name, which takes every option that is set.

    Raises:
        UsageError: if there is no such method, or it does not take an option.
    """
    if name not in METHODS:
        fitted = (*MIXING_KINDS, "auto", "paper")
        hint = f"fit it: loracat fit --mixing {name}, then export the recipe" if name in fitted else None
        raise UsageError(f"--method {name} is not one of {', '.join(METHODS)}", hint=hint)
    method = METHODS[name]
    for option in fields(options):
        if getattr(options, option.name) != option.default and option.name not in takes(method):
            can = ", ".join(f"--{word}" for word in sorted(takes(method)))
            raise UsageError(f"{name} takes no --{option.name}", hint=f"it takes {can}" if can else None)
    return method


def read_to_compose(
    adapters: Sequence[str],
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
        raise UsageError("nothing to export", hint="give a RECIPE, or --adapters")
    if len(adapters) > MAX_ADAPTERS:
        raise UsageError(f"{len(adapters)} adapters are given, and a record holds at most {MAX_ADAPTERS}")
    read = tuple(open_adapter(fetch_adapter(reference, progress=progress), progress=progress) for reference in adapters)
    check_distinct(read, [adapter.reference for adapter in read])
    warn_of_open_orders(read, progress)
    check_composable(read, base_given=base_given)
    return read, None


def export_method(
    name: str,
    output: str | Path,
    *,
    adapters: Sequence[str] = (),
    recipe: str | Path | Recipe | None = None,
    method_options: MethodOptions = DEFAULTS,
    fit_data: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    merge: bool = False,
    rank: int | None = None,
    dtype: str | None = None,
    profile: str | None = None,
    modules_to_save: str | None = None,
    task_type: str | None = None,
    gguf: bool = False,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | None = None,
    refit: bool = False,
    data: DataPaths | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Writes what a method makes of some adapters as one PEFT adapter directory.

    A method whose own result has full rank is cut to `rank`: to the sum of the ranks if that is None, with `merge` to
    the largest ingredient rank. The share of the energy that is kept stands in the certificate.

    Args:
        name: of the method.
        output: the directory to make.
        adapters: to compose; with a recipe, where its ingredients are now.
        recipe: whose ingredients are composed; its own mixing is not used.
        method_options: of the method; its rank is `rank`.
        fit_data: calibration JSONL, for a method that searches for weights; the base model is loaded for that alone.
        base: a Hub id or directory, None for what recipe or adapters name.
        base_revision: of a base on the Hub.
        merge, rank, dtype, profile, tolerance, energy, budget: as in `ExportOptions`.
        refit, data: as in `export_adapter`; not of a method that merges the factors.
        modules_to_save: `average`, `pick:NAME` or `refuse`; None is what the recipe says, and `refuse` without one.
        task_type: PEFT's name of the export's task; None for the one that the adapters agree on.
        gguf: write a GGUF file as well.
        force: replace an existing adapter directory.
        dry_run: write nothing, only tell what would be.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        UsageError: if options contradict each other, or the method cannot honour these adapters.
        InputError: of the kind that fits, if an adapter is rejected.
    """
    method = find_method(name, method_options)
    asked = None if task_type is None else checked_task(task_type)
    options = ExportOptions(merge, rank, dtype, profile, tolerance=tolerance, energy=energy, budget=budget)
    options.check(cuts=method.cuts)
    check_refit(refit=refit, fit_data=fit_data, data=data, merge=merge)
    check_free(Path(output), force=force)
    refitting = None
    if refit:
        from loracli.export.refit import refit_on

        refitting = refit_on(fit_data, data, base=base, base_revision=base_revision, progress=progress)
    read, loaded = read_to_compose(adapters, recipe, base_given=base is not None, progress=progress)
    searching = fit_data is not None and not (refit and method.search is None)
    if (method.search is None) == searching:
        need = "has to be fitted" if fit_data is None else "needs no calibration records"
        raise UsageError(f"{name} {need}", hint=f"{'give' if fit_data is None else 'leave out'} --fit-data")
    task = asked or _agreed(read, loaded)
    if fit_data is not None or refit:
        check_language_models(read, "what is fitted on records")
    policy = modules_to_save or (REFUSE if loaded is None else recorded_policy(loaded))
    policy = settled_policy(policy, read, [adapter.reference for adapter in read])
    if loaded is None:
        table, read = base_table(read, base, revision=base_revision, task=task, progress=progress)
        check_composable(read, base_given=base is not None, base_known=True)
    else:
        table = BaseTable(loaded.base.id, loaded.modules, loaded.mixing.bypassed)
    if table.bypassed:
        from loracli.fitting.reach import warn_of_merging

        warn_of_merging(table.id, table.bypassed, progress)
    saved = saved_modules(policy, read, progress=progress)
    if gguf:
        from loracli.export.gguf import find_llama_cpp_base

        named = base or BaseClaim(table.id, None) if loaded is None else base_of_config(loaded.base, base)
        found = find_llama_cpp_base(named, read, revision=base_revision, progress=progress)
        options = replace(options, gguf=found)
    weights = None if method.weights is None else method.weights(len(read))
    if fit_data is not None and searching:
        weights = searched_weights(
            method,
            method_options,
            read,
            fit_data,
            base=base or (None if loaded is None else loaded.base.claim),
            base_revision=base_revision,
            saved=saved,
            progress=progress,
        )
    whole = not merge or options.rule is not None
    cut = rank if rank is not None or whole else max(max(adapter.ranks) for adapter in read)
    chosen = replace(method_options, rank=cut) if method.cuts else method_options
    source = MethodSource(
        method,
        chosen,
        weights,
        read,
        published_identities(read),
        table,
        saved,
        task,
        asked is not None,
    )
    try:
        return write_export(
            source, Path(output), options, refit=refitting, force=force, dry_run=dry_run, progress=progress
        )
    except ValueError as error:
        raise UsageError(f"{name} cannot be computed here: {error}", hint="choose another --method") from None


def _agreed(adapters: Sequence[LoraAdapter], recipe: Recipe | None) -> str | None:
    """The task of what a method makes of adapters."""
    return agreed_task(adapters, option="--task-type") if recipe is None else task_of_recipe(adapters)


def published_identities(adapters: Sequence[LoraAdapter]) -> tuple[RecipeAdapter, ...]:
    """The adapters as they may be published: a local directory by its last names."""
    names = [identity_of(adapter, _name(adapter)) for adapter in adapters]
    labels = labels_of(names, Path())
    return identities_of(adapters, {a.reference: labels[n.reference] for a, n in zip(adapters, names, strict=True)})


def _name(adapter: LoraAdapter) -> str:
    """A name that labels can be made of: a directory by its path."""
    return adapter.reference if adapter.source.path is None else str(adapter.path)


def searched_weights(
    method: Method,
    options: MethodOptions,
    adapters: Sequence[LoraAdapter],
    fit_data: DataPaths,
    *,
    base: str | BaseClaim | None = None,
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
        base: as of `find_base`.
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
                file, model.tokenizer, max_length=settings.max_length, whole=True, progress=progress
            ).examples
        )
        calibration = Calibration(model, Dataset(files, (), training, ()), examples, settings, progress)
        layout = make_layout(adapters)
        with calibration.engine(adapters, layout.modules) as (engine, _):
            batches = plan_batches(examples, batch_tokens=settings.batch_tokens)
            find_reach(engine, batches, examples, model.reference, progress)
        progress.begin(TASK, None, "tokens")
        try:
            found = search_weights(method, options, calibration, adapters, layout)
        finally:
            progress.finish(TASK)
    progress.note(f"{method.name}: {found.note}")
    assert found.weights is not None
    return found.weights
