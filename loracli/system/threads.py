"""Work on many small things in a few threads, its results in order, and never more of them in memory than threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """work(item) of each item, in their order; while one result is used, the next `workers` are being made."""
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers)
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
