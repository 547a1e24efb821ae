"""What a set of records costs a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What each of n records costs.

    Args:
        nats: (n,) sums over the record's scored tokens, each as many times as it counts, float64.
        tokens: (n,) how many those are, counted likewise.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    def part(self, records: Sequence[int]) -> Scores:
        """The scores of some of the n records."""
        return Scores(self.nats[list(records)], self.tokens[list(records)])
