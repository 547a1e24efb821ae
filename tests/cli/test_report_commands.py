"""The commands that a report gives are run as they stand: they make again what made it, and what comes next works."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from loracli.errors import UsageError
from loracli.fitting.settings import FitSettings
from loracli.recipe.recipe import load_recipe
from loracli.report.commands import Files, made_by
from tests.cli.project import run

PLACES = {"path/to/base": "base"}  # of what no recipe knows, in this project


def commands(page: Path) -> list[list[str]]:
    """Those of a page, as a shell would take them apart."""
    found = re.findall(r"<pre><code>(.*?)</code></pre>", page.read_text(), re.DOTALL)
    return [[PLACES.get(word, word) for word in shlex.split(unescape(line))] for line in found]


def typed(words: list[str], *more: str) -> Any:
    """What a shell would do with it."""
    assert words[0] == "loracat"
    *plain, sign, file = words
    done = run(*(plain if sign == ">" else words)[1:], *more)
    assert done.exit_code == 0, f"{words}\n{done.stderr}"
    if sign == ">":
        Path(file).write_text(done.stdout)
    return done


def test_the_commands_of_a_page_make_its_recipe_comparison_and_page_again(here: Path) -> None:
    first = run(*"compare --data test.jsonl --base base --methods uniform --json".split())
    Path("comparison.json").write_text(first.stdout)
    assert run("report", "--comparison", "comparison.json").exit_code == 0
    made, compared = Path("recipe.json").read_bytes(), Path("comparison.json").read_bytes()
    fit, compare, report, export, generate = commands(Path("report.html"))
    page = Path("report.html").read_bytes()
    for name in ("recipe.json", "comparison.json", "report.html"):
        Path(name).unlink()
    done = typed(fit, "--force")
    typed(compare)
    typed(report)
    assert Path("recipe.json").read_bytes() == made
    assert Path("comparison.json").read_bytes() == compared
    assert Path("report.html").read_bytes() == page
    assert f"next: {shlex.join(export)}\n" in done.stderr
    typed(export)
    assert Path("adapter-merged").is_dir()
    assert "Your question" in generate
    typed(generate, "--max-new-tokens", "2")


def test_without_a_comparison_the_next_command_makes_one(here: Path) -> None:
    assert run("report").exit_code == 0
    *_, compare = commands(Path("report.html"))
    words = ["test.jsonl" if word == "DATA.jsonl" else word for word in compare]
    typed(words)
    assert json.loads(Path("comparison.json").read_text())["best"]
    assert run("report", "--comparison", "comparison.json", "--force").exit_code == 0


def test_a_comparison_that_failed_is_an_error_that_says_why(here: Path) -> None:
    failed = run("compare", "--data", "missing.jsonl", "--base", "base", "--json")
    Path("comparison.json").write_text(failed.stdout)
    told = run("report", "--comparison", "comparison.json")
    assert failed.exit_code == told.exit_code == 3 and not Path("report.html").exists()
    assert "failed: missing.jsonl cannot be read" in told.stderr


SETTINGS: dict[str, Any] = {
    "mixing": "layer", "holdout": 0.35, "max_length": 77, "batch_tokens": 99, "passes": 3.5, "cv": 3, "ridge": 1.25e-7,
    "learning_rate": 0.0123456789, "seed": 9, "format": "prompt-completion", "fields": "prompt=q b", "skip_bad": True,
    "allow_truncation": True, "select_by": "numeric", "max_new_tokens": 7, "tolerance": 0.5,
    "modules_to_save": "average",
}  # fmt: skip


@pytest.mark.parametrize("settings", [SETTINGS, {"paper": True}, {}])
def test_every_recorded_setting_comes_back_from_the_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    recipe, wanted = load_recipe("recipe.json"), FitSettings(**settings)
    recipe = replace(recipe, fit=replace(recipe.fit, settings=wanted.recorded()))
    given: list[Any] = []

    def prepare(*words: Any, settings: FitSettings, **rest: Any) -> None:
        given.append((words, settings, rest["eval_data"]))
        raise UsageError("enough")

    monkeypatch.setattr("loracli.fitting.inputs.prepare_fit", prepare)
    [line] = [step.line for step in made_by(recipe, Files(), None) if " fit " in step.line]
    assert run(*shlex.split(line)[1:], "--dry-run").exit_code == 2
    assert given == [((["./know", "./form"], ["calibration.jsonl"]), wanted, ["test.jsonl"])]
