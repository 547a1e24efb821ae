"""`loracat compare`: every way to compose, on the user's own records, with error bars."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli._options import (
    FieldsOpt,
    JsonOpt,
    MaxNewTokensOpt,
    MetricCommandOpt,
    ModulesToSaveOpt,
    QuietOpt,
    ToleranceOpt,
    complete_adapter,
)
from loracli.cli._output import Output

if TYPE_CHECKING:
    from loracli.algebra.methods.method import MethodOptions

EPILOG = (
    "loracat compare --data test.jsonl  ·  loracat compare recipe.json --data test.jsonl --methods ties,dare  ·  "
    "loracat compare --adapters ./math ./code --data test.jsonl --fit-data val.jsonl --methods all --control fresh-lora"
)


def compare(
    data: Annotated[
        list[str],
        typer.Option("--data", "-d", metavar="FILE...", help="JSONL to compare on; no record of it may be fitted on."),
    ],
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="Whose fit is compared; default: recipe.json, without --adapters."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER...",
            autocompletion=complete_adapter,
            help="Adapters to compose, without a fit; with a RECIPE: where its ingredients are now.",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "-m",
            metavar="NAMES",
            help="Names between commas, `data-free` for all that need no calibration data, or `all`.",
        ),
    ] = "data-free",
    fit_data: Annotated[
        list[str] | None,
        typer.Option("--fit-data", metavar="FILE...", help="Calibration JSONL for methods that have to be fitted."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="NAME...",
            help="fresh-lora: a new LoRA on --fit-data; random: the fit on random adapters; datamix DIR: an adapter "
            "trained on mixed data.",
        ),
    ] = None,
    generate: Annotated[
        str | None,
        typer.Option(
            "--generate",
            metavar="METRIC",
            help="Judge greedy answers too: exact, contains, numeric; or choice, by the options' log-likelihood.",
        ),
    ] = None,
    metric_command: MetricCommandOpt = None,
    max_new_tokens: MaxNewTokensOpt = 256,
    tolerance: ToleranceOpt = 1e-4,
    modules_to_save: ModulesToSaveOpt = "refuse",
    guard: Annotated[
        list[str] | None,
        typer.Option("--guard", metavar="FILE...", help="JSONL of what must not get worse than the base model."),
    ] = None,
    margin: Annotated[
        float, typer.Option("--margin", metavar="X", help="Nats per token that --guard may get worse by.")
    ] = 0.02,
    density: Annotated[
        float | None,
        typer.Option("--density", metavar="X", help="Share of entries that ties, dare and knots keep."),
    ] = None,
    scale: Annotated[
        float, typer.Option("--scale", metavar="X", help="Factor on the result of ties, dare, knots and tsv.")
    ] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="K", help="Of methods with a full-rank result; default: the sum of the ranks."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Hub id or directory; default: what recipe or adapters name."),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Branch, tag or commit of the base model.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--format", metavar="SHAPE", help="Of all records, as in `loracat fit`.")
    ] = None,
    fields: FieldsOpt = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that cannot be used, and say which.")
    ] = False,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Tokens of a record that are used.")
    ] = 1024,
    allow_truncation: Annotated[
        bool, typer.Option("--allow-truncation", help="Go on although --max-length drops more than a tenth.")
    ] = False,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", metavar="N", help="Tokens of a micro-batch.")] = 1024,
    passes: Annotated[
        float | None,
        typer.Option("--passes", metavar="N", help="Budget of each fit; default: 8, of auto 20, times the folds."),
    ] = None,
    cv: Annotated[
        int | None, typer.Option("--cv", metavar="K", help="Fits choose by K-fold cross-validation: for few records.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Of the bootstrap, the fits, and what methods draw.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help="Of the base model: auto, float32, bfloat16, float16, float64."),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", metavar="MAP", help="auto: spread the base over all devices of this machine."),
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Compare every way to compose adapters on your own records, with paired confidence intervals."""
    from loracli.algebra.methods.method import MethodOptions
    from loracli.cli._tables import comparison_lines
    from loracli.comparison.compare import compare_adapters
    from loracli.comparison.settings import CompareSettings, parse_controls, parse_methods
    from loracli.evaluation.metrics import task_metric
    from loracli.fitting.settings import FitSettings
    from loracli.model.placement import Placement
    from loracli.system.document import encode

    out = Output(as_json=as_json, quiet=quiet)
    metric = task_metric(generate, metric_command, max_new_tokens=max_new_tokens, tolerance=tolerance)
    fit = FitSettings(
        max_length=max_length,
        batch_tokens=batch_tokens,
        passes=passes,
        cv=cv,
        seed=seed,
        format=shape,
        fields=fields,
        allow_truncation=allow_truncation,
        skip_bad=skip_bad,
        modules_to_save=modules_to_save,
    )
    settings = CompareSettings(
        methods=parse_methods(methods),
        options=MethodOptions(density, scale, seed, rank),
        fit=fit,
        controls=parse_controls(control or ()),
        margin=margin,
    )
    found = compare_adapters(
        data,
        recipe=Path("recipe.json") if recipe is None and not adapters else recipe,
        adapters=adapters or (),
        fit_data=fit_data or None,
        guard=guard or None,
        base=base,
        base_revision=base_revision,
        settings=settings,
        metric=metric,
        placement=Placement(dtype, device, device_map),
        progress=out,
    )
    out.close()
    out.document(encode(found))
    out.value(found.best.name)
    comparison_lines(out, found)
    given = {"base": base, "base-revision": base_revision, "modules-to-save": modules_to_save}
    words = _export_of(found.best.name, settings.options, recipe, adapters or (), given)
    if words:
        out.hint(shlex.join(words))


def _export_of(
    best: str, options: MethodOptions, recipe: Path | None, adapters: Sequence[str], given: Mapping[str, str | None]
) -> list[str]:
    """The command that writes the best row; nothing where it is no composition, or has to be fitted first. `given` are
    options that a method needs as well, and a recipe knows."""
    from loracli.algebra.methods import METHODS
    from loracli.composition.composition import takes

    words = ["loracat", "export", *([] if recipe is None else [str(recipe)])]
    if best != "fit":
        if best not in METHODS or METHODS[best].search is not None:
            return []
        words += ["--method", best]
        for field in fields(options):
            value = getattr(options, field.name)
            if value != field.default and field.name in takes(METHODS[best]):
                words += [f"--{field.name}", str(value)]
        for option, text in given.items():
            words += [] if text in (None, "refuse") else [f"--{option}", str(text)]
    return [*words, *(["--adapters", *adapters] if adapters else [])]
