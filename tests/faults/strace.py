"""Faults at system calls, by strace's injection: the N-th call of a name fails, or the process dies there.

Only the main thread is traced; it is the one that writes.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.fork_server import Ended, ForkServer

STRACE = shutil.which("strace")

CHANGES = (
    *("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "rename", "renameat", "renameat2", "mkdir", "rmdir"),
    *("unlink", "unlinkat", "link", "linkat", "symlink", "symlinkat", "chmod", "fchmod", "flock"),
)
LOOKS = ("openat", "read", "pread64", "preadv", "newfstatat", "getdents64")
_CALL = re.compile(r"^(\w+)\((.*)")


@dataclass(frozen=True)
class Call:
    """The N-th call of a name in one command, and how strace shows it."""

    name: str
    number: int
    text: str

    @property
    def changes(self) -> bool:
        """Whether it changes what is on the disk."""
        return self.name in CHANGES or "O_CREAT" in self.text


def traced(
    server: ForkServer, words: tuple[str, ...], folder: Path, *options: str, seconds: float = 120.0, **more: Any
) -> tuple[Ended, str]:
    """A command that strace has been attached to before its first call, and strace's log."""
    assert STRACE is not None
    started = server.start(*words, cwd=folder, stopped=True, **more)
    while Path(f"/proc/{started.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        time.sleep(0.002)
    log = server.folder / "strace.log"
    tracer = subprocess.Popen(
        [STRACE, "-y", "-s", "0", "-o", str(log), "-p", str(started.pid), *options], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    attached = tracer.stderr.readline()
    assert "attached" in attached, attached
    started.send(signal.SIGCONT)
    ended = started.wait(seconds)
    tracer.communicate(timeout=30)
    return ended, log.read_text(errors="replace")


def calls(server: ForkServer, words: tuple[str, ...], folder: Path, yard: Path) -> list[Call]:
    """The calls of an undisturbed command that change the disk, or look at a file in the yard; not its own streams."""
    names = ",".join((*CHANGES, *LOOKS))
    ended, log = traced(server, words, folder, "-e", f"trace={names}")
    assert ended.code == 0, ended
    counts: dict[str, int] = {}
    found = []
    for line in log.splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        name, text = match.groups()
        counts[name] = counts.get(name, 0) + 1
        call = Call(name, counts[name], text)
        if str(server.folder) not in text and (call.changes or str(yard) in _path(text)):
            found.append(call)
    return found


def _path(text: str) -> str:
    """What a call is about: a quoted path that is absolute, or else all that strace shows of the folder it is in."""
    absolute = re.search(r'"(/[^"]*)"', text)
    return text if absolute is None else absolute[1]


def injection(call: Call, fault: str, *, onwards: bool = False) -> tuple[str, ...]:
    """Options of strace for a fault, `signal=KILL` or `error=EIO`, at a call, or from there on."""
    return ("-e", f"trace={call.name}", "-e", f"inject={call.name}:{fault}:when={call.number}{'+' if onwards else ''}")
