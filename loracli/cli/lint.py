"""`loracat lint`: which servers take an adapter and mean the same by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracli.cli._output import Output

EPILOG = "loracat lint adapter-merged  ·  loracat lint ./adapter --for vllm,sglang --base org/base-model"
SHOWN_FINDS = 3  # one wrong rank makes a find of every module; --json has the first twenty
SAID = {
    "takes": ("takes it", "bold green"),
    "differs": ("takes it for something else", "bold red"),
    "refuses": ("refuses it", "bold red"),
}
_WRITERS = {"peft": "PEFT", "mlx": "mlx-lm"}


def lint(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter that PEFT or mlx-lm wrote.")],
    servers: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVERS",
            help="Check some of vllm,sglang,llamacpp,tgi,ollama,peft,mlx; the default is all that read this layout.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Read the config of this base, a Hub id or a directory, for what only the base can tell.",
        ),
    ] = None,
    out: Output,
) -> None:
    """Check an adapter against the rules of servers, and print the commands that serve it."""
    from loracli.serving.lint import lint_adapter

    asked = [name.strip() for name in servers.split(",") if name.strip()] if servers else []
    found = lint_adapter(directory, servers=asked, base=base, progress=out)
    out.document(found.as_dict())
    out.line(f"{directory}: {found.modules} modules, rank up to {found.rank}, files of {_WRITERS[found.layout]}")
    for server in found.servers:
        words, style = SAID[server.verdict]
        out.value(f"{server.id} {server.verdict}")
        out.line()
        out.line(f"{server.name} ({server.versions}) {words}", style=style)
        for violation in server.violations:
            more = f" and {violation.count - SHOWN_FINDS} more" if violation.count > SHOWN_FINDS else ""
            out.line(f"  {violation.severity}  {violation.rule}: {'; '.join(violation.found[:SHOWN_FINDS])}{more}")
            out.line(f"    why     {violation.why}")
            out.line(f"    remedy  {violation.remedy}", whole=True)
        for reason in server.unclear:
            out.line(f"  not checked  {reason}", style="dim")
        for command in server.serve:
            out.line(f"  {'in Python: ' if server.id == 'peft' else ''}{command}", whole=True)
    if not found.taken:
        raise typer.Exit(3)
