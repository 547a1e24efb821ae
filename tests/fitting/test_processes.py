"""Several real processes: sums with the same bits for any number of them, and errors that end them all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

from loracli.errors import ProcessLost, UsageError
from loracli.fitting.processes import ALONE, connect, process_device
from loracli.system.machine import Launch, read_launch
from tests.faults.fork_server import ForkServer
from tests.fitting.process_program import ITEMS, fold, work
from tests.fitting.processes_started import ROOT, environment, forked, free_port, start_all, torchrun

PROGRAM = "process_program"


def test_sums_have_the_same_bits_for_one_two_and_four_processes(server: ForkServer) -> None:
    """7 items are uneven for 2 and 4; another order of addition gives other bits, so the plan's order was kept."""
    total = torch.zeros(50, dtype=torch.float64)
    for item in ITEMS:
        total += work(item)
    backwards = torch.zeros(50, dtype=torch.float64)
    for item in reversed(ITEMS):
        backwards += work(item)
    assert not torch.equal(total, backwards)
    assert torch.equal(fold(ALONE, work), total)
    for count, turns in ((2, [4, 4]), (4, [2, 2, 2, 2])):
        done = forked(server, count, "sums", program=PROGRAM)
        assert [process.code for process in done] == [0] * count, done
        result = json.loads("".join(process.stdout for process in done))  # one document: the first alone has printed
        assert result["fold"] == result["lockstep"] == [x.hex() for x in total.tolist()]
        assert result["in_order"] == [[item, [float(item)] * (item % 3)] for item in ITEMS]
        assert result["turns"] == turns  # in lockstep every process works in every round


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("in_the_plan", 1, "error: NonFiniteLoss: the loss is not finite (leave it out)"),
        ("elsewhere", 3, "error: CalibrationError: 2 lines are rejected [a:1: bad] [a:2: worse] (mend them)"),
        ("at_the_end", 1, "error: NonFiniteLoss: too late (None)"),
    ],
)
def test_an_error_on_one_process_ends_all_with_its_code_and_one_message(
    server: ForkServer, what: str, code: int, message: str
) -> None:
    first, second = forked(server, 2, what, program=PROGRAM)
    assert (first.code, second.code) == (code, code), (first, second)
    assert first.stderr.strip() == message
    assert second.stderr.strip() == ""


def test_a_bug_keeps_its_traceback_where_it_is_and_ends_the_others(server: ForkServer) -> None:
    first, second = forked(server, 2, "bug", program=PROGRAM)
    assert (first.code, second.code) == (1, 1)
    assert first.stderr.strip() == "error: FitError: process 1 failed: TypeError: a bug (None)"
    assert "Traceback" in second.stderr and "TypeError: a bug" in second.stderr


@pytest.mark.parametrize("what", ["unheard", "stuck"])
def test_an_error_that_nobody_hears_of_is_printed_by_its_own_process(server: ForkServer, what: str) -> None:
    """Because the first process is busy for long, or waits for the other in a forward that all take part in; there the
    end of the interpreter, which takes the group apart, is to end as well."""
    first, second = (
        forked(server, 2, what, program=PROGRAM) if what == "unheard" else start_all(2, what, program=PROGRAM)
    )
    assert (first.code, second.code) == (1, 1)
    assert second.stderr.strip() == "error: NonFiniteLoss: nobody hears this (None)"
    assert first.stderr.startswith("error: ProcessLost: another process")


def test_a_killed_process_ends_all_within_a_minute(server: ForkServer) -> None:
    started = time.monotonic()
    first, second = forked(server, 2, "killed", program=PROGRAM)
    assert (first.code, second.code) == (1, -9)
    assert first.stderr.startswith("error: ProcessLost: another process of this fit has ended")
    assert torchrun(2, f"tests.fitting.{PROGRAM}", "killed").returncode == 1
    assert time.monotonic() - started < 60


def test_one_process_by_itself_never_touches_torch_distributed() -> None:
    with connect(read_launch({})) as processes:
        assert processes is ALONE and processes.first
        assert not torch.distributed.is_initialized()
        assert processes.from_first(lambda: 5) == 5
        processes.barrier()
        with pytest.raises(ZeroDivisionError):
            fold(processes, lambda item: 1 / 0)
    assert not torch.distributed.is_initialized()


def test_processes_that_do_not_all_come_up_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracli.fitting.processes._START", timedelta(seconds=1))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessLost, match="the 2 processes did not come together"), connect(Launch(0, 2)):
        pass
    assert not torch.distributed.is_initialized()


GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_the_environment_of_a_launcher_is_read() -> None:
    assert read_launch({}) == Launch(0, 1, 0)
    assert read_launch({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()
    assert read_launch(GOOD) == Launch(1, 2, 1, 2) and not read_launch(GOOD).first
    two_machines = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert read_launch({**GOOD, **two_machines}) == Launch(3, 4, 1, 2)
    assert read_launch({name: value for name, value in GOOD.items() if name != "LOCAL_RANK"}).local_rank == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "RANK is '' and not a number"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"MASTER_ADDR": ""}, "not MASTER_ADDR"),
    ],
)
def test_a_broken_environment_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_launch({**GOOD, **change})
    with pytest.raises(UsageError, match="but not RANK"):
        read_launch({"WORLD_SIZE": "2"})


def test_reading_the_environment_loads_no_torch() -> None:
    code = "import sys, loracli.system.machine as m; m.read_launch(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0


def test_each_of_several_processes_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Launch(1, 2, 1)
    assert [process_device(Launch(), asked) for asked in ("auto", "cuda:1")] == ["auto", "cuda:1"]
    with pytest.raises(UsageError, match="all 2 processes on one device"):
        process_device(second, "cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [process_device(second, asked) for asked in ("auto", "cpu")] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [process_device(second, asked) for asked in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="more processes than the 1 CUDA devices"):
        process_device(second, "auto")
