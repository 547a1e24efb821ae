"""What the machine does to a command, as errors of ours: memory or disk run out, a disk fails, a file may not be read.

A room that knows what it was doing says so itself; this is for the edge of the command, where only the error is known.
"""

from __future__ import annotations

import errno

from loracli.errors import LoracatError, OutOfResources

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

# What torch's CPU allocator says in a plain RuntimeError, Python of a thread, and the linker in an ImportError.
_MEMORY_MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "can't start new thread",
    "failed to map segment",
    "std::bad_alloc",
)


def says_memory_ran_out(error: BaseException) -> bool:
    """Whether Python, torch on the CPU, or the system says that memory ran out."""
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
