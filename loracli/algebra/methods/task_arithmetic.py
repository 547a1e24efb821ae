"""Task arithmetic (arXiv 2212.04089, section 2): dW = lambda sum_i dW_i, with the one scale lambda chosen by the loss
on calibration records.

The paper takes lambda from a grid; here a grid of five points is followed by three steps of successive parabolic
interpolation (Brent 1973, chapter 5), as the loss is smooth in lambda.
"""

from __future__ import annotations

import math

from loracli.algebra.methods.method import Loss, Method, MethodOptions

GRID = (0.3, 0.6, 0.9, 1.2, 1.5)
REFINEMENTS = 3
CLOSE = 1e-3  # scales nearer than this are one


def search_scale(loss: Loss, adapters: int, options: MethodOptions) -> tuple[float, ...]:
    """lambda for each of N adapters, with at most 8 evaluations; the best point that was seen."""
    seen: dict[float, float] = {}

    def evaluate(scale: float) -> None:
        value = loss((scale,) * adapters)
        seen[scale] = value if math.isfinite(value) else math.inf

    for scale in GRID:
        evaluate(scale)
    for _ in range(REFINEMENTS):
        trial = _vertex(seen)
        if trial is None or min(abs(trial - scale) for scale in seen) < CLOSE:
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


TASK_ARITHMETIC = Method("task-arithmetic", "the sum, times one fitted scale", search=search_scale)
