"""The README's three lines, exactly as written, in an empty folder, against a Hub on 127.0.0.1."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.cli.project import shortened_example
from tests.faults.fork_server import Ended, ForkServer
from tests.stub_hub import StubHub

LINES = (
    "loracat fetch org/math-lora org/code-lora",
    "loracat fit --adapters org/math-lora org/code-lora --data val.jsonl",
    "loracat export --merge",
)
TOKEN = "hf_9zq4canary"


@pytest.fixture
def example(tmp_path: Path) -> Path:
    return shortened_example(tmp_path / "example", layers=1)


@pytest.fixture
def hub(example: Path) -> Iterator[StubHub]:
    with StubHub() as hub:
        for repo_id, folder in (("org/math-lora", "know"), ("org/code-lora", "form"), ("loracat/demo-base", "base")):
            files = {f.name: f.read_bytes() for f in (example / folder).iterdir() if f.is_file()}
            hub.add(repo_id, files)
        yield hub


@pytest.fixture
def server(tmp_path: Path, hub: StubHub) -> Iterator[ForkServer]:
    """Each line is a process of its own; what it imports is there already."""
    if sys.platform != "linux":
        pytest.skip("the server watches its processes as Linux has them")
    (tmp_path / "streams").mkdir()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    with ForkServer(tmp_path / "streams", environment) as running:
        yield running


def test_the_three_lines_give_one_adapter_that_peft_loads(
    tmp_path: Path, example: Path, hub: StubHub, server: ForkServer
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    records = (example / "calibration.jsonl").read_text().splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(records[:20]))

    def run(line: str) -> Ended:
        return server.run(*line.split()[1:], cwd=folder)

    for number, line in enumerate(LINES):
        if number == 2:
            shutil.rmtree(tmp_path / "hf")
            done = run("loracat fetch recipe.json")  # all that an export needs of the Hub
            assert done.code == 0 and TOKEN not in done.stdout + done.stderr
            hub.stop()  # an export needs no Hub, no base model and no data
            (folder / "val.jsonl").unlink()
        done = run(line)
        assert done.code == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        if number == 1:
            assert f"Bearer {TOKEN}" in hub.tokens
            assert re.findall(r"^next: (.*)$", done.stderr, flags=re.MULTILINE) == [LINES[2]]
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter-merged",
        "recipe.json",
        "recipe.json.activations.safetensors",
    ]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    base = AutoModelForCausalLM.from_pretrained(example / "base", dtype=torch.float32)
    assert PeftModel.from_pretrained(base, folder / "adapter-merged").peft_config["default"].r == 16


def test_the_readme_names_the_three_lines() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert "\n".join(LINES) in readme
