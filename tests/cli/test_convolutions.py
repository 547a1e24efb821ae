"""Adapters of convolutions go the whole way from inspection to verification without a base, by the commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.project import run
from tests.convolutions import adapt, close, config_of, deltas, model, total


def test_from_inspect_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [adapt(tmp_path / name, model(), r=4, seed=ord(name)) for name in "ab"]
    seen = run("inspect", "a", "b")
    assert seen.exit_code == 0, seen.stderr
    assert "first, second are convolutions, whose rank is that of a group" in seen.stdout
    [line] = [line for line in seen.stderr.splitlines() if line.startswith("next: ")]
    command = shlex.split(line.removeprefix("next: "))
    assert command == ["loracat", "export", "--method", "sum", "--adapters", "a", "b"]
    document = json.loads(run("inspect", "a", "b", "--json").stdout)
    assert [adapter["convolutions"] for adapter in document["adapters"]] == [["first", "second"]] * 2

    made = run(*command[1:], "-o", "out")
    assert made.exit_code == 0, made.stderr
    assert "written for PEFT only: it changes the convolution first" in made.stderr
    expected = total([deltas(path) for path in paths], [1.0, 1.0])
    for name, delta in deltas(tmp_path / "out").items():
        close(delta, expected[name])
    checked = run("verify", "out", "--adapters", "a", "b")
    assert checked.exit_code == 0 and "no difference" in checked.stdout

    cut = run("export", "--method", "sum", "--merge", "--rank", "2", "--adapters", "a", "b", "-o", "cut")
    assert cut.exit_code == 0 and "filled with zeros" not in cut.stderr
    assert config_of(tmp_path / "cut")["r"] == 4
    refused = run("fuse", "--method", "sum", "--adapters", "a", "b", "-o", "fused")
    assert refused.exit_code == 3
    assert "changes the convolution first" in refused.stderr
