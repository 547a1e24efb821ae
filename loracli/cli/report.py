"""`loracat report`: a recipe as one HTML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._options import ForceOpt, JsonOpt, QuietOpt, complete_adapter
from loracli.cli._output import Output

EPILOG = (
    "loracat report  ·  loracat compare recipe.json --data test.jsonl --json > comparison.json  ·  "
    "loracat report recipe.json --comparison comparison.json -o soup.html"
)


def report(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe that `loracat fit` wrote.")] = Path(
        "recipe.json"
    ),
    comparison: Annotated[
        Path | None,
        typer.Option("--comparison", "-c", metavar="FILE", help="What `loracat compare RECIPE --json` printed."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER...",
            autocompletion=complete_adapter,
            help="Where the ingredients are now, in order.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")] = Path(
        "report.html"
    ),
    force: ForceOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write one HTML file: verdict, comparison, weights as a map, the search, interference, provenance."""
    from loracli.report.report import write_report

    out = Output(as_json=as_json, quiet=quiet)
    written = write_report(recipe, output, comparison=comparison, adapters=adapters or (), force=force, progress=out)
    out.close()
    out.document({"report": str(written.path), "size_bytes": written.size_bytes, "parts": list(written.parts)})
    out.value(str(written.path))
    out.line(str(written.path), style="bold")
    out.line(f"  {written.size_bytes / 1000:.1f} kB: {', '.join(written.parts)}")
    if comparison is None:
        out.hint(
            shlex.join(["loracat", "compare", str(recipe), "--data", "test.jsonl", "--json"]) + " > comparison.json"
        )
