"""The searches against known minima and an independent AdamW."""

import pytest
import torch

from loracli.errors import NonFiniteLoss
from loracli.fitting.descent import AdamW, bfgs
from loracli.fitting.level import _peak_rate


def quadratic(center: torch.Tensor, curvature: torch.Tensor):  # type: ignore[no-untyped-def]
    calls = []

    def evaluate(theta: torch.Tensor) -> tuple[float, torch.Tensor]:
        calls.append(theta)
        return float(0.5 * (curvature * (theta - center) ** 2).sum()), curvature * (theta - center)

    return evaluate, calls


def test_bfgs_reaches_the_minimum_of_a_quadratic_in_few_evaluations() -> None:
    center = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    evaluate, calls = quadratic(center, torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))
    found = bfgs(evaluate, torch.zeros(3, dtype=torch.float64), evaluations=15)
    assert (found.theta - center).abs().max() < 1e-3
    assert found.evaluations == len(calls) <= 15


def test_bfgs_descends_where_the_first_step_is_far_too_long() -> None:
    """The first step is 15 times the way to the minimum: what is seen at its end tells how long it should be, so three
    evaluations are enough; shortening it by a fixed share would end where it began."""
    evaluate, calls = quadratic(torch.tensor([0.02], dtype=torch.float64), torch.tensor([900.0], dtype=torch.float64))
    found = bfgs(evaluate, torch.zeros(1, dtype=torch.float64), evaluations=3)
    assert len(calls) == 3 and abs(float(found.theta) - 0.02) < 1e-6


def test_bfgs_shortens_a_step_to_where_the_loss_is_not_finite() -> None:
    """A minimum at 1 with a wall at 1.1: steps beyond it raise, and the search still gets there."""
    beyond = []

    def evaluate(theta: torch.Tensor) -> tuple[float, torch.Tensor]:
        if float(theta) > 1.1:
            beyond.append(theta)
            raise NonFiniteLoss("the loss is not finite")
        return float(0.05 * (theta - 1) ** 2 + 0.2 * (theta - 1) ** 4), 0.1 * (theta - 1) + 0.8 * (theta - 1) ** 3

    found = bfgs(evaluate, torch.full((1,), 0.85, dtype=torch.float64), evaluations=30)
    assert beyond
    assert abs(float(found.theta) - 1) < 1e-3
    with pytest.raises(NonFiniteLoss):
        bfgs(evaluate, torch.full((1,), 2.0, dtype=torch.float64), evaluations=30)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 7])
def test_bfgs_keeps_to_its_evaluations_and_never_ends_above_its_start(evaluations: int) -> None:
    evaluate, calls = quadratic(
        torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([[1000.0]], dtype=torch.float64)
    )
    start = torch.tensor([[0.1]], dtype=torch.float64)
    found = bfgs(evaluate, start, evaluations=evaluations)
    assert len(calls) == found.evaluations <= evaluations
    assert found.value <= evaluate(start)[0]
    assert evaluate(found.theta)[0] == found.value


def test_adamw_is_torchs_under_its_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    ours = AdamW(torch.zeros(4, dtype=torch.float64), steps=20, rate=0.1, warm_up=4)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.AdamW([theta], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step, gradient in enumerate(gradients, start=1):
        ours.step(gradient)
        theirs.param_groups[0]["lr"] = 0.1 * (step / 4 if step <= 4 else (21 - step) / 16)
        theta.grad = gradient.clone()
        theirs.step()
        torch.testing.assert_close(ours.theta, theta.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("steps", "rate"), [(10, 0.1), (160, 0.05), (10_000, 0.01)])
def test_the_peak_rate_is_clipped_eight_over_steps(steps: int, rate: float) -> None:
    assert _peak_rate(steps) == rate
