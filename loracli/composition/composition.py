"""A composition: adapters and what makes one update of theirs in every module, with its origin. Algebra on factors,
module by module, without base model or data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter, kernels_of, module_names, widest_dtype
from loracli.adapters.claims import CAUSAL_LM, agreed_task, stated_licences
from loracli.adapters.names import target_of
from loracli.adapters.saved_modules import SavedModules
from loracli.algebra.factors import Factors, concatenate, without_zeros
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.composition.base_table import BaseTable
from loracli.composition.card import CardOrigin, CardText, method_card, recipe_card, weights_card
from loracli.composition.weights import ModuleWeights, equal_weights, weight_tables
from loracli.errors import RecipeError, UsageError
from loracli.hub.references import BaseClaim, Named, is_repo_id
from loracli.recipe.ingredients import identity_of
from loracli.recipe.recipe import Recipe, labels_of, without_paths
from loracli.recipe.record import INLINE_KINDS, RecipeActivations, RecipeAdapter, RecipeBase, RecipeMixing, group_name
from loracli.recipe.tensors import composed_update
from loracli.system.display import count_text, names_text, repr_line
from loracli.system.document import encode

DEFAULTS = MethodOptions()
CPU = torch.device("cpu")


def _unknown_rank(adapters: Sequence[LoraAdapter], module: str) -> None:
    """Of an update whose rank only doing it tells."""


@dataclass(frozen=True, eq=False)
class Composition:
    """Adapters, and what makes one update of theirs in every module.

        dW = sum_i w_i s_i B_i A_i    with `weights_of`, else what `update_of` makes of the adapters

    What it says of itself follows from these fields, so that another one is had by `dataclasses.replace`.

    Args:
        adapters: N of them.
        base: what is known of the base model.
        dtype: that keeps what it is made of.
        document_of, card_of: its origin, for `loracat.json` and for the model card.
        weights_of: of a module: one weight for each adapter, None for one that does not change it. None where the
            update is no weighted sum.
        update_of: of the adapters and a module: its update in float64, with scaling 1. None where there are weights.
        rank_of: of the adapters and a module: the rank of `update_of`, None where only doing it tells.
        method: that composes, None without one.
        fitted: whether a recipe says what it is.
        product: whether lora_B comes from a product of matrices that a fit found.
        activations: the activation covariance that a fit left, None without one.
        recorded: the base of the recipe that names the adapters, None without one.
        saved: modules that replace the base's, None without any.
        task_type: PEFT's name of its task, None without one.
        task_asked: whether the user chose it.
        device: that methods and cuts compute on; what they give is on the CPU.
    """

    adapters: tuple[LoraAdapter, ...]
    base: BaseTable
    dtype: torch.dtype
    document_of: Callable[[Composition], dict[str, Any]] = field(repr=False)
    card_of: Callable[[Composition], CardText] = field(repr=False)
    weights_of: Callable[[str], Sequence[float | None]] | None = field(default=None, repr=False)
    update_of: Callable[[Sequence[LoraAdapter], str], Merged] | None = field(default=None, repr=False)
    rank_of: Callable[[Sequence[LoraAdapter], str], int | None] = field(default=_unknown_rank, repr=False)
    method: Method | None = None
    fitted: bool = False
    product: bool = False
    activations: RecipeActivations | None = field(default=None, repr=False)
    recorded: RecipeBase | None = None
    saved: SavedModules | None = None
    task_type: str | None = None
    task_asked: bool = False
    device: torch.device = field(default=CPU, repr=False)

    def __repr__(self) -> str:
        adapters = names_text(adapter.source.label for adapter in self.adapters)
        return repr_line(self, adapters, count_text(len(self.names()), "module"))

    def names(self) -> tuple[str, ...]:
        """The modules that it changes, sorted; experts and groups in their own order."""
        return module_names(self.adapters)

    def weighted(self, module: str) -> tuple[list[Factors], list[float]] | None:
        """The updates and weights that a module's update is the sum of, None where it is made otherwise.

        Raises:
            RecipeError: if there is no weight for an adapter that changes the module.
        """
        return None if self.weights_of is None else _weighted(self.adapters, self.weights_of(module), module)

    def known_rank(self, module: str) -> int | None:
        """The rank of `compose`, None where only doing it tells."""
        weighted = self.weighted(module)
        return self.rank_of(self.adapters, module) if weighted is None else sum(update.rank for update in weighted[0])

    def compose(self, module: str) -> Merged:
        """The update of a module in float64, with scaling 1.

        Raises:
            RecipeError: as `weighted`, or if a recipe has no tensor that fits.
            ValueError: if a method does not suit the adapters, with the reason.
        """
        weighted = self.weighted(module)
        if weighted is not None:
            return Merged(concatenate(*weighted))
        assert self.update_of is not None
        if self.device == CPU:
            return self.update_of(self.adapters, module)
        made = self.update_of([_placed(adapter, module, self.device) for adapter in self.adapters], module)
        return replace(made, factors=made.factors.on(CPU))

    @property
    def merges(self) -> Method | None:
        """The method that makes each update of the factors themselves, None where weights or a fit do."""
        return self.method if self.weights_of is None else None

    def document(self) -> dict[str, Any]:
        """Its origin, for `loracat.json`, as it may be published."""
        return self.document_of(self)

    def card(self) -> CardText:
        """Its origin, for the model card, as it may be published."""
        return self.card_of(self)


def from_recipe(recipe: Recipe, adapters: Sequence[LoraAdapter], saved: SavedModules | None = None) -> Composition:
    """What a recipe says of its adapters.

    Raises:
        RecipeError: if it has tensors for another module, which would be left out.
    """
    mixing = recipe.mixing
    _check_tensors(mixing, adapters)
    composition = Composition(
        adapters=tuple(adapters),
        base=BaseTable(recipe.base.id, recipe.modules, recipe.mixing.bypassed),
        dtype=widest_dtype([adapter.dtype for adapter in adapters]),
        document_of=lambda _: {
            "recipe": json.loads(recipe.public().to_json()),
            "recipe_sha256": recipe.sha256(),
        },
        card_of=lambda made: recipe_card(recipe.public(), stated_licences(made.adapters)),
        fitted=True,
        activations=recipe.activations,
        recorded=recipe.base,
        saved=saved,
        task_type=task_of_recipe(adapters),
    )
    if mixing.kind in INLINE_KINDS:
        return replace(composition, weights_of=lambda module: _weights_of(mixing, module))

    def update(adapters: Sequence[LoraAdapter], module: str) -> Merged:
        return Merged(compose_module(mixing, adapters, module))

    if mixing.kind == "factors":
        return replace(
            composition,
            dtype=torch.float32,
            update_of=update,
            rank_of=lambda adapters, module: update(adapters, module).factors.rank,
        )
    return replace(composition, update_of=update, rank_of=_summed_rank, product=True)


def from_method(
    method: Method,
    adapters: Sequence[LoraAdapter],
    base: BaseTable,
    *,
    options: MethodOptions = DEFAULTS,
    weights: tuple[float, ...] | None = None,
    identities: tuple[RecipeAdapter, ...] | None = None,
    saved: SavedModules | None = None,
    task_type: str | None = None,
) -> Composition:
    """What a method makes of some adapters.

    Args:
        method: that composes.
        adapters: N of them.
        base: what is known of the base model.
        options: of the method.
        weights: one for each adapter; None for the method's own, of which one that merges has none.
        identities: of the adapters, by names that may be published; None for `published_identities`.
        saved: modules that replace the base's, None without any.
        task_type: PEFT's name of its task, None without one.
    """
    if weights is None:
        weights = method.fixed_weights(len(adapters), options)
    named = published_identities(adapters) if identities is None else identities
    taken = {name: value for name, value in asdict(options).items() if name in takes(method)}
    if method.weights is not None and options.scale == DEFAULTS.scale:
        del taken["scale"]  # which stands in the weights, and in no record of before they took it

    def update(adapters: Sequence[LoraAdapter], module: str) -> Merged:
        return method.merge_updates(updates_of(adapters, module), options)

    def document(made: Composition) -> dict[str, Any]:
        return {"method": {"name": method.name, "options": taken, "weights": weights}, **_document(made, named)}

    return Composition(
        adapters=tuple(adapters),
        base=base,
        dtype=widest_dtype([adapter.dtype for adapter in adapters]),
        document_of=document,
        card_of=lambda made: method_card(method, taken, weights, _card_origin(made, named)),
        weights_of=None if weights is None else lambda module: weights,
        update_of=update if weights is None else None,
        method=method,
        saved=saved,
        task_type=task_type,
    )


@dataclass(frozen=True, eq=False)
class OwnMoments:
    """What each adapter's own records show of its inputs.

    Args:
        by_module: Z (N, R, R) of each module in float64, as `Method.regress` takes it.
        records: the files: name, sha256, and the place of the adapter whose they are, from 1, None for records of all.
    """

    by_module: Mapping[str, Tensor] = field(repr=False)
    records: tuple[tuple[str, str, int | None], ...]


def from_moments(
    method: Method,
    adapters: Sequence[LoraAdapter],
    base: BaseTable,
    moments: OwnMoments,
    *,
    saved: SavedModules | None = None,
    task_type: str | None = None,
) -> Composition:
    """What a method makes of some adapters and what their own records show.

    Args:
        method: that regresses.
        moments: of the adapters, from `own_moments` of `loracli.composition.fitted`.
        adapters, base, saved, task_type: as in `from_method`.
    """
    made = from_method(method, adapters, base, saved=saved, task_type=task_type)

    def update(adapters: Sequence[LoraAdapter], module: str) -> Merged:
        return method.regress_updates(updates_of(adapters, module), moments.by_module[module])

    def document(composition: Composition) -> dict[str, Any]:
        records = [{"name": name, "sha256": sha256, "adapter": place} for name, sha256, place in moments.records]
        return {**made.document_of(composition), "records": records}

    return replace(made, update_of=update, rank_of=_summed_rank, document_of=document)


def _placed(adapter: LoraAdapter, module: str, device: torch.device) -> LoraAdapter:
    """The adapter with the update of one module on a device, and no other."""
    if module not in adapter.modules:
        return replace(adapter, modules={})
    own = adapter.modules[module]
    return replace(adapter, modules={module: replace(own, factors=own.factors.on(device))})


def updates_of(adapters: Sequence[LoraAdapter], module: str) -> list[Factors | None]:
    """The updates of one module, None for an adapter that does not have it."""
    return [a.modules[module].factors.loaded() if module in a.modules else None for a in adapters]


def from_weights(
    weights: ModuleWeights,
    adapters: Sequence[LoraAdapter],
    base: BaseTable,
    *,
    identities: tuple[RecipeAdapter, ...] | None = None,
    saved: SavedModules | None = None,
    task_type: str | None = None,
) -> Composition:
    """The sum of some adapters with weights by hand.

        dW_l = sum_i w_li s_i B_li A_li

    Args:
        weights: of every module that an adapter changes, from `weights_of_modules`.
        adapters, base, identities, saved, task_type: as in `from_method`.
    """
    named = published_identities(adapters) if identities is None else identities
    tables = weight_tables([f"#{place + 1}" for place in range(len(adapters))], weights)
    rows, equal = tuple(weights.values()), equal_weights(weights)
    return Composition(
        adapters=tuple(adapters),
        base=base,
        dtype=widest_dtype([adapter.dtype for adapter in adapters]),
        document_of=lambda made: {"weights": tables, **_document(made, named)},
        card_of=lambda made: weights_card(rows, equal, _card_origin(made, named)),
        weights_of=lambda module: weights[target_of(module)],
        saved=saved,
        task_type=task_type,
    )


def _document(made: Composition, adapters: Sequence[RecipeAdapter]) -> dict[str, Any]:
    """Of an origin without a fit, what does not depend on how it was composed."""
    return {
        "base": {"id": made.base.id},
        **({"bypassed": list(made.base.bypassed)} if made.base.bypassed else {}),
        **({} if made.saved is None else {"modules_to_save": made.saved.policy}),
        "adapters": [encode(identity) for identity in adapters],
        "versions": {"loracat": __version__, "torch": torch.__version__},
    }


def _card_origin(made: Composition, adapters: tuple[RecipeAdapter, ...]) -> CardOrigin:
    return CardOrigin(
        base=made.base,
        adapters=adapters,
        licences=tuple(stated_licences(made.adapters)),
        saved=None if made.saved is None else made.saved.policy,
        task_type=made.task_type if made.task_asked else None,
    )


def compose_module(mixing: RecipeMixing, adapters: Sequence[LoraAdapter], module: str) -> Factors:
    """The update of one module in float64, scaling 1, concatenated.

    lora_A (R, in) as stored and lora_B = B M (out, R), with sum_i w_li s_i B_i A_i for a weight per adapter, and the
    bias sum_i w_li s_i b_i of adapters with lora_bias; with `factors` the trained lora_A and lora_B.

    Raises:
        RecipeError: if the recipe has no weight for an adapter that changes the module, or no tensor that fits.
    """
    if mixing.kind in INLINE_KINDS:
        return concatenate(*_weighted(adapters, _weights_of(mixing, module), module))
    biased = next((a for a in adapters if module in a.modules and a.modules[module].factors.bias is not None), None)
    if biased is not None:
        raise RecipeError(f"the recipe's {mixing.kind} mixing cannot weigh the lora_bias of {biased.reference}")
    updates = [adapter.modules[module].factors for adapter in adapters if module in adapter.modules]
    return composed_update(mixing.kind, mixing.tensors, module, updates)


def _weights_of(mixing: RecipeMixing, module: str) -> Sequence[float | None]:
    try:
        return mixing.weights[group_name(module, mixing.kind)]
    except KeyError:
        raise RecipeError(f"the recipe has no weights for {module}") from None


def _weighted(
    adapters: Sequence[LoraAdapter], weights: Sequence[float | None], module: str
) -> tuple[list[Factors], list[float]]:
    """The updates of one module and their weights; adapters of weight 0 are left out, so that they cost no rank."""
    updates, chosen = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if module not in adapter.modules:
            continue
        if weight is None:
            raise RecipeError(f"the recipe has no weight of {adapter.reference} for {module}")
        updates.append(adapter.modules[module].factors)
        chosen.append(weight)
    return without_zeros(updates, chosen)


def _summed_rank(adapters: Sequence[LoraAdapter], module: str) -> int:
    return sum(adapter.modules[module].factors.rank for adapter in adapters if module in adapter.modules)


def _check_tensors(mixing: RecipeMixing, adapters: Sequence[LoraAdapter]) -> None:
    if mixing.kind not in INLINE_KINDS:
        unknown = sorted(mixing.weights.keys() - set(module_names(adapters)))
        if unknown:
            raise RecipeError(f"the recipe has tensors for {unknown[0]}, which no adapter changes")


def task_of_recipe(adapters: Sequence[LoraAdapter]) -> str | None:
    """That of what a recipe's adapters make: a fit runs causal language models, and nothing with a convolution."""
    return agreed_task(adapters) if kernels_of(adapters) else CAUSAL_LM


def base_of_config(recorded: RecipeBase, base: Named | None) -> Named | BaseClaim:
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


def published_identities(adapters: Sequence[LoraAdapter]) -> tuple[RecipeAdapter, ...]:
    """The adapters as they may be published: a local directory by its last names."""
    named = [identity_of(a, a.reference if a.source.path is None else str(a.path)) for a in adapters]
    labels = labels_of(named, Path())
    return tuple(
        without_paths(replace(identity_of(adapter, adapter.reference), reference=labels[name.reference]))
        for adapter, name in zip(adapters, named, strict=True)
    )
