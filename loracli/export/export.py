"""A composition becomes one adapter directory.

Concatenated: A holds the ingredients' own values, w s or s and M are folded into B, rank R = sum r_i, exact up to one
rounding of B; trained factors are written as they are. Merged: the best approximation of a given rank, from the
factors. Written whole or not at all, the same bytes for the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.claims import head_size, loading_lines
from loracli.algebra.factors import Factors
from loracli.composition.card import Certificate
from loracli.composition.composition import Composition, published_identities
from loracli.composition.weights import Weights
from loracli.errors import UsageError
from loracli.export.activations import Moments, moments_of, recorded_moments
from loracli.export.gguf import LlamaCppBase
from loracli.export.layout import Layout
from loracli.export.method import check_fitted, compose_method, compose_recipe, compose_weights, llama_cpp_base
from loracli.export.module import cut_module
from loracli.export.plan import TASK, ExportPlan, plan_layout
from loracli.export.refit import Refit, RefitRecord, check_refittable, refit_on
from loracli.export.request import ExportRequest, check
from loracli.export.write import write
from loracli.hub.references import Named, parse_reference
from loracli.progress import SILENT, Bar, Progress, amount_text, drawn, takes_bar
from loracli.recipe.recipe import check_recipe_there
from loracli.system.display import count_text, names_text, path_text, repr_line
from loracli.system.document import dtype_name
from loracli.system.files import ANOTHER_NAME, check_free, holds, told_in_dry_run, whole_directory
from loracli.system.machine import in_order, one_thread_each
from loracli.system.near import did_you_mean
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

    def loading_line(self, base: Named | None = None) -> str:
        """The Python that loads it with PEFT, imports included, with the class for its task; `base` is the one that the
        user named."""
        card, saved = self.composition.card(), self.composition.saved
        local = base is not None and Path(base).expanduser().is_dir()
        fitted = self.composition.recorded  # on a directory too, whatever the adapters call it
        named = card.base_named and not local and (fitted is None or fitted.commit is not None)
        known = str(base) if local else card.base_id if named else None
        labels = None if saved is None else head_size(saved.shapes)
        return "; ".join(loading_lines(self.layout.task_type, str(self.path), known, named=named, labels=labels))


@takes_bar
def export_adapter(
    request: ExportRequest,
    output: str | Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | Bar = SILENT,
) -> Exported:
    """Writes the composition of a recipe, the sum of adapters with weights by hand, or what a method makes of them, as
    one PEFT adapter directory.

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
    check_recipe_there(request.recipe)
    for adapter in request.adapters:
        parse_reference(adapter)
    with told_in_dry_run(dry_run, "the export", progress):
        check_free(Path(output), force=force)
    refit = _refit_of(request, progress)
    if request.weights is not None:
        composition = compose_weights(request, progress)
        llama_cpp = llama_cpp_base(request, composition.adapters, composition.base.id, progress=progress)
    elif method is None:
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


def _refit_of(request: ExportRequest, progress: Progress) -> Refit | None:
    if not request.refit:
        return None
    return refit_on(
        request.fit_data,
        request.data,
        base=request.base,
        base_revision=request.base_revision,
        placement=request.placement,
        progress=progress,
    )


@dataclass(frozen=True)
class Composed:
    """Adapters with weights by hand, read and checked, to be written in any way.

    Args:
        composition: what they make: `names()`, and `compose(module)` for the update of one.
        request: what was asked for.
    """

    composition: Composition
    request: ExportRequest = field(repr=False)

    def __repr__(self) -> str:
        adapters = names_text(adapter.source.label for adapter in self.composition.adapters)
        return repr_line(self, adapters, count_text(len(self.composition.names()), "module"))

    @takes_bar
    def export(
        self,
        output: str | Path,
        *,
        force: bool = False,
        dry_run: bool = False,
        progress: Progress | Bar = SILENT,
        **how: Any,
    ) -> Exported:
        """Writes them as one PEFT adapter directory, as `export_adapter` does.

        Args:
            output, force, dry_run, progress: as there.
            how: fields of `ExportRequest` that say how it is written: merge, rank, tolerance, energy, budget,
                activation_aware, refit, dtype, profile, gguf, fit_data, data, placement.
        Raises:
            UsageError: for a field that there is not, or that says what is composed.
            LoracatError: as `export_adapter`.
        """
        progress = drawn(progress)
        _check_how(how)
        request = replace(self.request, **how)
        check(request)
        with told_in_dry_run(dry_run, "the export", progress):
            check_free(Path(output), force=force)
        adapters = self.composition.adapters
        check_fitted(request, adapters)
        return write_export(
            self.composition,
            Path(output),
            request,
            llama_cpp=llama_cpp_base(request, adapters, self.composition.base.id, progress=progress),
            refit=_refit_of(request, progress),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )


