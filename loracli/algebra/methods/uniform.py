"""The average of the updates: dW = (1/N) sum_i dW_i, the static CAT of LoRA Soups (arXiv 2410.13025, section 3)."""

from __future__ import annotations

from loracli.algebra.methods.method import Method


def uniform_weights(adapters: int) -> tuple[float, ...]:
    """1/N for each of N adapters; one that lacks a module counts there with dW_i = 0."""
    return (1.0 / adapters,) * adapters


UNIFORM = Method("uniform", "the average, 1/N each", weights=uniform_weights)
