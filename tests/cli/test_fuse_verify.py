"""`loracat fuse` and `loracat verify` on the embedded example: what they write, print and end with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.project import run


def test_fuse_then_verify_as_the_hints_say(here: Path) -> None:
    shown = run("fuse", "--base", "base", "-o", "model")
    assert shown.exit_code == 0 and "loracat verify model" in shown.stderr
    before, after = load_file("base/model.safetensors"), load_file("model/model.safetensors")
    assert before.keys() <= after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained("model")
    partly = json.loads(run("verify", "model", "--json").stdout)
    assert partly["kind"] == "model" and partly["not_checked"][0]["why"]
    whole = json.loads(run("verify", "model", "--recipe", "recipe.json", "--base", "base", "--json").stdout)
    assert whole["not_checked"] == [] and whole["tensors"] == len(after)
    again = run("fuse", "--base", "base", "-o", "model")
    assert again.exit_code == 2 and "--force" in again.stderr
    document = json.loads(run("fuse", "--base", "base", "-o", "model", "--force", "--json").stdout)
    assert document["path"] == "model" and document["shards"] == 1 and document["resumed_shards"] == 0


def test_a_recipe_of_another_number_of_adapters_is_not_the_records(here: Path) -> None:
    assert run("export", "--adapters", "know", "--weights", "1", "-o", "one").exit_code == 0
    failed = run("verify", "one", "--recipe", "recipe.json")
    assert failed.exit_code == 7 and "the recipe has 2 adapters, the record 1" in failed.stderr
    assert "hint: it was made of know: leave --recipe out, and say with --adapters where that is" in failed.stderr


def test_a_model_fused_from_a_directory_is_verified_as_the_hint_says(here: Path) -> None:
    fused = run("fuse", "know", "--base", "base", "-o", "model")
    words = re.search(r"next: loracat (verify .*)", fused.stderr)
    assert words is not None and words[1] == "verify model --adapters know --base base"
    assert "NOT checked" not in run(*words[1].split()).stdout
    without_base = run("verify", "model", "--adapters", "know").stdout
    assert "the base is not at hand to make it again" in without_base
    assert "its ingredients are not at hand to make it again" in run("verify", "model", "--base", "base").stdout


def test_the_line_that_loads_an_export_asks_for_a_base_that_was_a_directory(here: Path) -> None:
    shown = run("export", "-o", "cat").stderr  # of a fit with --base base, which the adapters call loracat/demo-base
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "cat")' in shown


def test_verify_of_an_export_ends_with_7_and_names_every_difference(here: Path) -> None:
    assert run("export", "-o", "cat").exit_code == 0
    shown = run("verify", "cat", "--recipe", "recipe.json")
    assert shown.exit_code == 0 and "no difference" in shown.stdout and "NOT" not in shown.stdout
    Path("recipe.json").rename("moved.json")
    shown = run("verify", "cat", "--adapters", "know", "form")
    assert shown.exit_code == 0 and shown.stdout.count("NOT checked: the held-out table") == 1
    assert run("verify", "cat", "-q").stdout == "incomplete\n"
    Path("moved.json").rename("recipe.json")
    config = json.loads(Path("cat/adapter_config.json").read_text())
    Path("cat/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1, "bias": "all"}))
    failed = run("verify", "cat", "--json")
    assert failed.exit_code == 7
    error = json.loads(failed.stdout)["error"]
    assert error["kind"] == "VerificationError" and error["problems"]
    Path("cat/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    failed = run("verify", "cat", "--recipe", "recipe.json")
    assert failed.exit_code == 7 and "lora_alpha = 1" in failed.stderr
    assert run("verify", "know").exit_code == 3


def test_a_recipe_of_the_folder_is_taken_where_the_record_names_it_and_only_there(here: Path) -> None:
    """As with --recipe, ingredients included; another recipe, or what is none, changes nothing and is said."""
    assert run("export", "-o", "cat").exit_code == 0
    taken = run("verify", "cat")
    assert "recipe.json is the recipe that" in taken.stderr
    assert taken.stdout == run("verify", "cat", "--recipe", "recipe.json").stdout
    assert "NOT checked" not in taken.stdout
    recipe = Path("recipe.json").read_text()
    config = Path("know/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1}))
    assert run("verify", "cat").exit_code == 7
    other = json.loads(recipe)
    other["fit"]["passes"] += 1
    for text in (json.dumps(other), "{"):
        Path("recipe.json").write_text(text)
        left = run("verify", "cat")
        assert left.exit_code == 0 and "recipe.json is left alone: " in left.stderr
        assert "NOT checked: the held-out table" in left.stdout


@pytest.mark.parametrize(
    "line",
    [
        "compare --data test.jsonl --methods uniform",
        "show --layers --data test.jsonl",
        "generate --prompt hi --max-new-tokens 1",
        "export --data test.jsonl -o out",
        "fuse -o out",
        "fuse cat -o out",
        "verify cat --recipe recipe.json",
    ],
)
def test_every_command_says_that_a_base_is_not_the_recipes_and_only_then(here: Path, line: str) -> None:
    assert run("export", "-o", "cat").exit_code == 0
    shutil.copytree("base", "other/base")
    config = json.loads(Path("other/base/config.json").read_text())
    Path("other/base/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    warned = []
    for base in ("base", "other/base"):
        shown = run(*line.split(), "--base", base)
        assert shown.exit_code == 0, shown.stderr
        warned.append(len(re.findall("warning: config.json of .* is not the one that .* was fitted on", shown.stderr)))
        shutil.rmtree("out", ignore_errors=True)
        Path("loracat-compare.state").unlink(missing_ok=True)
    assert warned == [0, 1]
