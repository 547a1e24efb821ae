"""What an export writes: the rank of every module, and what goes where in its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.adapters.adapter import kernels_of
from loracli.adapters.kinds import BaseModule
from loracli.adapters.names import PREFIX, target_of
from loracli.algebra.truncate import rank_for_energy, rank_within, ranks_for_bytes, ranks_for_energy, spectrum
from loracli.composition.composition import Composition
from loracli.errors import RecipeError, UsageError
from loracli.export.gguf import LlamaCppBase, gguf_names
from loracli.export.layout import PROFILES, Layout, Place, choose_layout, ranks_of_targets
from loracli.export.module import ModuleExport, module_export
from loracli.export.request import OUTPUT_DTYPES, ExportRequest
from loracli.progress import Progress
from loracli.system.machine import in_order
from loracli.system.tensor_file import file_size

TASK = "export"


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes.

    Args:
        layout: of the adapter.
        dtype: of its tensors.
        rank: that `merge` cuts to unless ranks are chosen.
        ranks: of the update of each module that the composition changes.
        cuts: what these are cut to; none of an update that is written whole.
        held: modules whose rank is not known beforehand: composed, and held in the output's dtype.
        places: the factors in the tensor file, by the name of their tensor.
        whole: the parameters that replace the base's: their paths, by the name of their tensor.
        shapes: of every tensor in the file.
        modules: of the base, by name.
        llama_cpp: how llama.cpp has the base, None without a GGUF file.
        gguf: its names of the modules.
        merged: whether something is cut off.
    """

    layout: Layout
    dtype: torch.dtype
    rank: int
    ranks: Mapping[str, int]
    cuts: Mapping[str, int]
    held: Mapping[str, ModuleExport]
    places: Mapping[str, Place]
    whole: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, BaseModule]
    llama_cpp: LlamaCppBase | None
    gguf: Mapping[str, str]
    merged: bool


def plan_layout(
    composition: Composition,
    request: ExportRequest,
    llama_cpp: LlamaCppBase | None,
    progress: Progress,
    *,
    workers: int,
) -> ExportPlan:
    """Decides on ranks and layout.

    Args:
        composition: what is exported.
        request: how.
        llama_cpp: how llama.cpp has the base, None without a GGUF file.
        progress: told of modules that are composed for it.
        workers: modules that are composed at once.
    Raises:
        RecipeError: if nothing is known of a module of the base that an adapter changes.
        UsageError: if the profile, the budget or the GGUF file cannot be had, or a value overflows the dtype.
    """
    dtype = OUTPUT_DTYPES[request.dtype] if request.dtype else composition.dtype
    modules = {module.name: module for module in composition.base.modules}
    names = composition.names()
    missing = sorted({target_of(name) for name in names} - modules.keys())
    if missing:
        raise RecipeError(f"the recipe's table of base modules lacks {missing[0]}, which an adapter changes")
    if request.rank is not None and (request.merge or request.method is not None):
        _check_rank(composition, request.rank, modules)
    progress.begin(TASK, len(names) * (2 if request.rank_rule else 1), "modules")
    rank = request.rank or max(max(adapter.ranks) for adapter in composition.adapters)
    cuts = dict.fromkeys(names, rank) if request.merge else {}
    uniform = request.rank if request.merge else None
    if request.rank_rule:

        def decomposed(name: str) -> Tensor:
            found = spectrum(composition.compose(name).factors.on(composition.device)).cpu()
            progress.advance(TASK, 1)
            return found

        spectra = dict(zip(names, in_order(decomposed, names, workers=workers), strict=True))
        cuts, uniform = _choose_cuts(composition, request, spectra, modules, dtype)
    ranks: dict[str, int] = {}
    held: dict[str, ModuleExport] = {}
    for name in names:
        total, module = composition.known_rank(name), modules[target_of(name)]
        if total is None and not request.rank_rule:
            held[name] = module_export(composition, name, dtype, rank=cuts.get(name))
            ranks[name] = held[name].factors.rank
            progress.advance(TASK, 1)
        elif name in cuts:
            ranks[name] = min(cuts[name], total or cuts[name], module.in_features, module.out_features)
        else:
            assert total is not None
            ranks[name] = total
    layout = layout_of(composition, ranks, request.profile, uniform)
    kept = "lora_bias" if layout.lora_bias else "modules_to_save" if layout.modules_to_save else None
    if llama_cpp is not None and kept:
        raise UsageError(f"a GGUF adapter cannot hold the {kept} of this composition", hint="leave out --gguf")
    if llama_cpp is not None and dtype == torch.float64:
        raise UsageError("a GGUF adapter cannot hold the float64 of these adapters", hint="give --dtype float32")
    return ExportPlan(
        layout=layout,
        dtype=dtype,
        rank=rank,
        ranks=ranks,
        cuts=cuts,
        held=held,
        places=layout.places(modules),
        whole=_whole(composition),
        shapes=_shapes(layout, composition, modules),
        modules=modules,
        llama_cpp=llama_cpp,
        gguf={} if llama_cpp is None else gguf_names(llama_cpp, {name: modules[name] for name in layout.ranks}),
        merged=request.merge or any(made.certificate.kept_energy < 1 for made in held.values()),
    )


def _check_rank(composition: Composition, rank: int, modules: Mapping[str, BaseModule]) -> None:
    """Raises UsageError for a rank above the sum of the adapters' ranks and above that of every update."""
    most = sum(max(adapter.ranks) for adapter in composition.adapters)
    for name in composition.names():
        module, total = modules[target_of(name)], composition.known_rank(name)
        most = max(most, total or min(module.in_features, module.out_features))
    if rank > most:
        raise UsageError(
            f"--rank {rank} is above {most}, and no update here can need more: the rest would be zeros",
            hint=f"give at most --rank {most}, or leave --rank out",
        )


