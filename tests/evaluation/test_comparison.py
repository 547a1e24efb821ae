"""What a table says in a sentence: every verdict, with percentages that follow from its numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loracli.evaluation.comparison import BestOf, Comparison, ComparisonRow, MetricScore
from loracli.evaluation.sentences import best_first, claim, metric_claim, overfitted, remarks, training_gap, verdict
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import HeldOut, HeldOutControl, HeldOutRow
from tests.test_recipe import make_recipe

BETTER, WORSE, FEW, AS_GOOD = "better", "not better", "too few records", "no better than a fresh LoRA"


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


def beside_fresh(found: HeldOut, loss: float, difference: float, interval: tuple[float, float]) -> HeldOut:
    """With a fresh LoRA of a loss, and the fit's difference to it."""
    row = HeldOutRow("fresh-lora", loss, loss - 2.0, (-2.0, 2.0), 0.5)
    return replace(found, controls=(HeldOutControl(row, difference, interval),))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            table(BETTER, -1.0, (-1.2, -0.8)),
            "The composition is better than your best adapter, b: 50 % less loss on 128 records that it had not seen "
            "(95 % sure between 40 and 60 %); it was not held against a fresh LoRA",
        ),
        (
            beside_fresh(table(BETTER, -1.0, (-1.2, -0.8)), 2.0, -1.0, (-1.1, -0.9)),
            "The composition is better than your best adapter, b: 50 % less loss on 128 records that it had not seen "
            "(95 % sure between 40 and 60 %); and than a fresh LoRA trained on the same records: 50 % less loss (95 % "
            "sure between 45 and 55 %)",
        ),
        (
            beside_fresh(table(AS_GOOD, -1.0, (-1.2, -0.8)), 0.5, 0.5, (0.4, 0.6)),
            "The composition is no better than a fresh LoRA trained on the same records: 100 % more loss on 128 "
            "records that it had not seen (95 % sure between 80 and 120 %). That it has 50 % less loss than your best "
            "adapter, b, does not show that it uses what the adapters know: the form of the records alone may "
            "teach that much",
        ),
        (
            table(BETTER, -1.9, (-2.1, -1.7)),  # the interval of the difference alone would promise more than all
            "The composition is better than your best adapter, b: 95 % less loss on 128 records that it had not seen "
            "(95 % sure: at least 85 %); it was not held against a fresh LoRA",
        ),
        (
            table(BETTER, -0.01, (-0.015, -0.005), sum=1.5),
            "The composition is better than your best adapter, b: 0.5 % less loss on 128 records that it had not seen "
            "(95 % sure between 0.2 and 0.8 %), but sum is as good without any fit; it was not held against a fresh "
            "LoRA",
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
            table(WORSE, 0.0, (0.0, 1e-17)),  # weights of 0 and 1, up to rounding
            "The composition comes to your best adapter, b, alone: it has the same loss on 128 records that it had not "
            "seen",
        ),
        (
            table(WORSE, 0.06, (0.006, 0.1)),  # an end near 0 is told from 0
            "The composition is worse than your best adapter, b: 3.0 % more loss on 128 records that it had not seen "
            "(95 % sure between 0.3 and 5.0 %)",
        ),
        (
            table(FEW, -1.0, (-1.2, -0.8)),
            "Too few records to tell whether the composition is better than your best adapter, b: 50 % less loss on "
            "128 records that it had not seen, and a verdict needs at least 20 different ones: give more with --data, "
            "or others with --eval-data",
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


def test_a_verdict_of_cross_fitting_says_who_scored_the_records() -> None:
    found = replace(table("better", -1.0, (-1.2, -0.8)), parts=4)
    assert "50 % less loss on 128 records, each scored by a fit that had not seen it (95 % sure" in verdict(found)
    assert found.how == "each scored by one of 4 fits that had not seen it; the weights come from all of them"
    assert replace(found, parts=0).how == ""


def test_rows_are_shown_from_the_lowest_loss_up() -> None:
    assert [row.name for row in best_first(table(BETTER, -1.0, (-1.2, -0.8), sum=2.5).rows)] == [
        "fit",
        "b",
        "sum",
        "a",
        "base",
    ]


def fitted(
    training: float | None,
    held_out: float,
    gain: float,
    error: float | None,
    *,
    verdict: Any = BETTER,
    move: float = 1.0,
    name: str = "test.jsonl",
    records: int = 97,
    parts: int = 0,
) -> Recipe:
    """A recipe of a fit to 97 records with these losses, which is better than the best adapter by `gain`."""
    found = replace(
        table(verdict, -gain, (-9.0, 9.0), loss=held_out + gain),
        name=name,
        records=records,
        parts=parts,
        standard_error=error,
    )
    recipe = make_recipe(Path())
    return replace(recipe, held_out=found, fit=replace(recipe.fit, training_nats_per_token=training, largest_move=move))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (fitted(0.31, 0.42, 1.0, 0.01), False),  # a gap of 0.11 is a small part of the gain
        (fitted(0.31, 0.42, 0.34, 0.01), False),
        (fitted(0.31, 0.42, 0.32, 0.01), True),
        (fitted(0.31, 0.42, -0.1, 0.01, verdict=WORSE), True),  # no gain, and a gap beyond chance
        (fitted(0.31, 0.42, 0.1, 0.038), True),  # 0.11 is 2 * 0.0389 * sqrt(2)
        (fitted(0.31, 0.42, 0.1, 0.040), False),
        (fitted(0.31, 0.42, 0.1, 0.030, records=3 * 97), False),  # few training records: their loss is unsure
        (fitted(0.31, 0.42, 0.1, 0.030, records=2 * 97), True),
        (fitted(0.42, 0.31, 0.01, 0.001), False),
        (fitted(0.31, 0.42, 0.1, 0.01, move=0.0), False),  # other records, for nothing was fitted
        (fitted(0.31, 0.42, 0.1, None), None),
        (fitted(None, 0.42, 0.1, 0.01), None),
        (fitted(0.31, 0.42, 0.1, 0.01, verdict=FEW), None),
        (fitted(0.31, 0.42, 0.1, 0.01, parts=4), None),  # the losses are of different weights
    ],
)
def test_a_fit_is_overfitted_where_its_gap_is_beyond_chance_and_a_third_of_its_gain(
    recipe: Recipe, expected: bool | None
) -> None:
    assert overfitted(recipe) is expected
    assert ("overfitted" in training_gap(recipe)) == bool(expected)


