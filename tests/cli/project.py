"""Running `loracat` in this process, on a copy of the embedded example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from loracli.cli import app

FIT = "fit --adapters know form --data calibration.jsonl --eval-data test.jsonl --base base --passes 3".split()


def run(*words: str, input: bytes | None = None) -> Any:
    """The result, which has no escape sequence, no traceback and no exception that is a bug."""
    result = CliRunner().invoke(app, list(words), input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "\x1b" not in result.stdout + result.stderr
    return result


def document(*words: str) -> dict[str, Any]:
    """What a command that succeeds prints with --json."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stdout
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every name below the folder with its bytes, to compare before with after."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
