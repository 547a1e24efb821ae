"""Memory that runs out, at any amount: the command ends with 0 or 6."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.fork_server import ROOT, Ended, ForkServer
from tests.faults.trials import Tally, check_manners, trials, trials_of

MIB = 1 << 20


@trials_of(fit_core=(0, 24), export=(2, 24))
def test_any_amount_of_memory_is_enough_or_told_to_be_too_little(
    request: pytest.FixtureRequest, server: ForkServer, yard: Path, tally: Tally, name: str, count: int
) -> None:
    """From 4 MiB beyond what the libraries have mapped, to 4 GiB; with less, Python itself loses its errors."""
    command: Command = request.getfixturevalue(name)
    golden = command.golden(server, yard / "golden")
    codes = []
    for step in range(count):
        more = round(4 * MIB * 1024 ** (step / max(1, count - 1)))
        folder = command.place(yard / "trial")
        ended = server.run(*command.words, cwd=folder, limits={"AS": more})
        codes.append(ended.code)
        check_manners(ended, {0, 6})
        command.check_whole(folder, golden)
        command.repeat(server, folder, golden)
        tally.add(f"memory, {command.name}", ended.code)
    assert codes[0] == 6 and codes[-1] == 0


@trials(0, 8)
def test_a_whole_process_with_little_memory_ends_with_0_or_6(
    yard: Path, recipe: Path, tally: Tally, count: int
) -> None:
    for step in range(count):
        limit = round((1 + 5 * step / max(1, count - 1)) * 1024) * MIB

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        done = subprocess.run(
            [sys.executable, "-m", "loracli", "export", str(recipe / "recipe.json"), "-o", str(yard / f"as-{step}")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            preexec_fn=limited,
        )
        tally.add("memory of a whole process, 1 to 6 GiB", done.returncode)
        check_manners(Ended(done.returncode, done.stdout, done.stderr), {0, 6})
