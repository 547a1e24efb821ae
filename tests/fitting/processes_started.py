"""Starts several processes: under torchrun, which ends all when one fails, or by themselves; started anew, or from a
server that has imported everything, which is ten times as quick."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.faults.fork_server import Ended, ForkServer, Started

ROOT = Path(__file__).parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(count: int, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a module with its arguments under torchrun, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--master-port", free_port(), "-m", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=180)


def launched(count: int) -> list[dict[str, str]]:
    """What a launcher tells each of so many processes; nothing to one by itself."""
    if count == 1:
        return [{}]
    every = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def fork_all(
    server: ForkServer, count: int, *words: str, cwd: Path = ROOT, program: str | None = None
) -> list[Started]:
    """So many processes of `loracat WORDS`, or of a program beside this file, as a launcher starts them."""
    file = None if program is None else Path(__file__).with_name(program + ".py")
    return [server.start(*words, cwd=cwd, program=file, variables=each) for each in launched(count)]


def forked(server: ForkServer, count: int, *words: str, cwd: Path = ROOT, program: str | None = None) -> list[Ended]:
    """They at their end."""
    return [process.wait() for process in fork_all(server, count, *words, cwd=cwd, program=program)]


def start_all(count: int, *words: str, program: str) -> list[Ended]:
    """A program beside this file by so many processes started anew, without what they write to stdout."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.fitting.{program}", *words],
            cwd=ROOT,
            env=environment(**each),
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in launched(count)
    ]
    talk = [process.communicate(timeout=60)[1] for process in started]
    return [Ended(process.returncode, "", text) for process, text in zip(started, talk, strict=True)]
