"""The README's three lines, exactly as written, in an empty folder, against a Hub on 127.0.0.1."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loracli.demo.run import example_folder
from tests.stub_hub import StubHub

LINES = (
    "loracat fetch org/math-lora org/code-lora",
    "loracat fit --adapters org/math-lora org/code-lora --data val.jsonl",
    "loracat export --merge",
)
TOKEN = "hf_9zq4canary"


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with StubHub() as hub:
        for repo_id, folder in (("org/math-lora", "know"), ("org/code-lora", "form"), ("loracat/demo-base", "base")):
            files = {f.name: f.read_bytes() for f in (example_folder() / folder).iterdir() if f.is_file()}
            hub.add(repo_id, files)
        yield hub


def run(line: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "loracli", *line.split()[1:]]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_three_lines_give_one_adapter_that_peft_loads(tmp_path: Path, hub: StubHub) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    data = (example_folder() / "calibration.jsonl").read_text() + (example_folder() / "test.jsonl").read_text()
    (folder / "val.jsonl").write_text(data)
    home = tmp_path / "hf"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": os.getcwd()}
    environment |= {"HF_TOKEN": TOKEN}
    for number, line in enumerate(LINES):
        if number == 2:
            shutil.rmtree(home)
            done = run("loracat fetch recipe.json", folder, environment)  # all that an export needs of the Hub
            assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr
            hub.stop()  # an export needs no Hub, no base model and no data
            (folder / "val.jsonl").unlink()
        done = run(line, folder, environment)
        assert done.returncode == 0, done.stderr
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
    base = AutoModelForCausalLM.from_pretrained(example_folder() / "base", dtype=torch.float32)
    assert PeftModel.from_pretrained(base, folder / "adapter-merged").peft_config["default"].r == 16


def test_the_readme_names_the_three_lines() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert "\n".join(LINES) in readme
