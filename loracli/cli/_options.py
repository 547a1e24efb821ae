"""Option types that more than one command takes; each help text is written once, here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._complete import complete_adapter

JsonOpt = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout, also on failure.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print values only: no tables, notes or progress.")]
ForceOpt = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")]
RevisionOpt = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit for references without @REV.")
]
CacheDirOpt = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="DIR", help="Hub cache to use instead of the default one.")
]
TokenOpt = Annotated[
    str | None,
    typer.Option("--token", metavar="TOKEN", help="Hub token. Prefer `hf auth login` or the variable HF_TOKEN."),
]
AdaptersOpt = Annotated[
    list[str],
    typer.Option(
        "--adapters",
        "-a",
        metavar="ADAPTER...",
        autocompletion=complete_adapter,
        help="Adapters in order: org/name, org/name@rev, hf://org/name@rev/sub/folder, or a local directory.",
    ),
]
RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe that `loracat fit` wrote.")]
ModulesToSaveOpt = Annotated[
    str,
    typer.Option(
        "--modules-to-save",
        metavar="POLICY",
        help="Modules that adapters saved whole: pick:NAME, average, or refuse.",
    ),
]
MetricCommandOpt = Annotated[
    str | None,
    typer.Option(
        "--metric-command",
        metavar="COMMAND",
        help="Judge greedy answers by your own program: JSONL in, a number a line out.",
    ),
]
MaxNewTokensOpt = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Of a generated answer.")]
ToleranceOpt = Annotated[float, typer.Option("--tolerance", metavar="X", help="Relative, of the metric numeric.")]
