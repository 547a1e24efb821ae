"""`loracat fit`: learns the mixing weights and writes a recipe."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracli.cli._options import (
    AdaptersOpt,
    FieldsOpt,
    ForceOpt,
    JsonOpt,
    MaxNewTokensOpt,
    MetricCommandOpt,
    ModulesToSaveOpt,
    QuietOpt,
    ToleranceOpt,
    complete_mixing,
)
from loracli.cli._output import Output
from loracli.progress import amount_text
from loracli.system.document import dtype_name

if TYPE_CHECKING:
    from loracli.fitting.job import FitPlan
    from loracli.recipe.recipe import Recipe

EPILOG = (
    "loracat fit --adapters org/math-lora org/code-lora --data val.jsonl  ·  "
    "loracat fit -a ./math ./code -d calib.jsonl --eval-data test.jsonl --base ./base -o soup.json"
)


def fit(
    adapters: AdaptersOpt,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", "-d", metavar="FILE...", help="Calibration JSONL, each FILE or FILE:WEIGHT; - is standard input."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Hub id or directory; default: what all adapters name."),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Branch, tag or commit of the base model.")
    ] = None,
    mixing: Annotated[
        str,
        typer.Option(
            "--mixing",
            metavar="KIND",
            autocompletion=complete_mixing,
            help="adapter, layer, module (CAT), rank, core, factors; auto climbs as far as the data allow.",
        ),
    ] = "module",
    paper: Annotated[
        bool, typer.Option("--paper", help="The published recipe: softmax weights, one epoch, rate 1e-4.")
    ] = False,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="FILE...", help="Held-out JSONL, instead of holding out from --data."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="SHAPE",
            help="text, prompt-completion, conversational-prompt-completion, messages, sharegpt, or alpaca; default: "
            "what each file's first record has.",
        ),
    ] = None,
    fields: FieldsOpt = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that cannot be used, and say which.")
    ] = False,
    holdout: Annotated[
        float, typer.Option("--holdout", metavar="SHARE", help="Share of --data that is held out, at least 20 records.")
    ] = 0.2,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Tokens of a record that are used.")
    ] = 1024,
    allow_truncation: Annotated[
        bool,
        typer.Option(
            "--allow-truncation",
            help="Go on although --max-length leaves more than a tenth of a file's records with nothing to score.",
        ),
    ] = False,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", metavar="N", help="Tokens of a micro-batch.")] = 1024,
    passes: Annotated[
        float | None,
        typer.Option(
            "--passes",
            metavar="N",
            help="Budget in passes over the training records; default: 8, with --mixing auto 20, times the folds.",
        ),
    ] = None,
    cv: Annotated[
        int | None,
        typer.Option("--cv", metavar="K", help="Choose by K-fold cross-validation: for few records."),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            "--ridge", metavar="X", help="Pull towards the start; default: a falling path, chosen on the data."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="X", help="Peak rate; default: clip(8/steps, 0.01, 0.1).")
    ] = None,
    select_by: Annotated[
        str | None,
        typer.Option(
            "--select-by",
            metavar="METRIC",
            help="Choose starts, ridges and rungs by greedy answers to validation records: exact, contains, numeric; "
            "or choice, by the options' log-likelihood; default: by the loss.",
        ),
    ] = None,
    metric_command: MetricCommandOpt = None,
    max_new_tokens: MaxNewTokensOpt = 256,
    tolerance: ToleranceOpt = 1e-4,
    modules_to_save: ModulesToSaveOpt = "refuse",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the split and the order of batches.")] = 0,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help="Of the base model: auto, float32, bfloat16, float16, float64."),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", metavar="MAP", help="auto: spread the base over all devices of this machine."),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Run layers again in the backward pass; default: where memory would run out."
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Under torchrun: share the base out over all processes, for one too big for any."),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.json"
    ),
    force: ForceOpt = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted fit of the same inputs was.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write one JSON object for each step.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check adapters and data, and say what would be fitted in how much memory; write nothing."
        ),
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Learn the mixing weights of adapters on a small calibration file (CAT) and write a recipe."""
    from loracli.calibration.records import parse_sources
    from loracli.errors import FitError, UsageError
    from loracli.fitting.inputs import FitInputs, prepare_fit
    from loracli.fitting.job import fit_to_file
    from loracli.fitting.settings import FitSettings
    from loracli.model.placement import Placement
    from loracli.progress import SILENT
    from loracli.recipe.recipe import check_recipe_path
    from loracli.system.machine import read_launch

    launch = read_launch()
    out = Output(as_json=as_json, quiet=quiet)
    progress = out if launch.first else SILENT
    if launch.world_size > 1 and any(s.read_once for s in parse_sources([*data, *(eval_data or ())])):
        raise UsageError("a pipe or standard input reaches one process only", hint="give the data as a file")
    if not dry_run:
        check_recipe_path(output, force=force, kind=mixing)
    settings = FitSettings(
        mixing=mixing,
        paper=paper,
        holdout=holdout,
        max_length=max_length,
        batch_tokens=batch_tokens,
        passes=passes,
        cv=cv,
        ridge=ridge,
        learning_rate=learning_rate,
        seed=seed,
        format=shape,
        fields=fields,
        allow_truncation=allow_truncation,
        skip_bad=skip_bad,
        select_by=select_by,
        metric_command=metric_command,
        max_new_tokens=max_new_tokens,
        tolerance=tolerance,
        modules_to_save=modules_to_save,
    )

    def prepare() -> FitInputs:
        return prepare_fit(
            adapters,
            data,
            eval_data=eval_data or None,
            base=base,
            base_revision=base_revision,
            settings=settings,
            folder=output.parent,
            progress=progress,
        )

    placement = Placement(dtype, device, device_map, checkpointing, shard)
    if dry_run:
        from loracli.fitting.job import plan_fit

        if launch.first:
            plan = plan_fit(prepare(), placement=placement, world_size=launch.world_size, progress=progress)
            _print_plan(out, plan)
        return
    recipe = fit_to_file(
        prepare,
        output,
        placement=placement,
        launch=launch,
        resume=resume,
        log=log,
        force=force,
        progress=progress,
    )
    if recipe is not None:
        _print_fit(out, recipe, output)
        stopped = recipe.fit.stopped
        if stopped is not None:
            raise FitError(f"the fit stopped early: {stopped}", hint=f"the best weights until then are in {output}")


