"""Every exit code of docs/exit-codes.md, from the program itself."""

from __future__ import annotations

import os
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
    program = [COMMAND[0], "-c", limited + "from loracli.cli import main\nmain()", "fetch", "org/name"]
    with StubHub() as hub:
        hub.add("org/name", {"adapter_config.json": CONFIG, "adapter_model.safetensors": b"x" * 8192})
        variables = environment(HF_ENDPOINT=hub.url, HF_HOME=str(folder))
        return subprocess.run(
            program, cwd=folder, env=variables, capture_output=True, text=True, timeout=120, check=False
        )


def other_bytes(folder: Path) -> Any:
    config = folder / "know" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    return piped("export", cwd=folder)


def stopped_by(number: signal.Signals) -> Callable[[Path], Any]:
    def stop(folder: Path) -> Any:
        os.mkfifo(folder / "pipe")
        with subprocess.Popen(
            [*COMMAND, "show", "pipe"],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            with (folder / "pipe").open("wb"):  # waits until the command reads, which then waits for more
                process.send_signal(number)
                stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, stdout, stderr)

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
