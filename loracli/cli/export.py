"""`loracat export`: a recipe becomes one adapter directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._options import ForceOpt, JsonOpt, QuietOpt
from loracli.cli._output import Output
from loracli.progress import amount_text

EPILOG = "loracat export  ·  loracat export --merge --rank 16 -o soup/  ·  loracat export other.json --dtype bfloat16"


def export(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe that `loracat fit` wrote.")] = Path(
        "recipe.json"
    ),
    merge: Annotated[bool, typer.Option("--merge", help="Compress to one adapter of rank --rank.")] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="K", help="Rank with --merge; default: the largest ingredient rank.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Directory to make; default: adapter-cat or adapter-merged."
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER",
            help="Where the ingredients are now, in the recipe's order; one word or several.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; default: the ingredients' widest."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="NAME", help="portable or peft; default: portable where possible."),
    ] = None,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write one adapter: concatenated and exact, or with --merge compressed to a given rank."""
    from loracli.export.export import export_adapter

    out = Output(as_json=as_json, quiet=quiet)
    directory = output or Path("adapter-merged" if merge else "adapter-cat")
    exported = export_adapter(
        recipe,
        directory,
        merge=merge,
        rank=rank,
        adapters=adapters or (),
        dtype=dtype,
        profile=profile,
        force=force,
        progress=out,
    )
    out.close()
    certificate, layout = exported.certificate, exported.layout
    out.document(
        {
            "path": str(exported.path),
            "profile": layout.profile,
            "merged": exported.merged,
            "rank": layout.rank,
            "dtype": str(exported.dtype).removeprefix("torch."),
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
        }
    )
    out.value(str(exported.path))
    if layout.profile == "peft" and layout.reason:
        out.warn(f"written for PEFT and vLLM only: {layout.reason}")
    needed = max(module.rank for module in certificate.modules)
    if exported.merged and layout.rank > needed:
        out.warn(f"no module needs more than rank {needed}; up to {layout.rank} it is filled with zeros")
    out.line(str(exported.path), style="bold")
    out.line(
        f"  rank {layout.rank}, {len(layout.ranks)} modules, {str(exported.dtype).removeprefix('torch.')}, "
        f"{amount_text(exported.size_bytes, 'B')}, profile {layout.profile}"
    )
    if exported.merged:
        low = sorted(certificate.modules, key=lambda module: module.kept_energy)[:5]
        out.line(
            f"  energy kept by the compression: {certificate.mean_energy:.2%} on average, "
            f"{certificate.least_energy:.2%} at least; relative error {certificate.largest_error:.2f} at most"
        )
        out.table(
            ["  least kept (all are in loracat.json)", "energy"],
            [[f"  {module.name}", f"{module.kept_energy:.2%}"] for module in low],
        )
    else:
        out.line(
            f"  exact to {certificate.largest_error:.1e}, the rounding of {str(exported.dtype).removeprefix('torch.')}"
        )
    out.hint(f'PeftModel.from_pretrained(base_model, "{exported.path}")')
