"""What a directory says it was made of, and those ingredients found again.

The record is as untrusted as the weights: names in it lead to no path. An adapter of the Hub is fetched at its recorded
commit; a local one has to be named by the user, by --adapters or by the recipe; all are held against recorded hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.kinds import BaseModule
from loracli.adapters.saved_modules import REFUSE, SavedModules, saved_modules
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.composition.base_table import BaseTable
from loracli.composition.composition import Composition, from_method, from_recipe, from_weights
from loracli.composition.weights import weights_of_modules
from loracli.errors import (
    AccessDenied,
    AdapterNotFound,
    HubUnreachable,
    IntegrityError,
    RecipeError,
    UnsupportedAdapter,
    UsageError,
)
from loracli.hub.references import Named
from loracli.progress import Progress
from loracli.recipe.ingredients import by_names_of, read_recorded, recorded_policy
from loracli.recipe.recipe import Recipe, adapter_problems, base_problems, decode_recipe, load_recipe, without_paths
from loracli.recipe.record import INLINE_KINDS, RecipeAdapter, RecordedAdapters
from loracli.system.document import decode
from loracli.verifying.findings import Findings

COMPOSITION = "the composition of the written weights"
_INGREDIENTS = "the sha256 of the ingredients"
_EVIDENCE = "the held-out table and how the mixing was found, as recorded"


@dataclass(frozen=True)
class Origin:
    """A recorded composition.

    Args:
        adapters: the ingredients, by names that may be published.
        base_id: the base model.
        recipe: as it may be published, None with a method.
        recipe_sha256: of the recipe itself.
        method, options, weights: that composed, None with a recipe or tables.
        tables: of weights by hand, by the place of their adapter, None without.
        table: of base modules; with a method as far as what was written tells.
        policy: for modules that adapters saved whole.
        bypassed: with a method, modules whose weight the base is said to read without calling the layer.
    """

    adapters: tuple[RecipeAdapter, ...]
    base_id: str
    recipe: Recipe | None
    recipe_sha256: str | None
    method: Method | None
    options: MethodOptions
    weights: tuple[float, ...] | None
    table: tuple[BaseModule, ...]
    policy: str
    bypassed: tuple[str, ...] = ()
    tables: dict[str, dict[str, float]] | None = None

    @property
    def by_records(self) -> bool:
        """Whether the weights go by records too, so that ingredients do not tell them."""
        return self.method is not None and self.method.regress is not None


def read_origin(document: Any, where: Path) -> Origin:
    """The origin in a record.

    Raises:
        IntegrityError: if it is damaged.
    """
    if not isinstance(document, dict):
        raise IntegrityError("the record is damaged: its composition is not a JSON object", where=str(where))
    if "recipe" in document:
        try:
            recipe = decode_recipe(document["recipe"], "its recipe", Path())
        except RecipeError as error:
            raise IntegrityError(f"the record is damaged: {error.what}", where=str(where)) from None
        digest, policy = document.get("recipe_sha256"), recorded_policy(recipe)
        if not isinstance(digest, str):
            raise IntegrityError("the record has no recipe_sha256", where=str(where))
        return Origin(
            recipe.adapters, recipe.base.id, recipe, digest, None, MethodOptions(), None, recipe.modules, policy
        )
    problems: list[str] = []
    base, recorded = document.get("base"), document.get("method")
    adapters = decode(RecordedAdapters, document.get("adapters"), "adapters", problems)
    if not isinstance(base, dict) or not isinstance(base.get("id"), str):
        problems.append("base.id: missing")
    elif not problems:
        problems += [*base_problems(base["id"], None), *(p for adapter in adapters for p in adapter_problems(adapter))]
    tables = None
    if "weights" in document:
        tables = decode(dict[str, dict[str, float]], document["weights"], "weights", problems)
        recorded = {"name": None, "options": {}}
    name = recorded.get("name") if isinstance(recorded, dict) else None
    if tables is None and (not isinstance(name, str) or name not in METHODS):
        problems.append("method.name: none that this version has")
    if problems or not isinstance(recorded, dict) or not isinstance(base, dict):
        raise IntegrityError(f"the record is damaged: {problems[0]}", where=str(where))
    options = _options(recorded.get("options"), problems)
    weights = decode(tuple[float, ...] | None, recorded.get("weights"), "method.weights", problems)
    bypassed = decode(tuple[str, ...], document.get("bypassed", []), "bypassed", problems)
    if not adapters or (weights is not None and len(weights) != len(adapters)):
        problems.append("method.weights: not one for each adapter")
    if problems:
        raise IntegrityError(f"the record is damaged: {problems[0]}", where=str(where))
    policy = str(document.get("modules_to_save", REFUSE))
    method = METHODS.get(str(name))
    return Origin(adapters, base["id"], None, None, method, options, weights, (), policy, bypassed, tables)


def recipe_digest(record: dict[str, Any]) -> str | None:
    """The sha256 of the recipe that a record of an adapter or of a fused model names, None if it names none."""
    document = record.get("composition", record)
    digest = document.get("recipe_sha256") if isinstance(document, dict) else None
    return digest if isinstance(digest, str) else None


def _options(recorded: Any, problems: list[str]) -> MethodOptions:
    """The options of a method as they were set."""
    known = {field.name for field in fields(MethodOptions)}
    if not isinstance(recorded, dict) or not set(recorded) <= known:
        problems.append("method.options: not those of a method")
        return MethodOptions()
    plain = {f.name: f.default for f in fields(MethodOptions)} | recorded
    result: MethodOptions = decode(MethodOptions, plain, "method.options", problems)
    return result


@dataclass(frozen=True)
class Ingredients:
    """What is at hand of a composition: the adapters, and the recipe that the user named, None without one."""

    adapters: tuple[LoraAdapter, ...]
    recipe: Recipe | None


def find_ingredients(
    origin: Origin, findings: Findings, *, recipe: Path | None, adapters: Sequence[Named], progress: Progress
) -> Ingredients | None:
    """The ingredients by the names of the recorded table; None, and the findings say why, if they are not at hand.

    Args:
        origin: recorded.
        findings: told what is not at hand or differs.
        recipe: the recipe's file, None if the user has none.
        adapters: where the ingredients are, in the recorded order; empty for where they are recorded.
        progress: told of downloads.
    Raises:
        IntegrityError: if an ingredient is not the recorded one.
        AdapterNotFound: if one that the user named is not there.
    """
    given = None if recipe is None else load_recipe(recipe)
    if given is not None and origin.recipe is not None:
        if given.sha256() != origin.recipe_sha256:
            findings.differs(
                f"{recipe} is not the recipe that this was made with: name that one, or leave --recipe out"
            )
            return None
        # Older exports kept a base model's path that an adapter names.
        recorded = replace(origin.recipe, adapters=tuple(without_paths(a) for a in origin.recipe.adapters))
        if given.public().to_json() != recorded.to_json():
            findings.differs(f"the recorded recipe is not {recipe}")
            return None
        findings.checked.append("the recorded recipe, its held-out table included, against the one that is given")
    elif origin.recipe is not None:
        findings.skip(_EVIDENCE, "only the recipe itself tells whether they are its own: name it with --recipe")
    beside = origin.recipe is not None and origin.recipe.mixing.kind not in INLINE_KINDS and given is None
    if beside:
        findings.skip(COMPOSITION, "its mixing is kept in tensors beside the recipe: name the recipe with --recipe")
    if origin.method is not None and origin.by_records:
        findings.skip(COMPOSITION, f"{origin.method.name} goes by activations on records, which are not kept")
    wanted = _INGREDIENTS if beside or origin.by_records else COMPOSITION
    read = _ingredients(origin, given, findings, adapters, progress, wanted)
    if read is None:
        return None
    if wanted == _INGREDIENTS:  # else they are told by the tensors that are made of them
        findings.checked.append(wanted)
    if beside:
        return None
    if origin.table:
        together = zip(read, origin.adapters, strict=True)
        read = tuple(by_names_of(origin.table, adapter, recorded) for adapter, recorded in together)
    return Ingredients(read, given)


def compose_again(origin: Origin, given: Ingredients) -> Composition:
    """What is recorded, of ingredients by the names of the base.

    Raises:
        IntegrityError: if they do not fit the record.
    """
    read, saved = given.adapters, _saved(origin, given.adapters)
    if origin.recipe is not None:
        return from_recipe(given.recipe or origin.recipe, read, saved)
    base = BaseTable(origin.base_id, origin.table, origin.bypassed)
    if origin.tables is not None:
        try:
            weights = weights_of_modules(origin.tables, read)
        except UsageError as error:
            raise IntegrityError(f"the recorded weights do not fit the ingredients: {error}") from None
        return from_weights(weights, read, base, identities=origin.adapters, saved=saved)
    assert origin.method is not None
    return from_method(
        origin.method,
        read,
        base,
        options=origin.options,
        weights=origin.weights,
        identities=origin.adapters,
        saved=saved,
    )


def _saved(origin: Origin, adapters: tuple[LoraAdapter, ...]) -> SavedModules | None:
    try:
        return saved_modules(origin.policy, adapters)
    except (UsageError, UnsupportedAdapter) as error:
        raise IntegrityError(f"the recorded modules_to_save do not fit the ingredients: {error}") from None


def _ingredients(
    origin: Origin,
    given: Recipe | None,
    findings: Findings,
    adapters: Sequence[Named],
    progress: Progress,
    what: str,
) -> tuple[LoraAdapter, ...] | None:
    """Those of the record; None, and the findings say why `what` is not checked, if they are not at hand."""
    if adapters:
        return read_recorded(origin.adapters, Path(), relocated=adapters, progress=progress)
    if given is None:
        local = [adapter.reference for adapter in origin.adapters if adapter.repo_id is None]
        if local:
            findings.skip(what, f"{', '.join(local)} came from a directory: say where with --adapters")
            return None
    try:
        wanted = origin.adapters if given is None else given.adapters
        read = read_recorded(wanted, Path() if given is None else given.folder, progress=progress)
    except (AdapterNotFound, HubUnreachable, AccessDenied) as error:
        findings.skip(what, str(error))
        return None
    if len(read) != len(origin.adapters):
        made_of = ", ".join(adapter.reference for adapter in origin.adapters)
        raise IntegrityError(
            f"the recipe has {len(read)} adapters, the record {len(origin.adapters)}",
            hint=f"it was made of {made_of}: leave --recipe out, and say with --adapters where that is",
        )
    for adapter, recorded in zip(read, origin.adapters, strict=True):
        if dict(adapter.sha256) != recorded.sha256:
            raise IntegrityError(f"{adapter.reference} is not the adapter that is recorded as {recorded.reference}")
    return read
