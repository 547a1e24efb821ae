"""A report: its parts, each from a recipe, a comparison or the factors, in one file of HTML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import leaf
from loracli.algebra.basis import Interference, interference
from loracli.errors import AccessDenied, AdapterNotFound, HubUnreachable, InputError, OutputExists, UsageError
from loracli.evaluation.comparison import Comparison, ComparisonRow, ComparisonSettings
from loracli.evaluation.sentences import (
    DIFFERENCE,
    GUARDED,
    against_control,
    best_first,
    flattered,
    guard_cells,
    guard_title,
    remarks,
    training_gap,
    verdict,
)
from loracli.hub.references import Named
from loracli.progress import SILENT, Bar, Progress, amount_text, drawn, takes_bar
from loracli.recipe.ingredients import read_ingredients
from loracli.recipe.recipe import Recipe, check_recipe_there, load_recipe
from loracli.recipe.record import EDITED, INLINE_KINDS, HeldOut, HeldOutRow, HeldOutTask
from loracli.report.charts import NATS, Line, heat_map, intervals_chart, loss_curve, ridge_path
from loracli.report.commands import Files, Step, made_by, what_next
from loracli.report.grid import numbers
from loracli.report.page import command, folded, opened, page, paragraph, section, table, tag, text
from loracli.report.tables import claims, comparison_table, held_out_table
from loracli.system.display import count_text, path_text, repr_line
from loracli.system.document import decode
from loracli.system.files import ANOTHER_NAME, OR_FORCE, read_regular, same_file, write_atomically
from loracli.system.strict_json import StrictJsonError, parse_json


def _headline(recipe: Recipe) -> str:
    """The verdict in a sentence, and of what it is; of a recipe as it may be published."""
    names = " + ".join(adapter.reference for adapter in recipe.adapters)
    measured = recipe.held_out_of_weights
    worse = measured is not None and measured.verdict == "not better" and measured.row("fit").interval[0] > 0
    kind = "better" if measured is not None and measured.verdict == "better" else "worse" if worse else ""
    said = verdict(measured) if measured else f"No verdict: {EDITED}; what the fit measured is not theirs and left out"
    stopped = "" if recipe.fit.stopped is None else paragraph(f"STOPPED EARLY: {recipe.fit.stopped}")
    return (
        tag("h1", text(said[:1].upper() + said[1:] + "."), class_=f"verdict {kind}".strip())
        + stopped
        + paragraph(f"{names}: one LoRA adapter for {recipe.base.id}, mixed by {recipe.mixing.kind}.", soft=True)
    )


def _held_out(recipe: Recipe, found: HeldOut) -> str:
    """The recipe's own table, drawn and in numbers, and beside it the loss on the training records."""
    best, gap = found.best_ingredient, training_gap(recipe)
    rows = best_first(found.lines)
    lines = [Line(row.name, row.difference, row.interval, row.name != "base", row.name == best) for row in rows]
    return section(
        "On held-out records",
        _said_of(found.name, found.records, found.scored_tokens, best),
        paragraph(f"Cross-fitted: {found.how}.", soft=True) if found.how else "",
        intervals_chart(lines, best),
        held_out_table(found),
        paragraph(f"{gap[:1].upper()}{gap[1:]}.") if gap else "",
        paragraph(f"{against_control(found)}.") if found.controls else "",
        _tasks(best_first(found.rows), found.tasks),
    )


def _said_of(data: str, records: int, tokens: int, best: str) -> str:
    return paragraph(
        f"{records} records of {data}, {tokens} scored tokens. The lowest loss comes first. {DIFFERENCE.capitalize()}, "
        f"{best}, in {NATS}, with its paired 95 % interval; below zero is better. Worse on: the share of the "
        "records on which it costs more.",
        soft=True,
    )


def _tasks(rows: Sequence[HeldOutRow | ComparisonRow], tasks: Sequence[HeldOutTask]) -> str:
    if len(tasks) < 2:
        return ""
    names = [row.name for row in rows]
    cells = [[t.task, str(t.records), *(f"{t.nats_per_token[n]:.4f}" for n in names)] for t in tasks]
    return folded(f"{NATS} by task", table(f"{NATS} by task", ["task", "records", *names], cells))


