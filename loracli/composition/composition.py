"""A composition: adapters and what makes one update of theirs, from a recipe or by a method, with its origin. Algebra
on factors, module by module, without base model or data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, Protocol

import torch

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter, kernels_of, module_names, widest_dtype
from loracli.adapters.claims import CAUSAL_LM, agreed_task, stated_licences
from loracli.adapters.kinds import BaseModule
from loracli.adapters.saved_modules import SavedModules
from loracli.algebra.concatenate import concatenate, without_zeros
from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.composition.base_table import BaseTable
from loracli.composition.card import CardText, method_card, recipe_card
from loracli.errors import RecipeError, UsageError
from loracli.hub.references import BaseClaim, is_repo_id
from loracli.recipe.ingredients import identity_of
from loracli.recipe.recipe import Recipe, without_paths
from loracli.recipe.record import INLINE_KINDS, RecipeAdapter, RecipeBase, RecipeMixing, group_name
from loracli.recipe.tensors import composed_update
from loracli.system.document import encode


def composed_modules(recipe: Recipe, adapters: Sequence[LoraAdapter]) -> tuple[str, ...]:
    """The modules that any of the adapters changes, sorted.

    Raises:
        RecipeError: if the recipe has tensors for another module, which would be left out.
    """
    modules = module_names(adapters)
    if recipe.mixing.kind not in INLINE_KINDS:
        unknown = sorted(recipe.mixing.weights.keys() - set(modules))
        if unknown:
            raise RecipeError(f"the recipe has tensors for {unknown[0]}, which no adapter changes")
    return modules


def compose_module(mixing: RecipeMixing, adapters: Sequence[LoraAdapter], module: str) -> Factors:
    """The update of one module in float64, scaling 1, concatenated.

    lora_A (R, in) as stored and lora_B = B M (out, R), with sum_i w_li s_i B_i A_i for a weight per adapter, and the
    bias sum_i w_li s_i b_i of adapters with lora_bias; with `factors` the trained lora_A and lora_B.

    Raises:
        RecipeError: if the recipe has no weight for an adapter that changes the module, or no tensor that fits.
    """
    if mixing.kind not in INLINE_KINDS:
        biased = next((a for a in adapters if module in a.modules and a.modules[module].factors.bias is not None), None)
        if biased is not None:
            raise RecipeError(f"the recipe's {mixing.kind} mixing cannot weigh the lora_bias of {biased.reference}")
        updates = [adapter.modules[module].factors for adapter in adapters if module in adapter.modules]
        return composed_update(mixing.kind, mixing.tensors, module, updates)
    return concatenate(*weighted_updates(mixing, adapters, module))


def weighted_updates(
    mixing: RecipeMixing, adapters: Sequence[LoraAdapter], module: str
) -> tuple[list[Factors], list[float]]:
    """The updates of one module and their weights, of a mixing with a weight per adapter; adapters of weight 0 are left
    out, so that they cost no rank.

    Raises:
        RecipeError: if the recipe has no weight for an adapter that changes the module.
    """
    try:
        weights = mixing.weights[group_name(module, mixing.kind)]
    except KeyError:
        raise RecipeError(f"the recipe has no weights for {module}") from None
    updates, chosen = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if module not in adapter.modules:
            continue
        if weight is None:
            raise RecipeError(f"the recipe has no weight of {adapter.reference} for {module}")
        updates.append(adapter.modules[module].factors)
        chosen.append(weight)
    return without_zeros(updates, chosen)


def composed_rank(recipe: Recipe, adapters: Sequence[LoraAdapter], module: str) -> int:
    """The rank of `compose_module`: the sum of the ranks of adapters whose weight is not 0, or that of the trained
    factors."""
    if recipe.mixing.kind in INLINE_KINDS:
        return sum(update.rank for update in weighted_updates(recipe.mixing, adapters, module)[0])
    if recipe.mixing.kind == "factors":
        return compose_module(recipe.mixing, adapters, module).rank
    return sum(adapter.modules[module].factors.rank for adapter in adapters if module in adapter.modules)


def composed_dtype(recipe: Recipe, adapters: Sequence[LoraAdapter]) -> torch.dtype:
    """The dtype that keeps what a composition is made of: the adapters' widest, or that of the trained factors."""
    if recipe.mixing.kind == "factors":
        return torch.float32
    return widest_dtype([adapter.dtype for adapter in adapters])


class Source(Protocol):
    """A composition that can be exported."""

    @property
    def adapters(self) -> tuple[LoraAdapter, ...]:
        """Its ingredients."""

    @property
    def saved(self) -> SavedModules | None:
        """Modules that replace the base's, None without any."""

    @property
    def base_id(self) -> str:
        """Name of the base model."""

    @property
    def table(self) -> tuple[BaseModule, ...]:
        """Every module of the base that goes by the last name of a changed one."""

    @property
    def task_type(self) -> str | None:
        """PEFT's name of its task, None without one."""

    @property
    def dtype(self) -> torch.dtype:
        """That keeps what it is made of."""

    def names(self) -> tuple[str, ...]:
        """The modules that it changes, sorted; experts in their own order."""

    def known_rank(self, module: str) -> int | None:
        """The rank of `compose`, None where only doing it tells."""

    def weighted(self, module: str) -> tuple[list[Factors], list[float]] | None:
        """The updates and weights that a module's update is the sum of, None where it is made otherwise."""

    def compose(self, module: str) -> Merged:
        """The update of a module in float64, with scaling 1."""

    def document(self) -> dict[str, Any]:
        """Its origin, for `loracat.json`, as it may be published."""

    def card(self) -> CardText:
        """Its origin, for the model card, as it may be published."""


