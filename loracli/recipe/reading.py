"""Reading a recipe back: JSON, every field of it checked, and what contradicts itself refused, all problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from loracli.adapters.base_module import MAX_EXPERTS
from loracli.errors import RecipeError
from loracli.hub.references import URI_PREFIX, is_folder, is_hub_id
from loracli.recipe.mixing import INLINE_KINDS
from loracli.recipe.recipe import FIRST_SCHEMA, OTHER_ROWS, SCHEMA, Recipe, RecipeAdapter
from loracli.system.document import MAX_PROBLEMS, decode, schema_of
from loracli.system.files import CONFIG_FILE, TENSOR_FILES, read_regular
from loracli.system.strict_json import StrictJsonError, parse_json

MAX_RECIPE_BYTES = 64 << 20


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe, and its tensors if its mixing has any.

    Raises:
        RecipeError: if it cannot be read, naming every problem at once.
        IntegrityError: if the tensors beside it are not those it was written with.
    """
    path = Path(path)
    result = decode_recipe(read_document(path), f"the recipe {path}", path.parent)
    if result.mixing.kind in INLINE_KINDS:
        return result
    from loracli.recipe.tensors import read_sidecar

    return replace(result, mixing=replace(result.mixing, tensors=read_sidecar(path, result)))


def read_document(path: Path) -> Any:
    """The JSON of a recipe's file.

    Raises:
        RecipeError: if it cannot be read.
    """
    try:
        data = read_regular(path, MAX_RECIPE_BYTES)
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}",
            hint="`loracat fit` writes one; name it if it is elsewhere",
        ) from None
    try:
        return parse_json(data)
    except StrictJsonError as error:
        raise RecipeError(f"the recipe {path} is {error}") from None


def decode_recipe(fields: Any, name: str, folder: Path) -> Recipe:
    """A recipe from its JSON, without the tensors of its mixing; `name` is what errors call it.

    Raises:
        RecipeError: naming every problem at once.
    """
    if not isinstance(fields, dict) or "loracat_recipe" not in fields:
        raise RecipeError(f"{name} is not a recipe of loracat")
    fields = dict(fields)
    schema = fields.pop("loracat_recipe")
    if type(schema) is not int or not FIRST_SCHEMA <= schema <= SCHEMA:
        raise RecipeError(
            f"{name} has the schema {repr(schema)[:60]}; this version reads {FIRST_SCHEMA} to {SCHEMA}",
            hint=_schema_hint(schema),
        )
    problems: list[str] = []
    recipe = decode(Recipe, fields, "", problems)
    if not problems and schema != (least := schema_of(recipe, FIRST_SCHEMA)):
        problems.append(f"loracat_recipe: expected {least} for these fields, got {schema}")
    if not problems:
        problems = list(islice(_contradictions(recipe), MAX_PROBLEMS))
    if problems:
        raise RecipeError(f"{name} is damaged", problems=tuple(problems))
    result: Recipe = replace(recipe, folder=folder)
    return result


def _schema_hint(schema: object) -> str | None:
    if type(schema) is not int or schema < 1:
        return None
    if schema > SCHEMA:
        return "it was written by a newer loracat: upgrade"
    return "it was written by an older loracat: fit again"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    yield from _of_mixing(recipe)
    yield from base_problems(recipe.base.id, recipe.base.commit)
    for name in ("adapters", "data"):
        if not getattr(recipe, name):
            yield f"{name}: empty"
    taken = set(OTHER_ROWS)
    for index, adapter in enumerate(recipe.adapters):
        if adapter.reference in taken:
            yield f"adapters[{index}].reference: {adapter.reference!r} names another row of the table"
        taken.add(adapter.reference)
        yield from (f"adapters[{index}].{problem}" for problem in adapter_problems(adapter))
    for index, module in enumerate(recipe.modules):
        if not 0 <= module.experts <= MAX_EXPERTS:
            yield f"modules[{index}].experts: expected 0 to {MAX_EXPERTS}, got {module.experts}"
    yield from _of_table(recipe, taken)


