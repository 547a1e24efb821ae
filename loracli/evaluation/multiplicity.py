"""Whether one of many ways is the best beyond chance, and how small a difference so many records can show."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loracli.evaluation.bootstrap import RESAMPLES, resampled
from loracli.evaluation.comparison import BestOf
from loracli.model.loss import Scores

SIGNIFICANCE = 0.05
# z(1 - 0.05 / 2) + z(0.8): a test at 5 % on two sides finds a difference of so many standard errors four times in five.
DETECTED = 1.959964 + 0.841621


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, so that the chance of any false claim stays below the level.

    The i-th smallest of m, counted from 1, becomes max over j <= i of min(1, (m - j + 1) p_j) (Holm 1979).
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def best_of(scores: Mapping[str, Scores], *, seed: int = 0) -> BestOf:
    """The way with the lowest loss, and for each other the corrected one-sided p-value that it is as good.

    A p-value is the share of paired resamples in which the other is not worse, (1 + count) / (1 + resamples).

    Args:
        scores: of each way on the same records.
        seed: of the resampling.
    """
    best = min(scores, key=lambda name: scores[name].nats_per_token)
    others = [name for name in scores if name != best]
    if not others:
        return BestOf(best, {}, clear=False)
    differences = torch.stack([scores[name].nats - scores[best].nats for name in others])
    draws = resampled(differences, scores[best].tokens, seed=seed)
    as_good = (draws <= 0).sum(dim=1).tolist()
    rivals = holm({name: (1 + count) / (1 + RESAMPLES) for name, count in zip(others, as_good, strict=True)})
    return BestOf(best, rivals, clear=all(p < SIGNIFICANCE for p in rivals.values()))


def standard_error(difference: Tensor, tokens: Tensor) -> float:
    """Of a ratio of sums over n >= 2 records, sum(d) / sum(t) (Cochran 1977, section 6.4); infinite below.

    SE = sqrt( n / (n - 1) * sum_n (d_n - ratio t_n)^2 ) / sum_n t_n
    """
    n, total = len(tokens), float(tokens.sum())
    if n < 2:
        return math.inf
    residual = difference - float(difference.sum()) / total * tokens
    return float((residual.square().sum() * n / (n - 1)).sqrt()) / total


def detectable(difference: Tensor, tokens: Tensor) -> float:
    """The true difference in nats per token that so many records would show with a probability of 80 %, judged by how
    much this one varies over records."""
    return DETECTED * standard_error(difference, tokens)
