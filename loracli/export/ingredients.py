"""The adapters that a recipe names, found again and proven to be the same bytes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from loracli.adapters.adapter import LoraAdapter, open_adapter
from loracli.adapters.fused_experts import as_fused_experts
from loracli.adapters.recorded import check_hashes, recorded_reference
from loracli.adapters.saved_modules import REFUSE
from loracli.adapters.text_model import as_text_model
from loracli.errors import UsageError
from loracli.hub.fetch import fetch_adapter
from loracli.progress import SILENT, Progress
from loracli.recipe import BaseModule, Recipe, RecipeAdapter
from loracli.system.threads import in_order


def read_ingredients(
    recipe: Recipe, *, relocated: Sequence[str] = (), progress: Progress = SILENT
) -> tuple[LoraAdapter, ...]:
    """Opens the adapters of a recipe, in its order; `loaded()` of one brings its factors into memory.

    Args:
        recipe: names them.
        relocated: references to use instead, one for each, where the directories have moved.
        progress: told of downloads.
    Raises:
        IntegrityError: if a file is not the one that the weights were fitted for.
        UsageError: if there are not as many in `relocated` as in the recipe, or in another order.
    """
    read = read_recorded(recipe.adapters, recipe.folder, relocated=relocated, progress=progress)
    return tuple(by_names_of(recipe.modules, adapter) for adapter in read)


def by_names_of(modules: Sequence[BaseModule], adapter: LoraAdapter) -> LoraAdapter:
    """The adapter by the names of a recipe's table, as a fit took it."""
    outs = {module.name: module.out_features for module in modules if module.kind == "experts"}
    return as_fused_experts(as_text_model(adapter, {module.name for module in modules}), outs)


def read_recorded(
    recorded: Sequence[RecipeAdapter], folder: Path, *, relocated: Sequence[str] = (), progress: Progress = SILENT
) -> tuple[LoraAdapter, ...]:
    """As `read_ingredients`, of the adapters themselves; `folder` is where local references are relative to."""
    if relocated and len(relocated) != len(recorded):
        raise UsageError(
            f"the recipe has {len(recorded)} adapters and {len(relocated)} were given",
            hint="give them all in the recipe's order, and a recipe's name before --adapters: "
            + ", ".join(a.reference for a in recorded),
        )
    found = [
        fetch_adapter(relocated[number] if relocated else recorded_reference(wanted, folder), progress=progress)
        for number, wanted in enumerate(recorded)
    ]
    result = tuple(in_order(open_adapter, found, workers=torch.get_num_threads()))
    if relocated:
        _check_order(recorded, result, relocated)
    for wanted, adapter in zip(recorded, result, strict=True):
        check_hashes(wanted, adapter.sha256, adapter.path)
    return result


def _check_order(recorded: Sequence[RecipeAdapter], read: Sequence[LoraAdapter], given: Sequence[str]) -> None:
    """Raises UsageError if all the recorded adapters were given, in another order than the recorded one."""
    hashes = [dict(adapter.sha256) for adapter in read]
    wanted = [dict(adapter.sha256) for adapter in recorded]
    if hashes != wanted and all(hashes.count(one) == wanted.count(one) for one in wanted):
        right = [given[hashes.index(one)] for one in wanted]
        raise UsageError(
            "--adapters names the ingredients in another order than the recipe's",
            hint=f"give them as --adapters {shlex.join(right)}",
        )


def recorded_policy(recipe: Recipe) -> str:
    """What the recipe says of modules that its adapters saved whole; recipes of older versions have none."""
    return str(recipe.fit.settings.get("modules_to_save", REFUSE))
