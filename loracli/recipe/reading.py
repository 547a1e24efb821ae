"""Reading a recipe back: JSON, every field of it checked, and what contradicts itself refused, all problems at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loracli.errors import RecipeError
from loracli.recipe.mixing import INLINE_KINDS, RecipeMixing
from loracli.recipe.recipe import FIRST_SCHEMA, MAX_EXPERTS, OTHER_ROWS, SCHEMA, Recipe, RecipeAdapter
from loracli.system.document import decode, schema_of
from loracli.system.files import CONFIG_FILE, TENSOR_FILES
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
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}",
            hint="`loracat fit` writes one; name it if it is elsewhere",
        ) from None
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"the recipe {path} is larger than {MAX_RECIPE_BYTES} bytes")
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
        raise RecipeError(f"{name} is no recipe of loracat")
    fields = dict(fields)
    schema = fields.pop("loracat_recipe")
    if type(schema) is not int or not FIRST_SCHEMA <= schema <= SCHEMA:
        raise RecipeError(
            f"{name} has the schema {schema!r}; this version reads {FIRST_SCHEMA} to {SCHEMA}",
            hint=_schema_hint(schema),
        )
    problems: list[str] = []
    recipe = decode(Recipe, fields, "", problems)
    if not problems and schema != (least := schema_of(recipe, FIRST_SCHEMA)):
        problems.append(f"loracat_recipe: expected {least} for these fields, got {schema}")
    if not problems:
        problems = _contradictions(recipe)
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


def _contradictions(recipe: Recipe) -> list[str]:
    problems = _mixing_contradictions(recipe.mixing, len(recipe.adapters))
    for name in ("adapters", "data"):
        if not getattr(recipe, name):
            problems.append(f"{name}: empty")
    references = [adapter.reference for adapter in recipe.adapters]
    for index, adapter in enumerate(recipe.adapters):
        if adapter.reference in (*references[:index], *OTHER_ROWS):
            problems.append(f"adapters[{index}].reference: {adapter.reference!r} names another row of the table")
        problems += [f"adapters[{index}].{problem}" for problem in place_problems(adapter)]
        if CONFIG_FILE not in adapter.sha256:
            problems.append(f"adapters[{index}].sha256: lacks {CONFIG_FILE}")
        if adapter.sha256.keys().isdisjoint(TENSOR_FILES):
            problems.append(f"adapters[{index}].sha256: lacks {' or '.join(TENSOR_FILES)}")
    for index, module in enumerate(recipe.modules):
        if not 0 <= module.experts <= MAX_EXPERTS:
            problems.append(f"modules[{index}].experts: expected 0 to {MAX_EXPERTS}, got {module.experts}")
    if recipe.held_out.best_ingredient not in references:
        problems.append(f"held_out.best_ingredient: {recipe.held_out.best_ingredient!r} is none of the adapters")
    rows = [row.name for row in recipe.held_out.rows]
    if "fit" not in rows:
        problems.append("held_out.rows: no row 'fit'")
    for index, task in enumerate(recipe.held_out.tasks):
        if sorted(task.nats_per_token) != sorted(rows):
            problems.append(f"held_out.tasks[{index}].nats_per_token: not the names of held_out.rows")
    return problems


def place_problems(adapter: RecipeAdapter) -> list[str]:
    """What is impossible in the places that are recorded of an adapter."""
    return [
        f"renamed[{name!r}]: part {place.part} of {place.parts}"
        for name, place in (adapter.renamed or {}).items()
        if not 0 <= place.part < place.parts
    ]


def _mixing_contradictions(mixing: RecipeMixing, adapters: int) -> list[str]:
    problems = [
        f"mixing.weights[{group!r}]: {len(weights)} weights for {adapters} adapters"
        for group, weights in mixing.weights.items()
        if len(weights) != adapters
    ]
    if mixing.numbers < 1:
        problems.append(f"mixing.numbers: expected at least 1, got {mixing.numbers}")
    if (mixing.tensors_sha256 is None) != (mixing.kind in INLINE_KINDS):
        expected = "null" if mixing.kind in INLINE_KINDS else "the sha256 of its tensors"
        problems.append(f"mixing.tensors_sha256: expected {expected} with the kind {mixing.kind!r}")
    return problems
