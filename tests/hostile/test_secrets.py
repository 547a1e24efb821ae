"""A token reaches the Hub, and no output, file or message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.project import FIT, run, tree

TOKEN = "hf_canary0123456789"


def test_no_command_writes_or_says_the_token(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    said = ""
    for words in (
        ["inspect", "know", "form", "--token", TOKEN],
        [*FIT, "-o", "other.json", "--log", "steps.jsonl"],
        ["show", "other.json"],
        ["export", "other.json", "-o", "out"],
        ["report", "other.json", "-o", "report.html"],
        ["verify", "out"],
        ["env"],
        ["show", "nothing.json"],
    ):
        for more in ([], ["--json", *(["--force"] if "-o" in words else [])]):
            result = run(*words, *more)
            assert result.exit_code in (0, 3), (words, result.stderr)
            said += result.stdout + result.stderr
    assert TOKEN not in said
    assert not [name for name, data in tree(here).items() if TOKEN.encode() in (data or b"")]


def test_what_can_be_published_holds_no_path_of_this_machine(here: Path) -> None:
    assert run("export", "-o", "out").exit_code == 0
    home = str(here.parent).encode()
    assert not [name for name, data in tree(here / "out").items() if home in (data or b"")]
