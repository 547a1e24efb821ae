"""kill -9 at random moments: whoever runs the command again gets the bytes of an undisturbed run, and no leftovers."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.fork_server import ForkServer
from tests.faults.trials import Tally, check_manners, trials_of

CODE = -signal.SIGKILL


@trials_of(fetch=(1, 100), fit=(0, 40), fit_core=(1, 40), export=(0, 100), export_force=(2, 100))
def test_a_command_killed_at_a_random_moment_can_be_repeated(
    request: pytest.FixtureRequest, server: ForkServer, yard: Path, tally: Tally, name: str, count: int
) -> None:
    command: Command = request.getfixturevalue(name)
    began = time.monotonic()
    golden = command.golden(server, yard / "golden")
    whole = time.monotonic() - began
    generator = random.Random(name)
    for _ in range(count):
        folder = command.place(yard / "trial")
        started = server.start(*command.words, cwd=folder)
        time.sleep(generator.uniform(0, whole))
        started.send(signal.SIGKILL)
        ended = started.wait()
        if ended.code != CODE:  # it was quicker
            check_manners(ended, {0})
        command.repeat(server, folder, golden)
        tally.add(f"kill -9, {command.name}", "killed" if ended.code == CODE else ended.code)
