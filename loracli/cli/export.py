"""`loracat export`: a recipe, or a method, becomes one adapter directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli._options import DryRunOpt, FieldsOpt, ForceOpt, JsonOpt, QuietOpt, complete_adapter
from loracli.cli._output import Output
from loracli.progress import amount_text
from loracli.system.document import dtype_name
from loracli.system.files import GGUF_FILE

if TYPE_CHECKING:
    from loracli.export.export import Exported
    from loracli.export.refit import RefitRecord

EPILOG = (
    "loracat export  ·  loracat export --merge --rank 16 -o soup/  ·  loracat export --merge --tolerance 0.1  ·  "
    "loracat export --method ties --density 0.2 --adapters ./math ./code"
)


def export(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="That `loracat fit` wrote; default: recipe.json, unless --method has --adapters.",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Compress to one adapter of rank --rank.")] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="K", help="With --merge, or of a method that cuts; default: the largest ingredient rank."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", metavar="E", help="With --merge: least rank with |dW - dW'| <= E |dW| everywhere."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", metavar="X", help="With --merge: least ranks that keep this share of |dW|^2 in all."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="BYTES", help="With --merge: best ranks for a tensor file of, say, 20MB."),
    ] = None,
    activation_aware: Annotated[
        bool,
        typer.Option(
            "--activation-aware", help="With --merge: cut what the fit's records, or --fit-data's, show least of."
        ),
    ] = False,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="With --merge: fit the cut's k x k cores on records of --data; loads the base."),
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="FILE...",
            help="JSONL to score on, before and after, or to refit on; loads the base.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Directory; default: adapter-cat, adapter-merged, or adapter-METHOD."
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER...",
            autocompletion=complete_adapter,
            help="Where the ingredients are now, in the recipe's order; with --method the adapters to compose.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Compose by a method of `loracat compare` instead of a fit."),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", metavar="X", help="Share of entries that ties, dare and knots keep.")
    ] = None,
    scale: Annotated[
        float, typer.Option("--scale", metavar="X", help="Factor on the result of ties, dare, knots and tsv.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what dare and lorahub draw.")] = 0,
    fit_data: Annotated[
        list[str] | None,
        typer.Option(
            "--fit-data",
            metavar="FILE...",
            help="Calibration JSONL for task-arithmetic, lorahub, --activation-aware, --refit.",
        ),
    ] = None,
    fields: FieldsOpt = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="For --method, --data, --fit-data or --gguf: Hub id or directory; default: what adapters name.",
        ),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Branch, tag or commit of the base model.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; default: the ingredients' widest."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="NAME", help="portable, peft or mlx; default: portable where possible."),
    ] = None,
    modules_to_save: Annotated[
        str | None,
        typer.Option(
            "--modules-to-save",
            metavar="POLICY",
            help="With --method: modules that adapters saved whole: pick:NAME, average, refuse; default: the recipe's.",
        ),
    ] = None,
    task_type: Annotated[
        str | None,
        typer.Option(
            "--task-type", metavar="NAME", help="With --method: of the export; default: the one that the adapters have."
        ),
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write adapter.gguf for llama.cpp as well; needs the extra loracat[gguf].")
    ] = False,
    force: ForceOpt = False,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write one adapter: concatenated and exact, or with --merge compressed to a given rank."""
    from loracli.algebra.methods.method import MethodOptions
    from loracli.calibration.records import with_fields
    from loracli.cli._options import parse_bytes
    from loracli.errors import UsageError
    from loracli.evaluation.comparison import interval_text
    from loracli.export.export import export_adapter
    from loracli.export.loss import loss_of_export, read_loss_data
    from loracli.export.request import ExportRequest

    out = Output(as_json=as_json, quiet=quiet)
    if fields is not None and not (data or fit_data):
        raise UsageError("--fields has no use here: no data are read", hint="give it with --data or --fit-data")
    scored = with_fields(data, fields) if data else None
    fitted = with_fields(fit_data, fields) if fit_data else None
    directory = output or Path(f"adapter-{method or ('merged' if merge else 'cat')}")
    if dry_run and data and not refit:
        raise UsageError("--data scores what was written, and a dry run writes nothing", hint="leave out one of them")
    files = None
    if scored and not refit:
        files = read_loss_data(scored, base=base, base_revision=base_revision, progress=out)
    scores_alone = method is None and files is not None and not (fit_data or gguf)  # so that nothing else needs a base
    request = ExportRequest(
        recipe=Path("recipe.json") if recipe is None and not (method and adapters) else recipe,
        adapters=adapters or (),
        method=method,
        method_options=MethodOptions(density, scale, seed),
        modules_to_save=modules_to_save,
        task_type=task_type,
        merge=merge,
        rank=rank,
        tolerance=tolerance,
        energy=energy,
        budget=None if budget is None else parse_bytes(budget, "--budget"),
        activation_aware=activation_aware,
        refit=refit,
        dtype=dtype,
        profile=profile,
        gguf=gguf,
        fit_data=fitted,
        data=scored if refit else None,
        base=None if scores_alone else base,
        base_revision=None if scores_alone else base_revision,
    )
    exported = export_adapter(request, directory, force=force, dry_run=dry_run, progress=out)
    if dry_run:
        _print_plan(out, exported)
        return
    loss = None
    if files is not None:
        loss = loss_of_export(exported, files, base=base, base_revision=base_revision, progress=out)
    out.close()
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
            "modules": [
                {
                    "name": module.name,
                    "rank": module.rank,
                    "relative_error": module.relative_error,
                    "kept_energy": module.kept_energy,
                }
                for module in certificate.modules
            ],
            **({} if loss is None else {"loss": {**asdict(loss), "difference": loss.difference}}),
            **({} if exported.refit is None else {"refit": asdict(exported.refit)}),
        }
    )
    out.value(str(exported.path))
    if layout.profile == "peft" and layout.reason:
        out.warn(f"written for {layout.readers} only: {layout.reason}")
    if layout.profile == "portable" and layout.alone:
        out.warn(f"SGLang will not take {', '.join(layout.alone)}, which it stacks with each other")
    needed = max(module.rank for module in certificate.modules)
    held = max(layout.ranks.values())
    if exported.merged and held > needed:
        out.warn(f"no module needs more than rank {needed}; up to {held} it is filled with zeros")
    out.line(str(exported.path), style="bold")
    out.line(
        f"  rank {layout.rank}, {len(layout.ranks)} modules, {str(exported.dtype).removeprefix('torch.')}, "
        f"{amount_text(exported.size_bytes, 'B')}, profile {layout.profile}"
    )
    if gguf:
        out.line(f"  {GGUF_FILE} for llama.cpp: llama-server --lora {exported.path / GGUF_FILE}")
    if exported.merged:
        out.line(
            f"  energy kept by the compression: {certificate.mean_energy:.2%} on average, "
            f"{certificate.least_energy:.2%} at least; relative error {certificate.largest_error:.2f} at most"
        )
        out.table(
            ["  module", "rank", "energy kept", "relative error"],
            [
                [f"  {module.name}", str(module.rank), f"{module.kept_energy:.2%}", f"{module.relative_error:.3f}"]
                for module in certificate.worst
            ],
        )
    else:
        rounding = f" to {certificate.largest_error:.1e}, the rounding of {str(exported.dtype).removeprefix('torch.')}"
        out.line(f"  exact{rounding if certificate.largest_error else ''}")
    if loss is not None:
        out.table(
            ["  on held-out records", "nats per token"],
            [["  composition", f"{loss.before:.4f}"], ["  export", f"{loss.after:.4f}"]],
        )
        out.line(
            f"  {loss.records} records, {loss.scored_tokens} scored tokens; difference {loss.difference:+.4f}, "
            f"95 % interval {interval_text(loss.interval)}"
        )
    if exported.refit is not None:
        _show_refit(out, exported.refit)
    if layout.profile == "mlx":
        out.hint(f"mlx_lm.generate --model BASE --adapter-path {exported.path} --prompt ...")
    else:
        out.hint(exported.loading_line(base))


