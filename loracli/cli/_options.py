"""Option types that several commands take, with their completion; each help text is written once, here.

What a shell may complete an argument to. Runs at a keystroke: no torch, no network, nothing read but names.

Sizes as people type them.

Option types that more than one command takes; each help text is written once, here.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from loracli.errors import UsageError
from loracli.system.files import CONFIG_FILE

CACHED = "models--"  # what the name of a model's folder in a Hub cache begins with


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Adapters in the folder that is being typed, and those in the Hub cache.

    What can only be a path is left to the shell.
    """
    if incomplete.startswith((".", "/", "~")):
        return []
    return [*_local(incomplete), *_cached(ctx.params.get("cache_dir"))]


def complete_mixing() -> list[str]:
    """What `--mixing` takes."""
    from loracli.recipe.record import MIXING_KINDS

    return [*MIXING_KINDS, "auto"]


def _local(incomplete: str) -> list[tuple[str, str]]:
    pattern = os.path.join(glob.escape(os.path.dirname(incomplete)), "*", CONFIG_FILE)
    return [(os.path.dirname(path), "a directory") for path in sorted(glob.glob(pattern))]


def _cached(cache_dir: Path | None) -> list[tuple[str, str]]:
    """Repositories of which any snapshot is an adapter."""
    if cache_dir is None:
        from loracli.hub.references import surroundings

        cache_dir = surroundings().cache
    folder = glob.escape(str(cache_dir))
    found = glob.glob(os.path.join(folder, f"{CACHED}*", "snapshots", "*", CONFIG_FILE))
    names = {Path(path).parents[2].name.removeprefix(CACHED).replace("--", "/") for path in found}
    return [(name, "in the Hub cache") for name in sorted(names)]


UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """`20MB`, `1.5 GiB`, `800000`; units are powers of 1000, with an i of 1024. `option` is what errors name.

    Raises:
        UsageError: if it is no size.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", text.strip())
    if found is None or found[2] not in UNITS:
        raise UsageError(f"{option} {text} is no size", hint=f"for example 20MB; units: {', '.join(list(UNITS)[1:])}")
    return int(float(found[1]) * UNITS[found[2]])


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
EditedCardOpt = Annotated[
    bool, typer.Option("--edited-card", help="Let a README.md pass whose words were changed after it was written.")
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
FieldsOpt = Annotated[
    str | None,
    typer.Option(
        "--fields",
        metavar="NAME=KEY,...",
        help="What the data call the fields that are read: prompt=question,completion=answer.",
    ),
]
MaxNewTokensOpt = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Of a generated answer.")]
ToleranceOpt = Annotated[float, typer.Option("--tolerance", metavar="X", help="Relative, of the metric numeric.")]
