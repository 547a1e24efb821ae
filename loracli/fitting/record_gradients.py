"""The gradient of every record by itself, for the true labels and for sampled ones: what a certificate is made of.

Of the nats of record n, whose scored positions t count v times each:

    g_n = sum_t v d/dtheta -log p(y_t)                y_t the label
    h_n = sum_t sqrt(v) d/dtheta -log p(s_t)          s_t sampled from p, the model's distribution at position t

Under the model, scores d/dtheta log p(s_t) have mean 0 and those of different positions are uncorrelated. So
E[sum_n h_n h_n^T] = sum_n v sum_t F_t with F_t the Fisher information of position t, which for the cross-entropy of a
softmax is the Gauss-Newton matrix (Martens, arXiv 1412.1193). With the labels in the place of samples it would not be
(Kunstner et al., arXiv 1905.12558).

Each record is given mixing weights of its own, all at the same theta: one backward pass then leaves the gradients of
all records of a batch side by side. Forward and twice backward costs 3 units a token, where a step of a fit costs 2; a
sharded model costs 4, for there each backward pass needs a forward of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.calibration.batches import Batch
from loracli.calibration.render import Example
from loracli.fitting.mixing import DiagonalMixing
from loracli.model.loss import Objective, gradient_of
from loracli.model.placement import is_sharded


@dataclass(frozen=True)
class RecordGradients:
    """Of n records at one theta (P,), all float64.

    Args:
        nats: (n,) sums over the scored tokens, each as many times as it counts.
        tokens: (n,) how many those are, counted likewise.
        gradients: (n, P) g_n, of those nats.
        sampled: (n, P) h_n, of the nats of sampled labels.
    """

    nats: Tensor
    tokens: Tensor
    gradients: Tensor
    sampled: Tensor

    def rows(self) -> Tensor:
        """(n, 2 + 2P): one row for each record."""
        return torch.cat([self.nats[:, None], self.tokens[:, None], self.gradients, self.sampled], dim=1)


def from_rows(rows: Tensor) -> RecordGradients:
    """The inverse of `RecordGradients.rows`."""
    gradients, sampled = rows[:, 2:].chunk(2, dim=1)
    return RecordGradients(rows[:, 0], rows[:, 1], gradients, sampled)


def record_gradients(
    objective: Objective, mixing: DiagonalMixing, theta: Tensor, batch: Batch, examples: Sequence[Example], *, seed: int
) -> RecordGradients:
    """The gradients of each of the b records of a batch; the attached model is left at theta.

    What is drawn for a record is decided by the seed and its tokens: not by its place, nor by the batch.

    Args:
        objective: of the attached model.
        mixing: without softmax.
        theta: (P,).
        batch: of some of the examples.
        examples: that the batch was made from.
        seed: of the sampled labels.
    Raises:
        ValueError: if the weights of the mixing are a softmax.
    """
    if mixing.softmax:
        raise ValueError("theta is not the weights themselves where they are a softmax")
    weights = theta[mixing.index].repeat(len(batch.indices), 1).requires_grad_(True)  # (b, sum R)
    draws = torch.cat([_draws(examples[index], seed) for index in batch.indices])  # (s,)
    v = torch.ones(len(draws), dtype=torch.float64) if batch.weights is None else batch.weights  # (s,)

    def forward() -> tuple[Tensor, Tensor]:
        objective.set_weights_of_records(batch, weights)
        return objective.nats_and_sampled_nats(batch, draws)

    nats, sampled_nats = forward()
    # A sharded model gives its weights up after a backward pass, and the graph is of no use then.
    sharded = is_sharded(objective.attached.model)
    first = gradient_of((nats * v.to(nats)).sum(), weights, retain_graph=not sharded)
    if sharded:
        _, sampled_nats = forward()
    second = gradient_of((sampled_nats * v.to(nats).sqrt()).sum(), weights)
    with torch.no_grad():
        mixing.apply(objective.attached, theta)
    none = torch.zeros(len(batch.indices), dtype=torch.float64)
    return RecordGradients(
        nats=none.index_add(0, batch.owners, nats.detach().cpu().double() * v),
        tokens=none.index_add(0, batch.owners, v),
        gradients=_by_number(first, mixing),
        sampled=_by_number(second, mixing),
    )


def _by_number(gradient: Tensor, mixing: DiagonalMixing) -> Tensor:
    """(b, P): the sums over the rank rows that take the same number, from (b, sum R)."""
    return torch.zeros(len(gradient), mixing.numbers, dtype=torch.float64).index_add(1, mixing.index, gradient)


def _draws(example: Example, seed: int) -> Tensor:
    """(scored tokens,) uniform on the multiples of 2^-24 in [0, 1), which float32 holds, from SHAKE-256 of the seed and
    what the record is."""
    source = hashlib.shake_256(f"{seed}:{example.input_ids}:{example.scored}".encode())
    stream = source.digest(3 * example.scored_tokens)
    numbers = [int.from_bytes(stream[i : i + 3]) for i in range(0, len(stream), 3)]
    return torch.tensor(numbers, dtype=torch.float32) / (1 << 24)
