"""`loracat fit`: learns the mixing weights and writes a recipe."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from loracli.cli import _options as opt
from loracli.cli._help import Panel
from loracli.cli._output import Output
from loracli.progress import amount_text, duration_text
from loracli.system.document import dtype_name, encode

if TYPE_CHECKING:
    from loracli.fitting.job import FitPlan
    from loracli.recipe.recipe import Recipe

EPILOG = (
    "loracat fit --adapters org/math-lora org/code-lora --data val.jsonl  ·  "
    "loracat fit -a ./math ./code -d calib.jsonl --eval-data test.jsonl --base ./base -o soup.json"
)


@dataclass(frozen=True)
class SearchOptions:
    """What is learnt and how it is searched for, as in `loracli.fitting.settings.FitSettings`."""

    PANEL: ClassVar[Panel] = Panel.SEARCH

    mixing: Annotated[
        str,
        typer.Option(
            "--mixing",
            metavar="KIND",
            autocompletion=opt.complete_mixing,
            help="Learn by adapter, layer, module (CAT), rank, core or factors; auto goes as far as the data allow.",
        ),
    ] = "module"
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Fit by the published recipe: softmax weights, one pass, learning rate 1e-4."),
    ] = False
    holdout: Annotated[
        float | None,
        typer.Option(
            "--holdout",
            metavar="SHARE",
            help="Hold out this share of --data, at least 20 records and at most half; by default a fifth, and below "
            "100 records each of them in its turn.",
        ),
        Panel.DATA,
    ] = None
    ridge: Annotated[
        float | None,
        typer.Option(
            "--ridge",
            metavar="X",
            help="Pull towards the start with this penalty; by default none, and for rank and core the data choose.",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="Let the learning rate reach X; the default is clip(8/steps, 0.01, 0.1).",
        ),
    ] = None
    select_by: Annotated[
        str | None,
        typer.Option(
            "--select-by",
            metavar="METRIC",
            help="Choose starts, ridges and kinds of mixing by greedy answers to validation records: exact, contains, "
            "numeric; or choice, by the options' log-likelihood; the default is the loss.",
        ),
    ] = None
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            metavar="WORD",
            autocompletion=lambda: ["fresh-lora", "none"],
            help="fresh-lora: hold the fit against a new LoRA trained on the same records; none: do not; the default "
            "is to, where that costs less than the fit.",
        ),
    ] = None


_Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        metavar="FILE...",
        help="Fit on this calibration JSONL, each FILE or FILE:WEIGHT; - is standard input.",
    ),
]


_DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check adapters and data, and say what would be fitted in how much memory and time; write nothing.",
    ),
    Panel.OUTPUT,
]


def fit(
    *,
    adapters: opt.Adapters,
    data: _Data,
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    search: SearchOptions,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data", metavar="FILE...", help="Measure on this JSONL instead of holding out from --data."
        ),
        Panel.DATA,
    ] = None,
    reading: opt.ReadingOptions,
    answers: opt.AnswerOptions,
    placement: opt.PlacementOptions,
    checkpointing: opt.Checkpointing = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Under torchrun: share the base out over all processes, for a base too big for one."
        ),
        Panel.MACHINE,
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe there."), Panel.OUTPUT
    ] = (Path("recipe.json")),
    force: opt.Force = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted fit of the same inputs stopped."), Panel.OUTPUT
    ] = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write one JSON object for each step."), Panel.OUTPUT
    ] = None,
    dry_run: _DryRun = False,
    out: Output,
) -> None:
    """Learn the mixing weights of adapters on a small calibration file (CAT) and write a recipe."""
    from loracli.calibration.records import parse_sources
    from loracli.errors import FitError, UsageError
    from loracli.fitting.inputs import check_typed, prepare_fit
    from loracli.fitting.job import check_log, fit_to_file, plan_fit
    from loracli.fitting.settings import FitSettings
    from loracli.model.placement import Placement
    from loracli.progress import SILENT
    from loracli.recipe.recipe import check_recipe_path
    from loracli.recipe.record import INLINE_KINDS
    from loracli.system.files import told_in_dry_run
    from loracli.system.machine import read_launch

    launch = read_launch()
    progress = out if launch.first else SILENT
    if launch.world_size > 1 and any(s.read_once for s in parse_sources([*data, *(eval_data or ())])):
        raise UsageError("a pipe or standard input reaches one process only", hint="give the data as a file")
    settings = FitSettings(**vars(search), **vars(reading), **vars(answers))
    place = Placement(**vars(placement), checkpointing=checkpointing, shard=shard)
    if not dry_run:  # before anything is downloaded, but after what was typed
        place.check_processes(launch.world_size)
        check_typed(adapters, *filter(None, (data, eval_data)), shape=settings.format)
        check_recipe_path(output, force=force, kind=settings.mixing)
    elif launch.first:
        with told_in_dry_run(dry_run, "the fit", out):
            check_recipe_path(output, force=force, kind=settings.mixing)
        with told_in_dry_run(dry_run, "the fit", out):
            check_log(log, force=force, resume=resume)
    prepare = partial(
        prepare_fit,
        adapters,
        data,
        eval_data=eval_data or None,
        base=base,
        base_revision=base_revision,
        settings=settings,
        folder=output.parent,
        progress=progress,
    )
    if dry_run:
        if launch.first:
            _show_plan(
                out,
                plan_fit(prepare(placement=place), placement=place, world_size=launch.world_size, progress=progress),
            )
        return
    recipe = fit_to_file(
        prepare, output, placement=place, launch=launch, resume=resume, log=log, force=force, progress=progress
    )
    if recipe is not None:
        _show(out, recipe, output)
        if recipe.held_out.verdict.startswith(("no better", "not better")) and settings.mixing in INLINE_KINDS:
            out.note("where the task asks for a form that no adapter holds, try --mixing auto: it trains the factors")
        if eval_data and _can_be_doubted(recipe, [*data, *eval_data]):
            words = ["loracat", "compare", str(output), "--data", *eval_data, "--fit-data", *data]
            for option, value in (("--base", base), ("--base-revision", base_revision)):
                words += [] if value is None else [option, value]
            words += [*opt.set_words(reading), *opt.set_words(placement), "--control", "fresh-lora"]
            out.hint(shlex.join(words), what="whether a fresh LoRA does as well")
        if recipe.fit.stopped is not None:
            why = f"the fit stopped early: {recipe.fit.stopped}"
            raise FitError(why, hint=f"the best weights until then are in {output}")


def _can_be_doubted(recipe: Recipe, files: list[str]) -> bool:
    """Whether a comparison can train the fresh LoRA that the fit did not: its files can be read again, and no experts
    share a parameter."""
    from loracli.calibration.records import parse_sources

    again = not any(source.read_once for source in parse_sources(files))
    open_yet = recipe.fit.stopped is None and not recipe.held_out.controls
    return again and open_yet and all(module.kind != "experts" for module in recipe.modules)


def _show(out: Output, recipe: Recipe, output: Path) -> None:
    """What was found, in the order of a reader: whether it is better, how much, where it is; how with `-v`."""
    from loracli.cli._tables import held_out_lines, search_lines, unfinished_lines, verdict_lines, weights_text
    from loracli.evaluation.sentences import overfitted
    from loracli.recipe.recipe import files_beside
    from loracli.report.commands import export_words

    beside = [str(path) for path in files_beside(recipe, output)]
    out.close()
    if recipe.fit.stopped is None:  # a failure has its own document
        held_out = encode(recipe.held_out)
        out.document(
            {"recipe": str(output), "beside": beside}
            | {key: held_out[key] for key in ("verdict", "best_ingredient", "records", "rows", "tasks")}
            | {"parts": recipe.held_out.parts, "controls": encode(recipe.held_out.controls)}
            | {"training_nats_per_token": recipe.fit.training_nats_per_token, "overfitted": overfitted(recipe)}
            | {"mixing": recipe.mixing.kind, "criterion": recipe.fit.criterion, "rungs": encode(recipe.fit.rungs)}
        )
    out.value(str(output))
    verdict_lines(out, recipe)
    held_out_lines(out, recipe)
    if out.detailed:
        search_lines(out, recipe)
        out.line()
    out.line(f"fitted: {weights_text(recipe)} in {recipe.fit.passes:.3g} passes; how: loracat show --search")
    if not out.detailed:
        unfinished_lines(out, recipe)
    out.line(f"written: {', '.join([str(output), *beside])}")
    if recipe.fit.stopped is None:
        out.hint(shlex.join(export_words(output)))


_SAID = {
    "numbers": "weights",
    "parts": "parts for cross-fitting",
    "passes": "passes at most, all folds",
    "memory_bytes": "memory",
    "seconds": "time",
}


def _show_plan(out: Output, plan: FitPlan) -> None:
    """What a fit would do."""
    from loracli.fitting.settings import FRESH_LORA

    inputs, settings, again = plan.inputs, plan.inputs.settings, plan.decision.checkpointing
    facts: dict[str, Any] = {
        "base": inputs.base.id,
        "base_commit": inputs.base.commit,
        "dtype": dtype_name(plan.base.dtype),
        "quantisation": None if plan.base.quantisation is None else plan.base.quantisation.form,
        "device": plan.base.device,
        "adapters": list(inputs.references),
        "training_records": plan.training_records,
        "validation_records": plan.validation_records,
        "held_out_records": plan.held_out_records,
        "parts": plan.parts,
        "training_tokens": plan.training_tokens,
        "scored_tokens": plan.scored_tokens,
        "longest_record": plan.longest_record,
        "cut_records": plan.cut,
        "dropped_records": plan.dropped,
        "mixing": settings.mixing,
        "numbers": inputs.numbers,
        "modules": len(inputs.layout.modules),
        "passes": plan.passes,
        "control": FRESH_LORA if plan.controls else None,
        "select_by": None if settings.metric is None else settings.metric.name,
        "memory_bytes": plan.memory.total_checkpointed if again else plan.memory.total,
        "checkpointing": again,
        "seconds": plan.seconds,
    }
    out.document({"plan": facts})
    (out.warn if plan.decision.tight else out.note)(plan.decision.note)
    bare = {key: f"{value:g}" if isinstance(value, float) else value for key, value in facts.items()}
    shown = bare | {"adapters": ", ".join(facts["adapters"]), "memory_bytes": amount_text(facts["memory_bytes"], "B")}
    shown["passes"] = f"{plan.passes:.3g}"
    if plan.seconds is not None:
        more = "" if settings.metric is None else "; the answers that choose come on top"
        shown["seconds"] = f"at most about {duration_text(plan.seconds)}{more}"
    for key, words in shown.items():
        if words is None or key == "checkpointing" or (key == "parts" and not words):
            continue
        out.line(f"{_SAID.get(key, key.replace('_', ' ')):26} {words}")
        out.value(f"{key}={bare[key] if key in ('memory_bytes', 'passes', 'seconds') else words}")
