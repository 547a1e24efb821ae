"""A report: its parts, each from a recipe, a comparison or the factors, in one file of HTML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import leaf
from loracli.algebra.basis import Interference, interference
from loracli.errors import AccessDenied, AdapterNotFound, HubUnreachable, InputError, OutputExists, UsageError
from loracli.evaluation.comparison import Comparison, best_first, verdict
from loracli.progress import SILENT, Bar, Progress, amount_text, drawn, takes_bar
from loracli.recipe.ingredients import read_ingredients
from loracli.recipe.recipe import Recipe, check_recipe_there, load_recipe
from loracli.recipe.record import EDITED, INLINE_KINDS, HeldOut
from loracli.report.charts import (
    Line,
    folded,
    heat_map,
    intervals_chart,
    loss_curve,
    page,
    ridge_path,
    section,
    table,
    tag,
    text,
)
from loracli.report.grid import numbers
from loracli.report.tables import caption, claims, comparison_table, held_out_table
from loracli.system.display import count_text, path_text, repr_line
from loracli.system.document import decode
from loracli.system.files import read_regular, same_file, write_atomically
from loracli.system.strict_json import StrictJsonError, parse_json


def _headline(recipe: Recipe) -> str:
    """The adapters, and the verdict in a sentence; of a recipe as it may be published."""
    names = " + ".join(adapter.reference for adapter in recipe.adapters)
    measured = recipe.held_out_of_weights
    kind = {"better": "better", "not better": "worse"}.get(measured.verdict, "") if measured else ""
    said = verdict(measured) if measured else f"{EDITED}: what the fit measured is not theirs and left out"
    return (
        tag("h1", text(names))
        + tag("p", text(said[:1].upper() + said[1:] + "."), class_=f"verdict {kind}".strip())
        + tag("p", text(f"One LoRA adapter for {recipe.base.id}, mixed by {recipe.mixing.kind}."), class_="soft")
    )


def _held_out(table_of: HeldOut) -> str:
    """The recipe's own table, drawn and in numbers."""
    lines = [Line(row.name, row.difference, row.interval, row.name != "base") for row in best_first(table_of.rows)]
    return section(
        "On held-out records",
        caption(
            f"{table_of.records} records of {table_of.name}, {table_of.scored_tokens} scored tokens; difference in "
            f"nats per token to the best single adapter, {table_of.best_ingredient}, with its paired 95 % interval. "
            "Left of zero is better."
        ),
        caption(f"Cross-fitted: {table_of.how}.") if table_of.how else "",
        intervals_chart(lines, "differences on held-out records"),
        held_out_table(table_of),
        _tasks(table_of),
    )


def _tasks(table_of: HeldOut) -> str:
    if len(table_of.tasks) < 2:
        return ""
    names = [row.name for row in table_of.rows]
    rows = [[t.task, str(t.records), *(f"{t.nats_per_token[n]:.4f}" for n in names)] for t in table_of.tasks]
    return folded("by task", table(["task", "records", *names], rows))


def _compared(found: Comparison) -> str:
    """A comparison, drawn and in numbers."""
    rows = best_first(found.rows)
    lines = [Line(row.name, row.difference, row.interval, row.name not in ("base", "random")) for row in rows]
    repeated = f" {found.repeated_records} of the records were calibrated on." if found.repeated_records else ""
    return section(
        "Every way to compose",
        *claims(found),
        caption(
            f"{found.records} records of {found.data}, {found.scored_tokens} scored tokens; difference to the best "
            f"single adapter, {found.best_ingredient}. Smallest difference that so many records can show: "
            f"{found.detectable:.2g} nats per token, 4 times in 5.{repeated}"
        ),
        intervals_chart(lines, "differences of every way to compose"),
        comparison_table(found),
        _notes(found),
    )


def _notes(found: Comparison) -> str:
    lines = [f"{row.name}: {row.note}" for row in found.rows if row.note]
    lines += [f"{skipped.name} was left out: {skipped.reason}" for skipped in found.skipped]
    return folded("notes", *(tag("p", text(line)) for line in lines)) if lines else ""


