"""`loracat demo`: the whole story on an embedded example, offline."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._output import Output
from loracli.errors import OutputExists

EPILOG = "loracat demo  ·  loracat demo -o example/"


def demo(
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Keep recipe, adapters and the example itself in this new directory."
        ),
    ] = None,
    out: Output,
) -> None:
    """Fit, export, reload and compare on an embedded small model with two adapters, in about a minute, offline."""
    import tempfile

    from loracli.demo.run import EXAMPLE, run_demo
    from loracli.system.files import whole_directory

    if output is not None and output.exists():
        raise OutputExists(f"{output} exists", hint="choose another name with -o")
    with tempfile.TemporaryDirectory() if output is None else whole_directory(output, force=False) as folder:
        out.note("a small model with two adapters: 'know' holds facts, 'form' a way of answering; the test needs both")
        result = run_demo(Path(folder), progress=out)
    out.document(
        {
            "rows": [
                {
                    "name": row.name,
                    "nats_per_token": row.nats_per_token,
                    "exact_match": row.correct / row.questions,
                    "questions": row.questions,
                }
                for row in result.rows
            ],
            "seconds": result.seconds,
            "path": str(output) if output else None,
        }
    )
    out.table(
        ["", "exact match", "nats/token"],
        [
            [
                row.name,
                f"{row.correct}/{row.questions} = {row.correct / row.questions:.0%}",
                f"{row.nats_per_token:.4f}",
            ]
            for row in result.rows
        ],
        strong=next(i for i, row in enumerate(result.rows) if row.name == "fit"),
    )
    for row in result.rows:
        out.value(row.name, f"{row.correct / row.questions:.4f}", f"{row.nats_per_token:.4f}")
    records = sum(data.records for data in result.recipe.data)
    out.line()
    out.line(
        f"{result.rows[0].questions} questions about facts that only 'know' holds, in a form that only 'form' has."
    )
    out.line(f"Calibrated on {records} questions about other facts. {result.seconds:.0f} s.")
    if output is not None:
        out.line(f"kept in {output}: recipe.json, adapter-cat, adapter-merged; and the example: {', '.join(EXAMPLE)}")
        recipe, data, base = (str(output / name) for name in ("recipe.json", "test.jsonl", "base"))
        out.hint(shlex.join(["loracat", "compare", recipe, "--data", data, "--base", base]))
        return
    out.hint("loracat demo -o example")
