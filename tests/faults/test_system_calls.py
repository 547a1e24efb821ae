"""The writers killed at every system call that changes the disk, and every call failing in turn, once and for good."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.fork_server import ForkServer
from tests.faults.strace import CHANGES, STRACE, Call, calls, injection, traced
from tests.faults.trials import Tally, check_manners, trials_of

pytestmark = pytest.mark.skipif(
    STRACE is None and os.environ.get("LORACAT_STRACE") != "required",
    reason="no strace here; `make faults` installs it",
)

EVERY = 1000  # more than there are; a fit has hundreds, most of them of its state, over and over


def drawn(points: Sequence[Call], count: int, seed: str) -> list[Call]:
    """So many of the points, in their order; all if there are no more."""
    chosen = random.Random(seed).sample(range(len(points)), min(count, len(points)))
    return [points[index] for index in sorted(chosen)]


@trials_of(fetch_one=(1, EVERY), fit_core=(1, 60), export=(0, EVERY), export_force=(2, EVERY))
def test_a_command_killed_at_a_system_call_can_be_repeated(
    request: pytest.FixtureRequest, server: ForkServer, yard: Path, tally: Tally, name: str, count: int
) -> None:
    command: Command = request.getfixturevalue(name)
    golden = command.golden(server, yard / "golden")
    points = [call for call in calls(server, command.words, command.place(yard / "trial"), yard) if call.changes]
    assert len(points) >= 8
    hit = 0
    for call in drawn(points, count, name):
        folder = command.place(yard / "trial")
        ended, _ = traced(server, command.words, folder, *injection(call, "signal=KILL"))
        hit += ended.code == -signal.SIGKILL
        command.check_whole(folder, golden)
        command.repeat(server, folder, golden)
        outcome = "killed" if ended.code == -signal.SIGKILL else ended.code
        tally.add(f"kill -9 at a system call, {command.name}", outcome)
    assert hit >= 0.8 * min(count, len(points))  # a few calls come in another number each time


@trials_of(fetch_one=(0, EVERY), fit_core=(0, 24), export=(0, EVERY), export_force=(1, EVERY))
@pytest.mark.parametrize("onwards", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_system_call_that_fails_is_told_and_leaves_no_torn_output(
    request: pytest.FixtureRequest,
    server: ForkServer,
    yard: Path,
    tally: Tally,
    name: str,
    error: str,
    onwards: bool,
    count: int,
) -> None:
    command: Command = request.getfixturevalue(name)
    golden = command.golden(server, yard / "golden")
    found = calls(server, command.words, command.place(yard / "trial"), yard)
    points = [call for call in found if _can_fail(call, error, onwards)]
    for call in drawn(points, count, f"{name} {error} {onwards}"):
        folder = command.place(yard / "trial")
        ended, log = traced(server, command.words, folder, *injection(call, f"error={error}", onwards=onwards))
        try:
            check_manners(ended, silent=onwards and call.name == "write")  # its own streams fail too
            command.check_whole(folder, golden)
            if ended.code == 0:
                command.check_done(folder, golden, unremovable=onwards)
            command.repeat(server, folder, golden)
        except AssertionError as problem:
            problem.add_note(f"{error} at {call}")
            raise
        how = "from there on" if onwards else "once"
        tally.add(f"{error} {how}, {command.name}", ended.code if "INJECTED" in log else "not met")


def _can_fail(call: Call, error: str, onwards: bool) -> bool:
    """What is only looked at needs no space; and a disk that can never be read again has no Python either."""
    if call.name == "newfstatat":  # whose failure is absence
        return False
    return call.name in CHANGES if onwards else call.changes or error == "EIO"