def base_problems(base_id: str, commit: str | None) -> Iterator[str]:
    """What a record says of a base that no base can be."""
    if commit is not None and not is_hub_id(base_id):
        yield f"base.id: {base_id!r} has a commit and is not a repository on the Hub"
    if not base_id.isprintable():
        yield f"base.id: {base_id!r} has a character that no name has"


def adapter_problems(adapter: RecipeAdapter) -> Iterator[str]:
    """What a record says of an adapter that no adapter can be."""
    if CONFIG_FILE not in adapter.sha256:
        yield f"sha256: lacks {CONFIG_FILE}"
    if adapter.sha256.keys().isdisjoint(TENSOR_FILES):
        yield f"sha256: lacks {' or '.join(TENSOR_FILES)}"
    if (adapter.repo_id is None) != (adapter.commit is None):
        yield "commit: one that has a repo_id has a commit, and no other"
    if adapter.subfolder is not None and (adapter.repo_id is None or not is_folder(adapter.subfolder)):
        yield f"subfolder: {adapter.subfolder!r} is not a folder of a repository"
    if adapter.repo_id is not None:
        named = adapter.reference.removeprefix(URI_PREFIX).removeprefix("models/")
        if not named.startswith(adapter.repo_id) or named[len(adapter.repo_id) :][:1] not in ("", "@", "/"):
            yield f"reference: {adapter.reference!r} does not name the repository {adapter.repo_id}"
    for name, place in (adapter.renamed or {}).items():
        if not 0 <= place.part < place.parts:
            yield f"renamed[{name!r}]: part {place.part} of {place.parts}"


def _of_table(recipe: Recipe, known: set[str]) -> Iterator[str]:
    """Of the held-out table; `known` are the names that its rows may have."""
    table = recipe.held_out
    if table.best_ingredient not in known - set(OTHER_ROWS):
        yield f"held_out.best_ingredient: {table.best_ingredient!r} is none of the adapters"
    rows: set[str] = set()
    for index, row in enumerate(table.rows):
        if row.name not in known or row.name in rows:
            what = "a second row of that name" if row.name in rows else f"none of the adapters, {', '.join(OTHER_ROWS)}"
            yield f"held_out.rows[{index}].name: {row.name!r} is {what}"
        rows.add(row.name)
    if "fit" not in rows:
        yield "held_out.rows: no row 'fit'"
    for index, task in enumerate(table.tasks):
        if task.nats_per_token.keys() != rows:
            yield f"held_out.tasks[{index}].nats_per_token: not the names of held_out.rows"


def _of_mixing(recipe: Recipe) -> Iterator[str]:
    """Of the weights, and of what is said of each by the place of its adapter."""
    mixing, adapters, certificate = recipe.mixing, len(recipe.adapters), recipe.fit.certificate
    for group, weights in mixing.weights.items():
        if len(weights) != adapters:
            yield f"mixing.weights[{group!r}]: {len(weights)} weights for {adapters} adapters"
    if mixing.numbers < 1:
        yield f"mixing.numbers: expected at least 1, got {mixing.numbers}"
    if not set(mixing.bypassed) <= set(mixing.unreached):
        yield "mixing.bypassed: not all of them are in mixing.unreached"
    if (mixing.tensors_sha256 is None) != (mixing.kind in INLINE_KINDS):
        expected = "null" if mixing.kind in INLINE_KINDS else "the sha256 of its tensors"
        yield f"mixing.tensors_sha256: expected {expected} with the kind {mixing.kind!r}"
    if certificate is not None:
        for group, errors in certificate.standard_errors.items():
            if len(errors) != adapters:
                yield f"fit.certificate.standard_errors[{group!r}]: {len(errors)} for {adapters} adapters"
        for group, places in certificate.extrapolated.items():
            if any(not 0 <= place < adapters for place in places):
                yield f"fit.certificate.extrapolated[{group!r}]: not places of the {adapters} adapters"