@dataclass(frozen=True)
class RecipeSource:
    """What a recipe says of its adapters."""

    recipe: Recipe
    adapters: tuple[LoraAdapter, ...]
    saved: SavedModules | None = None

    @property
    def base_id(self) -> str:
        return self.recipe.base.id

    @property
    def table(self) -> tuple[BaseModule, ...]:
        return self.recipe.modules

    @property
    def task_type(self) -> str | None:
        return task_of_recipe(self.adapters)

    @property
    def dtype(self) -> torch.dtype:
        return composed_dtype(self.recipe, self.adapters)

    def names(self) -> tuple[str, ...]:
        return composed_modules(self.recipe, self.adapters)

    def known_rank(self, module: str) -> int | None:
        return composed_rank(self.recipe, self.adapters, module)

    def weighted(self, module: str) -> tuple[list[Factors], list[float]] | None:
        mixing = self.recipe.mixing
        return weighted_updates(mixing, self.adapters, module) if mixing.kind in INLINE_KINDS else None

    def compose(self, module: str) -> Merged:
        return Merged(compose_module(self.recipe.mixing, self.adapters, module))

    def document(self) -> dict[str, Any]:
        return {
            "recipe": json.loads(self.recipe.public().to_json()),
            "recipe_sha256": sha256(self.recipe.to_json().encode()).hexdigest(),
        }

    def card(self) -> CardText:
        return recipe_card(self.recipe.public(), stated_licences(self.adapters))


@dataclass(frozen=True)
class MethodSource:
    """What a method makes of some adapters.

    Args:
        method: that composes.
        options: of it.
        weights: one for each adapter, None of a method that merges.
        adapters: N of them.
        identities: of them, by the names that may be published.
        base: what is known of the base model.
        saved: modules that replace the base's, None without any.
        task_type: PEFT's name of its task, None without one.
        task_asked: whether the user chose it.
    """

    method: Method
    options: MethodOptions
    weights: tuple[float, ...] | None
    adapters: tuple[LoraAdapter, ...]
    identities: tuple[RecipeAdapter, ...]
    base: BaseTable
    saved: SavedModules | None = None
    task_type: str | None = None
    task_asked: bool = False

    @property
    def base_id(self) -> str:
        return self.base.id

    @property
    def table(self) -> tuple[BaseModule, ...]:
        return self.base.modules

    @property
    def dtype(self) -> torch.dtype:
        return widest_dtype([adapter.dtype for adapter in self.adapters])

    def names(self) -> tuple[str, ...]:
        return module_names(self.adapters)

    def known_rank(self, module: str) -> int | None:
        weighted = self.weighted(module)
        return None if weighted is None else sum(update.rank for update in weighted[0])

    def weighted(self, module: str) -> tuple[list[Factors], list[float]] | None:
        if self.weights is None:
            return None
        here = [(a, w) for a, w in zip(self.adapters, self.weights, strict=True) if module in a.modules]
        return without_zeros([adapter.modules[module].factors for adapter, _ in here], [weight for _, weight in here])

    def compose(self, module: str) -> Merged:
        weighted = self.weighted(module)
        if weighted is not None:
            return Merged(concatenate(*weighted))
        updates = [a.modules[module].factors if module in a.modules else None for a in self.adapters]
        return self.method.merge_updates(
            [None if update is None else update.loaded() for update in updates], self.options
        )

    def document(self) -> dict[str, Any]:
        return {
            "method": {"name": self.method.name, "options": self.taken(), "weights": self.weights},
            "base": {"id": self.base.id},
            **({"bypassed": list(self.base.bypassed)} if self.base.bypassed else {}),
            **({} if self.saved is None else {"modules_to_save": self.saved.policy}),
            "adapters": [encode(identity) for identity in self.identities],
            "versions": {"loracat": __version__, "torch": torch.__version__},
        }

    def taken(self) -> dict[str, Any]:
        """The options that the method takes, as they were set; null for its own default."""
        return {name: value for name, value in asdict(self.options).items() if name in takes(self.method)}

    def card(self) -> CardText:
        licences = stated_licences(self.adapters)
        saved = None if self.saved is None else self.saved.policy
        named = (self.method, self.taken(), self.weights, self.base.id, self.identities, licences, saved)
        task = self.task_type if self.task_asked else None
        return method_card(*named, bypassed=self.base.bypassed, task_type=task)


def task_of_recipe(adapters: Sequence[LoraAdapter]) -> str | None:
    """That of what a recipe's adapters make: a fit runs causal language models, and nothing with a convolution."""
    return agreed_task(adapters) if kernels_of(adapters) else CAUSAL_LM


def recorded_base(source: Source, base: str | None) -> str | BaseClaim | None:
    """The base that the user names, else the recipe's at its commit; None for what the adapters agree on."""
    return base or (source.recipe.base.claim if isinstance(source, RecipeSource) else None)


def base_of_config(recorded: RecipeBase, base: str | None) -> str | BaseClaim:
    """Where the config of a recipe's base is to be had: from the base that the user names, else from the Hub.

    Raises:
        UsageError: if the recipe was fitted on a local directory that has no name on the Hub either.
    """
    if base is None and recorded.commit is None and not is_repo_id(recorded.id):
        raise UsageError(f"the recipe was fitted on the local directory {recorded.id}", hint="name it with --base")
    return base or BaseClaim(recorded.id, recorded.commit)


def takes(method: Method) -> frozenset[str]:
    """The options that it takes; `rank` where it cuts its result itself."""
    return method.takes | ({"rank"} if method.cuts else set())


def identities_of(adapters: Sequence[LoraAdapter], labels: dict[str, str]) -> tuple[RecipeAdapter, ...]:
    """The adapters as they may be published, by their labels."""
    return tuple(
        without_paths(replace(identity_of(adapter, adapter.reference), reference=labels[adapter.reference]))
        for adapter in adapters
    )
