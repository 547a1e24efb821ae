"""Recipes whose fits are rows of one table: what each is called, and their ingredients together, each adapter once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter, module_names
from loracli.adapters.saved_modules import REFUSE
from loracli.algebra.factors import no_update
from loracli.composition.attached import MixingPoint, of_factors, of_recipe
from loracli.composition.composition import compose_module
from loracli.errors import UsageError
from loracli.evaluation.statistics import FIT
from loracli.fitting.mixing import Layout, make_diagonal
from loracli.hub.references import Named
from loracli.progress import Progress
from loracli.recipe.ingredients import by_names_of, read_recorded, recorded_policy
from loracli.recipe.recipe import Recipe, load_recipe, local_reference
from loracli.recipe.record import EDITED, INLINE_KINDS, RecipeAdapter, RecipeMixing

_ONE_AT_A_TIME = "compare them one at a time"


@dataclass(frozen=True)
class ComparedRecipe:
    """A recipe whose fit is compared.

    Args:
        row: name of the fit's row: `fit`, or of several recipes as many last names of the file as tell it from the
            others.
        recipe: it.
        places: of its adapters, in its order, among those of all recipes.
    """

    row: str
    recipe: Recipe
    places: tuple[int, ...]

    def point(self, adapters: Sequence[LoraAdapter], layout: Layout) -> MixingPoint:
        """Its mixing of its own adapters; those of other recipes have the weight 0, and tensors for their modules are
        zeros.

        Args:
            adapters: of all recipes.
            layout: of these.
        Raises:
            RecipeError: if it has no weight for an adapter, or no tensor that fits.
        """
        mixing, note = self.recipe.mixing, EDITED if self.recipe.mixing.edited else ""
        if self.places == tuple(range(len(adapters))):
            return of_recipe(mixing, adapters, layout, note=note)
        own = [adapters[place] for place in self.places]
        if mixing.kind in INLINE_KINDS:
            return of_recipe(self._among(mixing, layout), adapters, layout, note=note)
        composed = {name: compose_module(mixing, own, name) for name in module_names(own)}
        every = {name: module.factors for adapter in adapters for name, module in adapter.modules.items()}
        whole = {name: composed.get(name) or no_update(every[name]) for name in module_names(adapters)}
        return of_factors(whole, note=note)

    def _among(self, mixing: RecipeMixing, layout: Layout) -> RecipeMixing:
        """The mixing with a weight for each adapter of the layout."""
        weights = {}
        for group in make_diagonal(layout, mixing.kind).groups:
            row: list[float | None] = [0.0] * layout.adapters
            for index, place in enumerate(self.places):
                row[place] = mixing.weights[group][index] if group in mixing.weights else None
            weights[group] = tuple(row)
        return replace(mixing, weights=weights)


@dataclass(frozen=True)
class Ingredients:
    """The adapters of some recipes, each once, where the first recipe that has it says it is.

    Args:
        recorded: what is known of them, local ones relative to the first recipe's folder.
        owners: for each, the first recipe that has it.
    """

    recorded: tuple[RecipeAdapter, ...]
    owners: tuple[Recipe, ...]

    def read(self, relocated: Sequence[Named], progress: Progress) -> tuple[LoraAdapter, ...]:
        """As `loracli.recipe.ingredients.read_ingredients`, of all recipes together; with their factors in memory."""
        read = read_recorded(self.recorded, self.owners[0].folder, relocated=relocated, progress=progress)
        together = zip(read, self.recorded, self.owners, strict=True)
        return tuple(by_names_of(owner.modules, adapter, one).loaded() for adapter, one, owner in together)


def load_recipes(given: Recipe | Sequence[str | Path]) -> tuple[tuple[ComparedRecipe, ...], Ingredients]:
    """One recipe, or one or more that are read: the files of several tell them apart.

    Raises:
        RecipeError, IntegrityError: as `load_recipe`.
        UsageError: if two were fitted on different bases or with other tokens for the same records, replace modules
            differently, or call two adapters alike; or a file is given twice.
    """
    recipes = [given] if isinstance(given, Recipe) else [load_recipe(path) for path in given]
    names = [FIT] if isinstance(given, Recipe) or len(recipes) == 1 else _file_names(given)
    for first, second in combinations(zip(names, recipes, strict=True), 2):
        _check_comparable(*first, *second)
    adapters: list[RecipeAdapter] = []
    owners: list[tuple[str, Recipe]] = []
    compared = []
    for name, recipe in zip(names, recipes, strict=True):
        places: list[int] = []
        for adapter in recipe.adapters:
            known = (p for p, one in enumerate(adapters) if one.sha256 == adapter.sha256 and p not in places)
            place = next(known, len(adapters))
            if place == len(adapters):
                adapters.append(_seen_from(recipes[0].folder, recipe, adapter))
                owners.append((name, recipe))
            places.append(place)
        compared.append(ComparedRecipe(name, recipe, tuple(places)))
    _check_names(adapters, [name for name, _ in owners])
    return tuple(compared), Ingredients(tuple(adapters), tuple(recipe for _, recipe in owners))


def _file_names(paths: Sequence[str | Path]) -> list[str]:
    """Of each file as many last names as tell it from the others."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    names = []
    for place, own in enumerate(parts):
        if own in parts[:place]:
            raise UsageError(f"the recipe {paths[place]} is given twice", hint="give each recipe once")
        others = [other for other in parts if other != own]
        apart = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-next(apart, len(own)) :]))
    return names