def test_losses_of_records_that_were_drawn_alike_are_seldom_taken_for_overfitting() -> None:
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(2000):
        training, held_out = torch.rand(97, generator=generator), torch.rand(24, generator=generator)
        error = float(held_out.std()) / 24**0.5
        recipe = fitted(float(training.mean()), float(held_out.mean()), 0.0, error, records=24, verdict=WORSE)
        alarms += bool(overfitted(recipe))
    assert 0.01 < alarms / 2000 < 0.05


def test_both_losses_are_told_and_what_a_large_gap_means() -> None:
    losses = "the fit on its own training records: 0.3100 nats/token, on held-out ones 0.4200"
    assert training_gap(fitted(0.31, 0.42, 1.0, 0.01)) == losses
    other = training_gap(fitted(0.31, 0.42, 0.1, 0.01))
    assert other == f"{losses}: overfitted, or harder records; more like the held-out ones would help"
    share = training_gap(fitted(0.31, 0.42, 0.1, 0.01, name="val é.jsonl, <stdin>:2.5"))  # the names of its data
    assert share == f"{losses}: overfitted, more records would help"
    assert training_gap(fitted(None, 0.42, 1.0, 0.01)) == ""
    assert training_gap(fitted(0.31, 0.42, 0.1, 0.01, parts=4)) == f"{losses} by weights of fewer records"
    recipe = fitted(0.31, 0.42, 0.1, 0.01)
    assert training_gap(replace(recipe, mixing=replace(recipe.mixing, weights_sha256="0" * 64))) == ""  # edited


