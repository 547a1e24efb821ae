"""The sum of the updates: dW = sum_i dW_i, each adapter at full strength (as in arXiv 2508.11985)."""

from __future__ import annotations

from loracli.algebra.methods.method import Method


def sum_weights(adapters: int) -> tuple[float, ...]:
    """1 for each of N adapters."""
    return (1.0,) * adapters


SUM = Method("sum", "each adapter at full strength", weights=sum_weights)
