"""What a set of records costs a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What each of n records costs.

    Args:
        nats: (n,) sums over the record's scored tokens, float64.
        tokens: (n,) how many those are.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())
