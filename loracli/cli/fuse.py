"""`loracat fuse`: the base model with a composition folded into its weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._help import Panel
from loracli.cli._output import Output, encode_as
from loracli.progress import amount_text

EPILOG = (
    "loracat fuse -o model/  ·  loracat fuse adapter-merged/ --base ./llama -o model/  ·  "
    "loracat fuse --adapters ./math ./code --weights 0.7 0.3 -o model/  ·  "
    "loracat fuse --method sum --adapters ./math ./code -o model/"
)


def fuse(
    *,
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE",
            help="The recipe that `loracat fit` wrote, or an adapter's directory; recipe.json, unless --weights or "
            "--method has --adapters.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Write the model there."), Panel.OUTPUT
    ] = Path("model-fused"),
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    adapters: opt.AdaptersOrPlaces = None,
    weights: opt.Weights = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Compose by a method that needs no data instead of a fit."),
    ] = None,
    modules_to_save: opt.MethodModulesToSave = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Write float32, float16 or bfloat16; the default is the base's, and bfloat16 for a quantised one.",
        ),
    ] = None,
    dequantise: Annotated[
        bool,
        typer.Option(
            "--dequantise", help="Compute the weights of a base in fp8, bitsandbytes or 8-bit compressed-tensors."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a fusion that was stopped."), Panel.OUTPUT
    ] = False,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    out: Output,
) -> None:
    """Fold the composition into the base model's own weights, file by file."""
    from loracli.composition.weights import parse_words
    from loracli.fusing.composition import FuseRequest
    from loracli.fusing.fuse import fuse_model

    named = weights or (method and adapters)  # so that no recipe is
    composed = opt.default_recipe("fuse", adapters, out) if recipe is None and not named else recipe
    request = FuseRequest(
        composed,
        adapters=adapters or (),
        weights=parse_words(weights) if weights else None,
        method=method,
        modules_to_save=modules_to_save,
        base=base,
        base_revision=base_revision,
        dtype=dtype,
        dequantise=dequantise,
    )
    fused = fuse_model(request, output, force=force, resume=resume, dry_run=dry_run, progress=out)
    out.document({"dry_run": dry_run, **encode_as(fused, base_id="base", resumed="resumed_shards")})
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
        out.line(f"  replaced by what an adapter saved (modules_to_save): {', '.join(fused.replaced)}")
    if fused.untied:
        out.line("  embedding and head were one matrix and are two now: tie_word_embeddings is false in config.json")
    if fused.left_behind:
        out.note(f"not copied: {', '.join(fused.left_behind)}")
    if dry_run:
        return
    words = ["loracat", "verify", str(fused.path)]
    if composed is not None:
        words += ["--adapters" if composed.is_dir() else "--recipe", str(composed)]
    words += ["--adapters", *adapters] if adapters else []
    words += ["--base", base] if base else []
    out.hint(shlex.join(words))