def _print_fit(out: Output, recipe: Recipe, output: Path) -> None:
    """What was found."""
    from loracli.cli._tables import held_out_lines, search_lines
    from loracli.recipe.recipe import files_beside

    out.close()
    table, record = recipe.held_out, recipe.fit
    beside = [str(path) for path in files_beside(recipe, output)]
    if record.stopped is None:  # a failure has its own document
        out.document(
            {
                "recipe": str(output),
                "beside": beside,
                "verdict": table.verdict,
                "best_ingredient": table.best_ingredient,
                "records": table.records,
                "rows": [
                    {
                        "name": row.name,
                        "nats_per_token": row.nats_per_token,
                        "difference": row.difference,
                        "interval": list(row.interval),
                        "worse_records": row.worse_records,
                    }
                    for row in table.rows
                ],
                "tasks": [asdict(task) for task in table.tasks],
                "mixing": recipe.mixing.kind,
                "criterion": record.criterion,
                "rungs": [asdict(rung) for rung in record.rungs],
            }
        )
    out.value(str(output))
    search_lines(out, recipe)
    out.line()
    held_out_lines(out, recipe)
    out.line(f"written: {', '.join([str(output), *beside])}")
    if record.stopped is None:
        name = [] if output == Path("recipe.json") else [str(output)]
        out.hint(shlex.join(["loracat", "export", *name, "--merge"]))


def _print_plan(out: Output, plan: FitPlan) -> None:
    """What a fit would do, for --dry-run."""
    inputs, settings, memory = plan.inputs, plan.inputs.settings, plan.memory
    again = plan.decision.checkpointing
    facts: dict[str, Any] = {
        "base": inputs.base.id,
        "base_commit": inputs.base.commit,
        "dtype": dtype_name(plan.base.dtype),
        "device": plan.base.device,
        "adapters": list(inputs.references),
        "training_records": plan.training_records,
        "validation_records": plan.validation_records,
        "held_out_records": plan.held_out_records,
        "training_tokens": plan.training_tokens,
        "scored_tokens": plan.scored_tokens,
        "longest_record": plan.longest_record,
        "cut_records": plan.cut,
        "dropped_records": plan.dropped,
        "mixing": settings.mixing,
        "numbers": inputs.numbers,
        "modules": len(inputs.layout.modules),
        "passes": settings.budget,
        "select_by": None if settings.metric is None else settings.metric.name,
        "memory_bytes": memory.total_checkpointed if again else memory.total,
        "checkpointing": again,
    }
    out.close()
    out.document({"plan": facts})
    (out.warn if plan.decision.tight else out.note)(plan.decision.note)
    shown = facts | {"adapters": ", ".join(facts["adapters"]), "memory_bytes": amount_text(facts["memory_bytes"], "B")}
    for key, value in shown.items():
        if value is None or key == "checkpointing":
            continue
        words = f"{value:g}" if isinstance(value, float) else str(value)
        out.line(f"{key.removesuffix('_bytes').replace('_', ' '):20} {words}")
        out.value(f"{key}={facts[key] if key == 'memory_bytes' else words}")
