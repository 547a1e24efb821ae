"""Methods that are a weighted sum, with fixed weights or searched ones.

The sum of the updates: dW = sum_i dW_i, each adapter at full strength (as in arXiv 2508.11985).

The average of the updates: dW = (1/N) sum_i dW_i, the static CAT of LoRA Soups (arXiv 2410.13025, section 3).

Task arithmetic (arXiv 2212.04089, section 2): dW = lambda sum_i dW_i, with the one scale lambda chosen by the loss
on calibration records.

The paper takes lambda from a grid; here a grid of five points is followed by three steps of successive parabolic
interpolation (Brent 1973, chapter 5), as the loss is smooth in lambda.

LoRAHub (arXiv 2307.13269, section 3): one weight for each adapter, found without gradients on a few records.

    minimise  loss(w) + 0.05 sum_i |w_i| / N,    w in [-1.5, 1.5]^N,    by nevergrad's NGOpt with 40 evaluations from 0

What differs: the paper averages A and B apart, (sum w_i B_i)(sum w_i A_i), which brings in cross terms B_i A_j; here
dW = sum_i w_i dW_i. The search draws, so it depends on the order of the adapters and on the seed.

PEFT's `linear` combination with equal weights, for reproduction: it averages A and B apart.

    dW = (sum_i sqrt(|s_i| / N) B_i)(sum_i sign(s_i) sqrt(|s_i| / N) A_i)

so every adapter's B meets every other's A: of N^2 products B_i A_j only N are the adapters' own (PEFT 0.21,
tuners/lora/model.py, `_generalized_task_arithmetic_weighted_adapter`; the sums run over adapters that have the module).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Loss, Merged, Method, MethodOptions


def _sum_weights(adapters: int) -> tuple[float, ...]:
    """1 for each of N adapters."""
    return (1.0,) * adapters


SUM = Method("sum", "each adapter at full strength", weights=_sum_weights, takes=frozenset({"scale"}))


def _uniform_weights(adapters: int) -> tuple[float, ...]:
    """1/N for each of N adapters; one that lacks a module counts there with dW_i = 0."""
    return (1.0 / adapters,) * adapters


UNIFORM = Method("uniform", "the average, 1/N each", weights=_uniform_weights, takes=frozenset({"scale"}))


_GRID = (0.3, 0.6, 0.9, 1.2, 1.5)
_REFINEMENTS = 3
_CLOSE = 1e-3  # scales nearer than this are one


def _search_scale(loss: Loss, adapters: int, options: MethodOptions) -> tuple[float, ...]:
    """lambda for each of N adapters, with at most 8 evaluations; the best point that was seen."""
    seen: dict[float, float] = {}

    def evaluate(scale: float) -> None:
        value = loss((scale,) * adapters)
        seen[scale] = value if math.isfinite(value) else math.inf

    for scale in _GRID:
        evaluate(scale)
    for _ in range(_REFINEMENTS):
        trial = _vertex(seen)
        if trial is None or min(abs(trial - scale) for scale in seen) < _CLOSE:
            break
        evaluate(trial)
    return (min(seen, key=lambda scale: seen[scale]),) * adapters


def _vertex(seen: dict[float, float]) -> float | None:
    """The minimum of the parabola through the best point and its neighbours; None where it bends the wrong way, or the
    best point is at an end."""
    scales = sorted(seen)
    place = scales.index(min(seen, key=lambda scale: seen[scale]))
    if place in (0, len(scales) - 1):
        return None
    a, b, c = scales[place - 1 : place + 2]
    left, right = (b - a) * (seen[b] - seen[c]), (b - c) * (seen[b] - seen[a])
    if not math.isfinite(left) or not math.isfinite(right) or abs(left - right) < 1e-300:
        return None
    vertex = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
    return vertex if a < vertex < c else None


TASK_ARITHMETIC = Method(
    "task-arithmetic", "the sum, times one fitted scale", search=_search_scale, evaluations=len(_GRID) + _REFINEMENTS
)


_EVALUATIONS = 40
_LARGEST = 1.5
_PENALTY = 0.05


def _search_weights(loss: Loss, adapters: int, options: MethodOptions) -> tuple[float, ...]:
    """Weights of N adapters, the best that were seen."""
    import nevergrad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings of optimisers that it chose itself
        return _search(nevergrad, loss, adapters, options.seed)


def _search(nevergrad: Any, loss: Loss, adapters: int, seed: int) -> tuple[float, ...]:
    parameters = nevergrad.p.Array(init=[0.0] * adapters).set_bounds(-_LARGEST, _LARGEST)
    parameters.random_state.seed(seed % (1 << 32))
    optimiser = nevergrad.optimizers.NGOpt(parametrization=parameters, budget=_EVALUATIONS)
    best, found = math.inf, (0.0,) * adapters
    for _ in range(_EVALUATIONS):
        trial = optimiser.ask()
        weights = tuple(float(weight) for weight in trial.value)
        value = loss(weights) + _PENALTY * sum(map(abs, weights)) / adapters
        optimiser.tell(trial, value if math.isfinite(value) else 1e9)
        if value < best:
            best, found = value, weights
    return found


LORAHUB = Method(
    "lorahub",
    "one weight each, found without gradients",
    search=_search_weights,
    evaluations=_EVALUATIONS,
    takes=frozenset({"seed"}),
    package="nevergrad",
)


def _check_ranks(updates: Sequence[Factors | None]) -> None:
    """Raises ValueError if the ranks differ, as PEFT does."""
    ranks = sorted({update.rank for update in updates if update is not None})
    if len(ranks) > 1:
        raise ValueError(f"factors of the ranks {', '.join(map(str, ranks))} cannot be added, and PEFT refuses too")


def _average_factors(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """The factor average of one module."""
    present = [update for update in updates if update is not None]
    shares = [math.sqrt(abs(update.scaling) / len(updates)) for update in present]
    lora_A = torch.stack(
        [math.copysign(c, u.scaling) * u.lora_A.double() for c, u in zip(shares, present, strict=True)]
    )
    lora_B = torch.stack([c * u.lora_B.double() for c, u in zip(shares, present, strict=True)])
    return Merged(Factors(lora_A.sum(dim=0), lora_B.sum(dim=0)))


LINEAR_PEFT = Method(
    "linear-peft", "PEFT's average of A and of B, with its cross terms", merge=_average_factors, check=_check_ranks
)