def _weights(recipe: Recipe) -> str:
    """The map of the weights, and the same in numbers."""
    summary = "" if recipe.mixing.kind in INLINE_KINDS else (
        f" The mixing is {recipe.mixing.kind}, {recipe.mixing.numbers} numbers; shown are the weights whose weighted "
        "sum comes closest to it."
    )  # fmt: skip
    return section(
        "Mixing weights",
        caption(
            f"By layer and module; uniform, {1 / len(recipe.adapters):.3g}, has no colour. Each cell tells its number "
            f"when it is pointed at.{summary}"
        ),
        heat_map(recipe),
        folded("the weights as numbers", table(*numbers(recipe))),
    )


def _search(recipe: Recipe) -> str:
    """How the weights were found: the curve, the path of ridges, the kinds of mixing."""
    fit = recipe.fit
    parts = [tag("p", text(f"{rung.kind}: {rung.why}.")) for rung in fit.rungs]
    if fit.stages:
        parts.insert(0, loss_curve(fit))
        parts.append(folded("the stages with their ridges", table(*ridge_path(fit.stages))))
    certificate = recipe.certificate_of_weights
    if certificate is not None:
        bound = "" if certificate.certain else "At most "
        gain = min(certificate.decrement, certificate.loss)
        parts.append(
            tag(
                "p",
                text(
                    f"{bound}{gain:.1g} nats per token left to gain on the training records; your data support about "
                    f"{certificate.effective_numbers:.0f} of {recipe.mixing.numbers} weights."
                ),
            )
        )
    chosen = "" if fit.criterion == "nats per token" else f" Chosen by {fit.criterion}; costs are 1 minus its mean."
    stopped = f" Stopped early: {fit.stopped}." if fit.stopped else ""
    refitted = "then fitted once more on all training records" if fit.refitted else "not fitted again"
    return section("The search", caption(f"{fit.passes:.3g} epochs, {refitted}.{chosen}{stopped}"), *parts)


def _interferences(recipe: Recipe, adapters: Sequence[LoraAdapter]) -> str:
    """How far the adapters share directions, pair by pair and name by name."""
    labels = [adapter.reference for adapter in recipe.adapters]
    parts = []
    for i, first in enumerate(adapters):
        for j in range(i + 1, len(adapters)):
            second = adapters[j]
            by_leaf: dict[str, list[Interference]] = {}
            for name in first.modules.keys() & second.modules.keys():
                pair = interference(first.modules[name].factors, second.modules[name].factors)
                by_leaf.setdefault(leaf(name), []).append(pair)
            rows = [
                [
                    name,
                    f"{_mean([p.cosine for p in found]):+.3f}",
                    f"{max(abs(p.cosine) for p in found):.3f}",
                    f"{_mean([p.input for p in found]):.3f}",
                    f"{_mean([p.output for p in found]):.3f}",
                ]
                for name, found in sorted(by_leaf.items())
            ]
            title = tag("h3", text(f"{labels[i]} and {labels[j]}"))
            columns = ["modules", "cosine", "largest", "shared input", "shared output"]
            parts.append(title + (table(columns, rows) if rows else tag("p", "They change no module together.")))
    return section(
        "Interference",
        caption(
            "From the factors alone: the cosine of the two updates (mean over layers, and the largest in size), and "
            "which share of the smaller input and output space the other one uses too. 0 is none, 1 is all."
        ),
        *parts,
    )


