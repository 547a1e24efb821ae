"""Starts real processes, with and without a launcher that ends all when one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(count: int, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the module under torchrun, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--master-port", free_port(), "-m", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90)


def start_all(count: int, program: str, *arguments: str) -> tuple[list[int], list[str]]:
    """Exit codes and stderr of each process, started without a launcher."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", program, *arguments],
            cwd=ROOT,
            env=environment(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    talk = [process.communicate(timeout=60)[1] for process in started]
    return [process.returncode for process in started], talk
