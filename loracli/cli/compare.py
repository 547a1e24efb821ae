"""`loracat compare`: every way to compose, on the user's own records, with error bars."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._help import Panel
from loracli.cli._output import Output
from loracli.cli._settings import ingredient_reference
from loracli.progress import duration_text
from loracli.system.display import count_text
from loracli.system.document import encode

if TYPE_CHECKING:
    from loracli.algebra.methods.method import MethodOptions
    from loracli.comparison.compare import ComparisonPlan
    from loracli.comparison.settings import CompareSettings
    from loracli.evaluation.comparison import Comparison

EPILOG = (
    "loracat compare --data test.jsonl  ·  loracat compare recipe.json --data test.jsonl --methods ties,dare  ·  "
    "loracat compare module.json core.json --data test.jsonl  ·  "
    "loracat compare --adapters ./math ./code --weights 0.7 0.3 --data test.jsonl  ·  "
    "loracat compare --adapters ./math ./code --data test.jsonl --fit-data val.jsonl --methods all --control fresh-lora"
)


@dataclass(frozen=True)
class RowOptions:
    """What is compared with what, and what must not get worse."""

    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "-m",
            metavar="NAMES",
            help="Compare these, separated by commas; `data-free` are those that need no calibration data, `all` all.",
        ),
    ] = "data-free"
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="W...",
            help="Add a row, weights, by hand: one number for each adapter, or a file as for `loracat export`.",
        ),
    ] = None
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="NAME...",
            help="Add a control: fresh-lora is a new LoRA on --fit-data; random is the fit on random adapters, 5 "
            "draws; datamix DIR is an adapter trained on mixed data.",
        ),
    ] = None
    guard: Annotated[
        list[str] | None,
        typer.Option(
            "--guard", metavar="FILE...", help="Check on this JSONL that nothing gets worse than the base model."
        ),
    ] = None
    margin: Annotated[
        float, typer.Option("--margin", metavar="X", help="Let --guard get worse by X nats per token.")
    ] = 0.02


_Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        metavar="FILE...",
        help="Compare on this JSONL; none of its records may have been fitted on.",
    ),
]


_FitData = Annotated[
    list[str] | None,
    typer.Option(
        "--fit-data",
        metavar="FILE...",
        help="Calibrate on this JSONL what has to be fitted: kinds of mixing, task-arithmetic, lorahub, a control; for "
        "regmean, FILE@ADAPTER says whose records they are.",
    ),
    Panel.DATA,
]


_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, and say which rows would be compared in how much time."),
    Panel.OUTPUT,
]


_Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on after the last row of an interrupted comparison of the same inputs in this folder."
    ),
    Panel.OUTPUT,
]


_PerRecord = Annotated[
    Path | None,
    typer.Option(
        "--per-record",
        metavar="FILE",
        help="Write what each row scores on each record to this new JSONL.",
    ),
    Panel.OUTPUT,
]


_Force = Annotated[
    bool,
    typer.Option("--force", "-f", help="Start over, and drop the rows that an interrupted comparison has done."),
    Panel.OUTPUT,
]


def compare(
    *,
    data: _Data,
    recipe: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RECIPE",
            help="The recipe whose fit is compared, or several; recipe.json, unless there are --adapters.",
        ),
    ] = None,
    adapters: opt.AdaptersOrPlaces = None,
    rows: RowOptions,
    fit_data: _FitData = None,
    generate: Annotated[
        str | None,
        typer.Option(
            "--generate",
            metavar="METRIC",
            help="Judge greedy answers too: exact, contains, numeric; or choice, by the options' log-likelihood.",
        ),
        Panel.ANSWERS,
    ] = None,
    answers: opt.AnswerOptions,
    density: Annotated[opt.Density, Panel.COMPOSING] = None,
    scale: Annotated[opt.Scale, Panel.COMPOSING] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="K",
            help="Cut methods with a full-rank result to rank K; the default is the sum of the ranks.",
        ),
        Panel.COMPOSING,
    ] = None,
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    reading: opt.ReadingOptions,
    placement: opt.PlacementOptions,
    checkpointing: opt.Checkpointing = False,
    per_record: _PerRecord = None,
    dry_run: _DryRun = False,
    resume: _Resume = False,
    force: _Force = False,
    out: Output,
) -> None:
    """Compare every way to compose adapters on your own records, with paired confidence intervals."""
    from loracli.algebra.methods.method import MethodOptions
    from loracli.cli._tables import comparison_lines
    from loracli.comparison.compare import check_new, plan_comparison, resumable_comparison
    from loracli.comparison.inputs import prepare_comparison
    from loracli.comparison.state import comparison_state
    from loracli.evaluation.metrics import task_metric
    from loracli.model.placement import Placement
    from loracli.system.files import told_in_dry_run

    metric = task_metric(
        generate, answers.metric_command, max_new_tokens=answers.max_new_tokens, tolerance=answers.tolerance
    )
    place = Placement(**vars(placement), checkpointing=checkpointing)
    settings = _settings_of(rows, reading, MethodOptions(density, scale, reading.seed, rank))
    recipes = recipe or ([] if adapters else [Path("recipe.json")])
    _refuse_methods(recipes, rows.methods)
    prepare = partial(
        prepare_comparison,
        data,
        recipe=recipes,
        adapters=adapters or (),
        fit_data=fit_data or None,
        guard=rows.guard or None,
        base=base,
        base_revision=base_revision,
        placement=place,
        settings=settings,
        progress=out,
    )
    if dry_run:
        with told_in_dry_run(dry_run, "the comparison", out):
            check_new(per_record)
        _show_plan(out, plan_comparison(prepare(), placement=place, metric=metric, progress=out), metric is not None)
        return
    with resumable_comparison(
        prepare,
        comparison_state(recipes, adapters or (), data),
        placement=place,
        metric=metric,
        resume=resume,
        force=force,
        per_record=per_record,
        progress=out,
    ) as found:
        out.document(found.as_dict())
        out.value(found.best.name)
        comparison_lines(out, found)
        sys.stdout.flush()  # before what was done is dropped
    own = {"base": base, "base-revision": base_revision}
    words = _next_words(found, settings, recipe or (), adapters or (), rows.weights or (), fit_data or (), own, reading)
    if words:
        out.hint(shlex.join(words))


def _show_plan(out: Output, plan: ComparisonPlan, generates: bool) -> None:
    """What a comparison would do."""
    out.document({"plan": encode(plan)})
    more = "; the answers that are generated come on top" if generates else ""
    out.line(
        f"{count_text(len(plan.rows), 'row')} on {count_text(plan.records, 'record')}, "
        f"base {plan.base} in {plan.dtype} on {plan.device}: about {duration_text(plan.seconds)}{more}"
    )
    out.table(["", "kind", "about"], [[row.name, row.kind, duration_text(row.seconds)] for row in plan.rows])
    for row in plan.rows:
        out.value(f"{row.name}.seconds={row.seconds:g}")
    for one in plan.skipped:
        out.line(f"left out: {one.name}: {one.reason}")


def _refuse_methods(recipes: Sequence[Path], methods: str) -> None:
    """Of methods with blanks between them all but the first are taken for recipes."""
    from loracli.algebra.methods import METHODS
    from loracli.errors import UsageError

    wrong = [str(path) for path in recipes if str(path) in METHODS and not path.exists()]
    if wrong:
        named = wrong if methods in ("all", "data-free") else [methods, *wrong]
        hint = f"name methods with commas between them: --methods {','.join(named)}"
        raise UsageError(f"there is no recipe {wrong[0]}, which is the name of a method", hint=hint)


def _settings_of(rows: RowOptions, reading: opt.ReadingOptions, options: MethodOptions) -> CompareSettings:
    from loracli.comparison.settings import CompareSettings, parse_controls, parse_methods
    from loracli.composition.weights import parse_words
    from loracli.fitting.settings import FitSettings

    return CompareSettings(
        fit=FitSettings(**vars(reading)),
        methods=parse_methods(rows.methods),
        options=options,
        controls=parse_controls(rows.control or ()),
        weights=parse_words(rows.weights) if rows.weights else None,
        margin=rows.margin,
    )


def _next_words(
    found: Comparison,
    settings: CompareSettings,
    recipes: Sequence[Path],
    adapters: Sequence[str],
    weights: Sequence[str],
    fit_data: Sequence[str],
    base: Mapping[str, str | None],
    reading: opt.ReadingOptions,
) -> list[str]:
    """The command that writes the best row, or the fit of it where it has to be fitted; nothing where there is none."""
    from loracli.comparison.settings import FITTED_MIXINGS

    best = found.best.name
    given = {**base, "modules-to-save": reading.modules_to_save}
    words = _export_of(found, settings.options_of(best), recipes, adapters, given, weights)
    if not words and best in FITTED_MIXINGS and fit_data and len(recipes) < 2:
        names = adapters or _ingredients((recipes or [Path("recipe.json")])[0])
        words = _fit_of(best, names, fit_data, base, reading)
    return words


def _ingredients(recipe: Path) -> list[str]:
    """How to name the adapters of a recipe from here."""
    from loracli.recipe.recipe import load_recipe

    loaded = load_recipe(recipe)
    return [ingredient_reference(loaded.folder, adapter) for adapter in loaded.adapters]


def _fit_of(
    mixing: str,
    adapters: Sequence[str],
    data: Sequence[str],
    base: Mapping[str, str | None],
    reading: opt.ReadingOptions,
) -> list[str]:
    """The fit of the row that is best, as it was made for the comparison: every option of it that was set."""
    from loracli.calibration.records import parse_sources

    sources = parse_sources(data, owned=True)
    files = [
        f"{one.path or '-'}{'' if one.weight == 1 else f':{one.weight:.15g}'}" for one in sources
    ]  # without @ADAPTER
    words = ["loracat", "fit", "--adapters", *adapters, "--data", *files]
    words += ["--paper"] if mixing == "paper" else ["--mixing", mixing]
    for name, value in base.items():
        words += [] if value is None else [f"--{name}", value]
    return [*words, *opt.set_words(reading)]


def _export_of(
    found: Comparison,
    options: MethodOptions,
    recipes: Sequence[Path],
    adapters: Sequence[str],
    given: Mapping[str, str | None],
    weights: Sequence[str] = (),
) -> list[str]:
    """The command that writes the best row; nothing where it is no composition, or has to be fitted first. `given` are
    options that a method and weights need as well, and a recipe knows."""
    from loracli.algebra.methods import METHODS
    from loracli.comparison.settings import WEIGHTS
    from loracli.composition.composition import takes

    best, rows = found.best.name, [one.row for one in found.recipes]
    asked = [
        word for option, text in given.items() if text not in (None, "refuse") for word in (f"--{option}", str(text))
    ]
    if best == WEIGHTS:  # those of a recipe's ingredients stand in no file that export takes
        if recipes or not adapters:
            return []
        return ["loracat", "export", "--weights", *weights, *asked, "--adapters", *adapters]
    place = rows.index(best) if best in rows else 0
    if len(rows) > 1:
        own = found.recipes[place].adapters
        if best not in rows and set(own) != set(found.adapters):
            return []  # no recipe has all adapters that it composes
        adapters = [adapters[found.adapters.index(name)] for name in own] if adapters else ()
    words = ["loracat", "export", *map(str, recipes[place : place + 1])]
    if best not in rows:
        if best not in METHODS or METHODS[best].needs_records:
            return []
        words += ["--method", best]
        for field in fields(options):
            value = getattr(options, field.name)
            if value != field.default and field.name in takes(METHODS[best]):
                words += [f"--{field.name}", str(value)]
        words += asked
    return [*words, *(["--adapters", *adapters] if adapters else [])]
