"""DARE (arXiv 2311.03099, section 3): drop entries at random and rescale, then add.

    dW = scale sum_i m_i * dW_i / density,    m_i ~ Bernoulli(density) entry by entry

so that the expectation is the scaled sum. An adapter's mask is drawn from a hash of its own factors and the seed: the
order of the adapters changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.methods.order import digest, present_in_own_order
from loracli.algebra.methods.ties import approximated

DENSITY = 0.5  # the paper tries drop rates from 0.1 to 0.99


def dare(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """DARE of one module: its best approximation of the rank, as the result has full rank."""
    present = present_in_own_order(updates)
    total = drop(present[0], options)
    for update in present[1:]:
        total = total + drop(update, options)
    return approximated(total, present, options)


def drop(update: Factors, options: MethodOptions) -> Tensor:
    """m * dW / density (out, in), float64."""
    density = DENSITY if options.density is None else options.density
    matrix = update.delta_weight()
    if density == 1.0:
        return matrix
    mask = torch.rand(matrix.shape, generator=_generator(update, options.seed)) < density
    return torch.where(mask, matrix / density, 0.0)


def _generator(update: Factors, seed: int) -> torch.Generator:
    drawn = hashlib.sha256(f"{seed}:".encode() + digest(update)).digest()
    return torch.Generator().manual_seed(int.from_bytes(drawn[:7], "big"))


DARE = Method(
    "dare",
    "entries dropped at random and rescaled, then the sum",
    merge=dare,
    takes=frozenset({"density", "scale", "seed"}),
    full_rank=True,
)