def _show_refit(out: Output, refit: RefitRecord) -> None:
    """The three losses, and what was kept."""
    from loracli.evaluation.comparison import interval_text

    loss = refit.loss
    rows = [("composition", loss.composition), ("truncation", loss.truncated), ("refit", loss.refitted)]
    rows = rows if refit.kept == "refit" else rows[:2]
    out.table(["  on held-out records", "nats per token"], [[f"  {name}", f"{nats:.4f}"] for name, nats in rows])
    gain = f"a gain of {refit.gain:.4f} on the validation records, standard error {refit.standard_error:.4f}"
    if refit.kept == "refit":
        out.line(
            f"  {loss.records} records, {loss.scored_tokens} scored tokens; refit minus truncation "
            f"{loss.refitted - loss.truncated:+.4f}, 95 % interval {interval_text(loss.interval)}"
        )
        out.line(f"  refitted: {refit.numbers} numbers, {gain}")
    else:
        out.line(f"  the truncation is kept: {gain}")
    if refit.stopped is not None:
        out.warn(f"the refit stopped early: {refit.stopped}")


def _print_plan(out: Output, planned: Exported) -> None:
    """What would be written, for --dry-run."""
    layout, dtype = planned.layout, dtype_name(planned.dtype)
    out.close()
    out.document(
        {
            "plan": {
                "path": str(planned.path),
                "profile": layout.profile,
                "merged": planned.merged,
                "rank": layout.rank,
                "dtype": dtype,
                "size_bytes": planned.size_bytes,
                "modules": [{"name": name, "rank": rank} for name, rank in sorted(layout.ranks.items())],
                "tensors": [{"name": name, "shape": list(shape)} for name, shape in planned.shapes.items()],
            }
        }
    )
    out.value(str(planned.path))
    out.line(f"{planned.path} would be written:", style="bold")
    size = amount_text(planned.size_bytes, "B")
    out.line(f"  rank {layout.rank}, {len(layout.ranks)} modules, {dtype}, {size}, profile {layout.profile}")
    rows = [[f"  {name}", " x ".join(map(str, shape))] for name, shape in planned.shapes.items()]
    out.table(["  tensor", "shape"], rows)
