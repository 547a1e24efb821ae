"""Running `loracat` as a process of its own: behind pipes, or on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = str(Path(__file__).parents[2])
COMMAND = [sys.executable, "-m", "loracli"]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process: this one's, with these variables."""
    return os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | variables


def piped(*words: str, cwd: Path, variables: dict[str, str] | None = None, **options: Any) -> Any:
    """The finished process, with what it wrote as text."""
    return subprocess.run(
        [*COMMAND, *words],
        cwd=cwd,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@contextmanager
def own_terminal(patch: pytest.MonkeyPatch, width: int) -> Iterator[list[str]]:
    """Makes both streams of this process a terminal of that width; what it was sent is in the list at the end."""
    ours, theirs = pty.openpty()
    sent: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other side is closed
            while part := os.read(ours, 1 << 16):
                sent.append(part)

    reader, said = threading.Thread(target=read), list[str]()
    reader.start()
    stream = os.fdopen(theirs, "w")
    with patch.context() as patched:
        for name, value in (("COLUMNS", str(width)), ("TERM", "xterm"), ("NO_COLOR", "1")):
            patched.setenv(name, value)
        patched.setattr("sys.stdout", stream)
        patched.setattr("sys.stderr", stream)
        try:
            yield said
        finally:
            stream.close()
            reader.join()
            os.close(ours)
            said.append(b"".join(sent).decode())


def on_terminal(*words: str, cwd: Path, width: int = 80, variables: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and everything that a terminal of that width was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    with subprocess.Popen(
        [*COMMAND, *words],
        cwd=cwd,
        env=environment(**({"TERM": "xterm-256color"} | (variables or {}))),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            sent += part
    os.close(ours)
    return process.returncode, sent.decode().replace("\r\n", "\n")
