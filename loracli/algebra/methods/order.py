"""An order of updates that does not depend on the order they are given in, and a seed that belongs to one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from loracli.algebra.factors import Factors


def present_in_own_order(updates: Sequence[Factors | None]) -> list[Factors]:
    """The updates that are there, ordered by their content: sums over them are then the same to the bit however the
    adapters are ordered, and no elected sign hangs on it."""
    return sorted((update for update in updates if update is not None), key=digest)


def digest(update: Factors) -> bytes:
    """sha256 of the factors' bytes and the scaling."""
    result = hashlib.sha256(f"{update.scaling!r}:".encode())
    for factor in (update.lora_A, update.lora_B):
        result.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return result.digest()
