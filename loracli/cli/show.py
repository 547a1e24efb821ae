"""`loracat show`: a recipe for people."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output
from loracli.cli._settings import ingredient_reference

if TYPE_CHECKING:
    from loracli.recipe.recipe import Recipe

EPILOG = (
    "loracat show recipe.json  ·  loracat show recipe.json --json  ·  "
    "loracat show recipe.json --weights > weights.toml  ·  loracat show recipe.json --layers --data test.jsonl"
)


@dataclass(frozen=True)
class LayerOptions:
    """What is measured by layer, on which records."""

    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Measure on --data how much the loss changes when the composition leaves a layer out."
        ),
    ] = False
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", metavar="FILE...", help="With --layers: on this JSONL, that nothing was fitted on."
        ),
    ] = None
    adapters: opt.Places = None
    base: opt.Base = None
    base_revision: opt.BaseRevision = None

    def check(self, placement: opt.PlacementOptions, *, weights: bool, search: bool) -> None:
        """Raises UsageError for options that do not go together."""
        from loracli.errors import UsageError

        if self.layers and (weights or search):
            raise UsageError(f"--layers is shown by itself, without --{'weights' if weights else 'search'}")
        if self.layers and not self.data:
            raise UsageError("--layers is measured on records", hint="give them with --data FILE")
        given = {**vars(self), **{name: value != "auto" and value for name, value in vars(placement).items()}}
        for name, value in given.items():
            if value and not self.layers:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} is for --layers, and nothing else of a recipe is measured here",
                    hint=f"add --layers --data FILE, or leave {option} out",
                )


def _spread(cell: tuple[float, float, float] | None) -> list[str]:
    """Mean and range of some weights, in two columns; nothing where there is none, one number where all are equal."""
    if cell is None:
        return ["-", ""]
    mean, low, high = cell
    return [f"{mean:+.2f}", "" if low == high else f"{low:+.2f} to {high:+.2f}"]


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
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Print the weights alone, as a file to edit for `loracat export --weights`."),
    ] = False,
    search: Annotated[
        bool,
        typer.Option("--search", help="Also how the weights were found: starts, penalties, what is left to gain."),
    ] = False,
    layers: LayerOptions,
    placement: opt.PlacementOptions,
    out: Output,
) -> None:
    """Show a recipe: whether it is better, the held-out table, ingredients, and weights."""
    from loracli.cli._tables import (
        data_lines,
        held_out_lines,
        search_lines,
        table_names,
        verdict_lines,
        weight_maps,
        weights_text,
    )
    from loracli.evaluation.sentences import overfitted
    from loracli.recipe.recipe import load_recipe, weights_by_leaf
    from loracli.recipe.record import EDITED, INLINE_KINDS, other_bases_of, tensors_path

    layers.check(placement, weights=weights, search=search)
    if layers.layers:
        _show_layers(out, recipe, layers, placement)
        return
    loaded = load_recipe(recipe)
    if weights:
        _show_weights(out, loaded)
        return
    edited, measured = loaded.mixing.edited, loaded.held_out_of_weights
    out.document({"recipe": _document(loaded), "weights_edited": edited, "overfitted": overfitted(loaded)})
    out.value(EDITED if measured is None else measured.verdict)
    verdict_lines(out, loaded)
    held_out_lines(out, loaded)
    labels = loaded.labels()
    names = table_names(out, list(labels.values()))
    commit = f" at {loaded.base.commit}" if loaded.base.commit else ""
    kept = f", its linear layers kept in {loaded.base.quantisation}" if loaded.base.quantisation else ""
    out.line(f"base model: {loaded.base.id}{commit}{kept}", style="bold")
    out.line()
    out.table(
        ["adapter", "rank", "alpha", "commit", "sha256"],
        [
            [
                names[labels[a.reference]],
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
    mixing = loaded.mixing
    if mixing.kind in INLINE_KINDS:
        origin = "edited after the fit" if edited else "fitted"
        out.line(f"{weights_text(loaded)}, {origin}: mean over modules, and the lowest to the highest", style="bold")
    else:
        out.line(f"{weights_text(loaded)}, fitted, kept in {tensors_path(recipe).name}", style="bold")
        out.line("the weights that come closest: mean over modules, and the lowest to the highest")
    out.table(
        ["", *(column for label in labels.values() for column in (names[label], "lowest to highest"))],
        [
            [name, *(text for cell in cells for text in _spread(cell))]
            for name, cells in weights_by_leaf(loaded).items()
        ],
    )
    for what, modules in (
        ("weight read without calling the layer, so the update has no effect, here or in PEFT", mixing.bypassed),
        ("not reached by any record", [name for name in mixing.unreached if name not in mixing.bypassed]),
    ):
        if modules:
            out.line(f"{what}: {', '.join(modules)}")
    out.line()
    if mixing.kind != "adapter":
        weight_maps(out, loaded)
    data_lines(out, loaded)
    if search or out.detailed:
        out.line()
        search_lines(out, loaded)
    out.hint(shlex.join(["loracat", "export", str(recipe), "--merge"]))


def _show_weights(out: Output, recipe: Recipe) -> None:
    """The weights as a file, whose first line is the command that exports the same with them."""
    from loracli.adapters.saved_modules import REFUSE
    from loracli.composition.card import base_words
    from loracli.composition.weights import recipe_tables, toml_text
    from loracli.recipe.ingredients import recorded_policy

    tables, policy = recipe_tables(recipe), recorded_policy(recipe)
    words = ["loracat", "export", "--adapters", *(ingredient_reference(recipe.folder, a) for a in recipe.adapters)]
    if base_words(recipe.base.id, recipe.adapters) or any(adapter.renamed for adapter in recipe.adapters):
        words += ["--base", "path/to/base" if recipe.base.claim is None else recipe.base.id]
    words += [] if policy == REFUSE else ["--modules-to-save", policy]
    out.document({"weights": tables})
    out.text(toml_text(tables, words))


def _show_layers(out: Output, recipe: Path, options: LayerOptions, placement: opt.PlacementOptions) -> None:
    """What each layer does to the loss on the records."""
    from loracli.cli._tables import layer_lines
    from loracli.comparison.layers import layer_effects
    from loracli.model.placement import Placement
    from loracli.system.document import encode

    found = layer_effects(
        recipe,
        options.data or (),
        adapters=options.adapters or (),
        base=options.base,
        base_revision=options.base_revision,
        placement=Placement(**vars(placement)),
        progress=out,
    )
    out.document(encode(found))
    for effect in found.layers:
        out.value(f"{effect.layer} {effect.change:+.6g}")
    layer_lines(out, found)
