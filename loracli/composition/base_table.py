"""Which modules of the base an export has to name, without loading the base: an export pads those that no adapter
changes, so it has to know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracli.adapters.adapter import LoraAdapter, LoraModule, kernels_of
from loracli.adapters.claims import CAUSAL_LM
from loracli.adapters.kinds import BaseModule, kind_of
from loracli.adapters.names import leaf
from loracli.adapters.on_base import named_apart, turned_by_version
from loracli.errors import UsageError
from loracli.hub.references import BaseClaim, Named, agreed_base
from loracli.progress import SILENT, Progress


@dataclass(frozen=True)
class BaseTable:
    """What an export says of the base.

    Args:
        id: the name that it carries.
        modules: all that go by the last name of a changed one.
        bypassed: changed modules whose weight it reads without calling the layer, as far as its config was read.
    """

    id: str
    modules: tuple[BaseModule, ...]
    bypassed: tuple[str, ...] = ()


def base_table(
    adapters: Sequence[LoraAdapter],
    base: Named | None = None,
    *,
    revision: str | None = None,
    task: str | None = None,
    progress: Progress = SILENT,
) -> tuple[BaseTable, tuple[LoraAdapter, ...]]:
    """The table, and the adapters by its names.

    Args:
        adapters: that are composed.
        base: a Hub id or directory, None for the one that all adapters name.
        revision: of a base on the Hub.
        task: PEFT's name of what the base computes, None for a causal language model.
        progress: told of a download.
    Raises:
        IncompatibleAdapters: if they name no base or different ones, and none is given.
        BaseModelMismatch: if an adapter does not fit the base that is given, or carries another matrix for a module.
        UsageError: if an adapter carries a copy of a matrix of the base, and none is given to compare it with.
    """
    carrying = [adapter for adapter in adapters if adapter.base_copies]
    if carrying and base is None:
        raise UsageError(
            f"{carrying[0].reference} carries a copy of the base's {next(iter(carrying[0].base_copies))}, which has to "
            "be compared with the base",
            hint="give the base with --base",
        )
    known = None if base is not None else table_of_adapters(adapters)
    if known is not None:
        return known, tuple(adapters)
    from loracli.fitting.reach import bypassed_of
    from loracli.model.base import plan_base
    from loracli.model.checkpoint import read_checkpoint
    from loracli.model.modules import base_modules, check_base_copies, check_shapes, named_as, stored_weights
    from loracli.model.reference import find_base

    reference = find_base(adapters, base, revision=revision, progress=progress)
    skeleton = plan_base(reference, task=task).skeleton
    named = named_as(skeleton, adapters)
    check_shapes(skeleton, named)
    if carrying:
        weights = stored_weights(read_checkpoint(reference.path), skeleton)
        check_base_copies([adapter for adapter in named if adapter.base_copies], weights)
    targets = {name for adapter in named for name in adapter.targets}
    bypassed: tuple[str, ...] = ()
    if task in (None, CAUSAL_LM):  # which alone is tried
        bypassed = bypassed_of(sorted(targets), reference, progress)
    return BaseTable(reference.id, base_modules(skeleton, named), bypassed), named


def table_of_adapters(adapters: Sequence[LoraAdapter]) -> BaseTable | None:
    """The table without the base: where each last name was targeted as such by one of the adapters, so that it stands
    wherever the base has it, and where a convolution is changed, so that nothing is padded. None where only the base
    tells: of other names, of layers that adapters name in different ways, and how older PEFT has the factors of
    experts.

    Raises:
        IncompatibleAdapters: if the adapters name no base or different ones.
    """
    wanted = {leaf(m.name) for adapter in adapters for m in adapter.modules.values() if kind_of(m).padded}
    whole = frozenset[str]().union(*(adapter.config.whole_names for adapter in adapters))
    convolutions = kernels_of(adapters)
    older = any(
        kind_of(module).of_experts and turned_by_version(adapter.config.peft_version, transposed=False)
        for adapter in adapters
        for module in adapter.modules.values()
    )
    apart_names = not convolutions and named_apart(adapters)
    if older or apart_names or not (wanted <= whole or convolutions):
        return None
    claims = {a.reference: BaseClaim(a.config.base_model, a.config.base_revision) for a in adapters}
    named = "write its name into base_model_name_or_path of their adapter_config.json"
    found = agreed_base(claims, way_out=named if convolutions else "give the base with --base")
    return BaseTable(str(found.base_model), modules_of(adapters))


def modules_of(adapters: Sequence[LoraAdapter]) -> tuple[BaseModule, ...]:
    """The base's modules as far as adapters themselves tell."""
    known: dict[str, BaseModule] = {}
    for adapter in adapters:
        for name, modules in adapter.targets.items():
            experts = len(modules) if kind_of(modules[0]).of_experts else 0
            known.setdefault(name, _base_module(name, modules[0], experts, conv1d=adapter.config.fan_in_fan_out))
    return tuple(known[name] for name in sorted(known))


def _base_module(name: str, module: LoraModule, experts: int, *, conv1d: bool) -> BaseModule:
    kind = "conv1d" if conv1d and module.kind == "linear" else module.kind
    return BaseModule(name, kind, module.factors.in_features, module.factors.out_features, experts)