_COMPOSED = frozenset(
    "recipe adapters weights method method_options modules_to_save task_type base base_revision".split()
)


def _check_how(how: Mapping[str, Any]) -> None:
    known = {one.name for one in fields(ExportRequest)} - _COMPOSED
    for name in how:
        if name in _COMPOSED:
            raise UsageError(
                f"{name} says what is composed, which compose() has settled",
                hint=f"export_adapter(ExportRequest({name}=..., ...), DIR) composes otherwise",
            )
        if name not in known:
            near = did_you_mean(name, known) or f"it takes {', '.join(sorted(known))}"
            raise UsageError(f"Composed.export takes no {name}", hint=near)


@takes_bar
def compose(
    adapters: Sequence[Named],
    weights: Weights,
    *,
    modules_to_save: str | None = None,
    task_type: str | None = None,
    base: Named | None = None,
    base_revision: str | None = None,
    progress: Progress | Bar = SILENT,
) -> Composed:
    """The sum of adapters with weights by hand, without base model, data or fit.

        dW_l = sum_i w_li s_i B_li A_li

    Args:
        adapters: references or directories, one or more.
        weights: one number for each, the file with a table for each, or the tables themselves, by reference or place:
            `{"#1": {"default": 0.7, "mlp": 0.9}, "#2": {"default": 0.3}}`.
        modules_to_save, task_type, base, base_revision: as in `ExportRequest`.
        progress: told of downloads.
    Raises:
        UsageError: if the weights cannot be honoured.
        InputError: of the kind that fits, if adapters or base are rejected.
    """
    progress = drawn(progress)
    request = ExportRequest(
        adapters=adapters,
        weights=weights,
        modules_to_save=modules_to_save,
        task_type=task_type,
        base=base,
        base_revision=base_revision,
    )
    check(request)
    return Composed(compose_weights(request, progress), request)


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
            raise UsageError(f"{output} holds the ingredient {ingredient.reference}", hint=ANOTHER_NAME)
    composition = replace(composition, device=request.placement.algebra_device())
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
        _warn_of_noise(certificate, plan, progress)
    record = None if refitted is None else refitted.record
    return Exported(output, plan.layout, plan.dtype, plan.merged, certificate, size, composition, plan.shapes, record)


NOISE = 0.1  # relative error of what was only rounded, which is far smaller in every dtype


def _warn_of_noise(certificate: Certificate, plan: ExportPlan, progress: Progress) -> None:
    """Says where what was written has little to do with the composition."""
    most = 1.0 if plan.merged else NOISE  # 1: all of a cut's update could as well be left out
    found = sorted((m for m in certificate.modules if m.relative_error > most), key=lambda m: -m.relative_error)
    if found:
        more = "" if len(found) == 1 else f" and {count_text(len(found) - 1, 'other module')}"
        progress.warn(
            f"what was written for {found[0].name}{more} is rounding, with a relative error of "
            f"{found[0].relative_error:.2g}: the updates cancel there, or are too small for {dtype_name(plan.dtype)}"
        )


def _find_moments(composition: Composition, request: ExportRequest, progress: Progress) -> Moments:
    if request.fit_data is None:
        return recorded_moments(composition)
    found = moments_of(
        composition,
        request.fit_data,
        base=request.base,
        base_revision=request.base_revision,
        placement=request.placement,
        progress=progress,
    )
    return Moments(found, "records")


def _cut(plan: ExportPlan, composition: Composition, moments: Moments | None, workers: int) -> dict[str, Factors]:
    """Every module cut, in float64, with sqrt(S) on both sides."""
    by_module: Mapping[str, Tensor] = {} if moments is None else moments.by_module

    def work(name: str) -> Factors:
        return cut_module(composition, name, plan.cuts[name], by_module.get(name)).factors

    return dict(zip(plan.ranks, in_order(work, plan.ranks, workers=workers), strict=True))
