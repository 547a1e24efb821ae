"""The program that opens a pickle file: safetensors of the tensors in it, and nothing else of it.

    python -P -m loracli.conversion.unpickle FILE TARGET LIMITS

It runs in a process of its own (conversion/from_pickle.py starts it) that limits itself before it opens the file. torch
reads the file with `weights_only`, which builds tensors and plain containers and calls nothing else. What it refuses
goes to stdout in one line, with exit code 3; 6 is a full disk. Any other end, such as by a signal, is the starter's to
explain.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.system.machine import DISK_FULL
from loracli.system.tensor_file import FLOAT_NAMES, MAX_TENSORS, header_bytes, tensor_bytes

REFUSED, NO_ROOM = 3, 6
MOST_WORDS = 300  # characters of what is said; names are a stranger's
_GLOBAL = re.compile(r"GLOBAL ([\w.]{1,100})", re.ASCII)


class Refused(Exception):
    """Raised with the reason why a file is not what an adapter's is."""


def main(source: Path, target: Path, limits: Mapping[str, int]) -> int:
    """Returns the exit code.

    Args:
        source: the pickle file.
        target: the safetensors file to make.
        limits: `memory` and `seconds` beyond what this process has used already, `data` bytes in all tensors.
    """
    _limit(limits)
    try:
        tensors = _checked(_opened(source), limits["data"])
        _write(target, tensors)
    except Refused as reason:
        sys.stdout.write(json.dumps(str(reason)[:MOST_WORDS]))
        return REFUSED
    except OSError as error:
        if error.errno in DISK_FULL:
            return NO_ROOM
        raise
    return 0


def _limit(limits: Mapping[str, int]) -> None:
    torch.set_num_threads(1)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + limits["seconds"]
    for what, most in {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: limits["data"] + (64 << 20),  # and a header
        resource.RLIMIT_AS: _address_space() + limits["memory"],
    }.items():
        _, hard = resource.getrlimit(what)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(what, (wanted, wanted))
        except ValueError:
            if sys.platform != "darwin":  # where the kernel takes no limit on the address space
                raise


def _address_space() -> int:
    """Bytes that this process has mapped: torch alone maps gigabytes of libraries."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 32 << 30


def _opened(source: Path) -> Any:
    with source.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # else as torch wrote before 1.6: read, not mapped
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise Refused(_explained(error)) from None


def _explained(error: Exception) -> str:
    """What torch says, without its advice to trust the file."""
    text = str(error)
    named = _GLOBAL.search(text)
    if named:
        return f"it calls {named[1]}, and only tensors are read"
    if isinstance(error, MemoryError) or "allocate" in text:
        return "it needs more memory than its size explains"
    first = next(iter(text.splitlines()), "")
    if "weights_only" in text or "weights only" in text.lower():
        return "it holds something else than tensors and plain containers of them"
    return f"it is damaged, or not a file that torch.save wrote: {first or type(error).__name__}"


def _checked(content: Any, most: int) -> dict[str, Tensor]:
    """The tensors by name, each of an ordinary kind, together of at most `most` bytes."""
    if not isinstance(content, dict):
        raise Refused(f"it holds one {type(content).__name__} and no tensors by name")
    if not content:
        raise Refused("it holds no tensors")
    if len(content) > MAX_TENSORS:
        raise Refused(f"it holds {len(content)} tensors; at most {MAX_TENSORS} are read")
    total = 0
    for name, value in content.items():
        if type(name) is not str or name == "__metadata__" or not _is_text(name):
            raise Refused(f"it names a tensor {name!r:.100}")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise Refused(f"{name!r:.100} is a {type(value).__name__} and not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise Refused(f"{name!r:.100} is not an ordinary tensor, but {value.layout} on {value.device}")
        if value.dtype not in FLOAT_NAMES:
            raise Refused(f"{name!r:.100} has the dtype {str(value.dtype).removeprefix('torch.')}")
        total += value.numel() * value.element_size()
        if total > most:  # a view of a few numbers can have any shape, and one storage any number of views
            raise Refused(f"its tensors have more than {most} bytes, which its size does not explain")
    return content


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file in sorted order, one tensor in memory at a time."""
    order = sorted(tensors)
    with target.open("xb") as file:
        file.write(
            header_bytes([(name, FLOAT_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order])
        )
        for name in order:
            value = tensors[name].detach()
            file.write(tensor_bytes(value.resolve_conj().resolve_neg().contiguous()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])))
