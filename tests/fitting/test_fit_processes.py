"""`loracat fit` by several processes, as torchrun starts them: the same bytes, one voice, and one end for all."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loracli.recipe.recipe import load_recipe
from tests.faults.fork_server import Ended, ForkServer, Started
from tests.fitting.processes_started import fork_all, torchrun
from tests.tiny import random_records, write_jsonl


class SmallFit:
    """A small fit, by any number of processes."""

    def __init__(self, server: ForkServer, folder: Path, base: Path, adapters: tuple[Path, Path]) -> None:
        self.server, self.folder = server, folder
        data = write_jsonl(folder / "val.jsonl", random_records(30))
        self.words = ["fit", "-a", *map(str, adapters), "-d", str(data), "--base", str(base)]
        self.words += ["--dtype", "float32", "--device", "cpu", "--batch-tokens", "64", "--holdout", "0.2"]

    def start(self, count: int, *options: str) -> list[Started]:
        return fork_all(self.server, count, *self.words, *options, cwd=self.folder)

    def run(self, count: int, *options: str, code: int = 0) -> Ended:
        """What the processes have said together, once all have ended with this code."""
        done = [process.wait() for process in self.start(count, *options)]
        assert [process.code for process in done] == [code] * count, done
        return Ended(code, "".join(process.stdout for process in done), "".join(process.stderr for process in done))


@pytest.fixture
def small(server: ForkServer, tmp_path: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]) -> SmallFit:
    return SmallFit(server, tmp_path, shallow_base, two_shallow_adapters)


def test_two_processes_cross_fit_to_the_bytes_of_one(small: SmallFit) -> None:
    place = small.words.index("--holdout")
    del small.words[place : place + 2]
    for count in (1, 2):
        small.run(count, "--mixing", "adapter", "--passes", "2", "-o", f"{count}/recipe.json")
    one, two = ((small.folder / str(count) / "recipe.json").read_bytes() for count in (1, 2))
    assert one == two and json.loads(one)["held_out"]["parts"] == 4


def test_one_two_and_four_processes_write_the_same_bytes(small: SmallFit) -> None:
    """Of every kind of mixing up to core, with two folds; the first process alone prints. Two are under torchrun."""
    options = ("--mixing", "core", "--cv", "2", "--passes", "2", "--json")
    documents: list[Any] = []
    for count in (1, 2, 4):
        out = f"{count}/recipe.json"
        if count == 2:
            under = torchrun(count, "loracli", *small.words, *options, "-o", out, cwd=small.folder)
            done = Ended(under.returncode, under.stdout, under.stderr)
        else:
            done = small.run(count, *options, "-o", out)
        assert done.code == 0, done.stderr
        documents.append({**json.loads(done.stdout), "recipe": None, "beside": None})
        assert done.stderr.count("training records") == 1
    assert documents[0] == documents[1] == documents[2]
    for count in (2, 4):
        for name in ("recipe.json", "recipe.safetensors", "recipe.json.activations.safetensors"):
            one, other = (small.folder / str(n) / name for n in (1, count))
            assert one.read_bytes() == other.read_bytes()


def test_a_base_in_shards_gives_the_same_weights_to_rounding(
    server: ForkServer, tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    small = SmallFit(server, tmp_path, tiny_base, two_adapters)
    for count, options in ((1, ()), (2, ("--shard",))):
        small.run(count, *options, "--passes", "2", "-o", f"{count}.json")
    whole, shards = (load_recipe(small.folder / f"{count}.json") for count in (1, 2))
    for group, weights in whole.mixing.weights.items():
        pairs = zip(shards.mixing.weights[group], weights, strict=True)
        assert all(a == b or a == pytest.approx(b, abs=2e-3) for a, b in pairs)
    for row, other in zip(whole.held_out.rows, shards.held_out.rows, strict=True):
        assert row.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-3)


def test_a_rejected_input_is_said_once_and_ends_all_with_its_code(small: SmallFit) -> None:
    done = small.run(2, "-d", "nope.jsonl", code=3)
    assert done.stderr.count("error: ") == 1 and "nope.jsonl cannot be read" in done.stderr
    assert not (small.folder / "recipe.json").exists()


def test_a_process_that_dies_ends_all_and_the_state_is_resumed_by_another_number(small: SmallFit) -> None:
    """By three of them, which do not divide the work evenly."""
    small.run(1, "-o", "whole.json", "--passes", "2")
    first, second = small.start(2, "-o", "recipe.json", "--passes", "2")
    state = small.folder / "recipe.json.state"
    while len(list(state.glob("*.safetensors"))) < 5 and not (small.folder / "recipe.json").exists():
        time.sleep(0.01)
    second.send(signal.SIGKILL)
    assert (first.wait().code, second.wait().code) == (1, -signal.SIGKILL)
    small.run(3, "-o", "recipe.json", "--passes", "2", "--resume")
    assert (small.folder / "recipe.json").read_bytes() == (small.folder / "whole.json").read_bytes()


def test_standard_input_and_other_commands_are_for_one_process(small: SmallFit) -> None:
    assert "standard input reaches one process only" in small.run(2, "-d", "-", code=2).stderr
    alone = small.server.run("show", cwd=small.folder, variables={"RANK": "0", "WORLD_SIZE": "2"})
    assert alone.code == 2 and "MASTER_ADDR" in alone.stderr