def _compared(found: Comparison) -> str:
    """A comparison, drawn and in numbers, in the words of `loracat compare`."""
    rows, best = best_first(found.rows), found.best_ingredient
    wild = ("base", "random")
    lines = [Line(row.name, row.difference, row.interval, row.name not in wild, row.name == best) for row in rows]
    return section(
        "Every way to compose",
        *claims(found),
        *([paragraph(flattered(found))] if flattered(found) else []),
        _said_of(found.data, found.records, found.scored_tokens, best),
        intervals_chart(lines, best),
        comparison_table(found),
        tag("ul", *(tag("li", text(remark)) for remark in remarks(found)), class_="soft"),
        _guarded(found, rows),
        _tasks(rows, found.tasks),
    )


def _guarded(found: Comparison, rows: Sequence[ComparisonRow]) -> str:
    """What must not get worse, with the difference and its interval first."""
    if found.guard is None:
        return ""
    nats, *rest = GUARDED
    cells = []
    for row in rows:
        if row.guard is not None and row.kind != "base":
            loss, *others = guard_cells(row.guard)
            cells.append([row.name, *others, loss])
    title = guard_title(found)
    return tag("h3", text(title[:1].upper() + title[1:])) + table(title, ["adapter or method", *rest, nats], cells)


def _weights(recipe: Recipe) -> str:
    """The map of the weights, and the same in numbers."""
    summary = "" if recipe.mixing.kind in INLINE_KINDS else (
        f" The mixing is {recipe.mixing.kind}, {recipe.mixing.numbers} numbers; shown are the weights whose weighted "
        "sum comes closest to it."
    )  # fmt: skip
    errors = "" if recipe.certificate_of_weights is None else ", ± their standard errors where these are known"
    return section(
        "Mixing weights",
        paragraph(
            f"How much of each adapter a module takes, by layer, the first layer on top; uniform, "
            f"{1 / len(recipe.adapters):.3g}, has no colour. Pointed at, a cell names its module.{summary}",
            soft=True,
        ),
        heat_map(recipe),
        opened(f"the weights as numbers, by layer{errors}", table("the weights as numbers", *numbers(recipe))),
    )


def _search(recipe: Recipe) -> str:
    """How the weights were found: the curve, the stages with their ridges, the kinds of mixing."""
    fit = recipe.fit
    parts = [paragraph(f"{rung.kind}: {rung.why}.") for rung in fit.rungs]
    if fit.stages:
        curve = loss_curve(fit) if any(stage.losses for stage in fit.stages) else ""
        parts = [curve, *parts, opened("the stages of the search, in order", table("the stages", *ridge_path(fit)))]
    certificate = recipe.certificate_of_weights
    if certificate is not None:
        bound = "" if certificate.certain else "At most "
        parts.append(
            paragraph(
                f"{bound}{certificate.left:.1g} {NATS} left to gain on the training records; your data support about "
                f"{certificate.effective_numbers:.0f} of {recipe.mixing.numbers} weights."
            )
        )
    chosen = "" if fit.criterion == NATS else f" Chosen by {fit.criterion}; costs are 1 minus its mean."
    refitted = "then fitted once more on all training records" if fit.refitted else "not fitted again"
    return section("The search", paragraph(f"{fit.passes:.3g} passes, {refitted}.{chosen}", soft=True), *parts)


def _interferences(recipe: Recipe, adapters: Sequence[LoraAdapter]) -> str:
    """How far the adapters share directions, pair by pair and name by name."""
    labels = [adapter.reference for adapter in recipe.adapters]
    parts = []
    for i, first in enumerate(adapters):
        for j in range(i + 1, len(adapters)):
            second = adapters[j]
            by_leaf: dict[str, list[Interference]] = {}
            for name in sorted(first.modules.keys() & second.modules.keys()):
                pair = interference(first.modules[name].factors, second.modules[name].factors)
                by_leaf.setdefault(leaf(name), []).append(pair)
            cosines = {name: _mean([p.cosine for p in found]) for name, found in by_leaf.items()}
            rows = [
                [
                    name,
                    f"{cosines[name]:+.3f}",
                    f"{max(abs(p.cosine) for p in found):.3f}",
                    f"{_mean([p.input for p in found]):.3f}",
                    f"{_mean([p.output for p in found]):.3f}",
                ]
                for name, found in sorted(by_leaf.items(), key=lambda item: (-abs(cosines[item[0]]), item[0]))
            ]
            title = f"{labels[i]} and {labels[j]}"
            columns = ["modules", "cosine", "largest", "shared input", "shared output"]
            nothing = paragraph("They change no module together.")
            parts.append(tag("h3", text(title)) + (table(title, columns, rows) if rows else nothing))
    return section(
        "Interference",
        paragraph(
            "From the factors alone: the cosine of the two updates (mean over layers, and the largest in size), and "
            "which share of the smaller input and output space the other one uses too. 0 is none, 1 is all. The "
            "modules whose updates are most alike, or most opposed, come first.",
            soft=True,
        ),
        *parts,
    )


