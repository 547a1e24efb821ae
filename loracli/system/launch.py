"""Which process this is, as a launcher such as torchrun tells it. Loads no torch, so that a command can ask first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from loracli.errors import UsageError


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
