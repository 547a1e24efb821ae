"""Several processes on one fit: who runs which micro-batch, and sums whose bits do not depend on how many they are.

All run the same program on the same plan. An item of the plan is worked on by one process; its result, in float64,
reaches all of them, and all add the results in the order of the plan. So 1, 2 and 4 processes give the same bits,
provided that one item does, which takes the same number of threads in each.

Nothing may be decided from what only one process knows. That holds for errors too: every exchange begins by telling
whether somebody has failed, and then all raise the same error, the one of the lowest rank. A process that dies closes
its connections, and the others raise ProcessLost at their next exchange.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from loracli.errors import FitError, LoracatError, ProcessLost, UsageError
from loracli.system.machine import Launch

_START = timedelta(seconds=60)  # in which all processes must have come up
_WAIT = timedelta(hours=2)  # for one that is alive but slow: the first may fetch a large model meanwhile
_PATIENCE = timedelta(seconds=20)  # of one that has failed, for the others to hear of it

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of one fit, seen from one of them. `Processes()` is a process by itself.

    Every method is a meeting point: all processes must call it, in the same order.

    Args:
        rank: of this process, 0 to `world_size` - 1.
        world_size: K, how many there are.
        lockstep: every forward needs all of them, because the base model is sharded over them: who has no item left
            in a round repeats the last one, and the result is dropped.
        group: of torch.distributed, for tensors on the CPU; None for a process by itself.
    """

    rank: int = 0
    world_size: int = 1
    lockstep: bool = False
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def in_order(self, items: Sequence[T], work: Callable[[T], Tensor]) -> Iterator[tuple[T, Tensor]]:
        """Every item with its result, in the order of `items`, on every process; K at a time are worked on at once.

        Args:
            items: the plan, the same on all processes.
            work: an item to a vector of any length, which is widened to float64 on the CPU.
        Raises:
            Exception: what `work` raised, on every process; the one of the lowest rank, if several failed.
            ProcessLost: if another process has ended.
        """
        for start in range(0, len(items), self.world_size):
            these = items[start : start + self.world_size]
            yield from zip(these, self._round(these, work), strict=True)

    def from_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first process alone; its value, which must be picklable, or its error on all."""
        if self.world_size == 1:
            return work()
        content, failure = b"", None
        if self.first:
            try:
                content = pickle.dumps(work())
            except Exception as error:
                failure = error
        length = self._agree(failure, len(content))[0]
        tensor = _bytes_tensor(content, length)
        _finish(dist.broadcast(tensor, src=0, group=self.group, async_op=True))
        value: T = pickle.loads(tensor.numpy().tobytes())
        return value

    def barrier(self) -> None:
        """Waits for all.

        Raises:
            Exception: what another process failed with meanwhile.
        """
        self._agree(None)

    def _round(self, these: Sequence[T], work: Callable[[T], Tensor]) -> list[Tensor]:
        """The results of at most K items, the k-th worked on by the process of rank k."""
        result, failure = torch.zeros(0, dtype=torch.float64), None
        try:
            if self.rank < len(these):
                result = work(these[self.rank]).detach().to("cpu", torch.float64)  # (n,)
            elif self.lockstep:
                work(these[-1])
        except Exception as error:
            failure = _lost() if _says_lost(error) else error
        # In lockstep the others may be stuck in the forward that this process has left, and never hear of it.
        patience = _PATIENCE if self.lockstep and failure is not None else _WAIT
        lengths = self._agree(failure, len(result), patience)
        padded = torch.zeros(max(lengths), dtype=torch.float64)
        padded[: len(result)] = result
        rows = self._gather(padded)[: len(these)]
        return [row[:length] for row, length in zip(rows, lengths, strict=False)]

    def _agree(self, failure: Exception | None, number: int = 0, patience: timedelta = _WAIT) -> list[int]:
        """Everyone's number; or, if anyone has failed, the failure of the lowest rank raised on all."""
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return [number]
        report = b"" if failure is None else pickle.dumps(_portable(failure, self.rank))
        try:
            heads = [head.tolist() for head in self._gather(torch.tensor([len(report), number]), patience)]
            lengths = [head[0] for head in heads]
            if not any(lengths):
                return [head[1] for head in heads]
            reports = self._gather(_bytes_tensor(report, max(lengths)), patience)
        except ProcessLost:
            if failure is None:
                raise
            failure.told = False  # type: ignore[attr-defined]  # any exception takes an attribute
            raise failure from None
        lowest = next(rank for rank, length in enumerate(lengths) if length)
        if lowest != self.rank or failure is None:
            failure = pickle.loads(reports[lowest].numpy().tobytes())
        failure.told = True  # type: ignore[union-attr]
        raise failure

    def _gather(self, mine: Tensor, patience: timedelta = _WAIT) -> list[Tensor]:
        if self.world_size == 1:
            return [mine]
        all_of_them = [torch.empty_like(mine) for _ in range(self.world_size)]
        options = AllgatherOptions()
        options.timeout = (
            patience  # of the exchange itself: one that is only not waited for keeps a process from ending
        )
        _finish(self.group.allgather([all_of_them], [mine], options))
        return all_of_them

    def _fail(self, failure: Exception) -> NoReturn:
        """Tells the others of a failure that ends this process, unless they know, and raises what all end with."""
        if _says_lost(failure):
            raise _lost() from failure
        if getattr(failure, "told", None) is None and not isinstance(failure, ProcessLost):
            self._agree(failure, patience=_PATIENCE)
        raise failure