def _made(recipe: Recipe, steps: Sequence[Step], found: Comparison | None) -> str:
    """The commands that made all this, and what went in, by hash."""
    adapters = [
        [a.reference, str(a.rank), f"{a.lora_alpha:g}", a.dtype, (a.commit or "local")[:12], a.weights_sha256[:16]]
        for a in recipe.adapters
    ]
    data = [[d.name, str(d.records), str(d.scored_tokens), d.shape, d.sha256[:16]] for d in recipe.data]
    base = f"Base model {recipe.base.id}, {recipe.base.commit or 'a local directory'}."
    ran = _ran(recipe.dtype, recipe.base.quantisation, recipe.fit.settings.get("seed", 0), recipe.versions)
    return section(
        "How this was made",
        paragraph(
            "In the folder of the recipe, with the data beside it; path/to/... stands for a directory whose "
            "place is not recorded.",
            soft=True,
        ),
        _typed(steps),
        paragraph(f"{base} The fit: {ran}."),
        table("adapters", ["adapter", "rank", "alpha", "dtype", "commit", "sha256"], adapters),
        table("calibration data", ["data", "records", "scored tokens", "shape", "sha256"], data),
        folded("all settings of the fit", _settings(recipe.fit.settings)),
        "" if found is None else _made_comparison(found.settings),
    )


def _made_comparison(made: ComparisonSettings | None) -> str:
    """What the comparison ran with, which need not be what the fit did."""
    if made is None:
        return paragraph(
            "What the comparison ran with is not recorded: its document is of an older version of loracat."
        )
    ran = _ran(made.dtype, made.quantisation, made.options.get("seed", 0), made.versions)
    data = [
        [file.name, f"{file.weight:g}", "all" if file.adapter is None else f"#{file.adapter}", file.sha256[:16]]
        for file in made.fit_data
    ]
    title = "records that rows of the comparison were fitted on"
    return (
        paragraph(f"The comparison: {ran}.")
        + (table(title, ["data", "weight", "of adapter", "sha256"], data) if data else "")
        + folded("all settings of the comparison", _settings(made.options))
    )


def _ran(dtype: str, quantisation: str | None, seed: object, versions: Mapping[str, str]) -> str:
    kept = f", linear layers kept in {quantisation}" if quantisation else ""
    return f"run in {dtype}{kept}, seed {seed}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _settings(values: Mapping[str, object]) -> str:
    rows = [[name, "default" if value is None else str(value)] for name, value in values.items()]
    return table("settings", ["setting", "value"], rows)


def _next(steps: Sequence[Step]) -> str:
    return section("What next", _typed(steps))


