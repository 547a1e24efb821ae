"""What a table says in a sentence: every verdict, with percentages that follow from its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from loracli.evaluation.comparison import best_first, verdict
from loracli.recipe.record import HeldOut, HeldOutRow

BETTER, WORSE, FEW = "better", "not better", "too few records"


def table(verdict: Any, difference: float, interval: tuple[float, float], *, loss: float = 2.0, **losses: float) -> Any:
    """Of the adapters a and b, the best of which has a loss; `losses` are of `uniform` and `sum`."""
    rows = [
        HeldOutRow("base", loss + 3, 3.0, (2.0, 4.0), 1.0),
        HeldOutRow("a", loss + 1, 1.0, (0.5, 1.5), 0.9),
        HeldOutRow("b", loss, 0.0, (0.0, 0.0), 0.0),
        *(HeldOutRow(name, nats, nats - loss, (-1.0, 1.0), 0.5) for name, nats in losses.items()),
        HeldOutRow("fit", loss + difference, difference, interval, 0.1),
    ]
    return HeldOut("test.jsonl", 128, 900, "b", tuple(rows), (), verdict)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            table(BETTER, -1.0, (-1.2, -0.8)),
            "The composition is better than your best adapter, b: 50 % less loss on 128 records that it had not seen "
            "(95 % sure between 40 and 60 %)",
        ),
        (
            table(BETTER, -1.9, (-2.1, -1.7)),  # the interval of the difference alone would promise more than all
            "The composition is better than your best adapter, b: 95 % less loss on 128 records that it had not seen "
            "(95 % sure: at least 85 %)",
        ),
        (
            table(BETTER, -0.01, (-0.015, -0.005), sum=1.5),
            "The composition is better than your best adapter, b: 0.5 % less loss on 128 records that it had not seen "
            "(95 % sure between 0.2 and 0.8 %), but sum is as good without any fit",
        ),
        (
            table(WORSE, -0.02, (-0.1, 0.06)),
            "The composition is not clearly better than your best adapter, b: 1 % less loss on 128 records that it had "
            "not seen (95 % sure between 3 % more and 5 % less)",
        ),
        (
            table(WORSE, 0.2, (0.1, 0.3)),
            "The composition is worse than your best adapter, b: 10 % more loss on 128 records that it had not seen "
            "(95 % sure between 5 and 15 %)",
        ),
        (
            table(WORSE, 0.06, (0.006, 0.1)),  # an end near 0 is told from 0
            "The composition is worse than your best adapter, b: 3.0 % more loss on 128 records that it had not seen "
            "(95 % sure between 0.3 and 5.0 %)",
        ),
        (
            table(FEW, -1.0, (-1.2, -0.8)),
            "Too few records to tell whether the composition is better than your best adapter, b: 50 % less loss on "
            "128 records that it had not seen, and a verdict needs at least 20: give more with --data, or others with "
            "--eval-data",
        ),
        (
            table(WORSE, 0.2, (0.1, 0.3), loss=0.0),  # nothing to have a share of
            "The composition is worse than your best adapter, b: a difference of +0.2000 nats per token on 128 records "
            "that it had not seen (95 % interval +0.1000 to +0.3000)",
        ),
    ],
)
def test_every_verdict_is_a_sentence_with_its_share_of_the_best_adapters_loss(found: HeldOut, said: str) -> None:
    assert verdict(found) == said


def test_rows_are_shown_from_the_lowest_loss_up() -> None:
    assert [row.name for row in best_first(table(BETTER, -1.0, (-1.2, -0.8), sum=2.5).rows)] == [
        "fit",
        "b",
        "sum",
        "a",
        "base",
    ]
