"""What running out of memory looks like, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loracli.errors import OutOfResources

# What torch's CPU allocator says in a plain RuntimeError.
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into OutOfResources; any other error passes."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _ours() from error
    except RuntimeError as error:
        if any(message in str(error) for message in _CPU_MESSAGES):
            raise _ours() from error
        raise


def _ours() -> OutOfResources:
    return OutOfResources(
        "memory ran out during the fit",
        hint="try a smaller --batch-tokens, a smaller --max-length, or --dtype bfloat16",
    )
