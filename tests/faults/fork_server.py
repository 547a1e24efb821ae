"""Runs `loracat` hundreds of times without paying for its imports each time.

The server is one process that has imported everything and run nothing. For each trial it forks a child, which becomes
the command: own folder, own streams, own limits, the default action for every signal; then `main()` of the command
line, its exit handlers and its streams' last flush. What this leaves out of a real process is the imports at its start
and the deallocation of all modules at its end.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
HUNG = 1000  # in place of an exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that killed it, and what it said."""

    code: int
    stdout: str
    stderr: str


@dataclass
class Started:
    """A command that is running, or was forked `stopped` and waits for SIGCONT."""

    server: ForkServer
    pid: int
    streams: tuple[Path, ...]

    def send(self, signum: int) -> None:
        """The pid stays this child's own until `wait` has returned, even if it has ended."""
        os.kill(self.pid, signum)

    def wait(self, seconds: float = 120.0) -> Ended:
        code = self.server.ask(wait=self.pid, seconds=seconds)["code"]
        stdout, stderr = (path.read_text(errors="replace") for path in self.streams)
        return Ended(code, stdout, stderr)


@dataclass
class ForkServer:
    """The client's side; a context manager.

    Args:
        folder: for the streams of the commands.
        environment: of the server, and so of every command; what libraries read when they are imported is settled.
        inside: a command that runs its arguments, for a server in a mount namespace of its own.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    started: int = 0

    def __enter__(self) -> ForkServer:
        self._server = subprocess.Popen(
            [*self.inside, sys.executable, "-m", "tests.faults.fork_server"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    @property
    def pid(self) -> int:
        return self._server.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(
        self,
        *words: str,
        cwd: Path,
        stopped: bool = False,
        stdout: Path | None = None,
        terminal: Path | None = None,
        limits: Mapping[str, int] | None = None,
        program: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Started:
        """Forks a child that becomes `loracat WORDS`.

        Args:
            words: of the command line.
            cwd: where it runs.
            stopped: it stops itself before it begins, so that a tracer can be attached.
            stdout: where its results go, in place of a file of the server's.
            terminal: where its results and its talk go.
            limits: RLIMIT names to bytes; `AS` counts from what the child has mapped already.
            program: another file of Python to run in the place of `loracat`.
            variables: of its environment, beside the server's.
        """
        self.started += 1
        files = self.folder / f"{self.started}.out", self.folder / f"{self.started}.err"
        for file in files:
            file.touch()  # a child may be killed before it has opened them
        streams = terminal or stdout or files[0], terminal or files[1]
        answer = self.ask(
            words=words,
            cwd=str(cwd),
            stopped=stopped,
            streams=[str(stream) for stream in streams],
            limits=dict(limits or {}),
            program=str(program or "loracat"),
            variables=dict(variables or {}),
        )
        own = (file if stream == file else Path(os.devnull) for file, stream in zip(files, streams, strict=True))
        return Started(self, answer["pid"], tuple(own))

    def run(self, *words: str, cwd: Path, seconds: float = 120.0, **options: Any) -> Ended:
        return self.start(*words, cwd=cwd, **options).wait(seconds)


# The server's side.


def import_everything() -> None:
    """All that a command would import; `import transformers` alone gives little more than names."""
    import typer

    import loracli.cli

    for module in pkgutil.walk_packages(loracli.__path__, "loracli."):
        if module.name != "loracli.__main__":
            importlib.import_module(module.name)
    for name in ("transformers.models.llama.modeling_llama", "transformers.tokenization_utils_fast", "peft"):
        importlib.import_module(name)
    typer.main.get_command(loracli.cli.app)  # imports more, where it is first asked for


def serve() -> dict[str, Any] | None:
    """Answers requests; returns the request in every child that is to become a command, None where there is no more."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": _ended(request["wait"], time.monotonic() + request["seconds"])}
        else:
            child = os.fork()
            if child == 0:
                return request
            answer = {"pid": child}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def _ended(pid: int, deadline: float) -> int:
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(descriptor)


def become(request: Mapping[str, Any]) -> None:
    """Makes this child the process that a shell would have started."""
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    descriptors = (
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) for stream in request["streams"]),
    )
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.argv = [request["program"], *request["words"]]
    os.chdir(request["cwd"])
    os.environ.update(request["variables"])
    for name, size in request["limits"].items():
        used = _mapped() if name == "AS" else 0
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (used + size, used + size))
    if request["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)


def end(command: Callable[[], object]) -> NoReturn:
    """Runs the command and ends the process as the interpreter does, without taking the modules apart."""
    code: object = 1
    try:
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # the interpreter's own
    sys.stderr.flush()
    os._exit(int(code))  # type: ignore[call-overload]


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    import_everything()
    gc.freeze()  # a collection in a child would touch, and so copy, all of it
    own_request = serve()
    if own_request is not None:
        become(own_request)
        from loracli.cli import main

        program = own_request["program"]
        end(main if program == "loracat" else lambda: runpy.run_path(program, run_name="__main__"))
