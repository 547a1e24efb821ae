"""What the shells are told: commands, options, values and adapters, by Typer's protocol and by a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loracli.cli import app
from tests.cli.process import COMMAND, ROOT, environment, piped

Complete = Callable[..., list[str]]


def in_bash(words: list[str]) -> dict[str, str]:
    return {"_LORACAT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}


def in_zsh(words: list[str]) -> dict[str, str]:
    return {"_LORACAT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": " ".join(words)}


def in_fish(words: list[str]) -> dict[str, str]:
    fish = {"_LORACAT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return fish | {"_TYPER_COMPLETE_ARGS": " ".join(words)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, a folder that is none, and a Hub cache with two adapters and a base model."""
    for name in ("math", "code", "runs/best", "data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("math", "code", "runs/best"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    for name, file in (("org--m-lora", "adapter_config.json"), ("org--other", "adapter_config.json"), ("b", "config")):
        snapshot = tmp_path / "hf" / "hub" / f"models--{name}" / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / file).write_text("{}")
    return tmp_path


def completed(folder: Path, shell: Callable[[list[str]], dict[str, str]], *words: str) -> str:
    variables = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": "http://127.0.0.1:1"} | shell(["loracat", *words])
    done = piped(cwd=folder, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


CASES = [
    (["co"], ["compare", "convert"]),
    (["fit", "--eval"], ["--eval-data"]),
    (["fit", "--mixing", "a"], ["adapter", "auto"]),
    (["show", "--color", "a"], ["auto", "always"]),
    (["inspect", ""], ["code", "math", "org/m-lora", "org/other"]),
    (["inspect", "math", "o"], ["org/m-lora", "org/other"]),
    (["fetch", "runs/"], ["runs/best"]),
    (["convert", "m"], ["math"]),
    (["fit", "--adapters", "m"], ["math"]),
    (["fit", "-a", "math", "org/o"], ["org/other"]),
    (["export", "--adapters", "c"], ["code"]),
    (["inspect", "./m"], []),  # the shell completes paths
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_what_a_word_may_become(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hf" / "hub"))
    result = CliRunner().invoke(app, [], env=in_bash(["loracat", *words]))
    assert result.exit_code == 0 and result.stdout.split() == expected


def test_every_shell_is_told(folder: Path) -> None:
    assert completed(folder, in_bash, "inspect", "o") == "org/m-lora\norg/other\n"
    assert completed(folder, in_fish, "inspect", "o") == "org/m-lora\tin the Hub cache\norg/other\tin the Hub cache\n"
    assert completed(folder, in_fish, "fit", "--adapters", "math", "c").startswith("code\t")
    zsh = completed(folder, in_zsh, "inspect", "o")
    assert zsh.startswith("_arguments") and '"org/m-lora":"in the Hub cache"' in zsh and '"org/other"' in zsh


def test_another_cache_is_looked_into_where_one_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    snapshot = folder / "cache" / "models--org--here" / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    words = ["loracat", "inspect", "--cache-dir", "cache", "org/"]
    assert CliRunner().invoke(app, [], env=in_bash(words)).stdout.split() == ["org/here"]


PROBE = """
import sys
try:
    from loracli.cli import main
    main()
except SystemExit:
    pass
print("LOADED", [name for name in ("torch", "transformers", "peft", "safetensors", "numpy") if name in sys.modules])
"""


def test_completion_loads_no_torch(folder: Path) -> None:
    variables = {"HF_HOME": str(folder / "hf")} | in_bash(["loracat", "inspect", "o"])
    done = subprocess.run(
        [COMMAND[0], "-c", PROBE], cwd=folder, env=environment(**variables), capture_output=True, text=True, check=False
    )
    assert done.stdout == "org/m-lora\norg/other\nLOADED []\n"


def script(folder: Path, shell: str) -> Path:
    """The completion script of a shell, and a `loracat` on the path for it to call."""
    program = folder / "bin" / "loracat"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{COMMAND[0]}" -m loracli "$@"\n')
    program.chmod(0o755)
    path = folder / f"completion.{shell}"
    path.write_text(piped(cwd=folder, variables={"_LORACAT_COMPLETE": f"source_{shell}"}).stdout)
    return path


BASH = """
source {script}
COMP_WORDS=(loracat fit --adapters math o); COMP_CWORD=4
_loracat_completion loracat
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = """
source {script}
complete --do-complete "loracat fit --adapters math o"
"""
ZSH = """
autoload -Uz compinit; compinit -u -d {folder}/zcompdump
_arguments() {{ print -r -- "$@" }}
source {script}
words=(loracat fit --adapters math o); CURRENT=5
_loracat_completion
"""


@pytest.mark.parametrize(("shell", "session"), [("bash", BASH), ("fish", FISH), ("zsh", ZSH)])
def test_a_real_shell_completes_a_cached_adapter(folder: Path, shell: str, session: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on the path")
    text = session.format(script=script(folder, shell), folder=folder)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {"HF_HOME": str(folder / "hf"), "PATH": path, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [program, "-c", text], cwd=folder, env=environment(**variables), capture_output=True, text=True, check=False
    )
    assert "org/m-lora" in done.stdout and "org/other" in done.stdout and "code" not in done.stdout, done.stderr
