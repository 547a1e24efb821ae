"""An adapter is a stranger's: nothing in it is run, rendered, imported or followed, and no name becomes a path."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.system.tensor_file import open_tensor_file
from tests.cli.project import FIT, run, tree
from tests.hostile.canary import Canary, reading_commands

PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.pkl")


def test_the_canary_sings(canary: Canary) -> None:
    """Or none of the tests below could fail."""
    pickle.loads(canary.pickle())
    assert canary.sang()


@pytest.mark.parametrize("words", reading_commands(), ids=" ".join)
def test_a_pickle_is_never_opened(here: Path, canary: Canary, words: list[str]) -> None:
    (here / "form/adapter_model.safetensors").unlink()
    (here / "form/adapter_model.bin").write_bytes(canary.pickle())
    result = run(*words)
    assert result.exit_code == 3 and "adapter_model.safetensors" in result.stderr
    assert re.search(r"loracat convert (\./)?form --from-pickle", " ".join(result.stderr.split())), result.stderr
    assert not canary.sang()


def test_pickles_beside_the_tensors_are_never_opened(here: Path, canary: Canary) -> None:
    for name in PICKLES:
        for folder in ("know", "form", "base"):
            (here / folder / name).write_bytes(canary.pickle())
    for words in reading_commands():
        assert run(*words).exit_code == 0, words
    assert not canary.sang()


def test_nothing_that_a_config_names_is_imported(here: Path, canary: Canary) -> None:
    module = canary.module(here)
    path = here / "form/adapter_config.json"
    config = json.loads(path.read_text())
    named = {"parent_library": module, "base_model_class": "Attack"}
    path.write_text(json.dumps({**config, "auto_mapping": named, "megatron_core": module, "task_type": module}))
    for words in reading_commands():
        # 7: the recipe is of the adapter before; 3: the task is none that both have
        assert run(*words).exit_code in (0, 3, 7), words
    path.write_text(json.dumps({**config, "megatron_config": {"x": module}}))
    assert run("inspect", "form").exit_code == 3
    assert not canary.sang()


def test_code_and_templates_beside_an_adapter_are_neither_run_nor_rendered(here: Path, canary: Canary) -> None:
    """A template that would not end, in both places where one can be."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}" * 3
    (here / "form/chat_template.jinja").write_text(endless)
    (here / "form/tokenizer_config.json").write_text(json.dumps({"chat_template": endless}))
    for name in ("__init__.py", "modeling.py", "conftest.py", "sitecustomize.py"):
        (here / "form" / name).write_text(canary.program())
    for words in reading_commands():
        assert run(*words).exit_code == 0, words
    assert not canary.sang()


def test_code_that_a_base_brings_along_is_not_run(here: Path, canary: Canary) -> None:
    """What transformers runs with trust_remote_code."""
    path = here / "base/config.json"
    config = json.loads(path.read_text())
    (here / "base/attack.py").write_text(canary.program())
    mapped = {"AutoConfig": "attack.Attack", "AutoModelForCausalLM": "attack.Attack"}
    path.write_text(json.dumps({**config, "auto_map": mapped, "trust_remote_code": True}))
    result = run(*FIT, "-o", "other.json")
    assert result.exit_code in (0, 3)
    path.write_text(json.dumps({**config, "auto_map": mapped, "model_type": "attack", "architectures": ["Attack"]}))
    result = run(*FIT, "-o", "another.json")
    assert result.exit_code == 3, result.stderr
    assert not canary.sang()


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..\\outside", "a/../../outside", "~/outside"])
def test_no_name_in_an_adapter_becomes_a_path(here: Path, name: str) -> None:
    path = here / "form/adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, 4)
    tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(4, 4)
    save_file(tensors, path)
    before = {entry: data for entry, data in tree(here.parent).items()}
    for words in (["inspect", "form"], [*FIT, "-o", "other.json"], ["lint", "form"]):
        assert run(*words).exit_code == 3, words
    assert tree(here.parent) == before


def test_a_base_that_an_adapter_names_by_a_path_is_no_base(here: Path) -> None:
    for name in ("form", "know"):
        path = here / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(here / "base")}))
    result = run(*[word for word in FIT if word not in ("--base", "base")], "-o", "other.json")
    assert result.exit_code == 3 and "--base" in result.stderr


def test_an_adapter_is_never_mapped_into_memory(here: Path) -> None:
    """Or a file that shrinks could kill the process."""
    path = (here / "form/adapter_model.safetensors").resolve()
    file = open_tensor_file(path)
    with file.reader() as reader:
        for name in file.shapes:
            reader.read(name)
        assert str(path) not in Path(f"/proc/{os.getpid()}/maps").read_text()


def test_a_card_of_an_ingredient_is_not_copied(here: Path) -> None:
    shutil.rmtree(here / "adapter-cat", ignore_errors=True)
    (here / "form/README.md").write_text("---\nlicense: x\n---\n<script>attack()</script> [link](http://x)\n")
    assert run("export").exit_code == 0
    card = (here / "adapter-cat/README.md").read_text()
    assert "attack" not in card and "http://x" not in card
