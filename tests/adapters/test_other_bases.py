"""Adapters that name another base than the one that is given: each is said by name, once, and the recipe keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loracli.adapters.claims import other_bases
from tests.cli.project import run
from tests.tiny import make_adapter, random_records, write_jsonl


@pytest.mark.parametrize(
    ("base", "model", "copy_of"),
    [
        ("org/llama-8b", "org/llama-8b", "the same"),
        ("org/Llama-8B", "org/llama-8b", "the same"),
        ("org/llama-8b", "/home/me/llama", "the same"),  # nothing that can be compared
        ("org/llama-8b", None, "the same"),
        ("org/llama-8b", "org/llama-9b", None),
        ("org/llama-8b", "else/llama-8b", None),
        ("org/llama-8b", "unsloth/llama-8b-bnb-4bit", "org/llama-8b"),
        ("org/llama-8b", "unsloth/Llama-8B-unsloth-bnb-4bit", "org/llama-8b"),
        ("org/llama-8b", "mlx-community/llama-8b-4bit", "org/llama-8b"),
        ("org/llama-8b", "someone/llama-8b-GPTQ", "org/llama-8b"),
        ("unsloth/llama-8b-bnb-4bit", "org/llama-8b", "unsloth/llama-8b-bnb-4bit"),
        ("org/llama-8b", "unsloth/llama-9b-bnb-4bit", None),
        ("org/llama-8b", "org/llama-8b-4bit-tuned", None),
    ],
)
def test_a_name_is_that_of_the_base_of_a_quantised_copy_or_of_another_model(
    base: str, model: str | None, copy_of: str | None
) -> None:
    found = other_bases(base, {"a": model})
    if copy_of == "the same":
        assert found == ()
    else:
        assert [(other.adapter, other.model, other.copy_of) for other in found] == [("a", model, copy_of)]
        assert found[0].harmless == (copy_of is not None)


@pytest.mark.parametrize(
    ("claims", "saved_as", "said"),
    [
        ({"a": "org/one", "b": "org/one"}, None, []),  # a directory may be called anything
        ({"a": "org/one", "b": "org/two"}, None, [("a", False), ("b", False)]),
        ({"a": "org/base", "b": "org/two"}, None, [("b", False)]),
        ({"a": "org/one", "b": None, "c": "./one"}, None, []),
        ({"a": "org/one", "b": "unsloth/one-bnb-4bit"}, None, [("b", True)]),
        ({"a": "org/one", "b": "org/one"}, "org/two", [("a", False), ("b", False)]),
        ({"a": "org/one", "b": "org/two"}, "org/one", [("b", False)]),
    ],
)
def test_what_a_directory_holds_is_told_by_its_name_its_config_or_adapters_that_agree(
    claims: dict[str, str | None], saved_as: str | None, said: list[tuple[str, bool]]
) -> None:
    found = other_bases("base", claims, directory=True, saved_as=saved_as)
    assert [(other.adapter, other.harmless) for other in found] == said


@pytest.fixture
def here(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    named = {"a": "org/one", "other": "meta-llama/Llama-3-8B", "four": "unsloth/one-bnb-4bit"}
    for seed, (name, model) in enumerate(named.items()):
        config = make_adapter(tmp_path / name, tiny_base, rank=2, seed=seed) / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": model}))
    write_jsonl(tmp_path / "data.jsonl", random_records(24))
    return tmp_path


ADAPTERS = ("--adapters", "./a", "./other", "./four")
SAID = "./other names meta-llama/Llama-3-8B; ./four names unsloth/one-bnb-4bit, by its name the same model as org/one"


@pytest.mark.parametrize(
    "words",
    [
        ("fit", *ADAPTERS, "--data", "data.jsonl", "--mixing", "adapter"),
        ("compare", *ADAPTERS, "--data", "data.jsonl"),
        ("export", "--method", "sum", *ADAPTERS),
        ("export", "--method", "task-arithmetic", *ADAPTERS, "--fit-data", "data.jsonl"),
        ("fuse", "--method", "sum", *ADAPTERS, "-o", "fused"),
    ],
    ids=["fit", "compare", "export", "export with records", "fuse"],
)
def test_every_command_warns_of_each_by_name_and_once(here: Path, tiny_base: Path, words: tuple[str, ...]) -> None:
    talk = run(*words, "--base", str(tiny_base), "--quiet").stderr
    assert talk.count("warning: adapters of other bases than") == 1
    assert talk.count(SAID) == 1
    assert talk.count("./a names org/one;") == 1
    both = run("export", "--method", "sum", "--adapters", "./a", "./four", "-o", "two", "--base", str(tiny_base)).stderr
    assert "warning: adapters" not in both and "./four names unsloth/one-bnb-4bit, by its name the same" in both


def test_a_recipe_keeps_what_its_adapters_name(here: Path, tiny_base: Path) -> None:
    words = ("--data", "data.jsonl", "--mixing", "adapter", "--base", str(tiny_base))
    assert run("fit", *ADAPTERS, *words).exit_code == 0
    assert "base model: other names meta-llama/Llama-3-8B" in run("show").stdout
    exported = run("export", "-o", "out")
    assert "other names meta-llama/Llama-3-8B" in exported.stderr
    card = (here / "out" / "README.md").read_text()
    assert "`other` names `meta-llama/Llama-3-8B` as its base." in card
    assert (
        "`four` names `unsloth/one-bnb-4bit` as its base, by its name the same model as `org/one`, quantised." in card
    )


def test_the_name_in_the_config_of_a_directory_is_held_against_the_adapters(here: Path, tiny_base: Path) -> None:
    copy = here / "copy"
    copy.mkdir()
    for path in tiny_base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/two"}))
    words = ("export", "--method", "sum", "--adapters", "./a", "--base")
    assert "./a names org/one" in run(*words, "copy", "-o", "first").stderr
    assert "other bases" not in run(*words, str(tiny_base), "-o", "second").stderr
