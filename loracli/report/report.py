"""From a recipe, and a comparison where there is one, to a file of HTML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter
from loracli.errors import AccessDenied, AdapterNotFound, HubUnreachable, InputError, OutputExists, UsageError
from loracli.evaluation.comparison import Comparison
from loracli.progress import SILENT, Progress
from loracli.recipe.ingredients import read_ingredients
from loracli.recipe.reading import load_recipe
from loracli.recipe.recipe import Recipe
from loracli.report import sections
from loracli.report.page import page
from loracli.system.document import decode
from loracli.system.files import write_atomically
from loracli.system.strict_json import StrictJsonError, parse_json

MAX_COMPARISON_BYTES = 64 << 20


@dataclass(frozen=True)
class Written:
    """What a report wrote: the file, its size, and the names of its parts."""

    path: Path
    size_bytes: int
    parts: tuple[str, ...]


def write_report(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    comparison: str | Path | None = None,
    adapters: Sequence[str] = (),
    force: bool = False,
    progress: Progress = SILENT,
) -> Written:
    """Writes the report of a recipe, the same bytes for the same inputs.

    Args:
        recipe: a recipe, or the file of one.
        output: the file to write.
        comparison: what `loracat compare RECIPE --json` printed; None to show the recipe's own table alone.
        adapters: where the ingredients are now, in the recipe's order; empty for where the recipe says. Where they are
            not at hand their interference is left out, and said.
        force: replace an existing file.
        progress: told what is left out.
    Raises:
        OutputExists: if `output` is taken, before any work.
        RecipeError: if the recipe cannot be read.
        InputError: if the comparison cannot be read.
        UsageError: if the comparison is of other adapters.
        IntegrityError: if an ingredient is not the file that the weights were fitted for.
    """
    output = Path(output)
    _check_free(output, force=force)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    found = None if comparison is None else read_comparison(Path(comparison), loaded)
    ingredients = _ingredients(loaded, adapters, progress)
    public = loaded.public()
    parts = {"verdict": sections.headline(public)}
    if found is not None:
        parts["comparison"] = sections.compared(found.renamed(loaded.labels()))
    parts["held out"] = sections.held_out(public.held_out)
    parts["weights"] = sections.weights(loaded)
    parts["search"] = sections.search(public)
    if len(ingredients) > 1:
        parts["interference"] = sections.interferences(public, ingredients)
    parts["provenance"] = sections.provenance(public)
    content = page("loracat: " + " + ".join(a.reference for a in public.adapters), *parts.values()).encode()
    write_atomically(output, content)
    return Written(output, len(content), tuple(parts))


def read_comparison(path: Path, recipe: Recipe) -> Comparison:
    """A comparison from the JSON document of `loracat compare`.

    Raises:
        InputError: if it is no such document.
        UsageError: if it compares other adapters than the recipe's, or not its fit.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_COMPARISON_BYTES + 1)
    except OSError as error:
        raise InputError(f"the comparison {path} cannot be read: {error.strerror}") from None
    hint = "write one with: loracat compare RECIPE --data test.jsonl --json > comparison.json"
    try:
        document = parse_json(data) if len(data) <= MAX_COMPARISON_BYTES else None
    except StrictJsonError as error:
        raise InputError(f"the comparison {path} is {error}", hint=hint) from None
    if not isinstance(document, dict):
        raise InputError(f"the comparison {path} is no JSON object of at most {MAX_COMPARISON_BYTES} bytes", hint=hint)
    wanted = {field.name for field in fields(Comparison)}
    problems: list[str] = []
    found: Comparison = decode(Comparison, {k: v for k, v in document.items() if k in wanted}, "", problems)
    if problems:
        raise InputError(f"{path} is no comparison: {problems[0].removeprefix(': ')}", hint=hint)
    rows = {row.name for row in found.rows}
    references = tuple(adapter.reference for adapter in recipe.adapters)
    if len(found.adapters) != len(references) or "fit" not in rows or found.best.name not in rows:
        raise UsageError(f"{path} does not compare this recipe's fit", hint=hint)
    if found.adapters != references:
        named = ", ".join(found.adapters)
        raise UsageError(f"{path} compares {named}, and the recipe has {', '.join(references)}", hint=hint)
    return found


def _ingredients(recipe: Recipe, adapters: Sequence[str], progress: Progress) -> tuple[LoraAdapter, ...]:
    """The adapters, or none where they are not at hand."""
    try:
        return read_ingredients(recipe, relocated=adapters, progress=progress)
    except (AdapterNotFound, AccessDenied, HubUnreachable) as error:
        if adapters:
            raise
        progress.warn(f"the report has no interference between the adapters: {error}")
        return ()


def _check_free(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise OutputExists(f"{path} is a directory", hint="name a file with -o")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", hint="choose another name with -o, or replace it with --force")
