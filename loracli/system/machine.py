"""What the machine is to a command: its failures as errors of ours, its processes and its threads. Loads no torch.

Memory or disk run out, a disk fails, a file may not be read: a room that knows what it was doing says so itself; what
is here is for the edge of the command, where only the error is known. Which process this is, a launcher such as
torchrun tells. Work on many small things goes to a few threads, its results in order, and never more of them in memory
than threads.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from loracli.errors import LoracatError, OutOfResources, UsageError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

# What torch says in a plain RuntimeError: of its own allocator, of CUDA's runtime, driver, cuBLAS and cuDNN, of Triton,
# of MPS. What Python says of a thread, and the linker in an ImportError.
_MEMORY_MESSAGES = (
    "out of memory",
    "_alloc_failed",
    "_allocation_failed",
    "invalid buffer size",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "can't start new thread",
    "failed to map segment",
    "std::bad_alloc",
)


def says_memory_ran_out(error: BaseException) -> bool:
    """Whether Python, torch, a device, or the system says that memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, (RuntimeError, ImportError)) and any(
        message in str(error).lower() for message in _MEMORY_MESSAGES
    )


def machine_error(error: BaseException) -> LoracatError | None:
    """Our error for one of the machine's; None for anything else, which is a bug."""
    if says_memory_ran_out(error):
        return OutOfResources("memory ran out", hint="end other programs, or use a machine with more memory")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = None if error.filename is None else str(error.filename)
    if error.errno in DISK_FULL:
        return OutOfResources("no space left to write", where=where, hint="free some space and run the command again")
    return LoracatError(str(error.strerror), where=where)


@dataclass(frozen=True)
class Launch:
    """The place of this process among those started together; by default it is the only one.

    Args:
        rank: 0 to `world_size` - 1.
        world_size: how many processes were started.
        local_rank: the rank among the processes of this machine, which picks the CUDA device.
        local_world_size: how many processes this machine has, which share its memory.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and its like set
    them.

    Those that begin with LOCAL may be absent: then it is taken to be one machine.

    Raises:
        UsageError: if some of the variables are absent, are no numbers, or contradict each other.
    """
    if _number(environment, "WORLD_SIZE", 1) == 1:
        return Launch()
    rank, world_size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    local_rank = _number(environment, "LOCAL_RANK", rank)
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise UsageError(
            f"RANK={rank} of WORLD_SIZE={world_size} with LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
            f"{local_world_size} is not a place among processes",
            hint="start them with torchrun, or unset WORLD_SIZE for one process",
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise _absent(name)
    return Launch(rank, world_size, local_rank, local_world_size)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The variable as a number.

    Raises:
        UsageError: if it is no whole number, or absent without a default.
    """
    text = environment.get(name)
    if text is None:
        if default is None:
            raise _absent(name)
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"the environment variable {name} is {text!r} and not a number") from None


def _absent(name: str) -> UsageError:
    return UsageError(
        f"the environment says WORLD_SIZE, so several processes, but not {name}",
        hint="start them with torchrun, or unset WORLD_SIZE for one process",
    )


T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """work(item) of each item, in their order; while one result is used, the next `workers` are being made.

    Each worker uses as many threads for an operation of torch as this one does.
    """
    import torch

    pending: deque[Future[R]] = deque()
    # Asking takes the number over: a new thread's products would use all cores, whatever `set_num_threads` has said.
    pool = ThreadPoolExecutor(workers, initializer=torch.get_num_threads)
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_each() -> Iterator[int]:
    """How many threads torch may use; until the end it uses one for each operation.

    The matrices of an export are a few columns wide: several threads in one operation wait for each other longer than
    they work, most of all beside other programs. One thread also gives the same bits whatever the number.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
