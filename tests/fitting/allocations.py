"""What a piece of work allocates, measured two ways."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def saved_bytes(model: Any, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd saves, each storage once; parameters are not counted."""
    sizes: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(sizes.values())


def allocated_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that live when the work is done and its result is held, and the most at any time, from the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = work()
    events = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    levels = list(accumulate(events))
    return levels[-1], max(levels)