def layout_of(
    composition: Composition, ranks: Mapping[str, int], profile: str | None, rank: int | None = None
) -> Layout:
    """The layout of a composition; the arguments are those of `choose_layout`."""
    return choose_layout(
        composition.base.modules,
        ranks,
        next((name for name in PROFILES if name == profile), None),
        rank=rank,
        lora_bias=next((adapter.reference for adapter in composition.adapters if adapter.config.lora_bias), None),
        saved=() if composition.saved is None else composition.saved.modules,
        kernels=kernels_of(composition.adapters),
        task_type=composition.task_type,
    )


def _whole(composition: Composition) -> dict[str, str]:
    return {} if composition.saved is None else {PREFIX + path: path for path in composition.saved.sources}


def _shapes(layout: Layout, composition: Composition, modules: Mapping[str, BaseModule]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {name: place.shape for name, place in layout.places(modules).items()}
    saved = composition.saved
    return shapes if saved is None else shapes | {n: saved.shapes[path] for n, path in _whole(composition).items()}


def _choose_cuts(
    composition: Composition,
    request: ExportRequest,
    spectra: dict[str, Tensor],
    modules: Mapping[str, BaseModule],
    dtype: torch.dtype,
) -> tuple[dict[str, int], int | None]:
    """The ranks to cut to, and the one rank of a uniform layout.

    A layout of one rank takes one for all, because less would be filled up; `peft` takes one for each module, and for
    the experts of a parameter or the groups of a convolution together.
    """
    most = {name: len(squares) for name, squares in spectra.items()}

    def size(ranks: Mapping[str, int], rank: int | None = None) -> int:
        layout = layout_of(composition, ranks, request.profile, rank)
        return file_size(_shapes(layout, composition, modules), dtype)

    if layout_of(composition, most, request.profile).profile != "peft":
        uniform = _choose_uniform_rank(request, spectra, lambda rank: size(most, rank))
        return dict.fromkeys(spectra, uniform), uniform
    updates = Counter(target_of(name) for name in spectra)
    costs = {
        name: count * (modules[name].in_features + modules[name].out_features) * dtype.itemsize
        for name, count in updates.items()
    }

    def cuts(ranks: Mapping[str, int]) -> dict[str, int]:
        of_targets = ranks_of_targets(ranks)
        return {name: of_targets[target_of(name)] for name in spectra}

    # A tolerance holds for each update; the others for what a file has.
    together = spectra if request.tolerance is not None else spectra_of_targets(spectra)
    return cuts(_choose_ranks(request, together, costs, lambda ranks: size(cuts(ranks)))), None


def _choose_ranks(
    request: ExportRequest,
    spectra: Mapping[str, Tensor],
    costs: Mapping[str, int],
    size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """A rank for each module, at least 1.

    Args:
        request: with what they have to satisfy.
        spectra: squared singular values of each module.
        costs: bytes of one rank of each module.
        size: of the tensor file with these ranks.
    Raises:
        UsageError: if the smallest file is larger than the budget.
    """
    if request.tolerance is not None:
        return {name: rank_within(squares, request.tolerance) for name, squares in spectra.items()}
    if request.energy is not None:
        return ranks_for_energy(spectra, costs, request.energy)
    assert request.budget is not None
    least, most = dict.fromkeys(spectra, 1), {name: len(squares) for name, squares in spectra.items()}
    if size(least) > request.budget:
        raise _too_small(request.budget, size(least))
    for extreme in (least, most):  # the header's length depends on the digits of the ranks, a little
        header = size(extreme) - sum(costs[name] * rank for name, rank in extreme.items())
        if request.budget - header >= sum(costs.values()):
            ranks = ranks_for_bytes(spectra, costs, request.budget - header)
            if size(ranks) <= request.budget:
                return ranks
    return least


def spectra_of_targets(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared singular values as a file can be cut: the experts of a parameter, or the groups of a convolution, have
    one rank, so its k-th value is the sum of theirs."""
    updates: dict[str, list[Tensor]] = {}
    for name, squares in spectra.items():
        updates.setdefault(target_of(name), []).append(squares)
    return {
        name: torch.nn.utils.rnn.pad_sequence(several).sum(dim=1) if len(several) > 1 else several[0]
        for name, several in updates.items()
    }


def _choose_uniform_rank(request: ExportRequest, spectra: Mapping[str, Tensor], size: Callable[[int], int]) -> int:
    """One rank for all modules, at least 1; the arguments are those of `_choose_ranks`.

    Raises:
        UsageError: if the smallest file is larger than the budget.
    """
    if request.tolerance is not None:
        return max(rank_within(squares, request.tolerance) for squares in spectra.values())
    if request.energy is not None:
        return rank_for_energy(list(spectra.values()), request.energy)
    assert request.budget is not None
    most = max(1, max(int((squares > 0).sum()) for squares in spectra.values()))
    fitting = [rank for rank in range(1, most + 1) if size(rank) <= request.budget]
    if not fitting:
        raise _too_small(request.budget, size(1))
    return fitting[-1]


def _too_small(budget: int, least: int) -> UsageError:
    return UsageError(
        f"--budget {budget} bytes is too small: at rank 1 the tensor file has {least} bytes",
        hint=f"give at least --budget {least}",
    )
