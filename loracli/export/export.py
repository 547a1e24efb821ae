"""A composition becomes one adapter directory.

Concatenated: A holds the ingredients' own values, w s or s and M are folded into B, rank R = sum r_i, exact up to one
rounding of B; trained factors are written as they are. Merged: the best approximation of a given rank, from the
factors. Written whole or not at all, the same bytes for the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loracli.adapters.claims import head_size, loading_lines
from loracli.algebra.factors import Factors
from loracli.composition.card import Certificate
from loracli.composition.composition import Composition, published_identities
from loracli.errors import UsageError
from loracli.export.activations import Moments, moments_of, recorded_moments
from loracli.export.gguf import LlamaCppBase
from loracli.export.layout import Layout
from loracli.export.method import compose_method, compose_recipe
from loracli.export.module import cut_module
from loracli.export.plan import TASK, ExportPlan, plan_layout
from loracli.export.refit import Refit, RefitRecord, check_refittable, refit_on
from loracli.export.request import ExportRequest, check
from loracli.export.write import write
from loracli.progress import SILENT, Bar, Progress, amount_text, drawn, takes_bar
from loracli.recipe.recipe import Recipe
from loracli.system.display import count_text, names_text, path_text, repr_line
from loracli.system.document import dtype_name
from loracli.system.files import check_free, holds, whole_directory
from loracli.system.machine import in_order, one_thread_each
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

    def __repr__(self) -> str:
        parts = [adapter.reference for adapter in published_identities(self.composition.adapters)]
        method = self.composition.method
        made = names_text(parts) if method is None else f"{method.name} of {names_text(parts)}"
        layout = self.layout
        return repr_line(
            self,
            path_text(self.path),
            made,
            f"rank {layout.rank}",
            count_text(len(layout.ranks), "module"),
            dtype_name(self.dtype),
            amount_text(self.size_bytes, "B"),
        )

    def loading_line(self, base: str | None = None) -> str:
        """The Python that loads it with PEFT, with the class for its task; `base` is the one that the user named."""
        card, saved = self.composition.card(), self.composition.saved
        local = base is not None and Path(base).expanduser().is_dir()
        known = base if local else card.base_id if card.base_named else None
        labels = None if saved is None else head_size(saved.shapes)
        named = card.base_named and not local
        return loading_lines(self.layout.task_type, str(self.path), known, named=named, labels=labels)[-1]


@takes_bar
def export_adapter(
    request: ExportRequest,
    output: str | Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | Bar = SILENT,
) -> Exported:
    """Writes the composition of a recipe, or what a method makes of some adapters, as one PEFT adapter directory.

    The share of the energy that a cut keeps stands in the certificate.

    Args:
        request: what is composed, and how it is written.
        output: the directory to make.
        force: replace an existing adapter directory.
        dry_run: write nothing, only tell what would be.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        IntegrityError: if an ingredient is not the file that the weights were fitted for, or what was written reads
            back otherwise.
        UsageError: if options contradict each other, the profile cannot be had, or a method cannot honour the adapters.
        InputError: of the kind that fits, if recipe, adapters, base or records are rejected.
    """
    progress = drawn(progress)
    method = check(request)
    check_free(Path(output), force=force)
    refit = None
    if request.refit:
        base, revision = request.base, request.base_revision
        refit = refit_on(request.fit_data, request.data, base=base, base_revision=revision, progress=progress)
    if method is None:
        composition, llama_cpp = compose_recipe(request, progress)
    else:
        composition, llama_cpp = compose_method(request, method, progress)
    try:
        return write_export(
            composition,
            Path(output),
            request,
            llama_cpp=llama_cpp,
            refit=refit,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    except ValueError as error:
        if method is None:
            raise
        raise UsageError(f"{method.name} cannot be computed here: {error}", hint="choose another --method") from None


def write_export(
    composition: Composition,
    output: Path,
    request: ExportRequest,
    *,
    llama_cpp: LlamaCppBase | None = None,
    refit: Refit | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Writes a composition.

    Args:
        composition: what is written.
        output: the directory to make.
        request: how; what it says of the composition itself is not read.
        llama_cpp: how llama.cpp has the base, None without a GGUF file.
        refit: fits the cores of the cut, None for the cut itself.
        force, dry_run, progress: as in `export_adapter`.
    """
    if refit is not None:
        check_refittable(composition)
    for ingredient in composition.adapters:
        if holds(output, ingredient.path):
            raise UsageError(
                f"{output} holds the ingredient {ingredient.reference}", hint="choose another name with -o"
            )
    moments = None  # which change no shape, so that a dry run needs none
    if request.activation_aware and not dry_run:
        moments = _find_moments(composition, request, progress)
    with one_thread_each() as threads:
        workers = min(threads, MOST_WORKERS)
        plan = plan_layout(composition, request, llama_cpp, progress, workers=workers)
        cut = None if refit is None or dry_run else _cut(plan, composition, moments, workers)
    refitted = None
    if refit is not None and cut is not None:
        refitted = refit(composition, cut, plan.dtype)
        progress.begin(TASK, len(cut), "modules")
        del cut
    if dry_run:
        progress.finish(TASK)
        certificate, size = Certificate((), ""), file_size(plan.shapes, plan.dtype)
    else:
        with one_thread_each(), whole_directory(output, force=force) as folder:
            certificate, size = write(
                plan,
                composition,
                request,
                folder,
                moments=moments,
                refitted=refitted,
                progress=progress,
                workers=workers,
            )
    record = None if refitted is None else refitted.record
    return Exported(output, plan.layout, plan.dtype, plan.merged, certificate, size, composition, plan.shapes, record)


def _find_moments(composition: Composition, request: ExportRequest, progress: Progress) -> Moments:
    if request.fit_data is None:
        return recorded_moments(composition, None if isinstance(request.recipe, Recipe) else Path(request.recipe or ""))
    base, revision = request.base, request.base_revision
    found = moments_of(composition, request.fit_data, base=base, base_revision=revision, progress=progress)
    return Moments(found, "records")


def _cut(plan: ExportPlan, composition: Composition, moments: Moments | None, workers: int) -> dict[str, Factors]:
    """Every module cut, in float64, with sqrt(S) on both sides."""
    by_module: Mapping[str, Tensor] = {} if moments is None else moments.by_module

    def work(name: str) -> Factors:
        return cut_module(composition, name, plan.cuts[name], by_module.get(name)).factors

    return dict(zip(plan.ranks, in_order(work, plan.ranks, workers=workers), strict=True))
