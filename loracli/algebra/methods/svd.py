"""The sum of the updates at a lower rank: the closest matrix of rank k to sum_i dW_i (Eckart and Young).

What PEFT's `svd` combination is meant to be, from the factors instead of the dense matrix, and with the scaling once;
k is the largest rank of an ingredient unless it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from loracli.algebra.concatenate import concatenate
from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.truncate import truncate


def svd(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """The truncated sum of one module."""
    present = [update for update in updates if update is not None]
    rank = max(update.rank for update in present) if options.rank is None else options.rank
    found = truncate(concatenate(present, [1.0] * len(present)), rank)
    return Merged(found.factors, found.kept_energy)


SVD = Method("svd", "the sum, cut to the largest ingredient's rank", merge=svd, takes=frozenset({"rank"}))