ALONE = Processes()


@contextmanager
def connect(launch: Launch, device: str = "cpu", *, sharded: bool = False) -> Iterator[Processes]:
    """Brings the launched processes together, and at the end apart again; one process by itself touches nothing.

    An error inside is raised by all processes at the end: the same one, so the same exit code. The first process
    prints it. One that could not be told within 20 s says so in `told`, and whoever raises it prints it.

    Args:
        launch: from `read_launch`.
        device: that `process_device` gives.
        sharded: the base model will be sharded over the processes, which on CUDA devices takes NCCL.
    Raises:
        ProcessLost: if not all processes come up within 60 s, or one ends later.
    """
    if launch.world_size == 1:
        yield ALONE
        return
    processes = Processes(launch.rank, launch.world_size, sharded, _join(launch, device, sharded))
    try:
        yield processes
        processes.barrier()
    except Exception as failure:
        processes._fail(failure)
    finally:
        dist.destroy_process_group()


def process_device(launch: Launch, asked: str) -> str:
    """The device of one process of several: its own of the CUDA devices, or the CPU that all share.

    Raises:
        UsageError: if `asked` puts all processes on one CUDA device, or there are fewer devices than processes.
    """
    if launch.world_size == 1:
        return asked
    if asked.startswith("cuda:"):
        raise UsageError(
            f"--device {asked} would put all {launch.world_size} processes on one device",
            hint="leave --device out, or give cuda: each process takes its own",
        )
    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu" if asked == "auto" else asked
    if launch.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"there are more processes than the {torch.cuda.device_count()} CUDA devices of this machine",
            hint="start as many processes as there are devices (--nproc-per-node), or give --device cpu",
        )
    return f"cuda:{launch.local_rank}"


def _join(launch: Launch, device: str, sharded: bool) -> Any:
    """The group for tensors on the CPU. The weights of a sharded base travel over the default group, so that an error
    told here never meets one of its exchanges."""
    nccl = sharded and device.startswith("cuda")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # so that nothing of this process is on another's
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=_START))
        store.set(f"up/{launch.rank}", b"")
        store.wait([f"up/{rank}" for rank in range(launch.world_size)], _START)
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=PrefixStore("loracat", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=_WAIT,
            device_id=torch.device(device) if nccl else None,
        )
        return dist.new_group(backend="gloo", timeout=_WAIT)
    except RuntimeError as error:  # DistError, and what gloo says, among them
        raise ProcessLost(
            f"the {launch.world_size} processes did not come together: {str(error).partition(chr(10))[0]}",
            hint="see that all were started, and that MASTER_ADDR and MASTER_PORT can be reached from each machine",
        ) from error


def _finish(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise _lost() from error


def _lost() -> ProcessLost:
    return ProcessLost(
        "another process of this fit has ended or does not answer", hint="see the messages before this one"
    )


def _says_lost(error: Exception) -> bool:
    """Whether the error is what torch.distributed raises elsewhere, in a sharded model, when a process has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _portable(failure: Exception, rank: int) -> Exception:
    """The failure as the others will raise it; a bug keeps its traceback where it happened."""
    if isinstance(failure, LoracatError):
        return failure
    return FitError(f"process {rank} failed: {type(failure).__name__}: {failure}")


def _bytes_tensor(content: bytes, length: int) -> Tensor:
    """(length,) uint8, zeros after the content; a pickle ends by itself."""
    tensor = torch.zeros(length, dtype=torch.uint8)
    if content:
        tensor[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return tensor
