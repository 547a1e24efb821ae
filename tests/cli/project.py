"""Running `loracat` in this process, on the first layers of the embedded example."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loracli.cli import app
from loracli.demo.run import example_folder

FIT_WITH_CONTROL = (
    "fit --adapters know form --data calibration.jsonl --eval-data test.jsonl --base base --passes 2".split()
)
FIT = [*FIT_WITH_CONTROL, "--control", "none"]  # which takes half the time


def shortened_example(folder: Path, layers: int = 2) -> Path:
    """The embedded example with the first layers of its base and of its adapters, which takes half the time."""
    shutil.copytree(example_folder(), folder, dirs_exist_ok=True)
    for path in folder.glob("*/*.safetensors"):
        layer_of = re.compile(r".*\.layers\.(\d+)\.").match
        kept = {k: t for k, t in load_file(path).items() if (of := layer_of(k)) is None or int(of[1]) < layers}
        save_file(kept, path, metadata={"format": "pt"})
    config = folder / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
    return folder


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
