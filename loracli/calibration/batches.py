"""The plan of micro-batches: records sorted by length and packed under a token budget, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.calibration.render import Example


@dataclass(frozen=True)
class Batch:
    """Some records side by side, padded on the right.

    The padding needs no attention mask: in a causal model no position sees what stands right of it.

    Args:
        indices: b positions of the records in the list that the plan was made from.
        input_ids: (b, t).
        positions: (s,) places in the flattened (b * t) where the next token is scored.
        labels: (s,) those next tokens.
        owners: (s,) row of each, 0 to b - 1.
        weights: (s,) how many times each counts, float64; None where all count once.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    owners: Tensor
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the model processes, padding included."""
        return self.input_ids.numel()

    @property
    def scored_tokens(self) -> float:
        """Scored tokens, each as many times as it counts: what a sum of the batch's nats is divided by."""
        return self.labels.numel() if self.weights is None else float(self.weights.sum())

    def first_records(self, count: int) -> Batch:
        """The first of the records by themselves, padded as here."""
        kept = int((self.owners < count).sum())  # of s, in the order of the records
        weights = None if self.weights is None else self.weights[:kept]
        first = (self.positions[:kept], self.labels[:kept], self.owners[:kept], weights)
        return Batch(self.indices[:count], self.input_ids[:count], *first)


def plan_batches(examples: Sequence[Example], *, batch_tokens: int) -> list[Batch]:
    """Packs examples into batches of at most `batch_tokens` tokens with padding, shortest first; a longer one stands
    alone."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
    groups: list[list[int]] = []
    for index in order:
        length = len(examples[index].input_ids)  # the longest so far, as the order is ascending
        if groups and length * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [make_batch(examples, group) for group in groups]


def make_batch(examples: Sequence[Example], indices: Iterable[int]) -> Batch:
    """One batch of the examples at `indices`."""
    rows = tuple(indices)
    width = max(len(examples[i].input_ids) for i in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # (b, t); what stands in the padding is never seen
    positions, labels, owners, weights = [], [], [], []
    for row, index in enumerate(rows):
        example = examples[index]
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        for place, flag in enumerate(example.scored):
            if flag:  # token `place` is predicted at the position before it
                positions.append(row * width + place - 1)
                labels.append(example.input_ids[place])
                owners.append(row)
                weights.append(example.weight)
    weighted = torch.tensor(weights, dtype=torch.float64) if any(weight != 1 for weight in weights) else None
    return Batch(rows, input_ids, torch.tensor(positions), torch.tensor(labels), torch.tensor(owners), weighted)
