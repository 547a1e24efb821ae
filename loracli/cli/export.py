"""`loracat export`: a recipe, adapters with weights, or a method, become one adapter directory."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from loracli.cli import _options as opt
from loracli.cli._help import Panel
from loracli.cli._output import Output
from loracli.system.document import dtype_name, encode
from loracli.system.files import GGUF_FILE

if TYPE_CHECKING:
    from loracli.export.export import Exported
    from loracli.export.loss import ExportLoss
    from loracli.model.placement import Placement

EPILOG = (
    "loracat export  ·  loracat export --merge --rank 16 -o soup/  ·  loracat export --merge --tolerance 0.1  ·  "
    "loracat export --adapters ./math ./code --weights 0.7 0.3  ·  "
    "loracat export --method ties --density 0.2 --adapters ./math ./code"
)


@dataclass(frozen=True)
class CompressionOptions:
    """Whether the adapter is compressed, how far, and by what."""

    PANEL: ClassVar[Panel] = Panel.COMPRESSION

    merge: Annotated[bool, typer.Option("--merge", help="Compress to one adapter of rank --rank.")] = False
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="K",
            help="Cut to rank K with --merge or a method that truncates; the default is the largest ingredient's, "
            "and the sum of theirs for such a method without --merge.",
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="E",
            help="With --merge: take the least rank with |dW - dW'| <= E |dW| in every module.",
        ),
    ] = None
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", metavar="X", help="With --merge: take the least ranks that keep this share of |dW|^2 in all."
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="BYTES", help="With --merge: take the best ranks for a tensor file of, say, 20MB."
        ),
    ] = None
    activation_aware: Annotated[
        bool,
        typer.Option(
            "--activation-aware",
            help="With --merge: cut off what changes the outputs least on the fit's records, or on --fit-data's.",
        ),
    ] = False
    refit: Annotated[
        bool,
        typer.Option("--refit", help="With --merge: fit the cut's k x k cores on records of --data; loads the base."),
    ] = False

    def requested(self) -> dict[str, Any]:
        """By the names that `ExportRequest` has for it, the budget in bytes."""
        budget = None if self.budget is None else opt.parse_bytes(self.budget, "--budget")
        return {**vars(self), "budget": budget}


@dataclass(frozen=True)
class ComposingOptions:
    """Weights by hand or a method in the place of a fit, and what goes with them alone."""

    PANEL: ClassVar[Panel] = Panel.COMPOSING

    weights: opt.Weights = None
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Compose by a method of `loracat compare` instead of a fit."),
    ] = None
    density: opt.Density = None
    scale: opt.Scale = 1.0
    seed: opt.Seed = 0
    modules_to_save: opt.MethodModulesToSave = None
    task_type: Annotated[
        str | None,
        typer.Option(
            "--task-type",
            metavar="NAME",
            help="With --weights or --method: write this task type; the default is that of the adapters.",
        ),
    ] = None


@dataclass(frozen=True)
class WritingOptions:
    """How the adapter is written."""

    PANEL: ClassVar[Panel] = Panel.OUTPUT

    dtype: opt.WrittenDtype = None
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", metavar="NAME", help="Write for portable, peft or mlx; the default is portable where possible."
        ),
    ] = None
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write adapter.gguf for llama.cpp as well; needs the extra loracat[gguf].")
    ] = False
    force: opt.Force = False
    dry_run: opt.DryRun = False


@dataclass(frozen=True)
class MachineOptions:
    """Where the base model is, and as what, that --data and --fit-data need."""

    PANEL: ClassVar[Panel] = Panel.MACHINE

    base_dtype: Annotated[
        str,
        typer.Option(
            "--base-dtype",
            metavar="DTYPE",
            help="With --data or --fit-data: load the base as auto, float32, bfloat16, float16 or float64.",
        ),
    ] = "auto"
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="Run the base on auto, cpu, cuda, cuda:1 or mps; cuts and methods too, unless auto.",
        ),
    ] = "auto"
    device_map: opt.DeviceMap = None
    quantise: opt.Quantise = None

    def placement(self) -> Placement:
        """Raises UsageError for what no machine has."""
        from loracli.errors import UsageError
        from loracli.model.placement import DTYPES, Placement
        from loracli.system.near import did_you_mean

        if self.base_dtype not in ("auto", *DTYPES):
            hint = did_you_mean(self.base_dtype, DTYPES)
            raise UsageError(f"--base-dtype {self.base_dtype} is not one of auto, {', '.join(DTYPES)}", hint=hint)
        return Placement(self.base_dtype, self.device, self.device_map, quantise=self.quantise)


_Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="FILE...",
        help="Score on this JSONL, before and after, or refit on it; loads the base.",
    ),
]


def export(
    *,
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE",
            help="The recipe that `loracat fit` wrote; by default recipe.json, none with --weights or --method.",
        ),
    ] = None,
    compression: CompressionOptions,
    data: _Data = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write there; the default is adapter-cat, adapter-merged, or adapter-METHOD.",
        ),
        Panel.OUTPUT,
    ] = None,
    adapters: opt.AdaptersOrPlaces = None,
    composing: ComposingOptions,
    fit_data: Annotated[
        list[str] | None,
        typer.Option(
            "--fit-data",
            metavar="FILE...",
            help="Calibrate task-arithmetic, lorahub, --activation-aware or --refit on this JSONL; for regmean, "
            "FILE@ADAPTER says whose records they are.",
        ),
        Panel.DATA,
    ] = None,
    fields: Annotated[opt.Fields, Panel.DATA] = None,
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    machine: MachineOptions,
    writing: WritingOptions,
    out: Output,
) -> None:
    """Write one adapter: concatenated and exact, or with --merge compressed to a given rank."""
    from loracli.algebra.methods.method import MethodOptions
    from loracli.calibration.records import with_fields
    from loracli.composition.weights import parse_words
    from loracli.errors import LoracatError, UsageError
    from loracli.export.export import export_adapter
    from loracli.export.loss import loss_of_export, read_loss_data
    from loracli.export.request import ExportRequest

    if fields is not None and not (data or fit_data):
        raise UsageError("--fields has no use here: no data are read", hint="give it with --data or --fit-data")
    scored = with_fields(data, fields) if data else None
    fitted = with_fields(fit_data, fields) if fit_data else None
    placement = machine.placement()
    directory = output or Path(f"adapter-{composing.method or ('merged' if compression.merge else 'cat')}")
    if writing.dry_run and data and not compression.refit:
        raise UsageError("--data scores what was written, and a dry run writes nothing", hint="leave out one of them")
    files = None
    if scored and not compression.refit:
        files = read_loss_data(scored, base=base, base_revision=base_revision, progress=out)
    # so that nothing else needs a base
    scores_alone = (
        composing.method is None and not composing.weights and files is not None and not (fit_data or writing.gguf)
    )
    named = composing.weights or (composing.method and adapters)  # so that no recipe is
    request = ExportRequest(
        recipe=opt.default_recipe("export", adapters, out) if recipe is None and not named else recipe,
        adapters=adapters or (),
        weights=parse_words(composing.weights) if composing.weights else None,
        method=composing.method,
        method_options=MethodOptions(composing.density, composing.scale, composing.seed),
        modules_to_save=composing.modules_to_save,
        task_type=composing.task_type,
        **compression.requested(),
        dtype=writing.dtype,
        profile=writing.profile,
        gguf=writing.gguf,
        fit_data=fitted,
        data=scored if compression.refit else None,
        base=None if scores_alone else base,
        base_revision=None if scores_alone else base_revision,
        placement=placement,
        scored=files is not None,
    )
    exported = export_adapter(request, directory, force=writing.force, dry_run=writing.dry_run, progress=out)
    if writing.dry_run:
        _show_plan(out, exported)
        return
    loss = None
    if files is not None:
        try:
            loss = loss_of_export(
                exported, files, base=base, base_revision=base_revision, placement=placement, progress=out
            )
        except LoracatError:
            out.warn(f"{exported.path} is written; only its loss on the records is not known")
            raise
    _show(out, exported, loss, gguf=writing.gguf, base=base)


def _show(out: Output, exported: Exported, loss: ExportLoss | None, *, gguf: bool, base: str | None) -> None:
    """What was written, how exact it is, and how to load it."""
    from loracli.cli._tables import certificate_lines, export_loss_lines, exported_summary, refit_lines

    certificate, layout = exported.certificate, exported.layout
    out.document(
        {
            "path": str(exported.path),
            "profile": layout.profile,
            "merged": exported.merged,
            "rank": layout.rank,
            "dtype": dtype_name(exported.dtype),
            "gguf": str(exported.path / GGUF_FILE) if gguf else None,
            "size_bytes": exported.size_bytes,
            "largest_relative_error": certificate.largest_error,
            "mean_kept_energy": certificate.mean_energy,
            "modules": encode(certificate.modules),
            **({} if loss is None else {"loss": {**encode(loss), "difference": loss.difference}}),
            **({} if exported.refit is None else {"refit": encode(exported.refit)}),
        }
    )
    out.value(str(exported.path))
    if layout.profile == "peft" and layout.reason:
        out.warn(f"written for {layout.readers} only: {layout.reason}")
    if layout.profile == "portable" and layout.alone:
        out.warn(f"SGLang will not take {', '.join(layout.alone)}, which it stacks with each other")
    needed, held = max(module.rank for module in certificate.modules), max(layout.ranks.values())
    if exported.merged and held > needed:
        out.warn(f"no module needs more than rank {needed}; up to {held} it is filled with zeros")
    out.line(str(exported.path), style="bold")
    out.line(exported_summary(exported))
    if gguf:
        out.line(f"  {GGUF_FILE} for llama.cpp:")
        file = shlex.quote(str(exported.path / GGUF_FILE))
        out.line(f"  llama-server -m BASE.gguf --lora {file}", whole=True)
    certificate_lines(out, exported)
    if loss is not None:
        export_loss_lines(out, loss)
    if exported.refit is not None:
        refit_lines(out, exported.refit)
    if layout.profile == "mlx":
        at = shlex.quote(str(exported.path))
        out.hint(f"mlx_lm.generate --model {shlex.quote(base or 'BASE')} --adapter-path {at} --prompt PROMPT")
    else:
        out.hint(exported.loading_line(base), what="in Python")


def _show_plan(out: Output, planned: Exported) -> None:
    """What would be written."""
    from loracli.cli._tables import exported_summary

    layout = planned.layout
    out.document(
        {
            "plan": {
                "path": str(planned.path),
                "profile": layout.profile,
                "merged": planned.merged,
                "rank": layout.rank,
                "dtype": dtype_name(planned.dtype),
                "size_bytes": planned.size_bytes,
                "modules": [{"name": name, "rank": rank} for name, rank in sorted(layout.ranks.items())],
                "tensors": [{"name": name, "shape": list(shape)} for name, shape in planned.shapes.items()],
            }
        }
    )
    out.value(str(planned.path))
    out.line(f"{planned.path} would be written:", style="bold")
    out.line(exported_summary(planned))
    rows = [[f"  {name}", " x ".join(map(str, shape))] for name, shape in planned.shapes.items()]
    out.table(["  tensor", "shape"], rows)
