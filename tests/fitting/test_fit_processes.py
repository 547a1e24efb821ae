"""`loracat fit` by several processes, as torchrun starts them: the same bytes, one voice, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loracli.recipe.recipe import load_recipe
from tests.fitting.processes_started import environment, free_port
from tests.tiny import random_records, write_jsonl


class Started:
    """A small fit, by any number of processes."""

    def __init__(self, folder: Path, base: Path, adapters: tuple[Path, Path]) -> None:
        self.folder = folder
        data = write_jsonl(folder / "val.jsonl", random_records(50))
        self._fit = ["-m", "loracli", "fit", "-a", *map(str, adapters), "-d", str(data), "--base", str(base)]
        self._fit += ["--dtype", "float32", "--device", "cpu", "--batch-tokens", "64"]

    def command(self, count: int, *options: str) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", free_port()]
        return [sys.executable, *(launcher if count > 1 else []), *self._fit, *options]

    def run(self, count: int, *options: str) -> subprocess.CompletedProcess[str]:
        command = self.command(count, *options)
        return subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=180)


@pytest.fixture
def started(tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]) -> Started:
    return Started(tmp_path, tiny_base, two_adapters)


def test_one_two_and_four_processes_write_the_same_bytes(started: Started) -> None:
    """Of every rung up to core, with two folds; the first process alone prints."""
    options = ("--mixing", "core", "--cv", "2", "--passes", "3", "--json")
    documents: list[Any] = []
    for count in (1, 2, 4):
        done = started.run(count, *options, "-o", f"{count}/recipe.json")
        assert done.returncode == 0, done.stderr
        documents.append({**json.loads(done.stdout), "recipe": None, "beside": None})
        assert done.stderr.count("training records") == 1
    assert documents[0] == documents[1] == documents[2]
    for count in (2, 4):
        for name in ("recipe.json", "recipe.safetensors", "recipe.json.activations.safetensors"):
            one, other = (started.folder / str(n) / name for n in (1, count))
            assert one.read_bytes() == other.read_bytes()


def test_a_base_in_shards_gives_the_same_weights_to_rounding(started: Started) -> None:
    for count, options in ((1, ()), (2, ("--shard",))):
        done = started.run(count, *options, "--passes", "2", "-o", f"{count}.json")
        assert done.returncode == 0, done.stderr
    whole, shards = (load_recipe(started.folder / f"{count}.json") for count in (1, 2))
    for group, weights in whole.mixing.weights.items():
        pairs = zip(shards.mixing.weights[group], weights, strict=True)
        assert all(a == b or a == pytest.approx(b, abs=2e-3) for a, b in pairs)
    for row, other in zip(whole.held_out.rows, shards.held_out.rows, strict=True):
        assert row.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-3)


def test_a_rejected_input_is_said_once_and_ends_all_with_its_code(started: Started) -> None:
    done = started.run(2, "-d", "nope.jsonl")
    assert done.stderr.count("error: ") == 1 and "nope.jsonl cannot be read" in done.stderr
    assert "exitcode: 3" in done.stderr.replace(" ", "").replace("exitcode:3", "exitcode: 3")
    assert not (started.folder / "recipe.json").exists()


def test_a_process_that_dies_ends_all_and_the_state_is_resumed_by_another_number(started: Started) -> None:
    """By three of them, which do not divide the work evenly."""
    assert started.run(1, "-o", "whole.json", "--passes", "6").returncode == 0
    port = free_port()
    processes = [
        subprocess.Popen(
            started.command(1, "-o", "recipe.json", "--passes", "6"),
            cwd=started.folder,
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in (0, 1)
    ]
    while len(list(started.folder.glob("recipe.json.state/*.safetensors"))) < 5 and processes[0].poll() is None:
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert processes[0].wait(60) == 1
    processes[1].wait()
    assert started.run(3, "-o", "recipe.json", "--passes", "6", "--resume").returncode == 0
    assert (started.folder / "recipe.json").read_bytes() == (started.folder / "whole.json").read_bytes()


def test_standard_input_and_other_commands_are_for_one_process(started: Started) -> None:
    done = started.run(2, "-d", "-")
    assert "standard input reaches one process only" in done.stderr
    command = [sys.executable, "-m", "loracli", "show"]
    shown = subprocess.run(
        command, cwd=started.folder, env=environment(RANK="0", WORLD_SIZE="2"), capture_output=True, text=True
    )
    assert shown.returncode == 2 and "MASTER_ADDR" in shown.stderr
