"""Ctrl-C, SIGTERM, SIGHUP and a reader that goes away: the documented code, one word, nothing torn, nothing left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.fork_server import ROOT, ForkServer
from tests.faults.trials import Tally, check_manners, tree, trials, trials_of

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@trials_of(fetch=(0, 12), fit_core=(0, 10), export_force=(1, 20))
@pytest.mark.parametrize("signum", CODES, ids=lambda signum: signum.name)
def test_a_stopped_command_says_so_and_can_be_repeated(
    request: pytest.FixtureRequest,
    server: ForkServer,
    yard: Path,
    tally: Tally,
    name: str,
    signum: signal.Signals,
    count: int,
) -> None:
    command: Command = request.getfixturevalue(name)
    began = time.monotonic()
    golden = command.golden(server, yard / "golden")
    whole = time.monotonic() - began
    generator = random.Random(f"{name} {signum}")
    for _ in range(count):
        folder = command.place(yard / "trial")
        started = server.start(*command.words, cwd=folder)
        time.sleep(generator.uniform(0.05 * whole, whole))  # at first it is no command yet
        started.send(signum)
        ended = started.wait()
        check_manners(ended, {0, CODES[signum], -signum})  # the last after its last step
        command.check_whole(folder, golden)
        assert not list(folder.glob(".*")) or command.grows, "a stopped command cleans up"
        command.repeat(server, folder, golden)
        tally.add(f"{signum.name}, {command.name}", ended.code)


@trials(0, 12)
@pytest.mark.parametrize("signum", CODES, ids=lambda signum: signum.name)
def test_a_command_stopped_while_python_starts_leaves_nothing(
    yard: Path, recipe: Path, tally: Tally, signum: signal.Signals, count: int
) -> None:
    """Real processes; before our first line runs, how it ends is Python's to say."""
    generator = random.Random(signum)

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir()
        return subprocess.Popen(
            [sys.executable, "-m", "loracli", "export", str(recipe / "recipe.json"), "-o", "out"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(yard / f"undisturbed {signum.name}").wait(120) == 0
    golden = tree(yard / f"undisturbed {signum.name}")
    for _ in range(count):
        folder = yard / "starting"
        process = start(folder)
        time.sleep(generator.uniform(0.0, 3.0))
        process.send_signal(signum)
        code = process.wait(120)
        assert code in (0, 1, CODES[signum], -signum)
        left = tree(folder)
        assert left == golden or (left == {} and code != 0), "it is done, or nothing is there"
        shutil.rmtree(folder)
        tally.add(f"{signum.name} while Python starts", code)


@pytest.mark.parametrize("words", [("inspect", "first"), ("inspect", "first", "--json"), ("env",), ("fit", "--help")])
def test_a_reader_that_goes_away_ends_the_command_quietly(
    server: ForkServer, yard: Path, words: tuple[str, ...]
) -> None:
    pipe = yard / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    started = server.start(*words, cwd=yard / "project", stdout=pipe, stopped=True)
    while Path(f"/proc/{started.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        time.sleep(0.002)
    os.close(reader)
    started.send(signal.SIGCONT)
    ended = started.wait()
    assert (ended.code, ended.stderr) == (1, "")
