"""`loracat verify`: what was written, computed again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._options import EditedCardOpt, JsonOpt, QuietOpt, complete_adapter
from loracli.cli._output import Output

EPILOG = (
    "loracat verify adapter-cat/  ·  loracat verify adapter-cat/ --adapters ./math ./code  ·  "
    "loracat verify model/ --recipe recipe.json --base ./llama"
)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="That `loracat export` or `loracat fuse` wrote.")],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="RECIPE", help="The recipe that it was made with, to find local ingredients."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER...",
            autocompletion=complete_adapter,
            help="Where the ingredients are now, in the recorded order.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Hub id or directory of the base model, where it is needed."),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Branch, tag or commit of the base model.")
    ] = None,
    edited_card: EditedCardOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Compute an export or a fused model again from its ingredients and compare every tensor; 7 on any difference."""
    from loracli.verifying.verify import verify_directory

    out = Output(as_json=as_json, quiet=quiet)
    found = verify_directory(
        directory,
        recipe=recipe,
        adapters=adapters or (),
        base=base,
        base_revision=base_revision,
        edited_card=edited_card,
        progress=out,
    )
    out.close()
    out.document(
        {
            "path": str(found.path),
            "kind": found.kind,
            "tensors": found.tensors,
            "checked": list(found.checked),
            "not_checked": [{"what": item.what, "why": item.why} for item in found.not_checked],
        }
    )
    out.value("incomplete" if found.not_checked else "verified")
    out.line(str(found.path), style="bold")
    for what in found.checked:
        out.line(f"  checked: {what}")
    for item in found.not_checked:
        out.line(f"  NOT checked: {item.what}: {item.why}")
    out.line("no difference found" if found.not_checked else f"no difference, {found.tensors} tensors compared")
