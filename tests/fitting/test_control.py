"""The control of a fit: a new LoRA on the same records, and what the verdict makes of it."""

from __future__ import annotations

import math

import pytest
import torch

from loracli.fitting.control import FreshLora, _descend
from loracli.fitting.mixing import Layout


def fresh(rank: int = 3) -> FreshLora:
    layout = Layout(("model.a", "model.b"), ((rank,), (rank,)))
    return FreshLora(layout, [(8, 5), (6, 4)], rank, seed=0)


def test_a_new_lora_starts_as_peft_starts_one() -> None:
    """B is 0, and A is spread as torch spreads it with Kaiming's a = sqrt 5: uniformly within 1 / sqrt(in)."""
    control = fresh(rank=400)
    for (lora_A, lora_B), (width, out) in zip(control.factors(control.start), [(8, 5), (6, 4)], strict=True):
        assert lora_A.shape == (400, width) and lora_B.shape == (out, 400) and not lora_B.any()
        like = torch.empty(400, width)
        torch.nn.init.kaiming_uniform_(like, a=math.sqrt(5))
        assert lora_A.abs().max() <= 1 / math.sqrt(width)
        assert float(lora_A.std()) == pytest.approx(float(like.std()), rel=0.05)
        assert abs(float(lora_A.mean())) < 0.03


def test_a_new_lora_has_a_scaling_of_two_on_each_b_and_its_numbers_in_the_order_of_the_modules() -> None:
    control = fresh()
    assert control.numbers == 3 * (8 + 6 + 5 + 4)
    pairs = control.factors(torch.arange(control.numbers).double())
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in pairs] == [((3, 8), (5, 3)), ((3, 6), (4, 3))]
    assert (
        pairs[0][0][0, 0] == 0
        and pairs[1][0][0, 0] == 24
        and pairs[0][1][0, 0] == 2 * 42
        and pairs[1][1][-1, -1] == 2 * 68
    )


@pytest.mark.parametrize(
    ("losses", "best_at", "runs"),
    [
        ([5, 4, 3, 2, 1], 10, [2, 2, 2, 2, 2]),  # the last is the best
        ([5, 1, 2, 2, 2, 2, 9], 4, [2] * 6),  # four worse in a row: no more
        ([5, 1, 2, 2, 2, 0.5, 1], 12, [2] * 7),  # three in a row are not enough
        ([3, 3, 3, 3, 3, 3], 2, [2] * 5),  # as good is not better
        ([None, None, None], 5, [2, 2, 1]),  # nothing to check with: the last, and no step too many
    ],
)
def test_a_new_lora_stops_where_its_validation_loss_was_lowest(
    losses: list[float | None], best_at: int, runs: list[int]
) -> None:
    done: list[int] = []
    total = 5 if losses[0] is None else 2 * len(losses)

    def run(count: int, before: int) -> None:
        assert before == sum(done)
        done.append(count)

    theta, at = _descend(run, lambda after: losses[len(done) - 1], lambda: torch.tensor([sum(done)]), total, 2)
    assert (int(theta), at, done) == (best_at, best_at, runs)
