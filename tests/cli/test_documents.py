"""What `--json` prints is what the shipped schema says: of every command, on success and on failure, without a key
that is not described."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from loracli.cli import app
from loracli.demo.run import DemoResult, DemoRow
from loracli.errors import SettingsError
from loracli.recipe.recipe import load_recipe
from scripts.write_json_reference import PAGE, reference
from tests.cli.project import FIT, run
from tests.conversion.training import Trained, train

SCHEMA: dict[str, Any] = json.loads(files("loracli.cli").joinpath("documents.schema.json").read_text(encoding="utf-8"))
OTHERS = (  # of a command that has another document too
    "fit-plan",
    "compare-plan",
    "export-plan",
    "show-weights",
    "show-layers",
)
DATA = ["--data", "few.jsonl", "--base", "base"]


def closed(value: Any) -> Any:
    """A schema that takes no key it does not describe: stricter than the shipped one, which leaves room for more."""
    if isinstance(value, list):
        return [closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    inner = {key: closed(item) for key, item in value.items()}
    if isinstance(value.get("properties"), dict) and "additionalProperties" not in value:
        inner["additionalProperties"] = False
    return inner


def check(document: Any, name: str) -> None:
    """Raises if the document is not the one of a command, or not one of the schema as a whole."""
    strict = closed(SCHEMA) | {"anyOf": [{"$ref": f"#/$defs/{name}"}]}
    Draft202012Validator(strict).validate(document)
    Draft202012Validator(SCHEMA).validate(document)


def commands() -> set[str]:
    root: Any = typer.main.get_command(app)
    return set(root.commands)


def test_the_schema_is_one_and_names_every_command() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    named = {branch["$ref"].removeprefix("#/$defs/") for branch in SCHEMA["anyOf"]}
    assert named == {"error", *OTHERS, *commands()}


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run scripts/write_json_reference.py"


def test_a_key_that_is_not_described_is_found() -> None:
    """Or the tests below could not fail."""
    document = {"loracat": 1, "report": "r.html", "size_bytes": 1, "parts": []}
    check(document, "report")
    for wrong in (document | {"more": 1}, document | {"parts": [1]}, {"loracat": 1}, document | {"loracat": 2}):
        with pytest.raises(Exception, match=r"more|type|required|expected"):
            check(wrong, "report")


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    return train(tmp_path_factory.mktemp("dora"), tiny_base, use_dora=True)


# Each after what it needs is there.
SUCCESSES: list[tuple[str, list[str]]] = [
    ("fetch", ["fetch", "./know"]),
    ("fetch", ["fetch", "./know", "./form", "--dry-run"]),
    ("inspect", ["inspect", "know", "form"]),
    ("fit", [*FIT, "-o", "new.json", "--mixing", "adapter"]),
    ("fit-plan", [*FIT, "--dry-run", "--mixing", "auto", "--select-by", "exact"]),
    ("show", ["show"]),
    ("show-weights", ["show", "--weights"]),
    ("show-layers", ["show", "--layers", *DATA]),
    ("compare", ["compare", *DATA, "--methods", "uniform", "--generate", "exact", "--guard", "few.jsonl"]),
    ("compare-plan", ["compare", *DATA, "--methods", "uniform", "--dry-run"]),
    ("generate", ["generate", "--base", "base", "--prompt", "Where?", "--max-new-tokens", "3"]),
    ("export", ["export"]),
    ("export", ["export", "--merge", "--rank", "3", *DATA]),
    ("export", ["export", "--merge", "--rank", "2", "--refit", *DATA, "-o", "refitted"]),
    ("export-plan", ["export", "--dry-run", "-o", "planned"]),
    ("fuse", ["fuse", "--base", "base", "--dry-run"]),
    ("fuse", ["fuse", "--base", "base"]),
    ("verify", ["verify", "adapter-cat"]),
    ("lint", ["lint", "adapter-cat"]),
    ("report", ["report"]),
    ("env", ["env"]),
]


def test_every_command_prints_the_document_that_is_described(here: Path) -> None:
    Path("few.jsonl").write_text("".join(Path("test.jsonl").read_text().splitlines(keepends=True)[:24]))
    for name, words in SUCCESSES:
        result = run(*words, "--json")
        assert result.exit_code == 0, result.stdout
        check(json.loads(result.stdout), name)
    assert {name for name, _ in SUCCESSES} - set(OTHERS) == commands() - {
        "convert",
        "demo",
        "push",
    }  # which follow; tests/pushing


def test_a_conversion_prints_the_document_that_is_described(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    words = ["convert", str(dora.path), "--base", str(tiny_base), "-o", str(tmp_path / "out"), "--rank", "3"]
    check(json.loads(run(*words, "--json").stdout), "convert")


def test_the_demo_prints_the_document_that_is_described(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Any = load_recipe("recipe.json")
    made: Any = None
    shown = DemoResult(recipe, made, made, (DemoRow("fit", 0.5, 3, 4),), 1.5)
    monkeypatch.setattr("loracli.demo.run.run_demo", lambda *_, **__: shown)
    check(json.loads(run("demo", "--json").stdout), "demo")


def test_results_with_exit_code_3_are_described_too(here: Path) -> None:
    config = Path("form/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/other"}))
    result = run("inspect", "know", "form", "--json")
    assert result.exit_code == 3
    check(json.loads(result.stdout), "inspect")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    result = run("lint", "form", "--json")
    assert result.exit_code == 3
    check(json.loads(result.stdout), "lint")


def bad_line() -> None:
    Path("calibration.jsonl").write_text("{\n")


def bad_key() -> None:
    Path("loracat.toml").write_text("[fit]\nmixng = 1\n")


def nothing() -> None:
    pass


FAILURES: list[tuple[Callable[[], None], list[str], int]] = [
    (nothing, ["fit"], 2),
    (nothing, ["fit", "--seed", "one"], 2),
    (nothing, ["no-such-command"], 2),
    (nothing, ["--no-such-option"], 2),
    (nothing, ["show", "--color", "mauve"], 2),
    (bad_key, ["show"], 2),
    (bad_line, [*FIT, "-o", "new.json"], 3),
    (nothing, ["show", "missing.json"], 3),
]


@pytest.mark.parametrize(("damage", "words", "code"), FAILURES, ids=[" ".join(words[:3]) for _, words, _ in FAILURES])
def test_a_failure_prints_the_document_that_is_described(
    here: Path, damage: Callable[[], None], words: list[str], code: int
) -> None:
    damage()
    result = run(*words, "--json")
    document = json.loads(result.stdout)
    check(document, "error")
    assert result.exit_code == document["error"]["code"] == code
    assert document["error"]["message"].strip() and document["error"]["hint"]
    listed = document["error"]["kind"] in ("CalibrationError", "RecipeError", SettingsError.__name__)
    assert ("problems" in document["error"]) is listed


def test_an_interruption_prints_the_document_that_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loracli.recipe.recipe.load_recipe", stop)
    document = json.loads(run("show", "x.json", "--json").stdout)
    check(document, "error")
    assert (document["error"]["code"], document["error"]["kind"]) == (130, "Interrupted")
