"""What test_processes.py starts several times over: a small program with the error boundary of the command."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from loracli.errors import CalibrationError, LoracatError, NonFiniteLoss
from loracli.fitting import processes as module
from loracli.fitting.processes import Processes, connect
from loracli.system.machine import read_launch

ITEMS = range(7)
held: list[object] = []


def work(item: int) -> torch.Tensor:
    """Numbers of very different sizes, of which another order gives another sum."""
    generator = torch.Generator().manual_seed(item)
    size = torch.randint(-12, 12, (50,), generator=generator).double()
    return torch.randn(50, generator=generator, dtype=torch.float64) * 10**size


def uneven(item: int) -> torch.Tensor:
    return torch.full((item % 3,), float(item))


def fold(processes: Processes, of: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The sum over the items, in their order."""
    total = torch.zeros(50, dtype=torch.float64)
    for _, row in processes.in_order(ITEMS, of):
        total += row
    return total


def sums(processes: Processes) -> None:
    worked: list[int] = []
    turned = Processes(processes.rank, processes.world_size, True, processes.group)
    lockstep = fold(turned, lambda item: (worked.append(item), work(item))[1])  # type: ignore[func-returns-value]
    result = {
        "fold": [x.hex() for x in fold(processes, work).tolist()],
        "lockstep": [x.hex() for x in lockstep.tolist()],
        "in_order": [(item, row.tolist()) for item, row in processes.in_order(ITEMS, uneven)],
    }
    assert processes.from_first(lambda: (processes.rank, result)) == (0, result)
    try:
        processes.from_first(lambda: failing_item(3))
        raise AssertionError("the error of the first process is everyone's")
    except NonFiniteLoss:
        processes.barrier()
    each = processes.in_order(range(processes.world_size), lambda _: torch.tensor([float(len(worked))]))
    result["turns"] = [float(turns) for _, turns in each]
    if processes.first:
        sys.stdout.write(json.dumps(result) + "\n")


def failing_item(item: int) -> torch.Tensor:
    if item == 3:
        raise NonFiniteLoss("the loss is not finite", hint="leave it out")
    return work(item)


def in_the_plan(processes: Processes) -> None:
    """The process that works on item 3 fails; the search catches such errors, and all go on together."""
    try:
        fold(processes, failing_item)
    except NonFiniteLoss:
        processes.barrier()
    fold(processes, failing_item)


def elsewhere(processes: Processes) -> None:
    """One process fails between the meeting points, with more to tell than a sentence."""
    if processes.rank == 1:
        raise CalibrationError("2 lines are rejected", problems=("a:1: bad", "a:2: worse"), hint="mend them")
    fold(processes, work)


def bug(processes: Processes) -> None:
    if processes.rank == 1:
        raise TypeError("a bug")
    fold(processes, work)


def at_the_end(processes: Processes) -> None:
    """The first process fails when the other is already leaving."""
    if processes.first:
        raise NonFiniteLoss("too late")


def unheard(processes: Processes) -> None:
    """The first process is busy for longer than the other waits for it."""
    module._PATIENCE = timedelta(seconds=0.5)
    if processes.rank == 1:
        raise NonFiniteLoss("nobody hears this")
    time.sleep(2)
    processes.barrier()


def stuck(processes: Processes) -> None:
    """As in a sharded model: the first process waits, in its forward, for the other to take part."""
    module._PATIENCE = timedelta(seconds=0.5)
    held.append(torch.distributed.group.WORLD)  # as a sharded model holds it

    def forward(item: int) -> torch.Tensor:
        if processes.rank == 1:
            raise NonFiniteLoss("nobody hears this")
        torch.distributed.barrier()
        return work(item)

    fold(Processes(processes.rank, processes.world_size, True, processes.group), forward)


def killed(processes: Processes) -> None:
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fold(processes, work)


def main() -> None:
    launch = read_launch()
    try:
        with connect(launch) as processes:
            globals()[sys.argv[1]](processes)
    except LoracatError as error:
        if launch.first or error.told is False:
            problems = "".join(f" [{problem}]" for problem in getattr(error, "problems", ()))
            sys.stderr.write(f"error: {type(error).__name__}: {error.summary}{problems} ({error.hint})\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
