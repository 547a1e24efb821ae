"""What counts as right, by the cases that graders get wrong."""

from __future__ import annotations

import pytest

from loracli.evaluation.metrics import contains, is_exact, is_same_number, last_number


def test_exact_forgives_white_space_at_the_ends_alone() -> None:
    assert is_exact(" Paris\n", "Paris")
    assert not is_exact("paris", "Paris")
    assert not is_exact("Paris.", "Paris")


def test_contains_reads_over_capitals_and_spacing() -> None:
    assert contains("It is  PARIS\nof course", "is paris")
    assert not contains("Pari s", "paris")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234.0),
        ("it costs $3.50.", 3.5),
        ("5-3", 3.0),
        ("x = -7", -7.0),
        ("(2)-1", 1.0),
        ("1,2,3", 3.0),
        ("1,234,5", 5.0),
        ("2e3", 2000.0),
        ("0.5 or .25", 0.25),
        ("so 12 apples", 12.0),
        ("1e999", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_agree_within_the_relative_tolerance() -> None:
    assert is_same_number("about 100.005", "#### 100")
    assert not is_same_number("about 100.02", "#### 100")
    assert is_same_number("about 101", "100", tolerance=0.01)
    assert is_same_number("0", "0.0")
    assert not is_same_number("no idea", "4")
    assert not is_same_number("4", "no number")
