"""`loracat report`: a recipe as one HTML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output, encode_as

EPILOG = (
    "loracat report  ·  loracat compare recipe.json --data test.jsonl --json > comparison.json  ·  "
    "loracat report recipe.json --comparison comparison.json -o soup.html"
)


def report(
    *,
    recipe: opt.RecipeArgument = Path("recipe.json"),
    comparison: Annotated[
        Path | None,
        typer.Option(
            "--comparison",
            "-c",
            metavar="FILE",
            help="Show the comparison that `loracat compare RECIPE --json` printed.",
        ),
    ] = None,
    adapters: opt.Places = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Write the page there.")] = Path(
        "report.html"
    ),
    force: opt.Force = False,
    out: Output,
) -> None:
    """Write one HTML file: verdict, comparison, weights as a map, the search, how it was made, what comes next."""
    from loracli.recipe.recipe import load_recipe
    from loracli.report.report import write_report

    written = write_report(recipe, output, comparison=comparison, adapters=adapters or (), force=force, progress=out)
    out.document(encode_as(written, path="report"))
    out.value(str(written.path))
    out.line(str(written.path), style="bold")
    out.line(f"  {written.size_bytes / 1000:.1f} kB: {', '.join(written.parts)}")
    if comparison is None:
        base = [] if load_recipe(recipe).base.claim else ["--base", "MODEL"]  # a directory, which only the user knows
        words = ["loracat", "compare", str(recipe), "--data", "DATA.jsonl", *base, "--json"]
        out.hint(f"{shlex.join(words)} > comparison.json")
