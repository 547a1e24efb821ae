"""--dry-run says what the command itself then does, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from loracli.recipe.recipe import load_recipe
from tests.cli.project import FIT, document, run, tree


def test_a_fit_is_planned_as_it_is_done(here: Path) -> None:
    before = tree(here)
    plan = document(*FIT, "--dry-run")["plan"]
    assert tree(here) == before
    recipe = load_recipe("recipe.json")
    for words, said in ((FIT, True), ([*FIT, "--force"], False), ([*FIT, "-o", "new.json"], False)):
        assert ("recipe.json exists: the fit itself would be refused" in run(*words, "--dry-run").stderr) == said
    log = run(*FIT, "-o", "new.json", "--log", "test.jsonl", "--dry-run").stderr
    assert "warning: test.jsonl exists: the fit itself would be refused; choose another name with --log" in log
    assert plan["training_records"] == sum(data.records for data in recipe.data)
    assert plan["scored_tokens"] == sum(data.scored_tokens for data in recipe.data)
    assert (plan["held_out_records"], plan["numbers"]) == (recipe.held_out.records, recipe.mixing.numbers)
    assert (plan["dtype"], plan["passes"]) == (recipe.dtype, recipe.fit.folds * recipe.fit.settings["passes"])


def test_a_fits_tokens_are_those_of_the_tokenizer(here: Path) -> None:
    records = [json.loads(line) for line in Path("calibration.jsonl").read_text().splitlines()]
    Path("text.jsonl").write_text("".join(json.dumps({"text": record["prompt"]}) + "\n" for record in records))
    words = ["fit", "--dry-run", "-a", "know", "form", "--base", "base", "--data", "text.jsonl"]
    plan = document(*words, "--eval-data", "test.jsonl")["plan"]
    tokenizer = AutoTokenizer.from_pretrained("base")
    lengths = [len(tokenizer(record["prompt"])["input_ids"]) for record in records]
    assert plan["training_tokens"] - sum(lengths) in (0, len(records))  # with or without an end-of-text token
    assert plan["scored_tokens"] == plan["training_tokens"] - len(records)
    assert document(*words, "--max-length", "6")["plan"]["longest_record"] == 6


def test_a_comparison_is_planned_beside_a_file_that_is_in_its_way(here: Path) -> None:
    words = ["compare", "--data", "test.jsonl", "--base", "base", "--dry-run", "--per-record"]
    assert "exists" not in run(*words, "new.jsonl").stderr and not Path("new.jsonl").exists()
    told = run(*words, "test.jsonl")
    assert told.exit_code == 0 and "rows on" in told.stdout
    assert "warning: test.jsonl exists: the comparison itself would be refused; choose another name" in told.stderr


def test_a_fit_that_would_be_refused_is_refused_in_a_dry_run(here: Path) -> None:
    words = [*FIT, "--dry-run"]
    few = Path("calibration.jsonl").read_text().splitlines(keepends=True)[:2]
    Path("calibration.jsonl").write_text("".join(few))
    assert run(*words, "--mixing", "auto").exit_code == 2
    for way in (words, [*FIT, "-o", "new.json"]):
        alone = run(*way, "--shard")
        assert alone.exit_code == 2 and "this is the only one" in alone.stderr
    tokenizer = Path("base/tokenizer.json")
    tokenizer.write_text("{")
    assert run(*words).exit_code == 3


def test_a_fit_says_beforehand_that_memory_will_not_do(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = document(*FIT, "--dry-run")["plan"]["memory_bytes"]
    for share, code in ((2.0, 0), (0.01, 6)):
        monkeypatch.setattr("loracli.model.session._available_memory", lambda *_, s=share, **__: int(s * needed))
        assert run(*FIT, "--dry-run").exit_code == code
    assert "free on cpu" in run(*FIT, "--dry-run").stderr
    monkeypatch.setattr("loracli.model.session._available_memory", lambda *_, **__: int(0.95 * needed))
    plan = document(*FIT, "--dry-run")["plan"]
    assert plan["checkpointing"] and plan["memory_bytes"] < needed


EXPORTS = [
    [],
    ["--merge", "--rank", "3"],
    ["--merge", "--energy", "0.9", "--dtype", "float32"],
    ["--merge", "--budget", "50kB", "--profile", "peft"],
    ["--method", "ties"],
    ["--profile", "mlx"],
]


@pytest.mark.parametrize("options", EXPORTS, ids=" ".join)
def test_an_export_is_planned_as_it_is_written(here: Path, options: list[str]) -> None:
    words = ["export", *options, "-o", "out"]
    before = tree(here)
    plan = document(*words, "--dry-run")["plan"]
    assert tree(here) == before
    assert f"rank {plan['rank']}, " in run(*words, "--dry-run").stdout
    done = document(*words)
    for key in ("path", "profile", "merged", "rank", "dtype", "size_bytes"):
        assert plan[key] == done[key], key
    [file] = Path("out").glob("*.safetensors")
    assert plan["size_bytes"] == file.stat().st_size
    with safe_open(file, "pt") as tensors:
        shapes = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert {tensor["name"]: tensor["shape"] for tensor in plan["tensors"]} == shapes
    again = run(*words, "--dry-run")  # the output is there now
    assert again.exit_code == 0 and "the export itself would be refused; choose another name" in again.stderr


def test_what_only_writing_can_tell_is_refused_in_a_dry_run(here: Path) -> None:
    result = run("export", "--dry-run", "--data", "test.jsonl")
    assert result.exit_code == 2 and "--data" in result.stderr


def test_a_fusion_is_planned_as_it_is_written(here: Path) -> None:
    before = tree(here)
    plan = document("fuse", "--base", "base", "--dry-run")
    assert tree(here) == before and plan["dry_run"] is True
    assert "would be written" in run("fuse", "--base", "base", "--dry-run").stdout
    done = document("fuse", "--base", "base")
    assert plan | {"dry_run": False} == done
    again = run("fuse", "--base", "base", "--dry-run")
    assert again.exit_code == 0 and "the fusion itself would be refused" in again.stderr
