"""What can be folded into a base: a recipe, an adapter directory, or adapters and a method; and the base that it is
meant for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import target_of
from loracli.algebra.methods.method import Method
from loracli.composition.base_table import BaseTable
from loracli.composition.composition import MethodSource, RecipeSource, Source
from loracli.errors import BaseModelMismatch, IntegrityError, UsageError
from loracli.export.method import DEFAULTS, find_method, published_identities, read_to_compose
from loracli.fusing.plan import FusionPlan
from loracli.fusing.workplace import read_config
from loracli.model.base import BasePlan, base_modules, check_shapes, find_base, named_as, plan_base
from loracli.model.checkpoint import FLOATS, Checkpoint
from loracli.progress import Progress
from loracli.recipe.ingredients import read_ingredients
from loracli.recipe.reading import load_recipe
from loracli.recipe.recipe import BaseModule, Recipe, RecipeBase
from loracli.system.files import CONFIG_FILE


@dataclass(frozen=True)
class Composition:
    """Adapters, and what composes them.

    Args:
        adapters: the ingredients.
        recipe: whose mixing composes them, None with a method.
        method: that composes them, None with a recipe's mixing.
        base: as a recipe recorded it, None where nothing did.
    """

    adapters: tuple[LoraAdapter, ...]
    recipe: Recipe | None
    method: Method | None
    base: RecipeBase | None

    def source(self, base_id: str) -> Source:
        """What gives the update of every module."""
        if self.method is None:
            assert self.recipe is not None
            return RecipeSource(self.recipe, self.adapters)
        weights = None if self.method.weights is None else self.method.weights(len(self.adapters))
        identities = published_identities(self.adapters)
        return MethodSource(self.method, DEFAULTS, weights, self.adapters, identities, BaseTable(base_id, ()))


def read_composition(
    recipe: str | Path | Recipe | None,
    adapters: Sequence[str],
    method: str | None,
    *,
    base_given: bool,
    progress: Progress,
) -> Composition:
    """Reads the ingredients.

    Args:
        recipe: a recipe, its file, or an adapter's directory; None with a method and adapters.
        adapters: with a recipe where its ingredients are now; with a method what is composed.
        method: a name of `loracli.algebra.methods`, None for the recipe's own mixing.
        base_given: whether the user named the base.
        progress: told of downloads.
    Raises:
        UsageError: if these do not go together, or the method has to be fitted or cuts its result.
    """
    if isinstance(recipe, (str, Path)) and (Path(recipe) / CONFIG_FILE).is_file():
        if adapters or method:
            raise UsageError(f"{recipe} is an adapter: it goes without --adapters and --method")
        recipe, adapters, method = None, [str(recipe)], "sum"
    if method is None:
        if recipe is None:
            raise UsageError(
                "nothing to fuse", hint="give a RECIPE, an adapter's directory, or --method and --adapters"
            )
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        ingredients = read_ingredients(loaded, relocated=adapters, progress=progress)
        _refuse_kept(ingredients)
        return Composition(ingredients, loaded, None, loaded.base)
    found = find_method(method)
    if found.search is not None or found.cuts:
        data = " --fit-data FILE" if found.search else ""
        raise UsageError(
            f"{method} {'has to be fitted' if found.search else 'cuts its result, and only an export says how far'}",
            hint=f"loracat export --method {method}{data}, then fuse the directory that it writes",
        )
    read, given = read_to_compose(adapters, recipe, base_given=base_given, progress=progress)
    _refuse_kept(read)
    return Composition(read, None, found, given.base if given else None)


def _refuse_kept(adapters: Sequence[LoraAdapter]) -> None:
    for adapter in adapters:
        if adapter.config.lora_bias or adapter.saved:
            feature = "lora_bias" if adapter.config.lora_bias else "modules_to_save"
            raise UsageError(
                f"{adapter.reference} has {feature}, which is no update of a weight and cannot be folded in",
                hint="serve it as an adapter: loracat export --profile peft",
            )


def plan_composed_base(
    composition: Composition,
    base: str | None,
    revision: str | None,
    *,
    dequantise: bool = False,
    progress: Progress,
) -> tuple[BasePlan, Composition]:
    """The base that the composition is meant for, without its weights, with `dequantise` one that is quantised; and the
    composition by the base's names.

    Raises:
        UsageError: if the recipe was fitted on a local directory and no base is given.
        IntegrityError: if the base at the recorded commit is not the one that was recorded.
        BaseModelMismatch: if the adapters do not fit it, or it is quantised and need not be.
    """
    recorded, adapters = composition.base, composition.adapters
    asked = base
    if asked is None and recorded is not None:
        if recorded.commit is None:
            raise UsageError(f"the recipe was fitted on a local copy of {recorded.id}", hint="name it with --base")
        asked, revision = recorded.id, revision or recorded.commit
    reference = find_base(adapters, asked, revision=revision, progress=progress)
    if not dequantise and read_config(reference.path).get("quantization_config") is not None:
        raise BaseModelMismatch(
            f"the base model {reference.id} is quantised",
            hint="give the unquantised model with --base, or compute its weights with --dequantise",
        )
    plan = plan_base(reference, dequantised=dequantise)
    if recorded is not None:
        found = hashlib.sha256((plan.reference.path / "config.json").read_bytes()).hexdigest()
        if found != recorded.config_sha256:
            said = f"config.json of {plan.reference.id} is not the one that the weights were fitted on"
            if base is None:
                raise IntegrityError(said, where=str(plan.reference.path))
            progress.warn(f"{said}; only shapes are checked")
    composition = replace(composition, adapters=named_as(plan.skeleton, adapters))
    check_shapes(plan.skeleton, composition.adapters)
    return plan, composition


def changed_modules(plan: BasePlan, source: Source) -> list[BaseModule]:
    """The modules that the composition changes, as the base has them.

    Raises:
        BaseModelMismatch: if one is no linear layer, embedding or parameter with experts.
    """
    table = {module.name: module for module in base_modules(plan.skeleton, source.adapters)}
    names = list(dict.fromkeys(target_of(name) for name in source.names()))
    for name in names:
        if name not in table or table[name].kind == "other":
            raise BaseModelMismatch(
                f"the update of {name} cannot be folded in: it is no linear layer, embedding or experts",
                hint="serve it as an adapter: loracat export",
            )
    return [table[name] for name in names]


def check_base_copies(adapters: Sequence[LoraAdapter], checkpoint: Checkpoint, plan: FusionPlan) -> None:
    """Raises BaseModelMismatch if an adapter carries a matrix of the base that is not the base's own."""
    sources = {t.module: t.source for shard in plan.shards for t in shard.tensors if t.module is not None}
    for adapter in adapters:
        for name in adapter.base_copies:
            copy, source = adapter.read_base_copy(name), sources[name]
            if source.dtype not in FLOATS:
                raise BaseModelMismatch(
                    f"{adapter.reference} carries its own matrix for {name}, and that of the base model is quantised",
                    hint="give the unquantised model with --base",
                )
            with checkpoint.open(source) as rows:
                own = rows.read(0, source.shape[0])
            if copy.shape != own.shape or not torch.equal(copy.to(own.dtype), own):
                raise BaseModelMismatch(
                    f"{adapter.reference} carries its own matrix for {name}, and it differs from the base model's",
                    hint="the adapter was trained with a changed embedding, which an adapter cannot carry",
                )
