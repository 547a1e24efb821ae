"""What the machine does becomes an error of ours with the right code; a bug stays one."""

from __future__ import annotations

import builtins
import errno
import signal
from typing import Any

import pytest

from loracli import cli
from loracli.__main__ import main
from loracli.errors import LoracatError, OutOfResources
from loracli.system.machine import machine_error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GiB, other allocations: 1.20 GiB)"),
        RuntimeError("Invalid buffer size: 16.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large", "out"),
    ],
    ids=str,
)
def test_what_runs_out_is_out_of_resources(error: Exception) -> None:
    assert type(machine_error(error)) is OutOfResources


def test_another_failure_of_the_system_is_named_with_its_file() -> None:
    ours = machine_error(PermissionError(errno.EACCES, "Permission denied", "data/x"))
    assert type(ours) is LoracatError and str(ours) == "data/x: Permission denied"


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ImportError("No module named x"), OSError("no number")], ids=str
)
def test_a_bug_is_none_of_the_machines(error: Exception) -> None:
    assert machine_error(error) is None


def test_ctrl_c_while_the_commands_are_imported_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = builtins.__import__

    def interrupted(name: str, *rest: Any, **options: Any) -> Any:
        if name == "loracli.cli":
            raise KeyboardInterrupt
        return inner(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup has it; and after the command nothing of ours handles a signal."""
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(signum) for signum in signals]
    monkeypatch.setattr("sys.argv", ["loracat", "--version"])
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with pytest.raises(SystemExit):
            cli.main()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)
