"""The same command in other surroundings writes the same bytes: seed of Python's hashes, locale, time zone, folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.commands import Command
from tests.faults.fork_server import ROOT, ForkServer
from tests.faults.trials import Tally, tree, trials

LOCALES = ("C", "C.UTF-8", "tr_TR.UTF-8")
ZONES = ("UTC", "Asia/Kathmandu", "America/St_Johns")


@trials(0, 5)
def test_a_fit_and_its_export_are_the_same_bytes_everywhere(
    server: ForkServer, yard: Path, tally: Tally, fit_core: Command, count: int
) -> None:
    place = yard / "golden"
    fit_core.golden(server, place)
    assert server.run("export", cwd=place).code == 0
    golden = tree(place)
    for seed in range(count):
        folder = yard / f"elsewhere-{seed}"
        folder.mkdir()
        surroundings = {
            "PYTHONHASHSEED": str(seed),
            "LC_ALL": LOCALES[seed % len(LOCALES)],
            "TZ": ZONES[seed % len(ZONES)],
            "COLUMNS": str(40 + seed),
        }
        for words in (fit_core.words, ("export",)):
            subprocess.run(
                [sys.executable, "-m", "loracli", *words],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **surroundings},
                check=True,
                capture_output=True,
            )
        assert tree(folder) == golden
        tally.add("other surroundings", 0)
