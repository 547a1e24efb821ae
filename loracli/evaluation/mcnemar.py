"""McNemar's exact test: whether two ways of answering the same questions are equally often right."""

from __future__ import annotations

import math

from torch import Tensor


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Two-sided p-value from the b + c records on which exactly one is right (McNemar 1947; exact binomial form).

        p = min(1, 2 P(X <= min(b, c))),    X ~ Binomial(b + c, 1/2)

    Args:
        first: (n,) whether each record is right.
        second: (n,) likewise, of the same records.
    """
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / (1 << (b + c)))
