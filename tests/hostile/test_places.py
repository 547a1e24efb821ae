"""Two names of one file: links, and names that differ only in case; and files that are swapped while they are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from loracli.adapters import adapter as adapter_module
from loracli.adapters.adapter import open_adapter
from loracli.errors import BaseModelMismatch, IntegrityError, OutputExists
from loracli.fitting.journal import open_state
from loracli.fusing.workplace import _holds_fused_model
from loracli.model.checkpoint import shard_names
from loracli.system.files import holds, same_file
from tests.cli.project import FIT, run, tree

READ = [
    "know/adapter_config.json",
    "form/adapter_model.safetensors",
    "base/config.json",
    "calibration.jsonl",
    "test.jsonl",
]


@pytest.mark.parametrize("name", [*READ, "recipe.json", "recipe.safetensors"])
@pytest.mark.parametrize("way", ["itself", "hard link", "resumed"])
def test_no_log_is_written_onto_what_is_read_or_onto_the_recipe(here: Path, name: str, way: str) -> None:
    log = name
    if way == "hard link" and name in READ:
        log = "linked"
        os.link(name, log)
    before = tree(here)
    result = run(*FIT, "--mixing", "core", "--log", log, "--resume" if way == "resumed" else "--force")
    assert result.exit_code == 2, result.stderr
    if way != "resumed":
        assert log in result.stderr and "--log" in result.stderr
    assert tree(here) == before


def test_a_log_follows_no_link_and_goes_on_only_with_a_log(here: Path) -> None:
    (here.parent / "rc").write_text("precious")
    Path("link").symlink_to(here.parent / "rc")
    Path("dangling").symlink_to(here.parent / "new")
    Path("notes.txt").write_text("precious\n")
    Path("notes.json").write_text('{"precious": 1}\n')
    for name, more in (
        ("link", "--force"),
        ("dangling", "--force"),
        ("notes.txt", "--resume"),
        ("notes.json", "--resume"),
    ):
        result = run(*FIT, "-o", "other.json", "--log", name, more)
        assert result.exit_code == 2 and name in result.stderr
    assert (here.parent / "rc").read_text() == "precious" and not (here.parent / "new").exists()
    assert Path("notes.txt").read_text() == "precious\n"
    assert run(*FIT, "-o", "other.json", "--log", "steps.jsonl").exit_code == 0
    assert run(*FIT, "-o", "other.json", "--log", "steps.jsonl", "--resume", "--force").exit_code == 0


@pytest.mark.parametrize("name", READ)
def test_no_recipe_is_written_onto_what_is_read(here: Path, name: str) -> None:
    before = tree(here)
    result = run(*FIT, "-o", name, "--force")
    assert result.exit_code == 2 and "this fit reads it" in result.stderr
    assert tree(here) == before


def test_no_report_is_written_onto_its_recipe(here: Path) -> None:
    os.link("recipe.json", "linked.html")
    before = tree(here)
    for name in ("recipe.json", "linked.html"):
        assert run("report", "-o", name, "--force").exit_code == 2
    assert tree(here) == before


def test_a_recipe_a_comparison_or_a_state_that_is_a_fifo_is_one_error_and_no_wait(here: Path, tmp_path: Path) -> None:
    os.mkfifo("pipe")
    for words in (("show", "pipe"), ("export", "pipe"), ("report", "--comparison", "pipe")):
        result = run(*words)
        assert result.exit_code == 3 and "pipe cannot be read: it is not a regular file" in result.stderr, words
    os.mkfifo("loracat-fuse.json")
    assert not _holds_fused_model(here)
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / "state" / "identity.json")
    with pytest.raises(OutputExists, match="in the way"):
        open_state(tmp_path / "state", {}, resume=True)


@pytest.mark.parametrize("way", ["link to the directory", "hard links"])
def test_two_adapters_that_are_one_are_refused(here: Path, way: str) -> None:
    if way == "hard links":
        shutil.copytree("know", "twin", copy_function=os.link)
    else:
        Path("twin").symlink_to("know")
    for words in (
        ["fit", "--adapters", "know", "twin", "--data", "calibration.jsonl", "--base", "base", "-o", "other.json"],
        ["compare", "--adapters", "know", "form", "twin", "--data", "test.jsonl", "--base", "base"],
        ["export", "--method", "uniform", "--adapters", "know", "twin", "-o", "out"],
    ):
        result = run(*words)
        assert result.exit_code == 2 and "know and twin are one adapter" in result.stderr, result.stderr


def test_names_that_a_file_system_takes_for_one_are_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where case does not count: the system says of KNOW that it is know."""
    assert not same_file(Path("KNOW"), Path("know"))
    monkeypatch.setattr(Path, "samefile", lambda self, other: str(self).casefold() == str(Path(other)).casefold())
    assert same_file(Path("KNOW"), Path("know")) and not same_file(Path("know"), Path("form"))
    assert holds(here / "KNOW", here / "know" / "x") and not holds(here / "FORM", here / "know")


def test_shards_whose_names_differ_only_in_case_are_refused(here: Path) -> None:
    shutil.move("base/model.safetensors", "base/a.safetensors")
    shutil.copy("base/a.safetensors", "base/A.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "A.safetensors"}}
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelMismatch, match="differ only in case"):
        shard_names(Path("base"))


def test_a_file_of_the_base_named_like_one_of_ours_stays_behind(here: Path) -> None:
    Path("base/readme.MD").write_text("theirs")
    Path("base/notes.txt").write_text("theirs")
    assert run("fuse", "--base", "base", "-o", "fused").exit_code == 0
    assert sorted(name for name in os.listdir("fused") if name.casefold() in ("readme.md", "notes.txt")) == [
        "README.md",
        "notes.txt",
    ]


def test_an_adapter_that_is_swapped_while_it_is_opened_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, tensors and hashes are of one adapter, or there is none."""
    read = adapter_module.read_config
    shutil.copytree("know", "other")
    config = json.loads(Path("other/adapter_config.json").read_text())
    Path("other/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))

    def swap(path: Path) -> object:
        config = read(path)
        path.parent.rename("aside")
        Path("other").rename("know")
        return config

    monkeypatch.setattr(adapter_module, "read_config", swap)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        open_adapter("./know")


def test_an_adapter_that_is_swapped_after_the_fit_is_refused(here: Path) -> None:
    assert run("inspect", "know", "form").exit_code == 0
    Path("know").rename("aside")
    shutil.copytree("form", "know")
    assert run("export", "-o", "out").exit_code == 7 and not Path("out").exists()