def _seen_from(folder: Path, recipe: Recipe, adapter: RecipeAdapter) -> RecipeAdapter:
    """The adapter with a local reference relative to another folder than its recipe's."""
    if adapter.repo_id is not None or recipe.folder == folder:
        return adapter
    return replace(adapter, reference=local_reference(recipe.folder / adapter.reference, folder))


def _check_names(adapters: Sequence[RecipeAdapter], owners: Sequence[str]) -> None:
    """Raises UsageError where two adapters go by one name."""
    for (first, one), (second, other) in combinations(zip(owners, adapters, strict=True), 2):
        if one.reference == other.reference and first != second:
            raise UsageError(
                f"{one.reference} is one adapter in {first} and another in {second}: their files differ",
                hint=f"{_ONE_AT_A_TIME}, or fit again with a name that tells them apart",
            )


def _check_comparable(name: str, recipe: Recipe, other_name: str, other: Recipe) -> None:
    """Raises UsageError for the first thing that two recipes have to share and do not."""
    for what, values, way_out in _shared(recipe, other):
        mine, theirs = values
        if mine != theirs:
            raise UsageError(
                f"{name} and {other_name} cannot be compared on the same records: {what} {mine} and {theirs}",
                hint=f"{_ONE_AT_A_TIME}, or fit one of them again {way_out}",
            )


def _shared(recipe: Recipe, other: Recipe) -> Iterator[tuple[str, tuple[str, str], str]]:
    """What two recipes have to share: in words, the value of each, and how a fit gets the same."""

    def both(value: Callable[[Recipe], object]) -> tuple[str, str]:
        return str(value(recipe)), str(value(other))

    way_out = "with the other's --base and --base-revision"
    yield "the base models are", both(lambda one: one.base.id), way_out
    if None not in (recipe.base.commit, other.base.commit):
        yield "the commits of the base model are", both(lambda one: one.base.commit), way_out
    yield "the configs of the base model have the sha256", both(lambda one: one.base.config_sha256), way_out
    lengths = both(lambda one: one.fit.settings.get("max_length"))
    yield "the tokens of a record that were used are at most", lengths, "with the other's --max-length"
    templates = [{data.template_sha256 for data in one.data if data.template_sha256} for one in (recipe, other)]
    if all(templates):  # records without turns are rendered by none
        shown = [", ".join(sorted(found)) for found in templates]
        yield "the chat templates have the sha256", (shown[0], shown[1]), "with the other's tokenizer"
    if {recorded_policy(recipe), recorded_policy(other)} != {REFUSE}:
        same = [one.sha256 for one in recipe.adapters] == [one.sha256 for one in other.adapters]
        policies = both(recorded_policy) if same else ("those of one's adapters", "those of the other's")
        yield "the modules that replace the base's are", policies, "with the other's adapters and --modules-to-save"