def compared(*rows: tuple[str, Any, float, float]) -> Comparison:
    """Of rows with a name, a kind, a loss and a mean of the metric; the lowest loss of a composition is the best."""
    made = tuple(
        ComparisonRow(
            name, kind, loss, 1.0, loss - 2, (-1.0, 1.0), None, 0.5, 8, None, "", None,
            MetricScore(mean, mean - 0.5, (-0.1, 0.1), None), None,
        )
        for name, kind, loss, mean in rows
    )  # fmt: skip
    best = min((row for row in made if row.kind not in ("base", "control")), key=lambda row: row.nats_per_token)
    return Comparison(
        "test.jsonl", "base", ("a",), 24, 99, "a", made, (), (), BestOf(best.name, {"a": 0.001}, clear=True), 0.1,
        "exact", None, 0.02, 0,
    )  # fmt: skip


A, FIT = ("a", "ingredient", 2.0, 0.5), ("fit", "fit", 1.0, 0.7)


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([A, FIT], "-0.100 to +0.100)"),
        ([A, ("sum", "method", 1.5, 0.8), FIT], "-0.100 to +0.100), where the loss is lowest with fit"),
        ([A, FIT, ("base", "base", 3.0, 0.9)], "-0.100 to +0.100); but base has 0.900"),
        ([A, FIT, ("fresh-lora", "control", 3.0, 0.9)], "-0.100 to +0.100); but fresh-lora has 0.900"),
    ],
)
def test_the_metric_says_where_it_disagrees_with_the_loss(rows: Any, ends: str) -> None:
    said = metric_claim(compared(*rows))
    best = "sum has the highest, 0.800; +0.300" if "where" in ends else "fit has the highest, 0.700; +0.200"
    assert said.startswith(f"by exact, {best} to the best single adapter") and said.endswith(ends)


def test_ways_that_tie_by_the_metric_are_named_together_and_an_adapter_is_not_compared_with_itself() -> None:
    tied = metric_claim(compared(A, ("sum", "method", 1.5, 0.7), FIT))
    assert tied == (
        "by exact, fit and sum have the highest, 0.700, together; fit +0.200 to the best single adapter "
        "(95 % interval -0.100 to +0.100)"
    )
    alone = metric_claim(compared(("a", "ingredient", 2.0, 0.9), FIT))
    assert alone == "by exact, a has the highest, 0.900, where the loss is lowest with fit"
    beside = metric_claim(compared(("a", "ingredient", 2.0, 0.7), FIT, ("sum", "method", 1.5, 0.6)))
    assert beside == "by exact, fit and a have the highest, 0.700, together"


def test_where_all_ways_are_as_good_by_the_metric_none_is_best() -> None:
    rows = (A, ("fit", "fit", 1.0, 0.5))
    said = "by exact, no way is best: all have 0.500"
    assert metric_claim(compared(*rows, ("base", "base", 3.0, 0.1))) == said
    assert metric_claim(compared(*rows, ("base", "base", 3.0, 0.9))) == f"{said}; but base has 0.900"


def test_a_base_with_a_lower_loss_stands_in_the_claim_and_no_difference_is_said_to_be_seen_where_there_is_none() -> (
    None
):
    found = compared(A, FIT, ("base", "base", 0.5, 0.1))
    assert claim(found).endswith("; but base has a lower loss, 0.5000")
    assert any("4 times in 5" in line for line in remarks(found))
    assert not any("4 times in 5" in line for line in remarks(replace(found, detectable=0.0)))


@pytest.mark.parametrize(("loss", "said"), [(0.9, "; but fresh-lora has a lower loss, 0.9000"), (1.1, "")])
def test_a_control_with_a_lower_loss_stands_in_the_claim(loss: float, said: str) -> None:
    found = claim(compared(A, FIT, ("fresh-lora", "control", loss, 0.1)))
    assert found.startswith("fit is the best of 2 ways") and found.endswith(said or ")")
    assert ("fresh-lora" in found) == bool(said)