def _provenance(recipe: Recipe) -> str:
    """What went in, by hash."""
    adapters = [
        [a.reference, (a.commit or "local")[:12], a.weights_sha256[:16], str(a.rank), f"{a.lora_alpha:g}", a.dtype]
        for a in recipe.adapters
    ]
    data = [[d.name, d.shape, str(d.records), str(d.scored_tokens), d.sha256[:16]] for d in recipe.data]
    settings = [[name, "default" if value is None else str(value)] for name, value in recipe.fit.settings.items()]
    versions = ", ".join(f"{name} {version}" for name, version in recipe.versions.items())
    base = f"Base model {recipe.base.id}, {recipe.base.commit or 'a local directory'}, run in {recipe.dtype}."
    return section(
        "Provenance",
        tag("p", text(base)),
        table(["adapter", "commit", "sha256", "rank", "alpha", "dtype"], adapters),
        table(["data", "shape", "records", "scored tokens", "sha256"], data),
        folded("settings", table(["setting", "value"], settings)),
        caption(versions),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_MAX_COMPARISON_BYTES = 64 << 20


@dataclass(frozen=True)
class Written:
    """What a report wrote: the file, its size, and the names of its parts."""

    path: Path
    size_bytes: int
    parts: tuple[str, ...]

    def __repr__(self) -> str:
        return repr_line(
            self, path_text(self.path), amount_text(self.size_bytes, "B"), count_text(len(self.parts), "part")
        )


@takes_bar
def write_report(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    comparison: str | Path | None = None,
    adapters: Sequence[str] = (),
    force: bool = False,
    progress: Progress | Bar = SILENT,
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
    progress = drawn(progress)
    output = Path(output)
    check_recipe_there(recipe)
    _check_free(output, force=force, read=(recipe, comparison))
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    found = None if comparison is None else _read_comparison(Path(comparison), loaded)
    ingredients = _ingredients(loaded, adapters, progress)
    public = loaded.public()
    parts = {"verdict": _headline(public)}
    if found is not None:
        parts["comparison"] = _compared(found.labelled() if len(found.recipes) > 1 else found.renamed(loaded.labels()))
    if public.held_out_of_weights is not None:
        parts["held out"] = _held_out(public.held_out_of_weights)
    parts["weights"] = _weights(loaded)
    parts["search"] = _search(public)
    if len(ingredients) > 1:
        parts["interference"] = _interferences(public, ingredients)
    parts["provenance"] = _provenance(public)
    content = page("loracat: " + " + ".join(a.reference for a in public.adapters), *parts.values()).encode()
    write_atomically(output, content)
    return Written(output, len(content), tuple(parts))


def _read_comparison(path: Path, recipe: Recipe) -> Comparison:
    """A comparison from the JSON document of `loracat compare`.

    Raises:
        InputError: if it is no such document.
        UsageError: if it compares other adapters than the recipe's, or not its fit.
    """
    try:
        data = read_regular(path, _MAX_COMPARISON_BYTES)
    except OSError as error:
        raise InputError(f"the comparison {path} cannot be read: {error.strerror}") from None
    hint = "write one with: loracat compare RECIPE --data test.jsonl --json > comparison.json"
    try:
        document = parse_json(data)
    except StrictJsonError as error:
        raise InputError(f"the comparison {path} is {error}", hint=hint) from None
    if not isinstance(document, dict):
        raise InputError(f"the comparison {path} is not a JSON object", hint=hint)
    wanted = {field.name for field in fields(Comparison)}
    problems: list[str] = []
    found: Comparison = decode(Comparison, {k: v for k, v in document.items() if k in wanted}, "", problems)
    if problems:
        raise InputError(f"{path} is not a comparison: {problems[0].removeprefix(': ')}", hint=hint)
    rows = {row.name for row in found.rows}
    references = tuple(adapter.reference for adapter in recipe.adapters)
    alone = len(found.recipes) < 2  # and none in documents of older versions
    own = next((one.row for one in found.recipes if one.sha256 == recipe.sha256()), "fit" if alone else "")
    if (alone and len(found.adapters) != len(references)) or own not in rows or found.best.name not in rows:
        raise UsageError(f"{path} does not compare this recipe's fit", hint=hint)
    if alone and found.adapters != references:
        named = ", ".join(found.adapters)
        raise UsageError(f"{path} compares {named}, and the recipe has {', '.join(references)}", hint=hint)
    if found.recipes and recipe.sha256() not in [one.sha256 for one in found.recipes]:
        raise UsageError(f"{path} compares another recipe, or this one before it was changed", hint=hint)
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


def _check_free(path: Path, *, force: bool, read: Sequence[object]) -> None:
    if path.is_dir():
        raise OutputExists(f"{path} is a directory", hint="name a file with -o")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", hint="choose another name with -o, or replace it with --force")
    if any(same_file(path, Path(name)) for name in read if isinstance(name, (str, Path))):
        raise UsageError(f"{path} is what the report is made of", hint="choose another name with -o")
