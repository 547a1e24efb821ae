"""The two searches: BFGS for a handful of numbers, AdamW for hundreds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.errors import NonFiniteLoss

BETAS = (0.9, 0.95)
EPSILON = 1e-8
WARM_UP = 0.05
ARMIJO = 1e-4
BACK = 0.4  # of a step to where the loss is not finite
SHORTEST, LONGEST = 0.05, 0.6  # shares of a step that did not descend, between which the next is
FIRST_MOVE = 0.3  # largest change of a weight in the first step; mixing weights live on the scale of 1
LARGEST_MOVE = 1.0  # and in any later one


@dataclass(frozen=True)
class Minimum:
    """The best point that a search saw.

    Args:
        theta: of the shape of the start.
        value: there.
        values: of every evaluation, in order; where the loss was not finite there is none.
        evaluations: how many were spent.
    """

    theta: Tensor
    value: float
    values: tuple[float, ...]
    evaluations: int


def bfgs(evaluate: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, *, evaluations: int) -> Minimum:
    """Quasi-Newton descent with a dense inverse Hessian and backtracking; Nocedal and Wright 2006, algorithms 6.1, 3.1.

    Args:
        evaluate: theta to its value and gradient, which has theta's shape.
        start: where to begin; float64.
        evaluations: at most so many calls, at least 1.
    Raises:
        NonFiniteLoss: if `evaluate` does at the start; further on, a step to such a point is shortened.
    """
    shape = start.shape
    theta, (value, gradient) = start.flatten(), evaluate(start)
    gradient, values = gradient.flatten(), [value]
    inverse = torch.eye(theta.numel(), dtype=torch.float64) * (FIRST_MOVE / max(float(gradient.abs().max()), 1e-12))
    used, scaled = 1, False
    while used < evaluations and float(gradient.abs().max()) > 1e-7:
        direction = -(inverse @ gradient)
        slope = float(direction @ gradient)
        step = min(1.0, LARGEST_MOVE / float(direction.abs().max()))
        while used < evaluations:
            trial = theta + step * direction
            used += 1
            try:
                new_value, new_gradient = evaluate(trial.view(shape))
            except NonFiniteLoss:  # too far: as any step that climbs
                step *= BACK
                continue
            new_gradient = new_gradient.flatten()
            values.append(new_value)
            if new_value <= value + ARMIJO * step * slope:
                break
            step *= _interpolated(value, step * slope, new_value, step * float(new_gradient @ direction))
        else:
            break
        s, y = trial - theta, new_gradient - gradient
        curvature = float(s @ y)
        if curvature > 1e-12:
            if not scaled:
                inverse, scaled = torch.eye(len(theta), dtype=torch.float64) * (curvature / float(y @ y)), True
            rho = 1.0 / curvature
            left = torch.eye(len(theta), dtype=torch.float64) - rho * torch.outer(s, y)
            inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
        theta, value, gradient = trial, new_value, new_gradient
    return Minimum(theta.view(shape), value, tuple(values), used)


def _interpolated(value: float, slope: float, new_value: float, new_slope: float) -> float:
    """The share of a step at which the cubic through both ends, with their slopes along the step, is least; Nocedal and
    Wright 2006, equation 3.59, kept within bounds. With few evaluations to spend, halving would use them all up."""
    first = slope + new_slope - 3 * (new_value - value)
    square = first * first - slope * new_slope
    if square < 0:
        return SHORTEST
    second = math.sqrt(square)
    bottom = new_slope - slope + 2 * second
    share = 1 - (new_slope + second - first) / bottom if bottom > 0 else SHORTEST
    return min(max(share, SHORTEST), LONGEST)


def peak_rate(steps: int) -> float:
    """clip(8 / steps, 0.01, 0.1): Adam moves about the rate in a step, and a weight should be able to travel about 4 in
    all."""
    return min(max(8.0 / steps, 0.01), 0.1)


class AdamW:
    """AdamW without decay (arXiv 1711.05101) on one tensor, under one schedule: warm-up, then linear decay to
    zero.

    Args:
        start: theta at step 0.
        steps: of the whole schedule.
        rate: the peak rate.
        warm_up: steps of linear warm-up.
        betas: decay of the two moments.
    """

    def __init__(
        self, start: Tensor, *, steps: int, rate: float, warm_up: int, betas: tuple[float, float] = BETAS
    ) -> None:
        self.theta = start.clone()
        self._betas = betas
        self.step_number = 0
        self._steps, self._rate, self._warm_up = steps, rate, warm_up
        self._first, self._second = torch.zeros_like(start), torch.zeros_like(start)

    def state(self) -> dict[str, Tensor]:
        """What, with `step_number`, a step depends on."""
        return {"theta": self.theta, "first": self._first, "second": self._second}

    def restore(self, state: Mapping[str, Tensor], step_number: int) -> None:
        """Goes to where another one was."""
        self.theta, self._first, self._second = (state[name] for name in ("theta", "first", "second"))
        self.step_number = step_number

    def step(self, gradient: Tensor) -> None:
        """One step down the gradient."""
        self.step_number += 1
        first, second = self._betas
        self._first = first * self._first + (1 - first) * gradient
        self._second = second * self._second + (1 - second) * gradient.square()
        mean = self._first / (1 - first**self.step_number)
        square = self._second / (1 - second**self.step_number)
        self.theta = self.theta - self.rate() * mean / (square.sqrt() + EPSILON)

    def rate(self) -> float:
        """The rate of the current step: as transformers' linear schedule, which the published recipe uses, but counted
        from 1."""
        if self.step_number <= self._warm_up:
            return self._rate * self.step_number / max(self._warm_up, 1)
        return self._rate * max(self._steps - self.step_number + 1, 0) / max(self._steps - self._warm_up, 1)
