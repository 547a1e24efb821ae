"""`loracat verify`: what was written, computed again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output
from loracli.system.document import encode

EPILOG = (
    "loracat verify adapter-cat/  ·  loracat verify adapter-cat/ --adapters ./math ./code  ·  "
    "loracat verify model/ --recipe recipe.json --base ./llama"
)


def verify(
    *,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory that `loracat export` or `loracat fuse` wrote.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Find local ingredients by this recipe, which it was made with; by default by recipe.json, if it is.",
        ),
    ] = None,
    adapters: opt.Places = None,
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    edited_card: opt.EditedCard = False,
    out: Output,
) -> None:
    """Compute an export or a fused model again from its ingredients and compare every tensor; exit code 7 on any
    difference."""
    from loracli.verifying.verify import verify_directory

    found = verify_directory(
        directory,
        recipe=recipe,
        adapters=adapters or (),
        base=base,
        base_revision=base_revision,
        edited_card=edited_card,
        at_hand="recipe.json",
        progress=out,
    )
    out.document(encode(found))
    out.value("incomplete" if found.not_checked else "verified")
    out.line(str(found.path), style="bold")
    for what in found.checked:
        out.line(f"  checked: {what}")
    for item in found.not_checked:
        out.line(f"  NOT checked: {item.what}: {item.why}")
    out.line("no difference found" if found.not_checked else f"no difference, {found.tensors} tensors compared")
