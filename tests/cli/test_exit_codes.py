"""Every exit code of docs/exit-codes.md, from the program itself."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import COMMAND, ROOT, environment, piped
from tests.stub_hub import StubHub

CONFIG = b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'


def after(statements: str, *words: str, cwd: Path, **variables: str) -> Any:
    """The finished program, before which some statements ran in its process."""
    return subprocess.run(
        [COMMAND[0], "-c", f"{statements}\nfrom loracli.cli import main\nmain()", *words],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def done(folder: Path) -> Any:
    return piped("--version", cwd=folder)


def no_place_for_the_output(folder: Path) -> Any:
    (folder / "file").write_text("")
    return piped("export", "recipe.json", "-o", "file/adapter", cwd=folder)


def not_as_typed(folder: Path) -> Any:
    return piped("fit", "--no-such-option", cwd=folder)


def rejected(folder: Path) -> Any:
    return piped("show", "missing.json", cwd=folder)


def not_let_in(folder: Path) -> Any:
    with StubHub() as hub:
        hub.add("org/name", {"adapter_config.json": CONFIG})
        hub.fail("org/name", "gated")
        return piped("fetch", "org/name", cwd=folder, variables={"HF_ENDPOINT": hub.url, "HF_HOME": str(folder)})


def offline(folder: Path) -> Any:
    return piped("fetch", "org/name", cwd=folder, variables={"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)})


def disk_full(folder: Path) -> Any:
    # The system's limit for one file: the same error as a full disk.
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    with StubHub() as hub:
        hub.add("org/name", {"adapter_config.json": CONFIG, "adapter_model.safetensors": b"x" * 8192})
        return after(limited, "fetch", "org/name", cwd=folder, HF_ENDPOINT=hub.url, HF_HOME=str(folder))


def other_bytes(folder: Path) -> Any:
    config = folder / "know" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    return piped("export", cwd=folder)


# A signal that comes from elsewhere may come just before the command begins to wait, and would then be seen only when
# it has waited.
STOP = """
import os, signal
import loracli.recipe.reading
signal.signal(signal.SIGINT, signal.default_int_handler)
loracli.recipe.reading.read_document = lambda path: os.kill(os.getpid(), {number})
"""


def stopped_by(number: signal.Signals) -> Callable[[Path], Any]:
    def stop(folder: Path) -> Any:
        return after(STOP.format(number=int(number)), "show", "recipe.json", cwd=folder)

    return stop


CODES: dict[int, Callable[[Path], Any]] = {
    0: done,
    1: no_place_for_the_output,
    2: not_as_typed,
    3: rejected,
    4: not_let_in,
    5: offline,
    6: disk_full,
    7: other_bytes,
    129: stopped_by(signal.SIGHUP),
    130: stopped_by(signal.SIGINT),
    143: stopped_by(signal.SIGTERM),
}


def test_every_documented_code_is_driven() -> None:
    page = (Path(ROOT) / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(CODES)


@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{code}-{CODES[code].__name__}")
def test_the_program_ends_with_the_documented_code(here: Path, code: int) -> None:
    process = CODES[code](here)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr and "\x1b" not in process.stdout + process.stderr
    said = {129: "terminated\n", 130: "interrupted\n", 143: "terminated\n"}
    if code in said:
        assert (process.stdout, process.stderr) == ("", said[code])
    elif code:
        assert process.stdout == "" and process.stderr.startswith("error: ")
    else:
        assert process.stdout and process.stderr == ""


BEFORE_ANY_COMMAND = """
import os, signal
import typer.main
put_together = typer.main.get_command
def interrupted(app):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    return put_together(app)
typer.main.get_command = interrupted
"""


def test_ctrl_c_while_the_commands_are_put_together_is_no_traceback(tmp_path: Path) -> None:
    done = after(BEFORE_ANY_COMMAND, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
