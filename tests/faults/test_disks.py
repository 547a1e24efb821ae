"""Disks that are full: a small file system, a limit on the size of files, a device that takes nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.conftest import server_environment
from tests.faults.fork_server import ForkServer
from tests.faults.trials import Tally, check_manners, trials_of
from tests.stub_hub import StubHub

LARGE = 64 << 20
CODES = {0, 6}


@dataclass(frozen=True)
class Disk:
    """A file system of a size that can be changed, in a namespace of its server's own.

    Args:
        server: whose commands see it.
        inner: its folder, as they do.
    """

    server: ForkServer
    inner: Path

    @property
    def outer(self) -> Path:
        """Its folder, as this process sees it."""
        return Path(f"/proc/{self.server.pid}/root{self.inner}")

    def resize(self, size: int) -> None:
        user = [] if os.getuid() == 0 else ["-U", "--preserve-credentials"]
        enter = ["nsenter", "-t", str(self.server.pid), *user, "-m"]
        subprocess.run([*enter, "mount", "-o", f"remount,size={size}", str(self.inner)], check=True)

    def used(self) -> int:
        status = os.statvfs(self.outer)
        return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.fixture(scope="module")
def disk(yard: Path, hub: StubHub) -> Iterator[Disk]:
    inner = yard / "disk"
    inner.mkdir()
    (yard / "disk-streams").mkdir()
    namespace = "-m" if os.getuid() == 0 else "-Urm"
    script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
    inside = ("unshare", namespace, "sh", "-c", script, "sh", str(LARGE), str(inner))
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces here")
    with ForkServer(yard / "disk-streams", server_environment(yard, hub), inside) as server:
        disk = Disk(server, inner)
        server.run("--version", cwd=yard)  # when it answers, the disk is there
        (disk.outer / "project").symlink_to(yard / "project")
        yield disk


@trials_of(fetch=(0, 12), fit_core=(0, 6), export=(0, 12), export_force=(0, 12))
def test_a_full_disk_ends_a_command_with_6_and_more_room_lets_it_end(
    request: pytest.FixtureRequest, disk: Disk, yard: Path, tally: Tally, name: str, count: int
) -> None:
    command: Command = request.getfixturevalue(name)
    disk.resize(LARGE)
    shutil.rmtree(disk.outer / "golden", ignore_errors=True)
    before = disk.used()
    golden = command.golden(disk.server, disk.inner / "golden", seen=disk.outer / "golden")
    needed = disk.used() - before
    shutil.rmtree(disk.outer / "golden")
    generator, codes = random.Random(name), set()
    for _ in range(count):
        command.place(disk.outer / "trial")
        disk.resize(disk.used() + generator.randrange(4096, needed + 4096))
        ended = disk.server.run(*command.words, cwd=disk.inner / "trial")
        codes.add(ended.code)
        check_manners(ended, CODES)
        command.check_whole(disk.outer / "trial", golden)
        disk.resize(LARGE)
        command.repeat(disk.server, disk.inner / "trial", golden, seen=disk.outer / "trial")
        tally.add(f"full disk, {command.name}", ended.code)
    assert 6 in codes


@trials_of(fetch=(0, 6), fit_core=(0, 6), export=(0, 12), export_force=(1, 12))
def test_a_limit_on_the_size_of_files_ends_a_command_with_6(
    request: pytest.FixtureRequest, server: ForkServer, yard: Path, tally: Tally, name: str, count: int
) -> None:
    command: Command = request.getfixturevalue(name)
    golden = command.golden(server, yard / "golden")
    largest = max(len(data) for data in golden.values() if data is not None)
    generator = random.Random(name)
    for _ in range(count):
        folder = command.place(yard / "trial")
        limit = generator.randrange(2048, largest)
        ended = server.run(*command.words, cwd=folder, limits={"FSIZE": limit})
        check_manners(ended, {6})
        command.check_whole(folder, golden)
        command.repeat(server, folder, golden)
        tally.add(f"limit on the size of files, {command.name}", ended.code)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [("inspect", "first"), ("inspect", "first", "--json"), ("env",)])
def test_results_that_cannot_be_written_are_told(server: ForkServer, yard: Path, words: tuple[str, ...]) -> None:
    ended = server.run(*words, cwd=yard / "project", stdout=Path("/dev/full"))
    check_manners(ended, {6})
    assert ended.stderr.splitlines()[-2] == "error: standard output: no space left to write"
