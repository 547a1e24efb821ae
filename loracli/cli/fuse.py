"""`loracat fuse`: the base model with a composition folded into its weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._options import DryRunOpt, ForceOpt, JsonOpt, QuietOpt, complete_adapter
from loracli.cli._output import Output
from loracli.progress import amount_text

EPILOG = (
    "loracat fuse -o model/  ·  loracat fuse adapter-merged/ --base ./llama -o model/  ·  "
    "loracat fuse --method sum --adapters ./math ./code -o model/"
)


def fuse(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="That `loracat fit` wrote, or an adapter's directory; default: recipe.json, unless --method has "
            "--adapters.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the model to write.")
    ] = Path("model-fused"),
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="Hub id or directory; default: the recorded one, or what the adapters name."
        ),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Branch, tag or commit of the base model.")
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
        typer.Option("--method", metavar="NAME", help="Compose by a method that needs no data instead of a fit."),
    ] = None,
    modules_to_save: Annotated[
        str | None,
        typer.Option(
            "--modules-to-save",
            metavar="POLICY",
            help="With --method, of modules that adapters saved whole: pick:NAME, average or refuse.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, float16 or bfloat16; default: as in the base; of a quantised one bfloat16.",
        ),
    ] = None,
    dequantise: Annotated[
        bool,
        typer.Option(
            "--dequantise", help="Compute the weights of a base in fp8, bitsandbytes or 8-bit compressed-tensors."
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a fusion that was stopped.")] = False,
    force: ForceOpt = False,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Fold the composition into the base model's own weights, file by file."""
    from loracli.fusing.fuse import fuse_model

    out = Output(as_json=as_json, quiet=quiet)
    composed = Path("recipe.json") if recipe is None and (method is None or not adapters) else recipe
    fused = fuse_model(
        composed,
        output,
        adapters=adapters or (),
        method=method,
        modules_to_save=modules_to_save,
        base=base,
        base_revision=base_revision,
        dtype=dtype,
        dequantise=dequantise,
        force=force,
        resume=resume,
        dry_run=dry_run,
        progress=out,
    )
    out.close()
    out.document(
        {
            "dry_run": dry_run,
            "path": str(fused.path),
            "base": fused.base_id,
            "modules": fused.modules,
            "shards": fused.shards,
            "resumed_shards": fused.resumed,
            "size_bytes": fused.size_bytes,
            "dtypes": list(fused.dtypes),
            "untied": fused.untied,
            "dequantised": fused.dequantised,
            "left_behind": list(fused.left_behind),
            "replaced": list(fused.replaced),
            "bypassed": list(fused.bypassed),
        }
    )
    out.value(str(fused.path))
    out.line(str(fused.path) + (" would be written:" if dry_run else ""), style="bold")
    files = "1 file" if fused.shards == 1 else f"{fused.shards} files"
    out.line(
        f"  {fused.base_id} with {fused.modules} modules changed, {' and '.join(fused.dtypes)}, "
        f"{amount_text(fused.size_bytes, 'B')} in {files}"
    )
    if fused.resumed:
        out.line(f"  {fused.resumed} of them were there already")
    if fused.dequantised:
        out.line(f"  the base is quantised ({fused.dequantised}); this model is not")
    if fused.replaced:
        out.line(f"  replaced as an adapter saved them (modules_to_save): {', '.join(fused.replaced)}")
    if fused.untied:
        out.line("  embedding and head were one matrix and are two now: tie_word_embeddings is false in config.json")
    if fused.left_behind:
        out.note(f"not taken along: {', '.join(fused.left_behind)}")
    if dry_run:
        return
    ingredients = [" --adapters ", shlex.join(adapters)] if adapters else []
    known = [" --recipe ", shlex.quote(str(composed))] if composed and composed.is_file() else ingredients
    bases = [" --base ", shlex.quote(base)] if base else []
    out.hint("".join(["loracat verify ", shlex.quote(str(fused.path)), *known, *bases]))
