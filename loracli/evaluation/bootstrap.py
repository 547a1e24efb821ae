"""Paired bootstrap over records: the unit that was drawn is the record, and all methods saw the same ones.

The statistic is a ratio of sums, sum_n d_n / sum_n t_n with d_n the difference in nats and t_n the scored tokens of
record n, so long records weigh as they do in the loss. Percentile interval (Efron and Tibshirani 1993, chapter 13);
pairing as in arXiv 2411.00640.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
_ROWS = 500  # resamples at a time, so that memory stays at a few megabytes per thousand records


def resampled(differences: Tensor, tokens: Tensor, *, seed: int = 0) -> Tensor:
    """(K, 10,000): sum(difference) / sum(tokens) of K differences over the same resampled records.

    Args:
        differences: (K, n) of one method minus another, for each record.
        tokens: (n,) scored tokens of each record.
        seed: of the resampling; the same seed draws the same records.
    """
    n = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    together = torch.cat([differences, tokens[None]]).T  # (n, K + 1)
    sums = []
    for start in range(0, RESAMPLES, _ROWS):
        rows = min(_ROWS, RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        times = torch.zeros(rows, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(rows, n).double())
        sums.append(times @ together)
    ratios = torch.cat(sums)
    return (ratios[:, :-1] / ratios[:, -1:]).T


def intervals(differences: Tensor, tokens: Tensor, *, seed: int = 0) -> list[tuple[float, float]]:
    """The 95 % interval of each of K differences, as `resampled` takes them: low and high, in nats per token."""
    tail = (1 - LEVEL) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ends = torch.quantile(resampled(differences, tokens, seed=seed), levels, dim=1)  # (2, K)
    return [(low, high) for low, high in ends.T.tolist()]


def paired_interval(difference: Tensor, tokens: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of sum(difference) / sum(tokens) over resampled records.

    Args:
        difference: (n,) nats of one method minus nats of the other, for each record.
        tokens: (n,) scored tokens of each record.
        seed: of the resampling; the same seed draws the same records for every pair of methods.
    Returns:
        low and high, in nats per token.
    """
    return intervals(difference[None], tokens, seed=seed)[0]
