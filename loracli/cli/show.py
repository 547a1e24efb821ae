"""`loracat show`: a recipe for people."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracli.cli import _options as opt
from loracli.cli._output import Output

if TYPE_CHECKING:
    from loracli.recipe.recipe import Recipe

EPILOG = "loracat show recipe.json  ·  loracat show recipe.json --json"


def _spread(cell: tuple[float, float, float] | None) -> str:
    """Mean and range of some weights; nothing where there is none, one number where all are equal."""
    if cell is None:
        return "-"
    mean, low, high = cell
    return f"{mean:+.3f}" if low == high else f"{mean:+.3f} ({low:+.2f} to {high:+.2f})"


def _document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is in the file; of weights that were edited without what the fit measured."""
    document: dict[str, Any] = json.loads(recipe.to_json())
    if recipe.mixing.edited:
        del document["held_out"]
        document["fit"]["certificate"] = None
    return document


def show(
    *,
    recipe: opt.RecipeArgument = Path("recipe.json"),
    out: Output,
) -> None:
    """Show a recipe: ingredients, weights, how they were found, and the held-out table."""
    from loracli.cli._tables import data_lines, held_out_lines, search_lines, weight_maps
    from loracli.recipe.recipe import load_recipe, weights_by_leaf
    from loracli.recipe.record import EDITED, INLINE_KINDS, other_bases_of, tensors_path

    loaded = load_recipe(recipe)
    edited, measured = loaded.mixing.edited, loaded.held_out_of_weights
    out.document({"recipe": _document(loaded), "weights_edited": edited})
    out.value(EDITED if measured is None else measured.verdict)
    labels = loaded.labels()
    commit = f" at {loaded.base.commit}" if loaded.base.commit else ""
    out.line(f"base model: {loaded.base.id}{commit}", style="bold")
    out.line()
    out.table(
        ["adapter", "rank", "alpha", "commit", "sha256"],
        [
            [
                labels[a.reference],
                str(a.rank),
                f"{a.lora_alpha:g}{' rs' if a.use_rslora else ''}",
                (a.commit or "local")[:12],
                a.weights_sha256[:12],
            ]
            for a in loaded.adapters
        ],
    )
    for other in other_bases_of(loaded.base.id, loaded.adapters):
        out.line(f"base model: {replace(other, adapter=labels[other.adapter])}")
    out.line()
    mixing, spread = loaded.mixing, "mean over modules (lowest to highest)"
    if mixing.kind in INLINE_KINDS:
        origin = "edited after the fit" if edited else f"{mixing.numbers} fitted"
        out.line(f"weights: {mixing.kind}, {origin}, {spread}", style="bold")
    else:
        kept = tensors_path(recipe).name
        out.line(f"mixing: {mixing.kind}, {mixing.numbers} numbers fitted, kept in {kept}", style="bold")
        out.line(f"the weights that come closest to it, {spread}:")
    out.table(
        ["", *labels.values()],
        [[name, *(_spread(cell) for cell in cells)] for name, cells in weights_by_leaf(loaded).items()],
    )
    for what, names in (
        ("weight read without calling the layer, so the update has no effect, here or in PEFT", mixing.bypassed),
        ("not reached by any record", [name for name in mixing.unreached if name not in mixing.bypassed]),
    ):
        if names:
            out.line(f"{what}: {', '.join(names)}")
    out.line()
    if mixing.kind != "adapter":
        weight_maps(out, loaded)
    data_lines(out, loaded)
    search_lines(out, loaded)
    out.line()
    held_out_lines(out, loaded)
    out.hint(shlex.join(["loracat", "export", str(recipe), "--merge"]))
