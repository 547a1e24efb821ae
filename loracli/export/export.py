"""A composition becomes one adapter directory.

Concatenated: A holds the ingredients' own values, w s or s and M are folded into B, rank R = sum r_i, exact up to one
rounding of B; trained factors are written as they are. Merged: the best approximation of a given rank, from the
factors. Written whole or not at all, the same bytes for the same inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loracli.adapters.other_bases import say_other_bases
from loracli.adapters.saved_modules import saved_modules
from loracli.adapters.tasks import head_size, loading_lines
from loracli.calibration.records import DataPaths
from loracli.composition.card import Certificate
from loracli.composition.composition import Composition, base_of_config, from_recipe
from loracli.errors import UsageError
from loracli.export.activations import Moments, recorded_moments
from loracli.export.layout import Layout
from loracli.export.options import ExportOptions
from loracli.export.plan import TASK, AdapterPlan
from loracli.export.refit import Refit, RefitRecord, check_refit, check_refittable
from loracli.progress import SILENT, Progress
from loracli.recipe.ingredients import read_ingredients, recorded_policy
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.recipe.record import other_bases_of
from loracli.system.files import check_free, holds, whole_directory
from loracli.system.machine import one_thread_each
from loracli.system.tensor_file import file_size

MOST_WORKERS = 4  # modules that are worked on at once; each is held in float64 while it is compressed


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: the directory.
        layout: profile, ranks and targets.
        dtype: of the tensors.
        merged: whether it was compressed.
        certificate: exactness per module; of no module after a dry run.
        size_bytes: of the tensor file.
        composition: what it was made of.
        shapes: of the tensors in the file, by name.
        refit: how the cut was refitted, None where that was not asked for.
    """

    path: Path
    layout: Layout
    dtype: torch.dtype
    merged: bool
    certificate: Certificate
    size_bytes: int
    composition: Composition = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    refit: RefitRecord | None = None

    def loading_line(self, base: str | None = None) -> str:
        """The Python that loads it with PEFT, with the class for its task; `base` is the one that the user named."""
        card, saved = self.composition.card(), self.composition.saved
        local = base is not None and Path(base).expanduser().is_dir()
        known = base if local else card.base_id if card.base_named else None
        labels = None if saved is None else head_size(saved.shapes)
        named = card.base_named and not local
        return loading_lines(self.layout.task_type, str(self.path), known, named=named, labels=labels)[-1]


def export_adapter(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    rank: int | None = None,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    profile: str | None = None,
    gguf: bool = False,
    tolerance: float | None = None,
    energy: float | None = None,
    budget: int | None = None,
    activation_aware: bool = False,
    fit_data: DataPaths | None = None,
    refit: bool = False,
    data: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Writes the composition of a recipe as one PEFT adapter directory.

    Args:
        recipe: a recipe, or the file of one.
        output: the directory to make.
        merge, rank, dtype, profile, tolerance, energy, budget, activation_aware: as in `ExportOptions`.
        fit_data: calibration JSONL, for `activation_aware` and `refit`; the base model is loaded for that alone. None
            for what the fit left beside the recipe.
        refit: with `merge`, fit the k x k core of every cut module; the base model is loaded for that.
        data: calibration JSONL for `refit`, of which a share is held out to score the result on; with `fit_data`, which
            is calibrated on then, all of it is.
        base, base_revision: of that base model, and of the config that `gguf` reads; None for what the recipe or the
            adapters name.
        adapters: where the ingredients are now, in the recipe's order; empty for where the recipe says.
        gguf: write a GGUF file as well.
        force: replace an existing adapter directory.
        dry_run: write nothing, only tell what would be.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        IntegrityError: if an ingredient is not the file that the weights were fitted for, or what was written reads
            back otherwise.
        UsageError: if options contradict each other, or the profile cannot be had.
    """
    options = ExportOptions(
        merge,
        rank,
        dtype,
        profile,
        tolerance=tolerance,
        energy=energy,
        budget=budget,
        activation_aware=activation_aware,
    )
    options.check()
    if fit_data is not None and not (activation_aware or refit):
        raise UsageError("--fit-data has no use here", hint="give it with --activation-aware or --refit")
    check_refit(refit=refit, fit_data=fit_data, data=data, merge=merge)
    check_free(Path(output), force=force)
    refitting = None
    if refit:
        from loracli.export.refit import refit_on

        refitting = refit_on(fit_data, data, base=base, base_revision=base_revision, progress=progress)
    path = None if isinstance(recipe, Recipe) else Path(recipe)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    ingredients = read_ingredients(recipe, relocated=adapters, progress=progress)
    if fit_data is None and not refit:  # which look for the base, and say so
        others = other_bases_of(recipe.base.id, recipe.adapters)
        say_other_bases(recipe.base.id, others, progress)
    if gguf:
        from loracli.export.gguf import find_llama_cpp_base

        llama_cpp = find_llama_cpp_base(
            base_of_config(recipe.base, base),
            ingredients,
            revision=base_revision,
            config_sha256=recipe.base.config_sha256,
            progress=progress,
        )
        options = dataclasses.replace(options, gguf=llama_cpp)
    saved = saved_modules(recorded_policy(recipe), ingredients)
    composition = from_recipe(recipe, ingredients, saved)
    if recipe.mixing.bypassed:
        from loracli.fitting.reach import warn_of_merging

        warn_of_merging(recipe.base.id, recipe.mixing.bypassed, progress)
    moments = None  # which change no shape, so that a dry run needs none
    if activation_aware and fit_data is not None and not dry_run:
        from loracli.export.activations import moments_of

        found = moments_of(composition, fit_data, base=base, base_revision=base_revision, progress=progress)
        moments = Moments(found, "records")
    elif activation_aware and not dry_run:
        moments = recorded_moments(composition, path)
    return write_export(
        composition,
        Path(output),
        options,
        moments=moments,
        refit=refitting,
        force=force,
        dry_run=dry_run,
        progress=progress,
    )


def write_export(
    composition: Composition,
    output: Path,
    options: ExportOptions,
    *,
    moments: Moments | None = None,
    refit: Refit | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Writes a composition; what `export_adapter` and `export_method` have in common.

    `moments` are what the modules are cut by, None to cut by |dW|_F; `refit` fits the cores of the cut.
    """
    if refit is not None:
        check_refittable(composition)
    for ingredient in composition.adapters:
        if holds(output, ingredient.path):
            raise UsageError(
                f"{output} holds the ingredient {ingredient.reference}", hint="choose another name with -o"
            )
    with one_thread_each() as threads:
        plan = AdapterPlan(composition, options, moments, progress, workers=min(threads, MOST_WORKERS))
        shapes = plan.shapes(plan.layout)
        cut = None if refit is None or dry_run else plan.cut()
    if refit is not None and cut is not None:
        plan.refitted = refit(composition, cut, plan.dtype)
        progress.begin(TASK, len(cut), "modules")
        del cut
    if dry_run:
        progress.finish(TASK)
        certificate, size = Certificate((), ""), file_size(shapes, plan.dtype)
    else:
        with one_thread_each(), whole_directory(output, force=force) as folder:
            certificate, size = plan.write(folder)
    record = None if plan.refitted is None else plan.refitted.record
    return Exported(output, plan.layout, plan.dtype, plan.merged, certificate, size, composition, shapes, record)
