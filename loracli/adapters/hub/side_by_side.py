"""A few repositories at a time, and an end for all of them when one fails."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

WORKERS = 4
SECONDS_TO_STOP = 2.0  # for transfers to notice that they shall, and to remove what they have written

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Sequence[T], stopped: threading.Event) -> list[R]:
    """work(item) of each, in a few threads, in the order of the items; `stopped` is set by a failure, or by Ctrl-C."""
    if len(items) < 2:
        return [work(item) for item in items]
    waiting: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[int, R | BaseException]] = queue.SimpleQueue()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def run() -> None:
        with suppress(queue.Empty):
            while not stopped.is_set():
                number, item = waiting.get_nowait()
                try:
                    outcomes.put((number, work(item)))
                except BaseException as error:
                    outcomes.put((number, error))

    # Daemons: a pool's threads would keep the process alive for as long as a server that has stopped sending likes.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(len(items), WORKERS))]
    results: dict[int, R] = {}
    try:
        for thread in threads:
            thread.start()
        while len(results) < len(items):
            number, outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            results[number] = outcome
    except BaseException:
        _stop(stopped)
        until = time.monotonic() + SECONDS_TO_STOP
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise
    return [results[number] for number in range(len(items))]


def _stop(stopped: threading.Event) -> None:
    """Lets the transfers of other threads end at their next block."""
    stopped.set()
    with suppress(ImportError):  # not in every version; those transfers then end with their file
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]
