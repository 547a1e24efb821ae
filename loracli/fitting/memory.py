"""How much memory there is, what running out of it looks like, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loracli.errors import OutOfResources
from loracli.system.machine import says_memory_ran_out


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into OutOfResources; any other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            raise _ours() from error
        raise


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or says_memory_ran_out(error)


def _ours() -> OutOfResources:
    return OutOfResources(
        "memory ran out during the fit",
        hint="try --checkpointing, a smaller --batch-tokens, a smaller --max-length, or --dtype bfloat16",
    )


def available_memory(device: str, *, every: bool = False, root: Path = Path("/")) -> int | None:
    """Bytes that a new tensor could take on the device now; None if nothing tells.

    Of a CUDA device what its driver calls free. Of the CPU what Linux calls available, or less where a control group
    (a container, a batch job) allows less; elsewhere the free pages, or all pages where those are not told.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...
        every: all CUDA devices together, as a device map uses them.
        root: of the file system with `proc` and `sys`.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if every else [device]
        return sum(int(torch.cuda.mem_get_info(one)[0]) for one in devices)
    if kind != "cpu":
        return None
    meminfo = _numbers(root / "proc/meminfo")
    free = meminfo["MemAvailable"] * 1024 if "MemAvailable" in meminfo else _free_pages()  # kB
    rooms = [room for room in (free, *_group_rooms(root)) if room is not None]
    return max(min(rooms), 0) if rooms else None


def _free_pages() -> int | None:
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not of this system
            continue
    return None


def _group_rooms(root: Path) -> list[int]:
    """What each control group above this process leaves: limit - used + file cache that can be dropped."""
    rooms = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path may be the host's; what the container sees of it then stands at the top.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            folder = root.joinpath(top, *parts[:depth])
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal():  # "max" is no limit
                rooms.append(int(most) - int(now) + _numbers(folder / "memory.stat").get(cache, 0))
    return rooms


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name value`, as the kernel writes them."""
    words = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
