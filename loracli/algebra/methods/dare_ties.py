"""DARE with TIES' merge (arXiv 2311.03099, section 3.2, with 2306.01708): drop at random and rescale, elect signs, and
take the mean over the entries that agree."""

from __future__ import annotations

from collections.abc import Sequence

from loracli.algebra.factors import Factors
from loracli.algebra.methods.dare import drop
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.methods.order import present_in_own_order
from loracli.algebra.methods.ties import approximated, disjoint_mean


def dare_ties(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """DARE-TIES of one module: its best approximation of the rank, as the result has full rank."""
    present = present_in_own_order(updates)
    return approximated(disjoint_mean([drop(update, options) for update in present]), present, options)


DARE_TIES = Method(
    "dare-ties",
    "dropped at random and rescaled, signs elected, disjoint mean",
    merge=dare_ties,
    takes=frozenset({"density", "scale", "seed"}),
    full_rank=True,
)