def _typed(steps: Sequence[Step]) -> str:
    return "".join(paragraph(step.why) + command(step.line) for step in steps)


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
    comparison: Comparison | str | Path | None = None,
    adapters: Sequence[Named] = (),
    force: bool = False,
    progress: Progress | Bar = SILENT,
) -> Written:
    """Writes the report of a recipe, the same bytes for the same inputs.

    Args:
        recipe: a recipe, or the file of one.
        output: the file to write.
        comparison: from `compare_adapters`, or the file of what `loracat compare RECIPE --json` printed; None to show
            the recipe's own table alone.
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
    found = _read_comparison(comparison) if isinstance(comparison, (str, Path)) else comparison
    if found is not None:
        _check_compares(found, loaded, "the comparison" if comparison is found else str(comparison))
    ingredients = _ingredients(loaded, adapters, progress)
    public = loaded.public()
    files = Files(
        "recipe.json" if isinstance(recipe, Recipe) else Path(recipe).name,
        None if found is None else "comparison.json" if comparison is found else Path(str(comparison)).name,
    )
    parts = {"verdict": _headline(public)}
    if found is not None:
        parts["comparison"] = _compared(found.labelled() if len(found.recipes) > 1 else found.renamed(loaded.labels()))
    if public.held_out_of_weights is not None:
        parts["held out"] = _held_out(public, public.held_out_of_weights)
    parts["weights"] = _weights(loaded)
    parts["search"] = _search(public)
    if len(ingredients) > 1:
        parts["interference"] = _interferences(public, ingredients)
    parts["provenance"] = _made(public, made_by(loaded, files, found), found)
    parts["next"] = _next(what_next(loaded, files, found))
    content = page("loracat: " + " + ".join(a.reference for a in public.adapters), *parts.values()).encode()
    write_atomically(output, content)
    return Written(output, len(content), tuple(parts))


_HOW = "write one with: loracat compare RECIPE --data test.jsonl --json > comparison.json"


def _read_comparison(path: str | Path) -> Comparison:
    """A comparison from the JSON document of `loracat compare`.

    Raises:
        InputError: if it is no such document.
    """
    try:
        data = read_regular(Path(path), _MAX_COMPARISON_BYTES)
    except OSError as error:
        raise InputError(f"the comparison {path} cannot be read: {error.strerror}") from None
    try:
        document = parse_json(data)
    except StrictJsonError as error:
        raise InputError(f"the comparison {path} cannot be read: {error}", hint=_HOW) from None
    if not isinstance(document, dict):
        raise InputError(f"the comparison {path} is not a JSON object", hint=_HOW)
    failure = document.get("error")
    if isinstance(failure, dict) and isinstance(failure.get("message"), str):
        raise InputError(f"the comparison that {path} was written by failed: {failure['message']}", hint=_HOW)
    wanted = {field.name for field in fields(Comparison)}
    problems: list[str] = []
    found: Comparison = decode(Comparison, {k: v for k, v in document.items() if k in wanted}, "", problems)
    if problems:
        raise InputError(f"{path} is not a comparison: {problems[0].removeprefix(': ')}", hint=_HOW)
    return found


def _check_compares(found: Comparison, recipe: Recipe, path: str) -> None:
    """Raises UsageError if the comparison that `path` names is of other adapters than the recipe's, or not its fit."""
    rows = {row.name for row in found.rows}
    references = tuple(adapter.reference for adapter in recipe.adapters)
    alone = len(found.recipes) < 2  # and none in documents of older versions
    own = next((one.row for one in found.recipes if one.sha256 == recipe.sha256()), "fit" if alone else "")
    if (alone and len(found.adapters) != len(references)) or own not in rows or found.best.name not in rows:
        raise UsageError(f"{path} does not compare this recipe's fit", hint=_HOW)
    if alone and found.adapters != references:
        named = ", ".join(found.adapters)
        raise UsageError(f"{path} compares {named}, and the recipe has {', '.join(references)}", hint=_HOW)
    if found.recipes and recipe.sha256() not in [one.sha256 for one in found.recipes]:
        raise UsageError(f"{path} compares another recipe, or this one before it was changed", hint=_HOW)


def _ingredients(recipe: Recipe, adapters: Sequence[Named], progress: Progress) -> tuple[LoraAdapter, ...]:
    """The adapters, or none where they are not at hand."""
    try:
        return read_ingredients(recipe, relocated=adapters, progress=progress)
    except (AdapterNotFound, AccessDenied, HubUnreachable) as error:
        if adapters:
            raise
        where = "name all adapters where they are now with --adapters"
        progress.warn(f"the report has no interference between the adapters: {error}; {where}")
        return ()


def _check_free(path: Path, *, force: bool, read: Sequence[object]) -> None:
    if path.is_dir():
        raise OutputExists(f"{path} is a directory", hint="name a file in it")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", hint=OR_FORCE)
    if any(same_file(path, Path(name)) for name in read if isinstance(name, (str, Path))):
        raise UsageError(f"{path} is what the report is made of", hint=ANOTHER_NAME)
