"""Who descends on which records, and who chooses on which."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loracli.calibration.records import Record
from loracli.calibration.render import Example
from loracli.errors import UsageError
from loracli.fitting.criterion import FEWEST_TO_VALIDATE, MOST_TO_VALIDATE, Fold, cross_folds, one_fold


def made(contents: Sequence[str], *, without: Sequence[int] = ()) -> tuple[list[Example], list[Record]]:
    """Records of these texts, and examples of all but those that had nothing scored."""
    records = [Record(f"val.jsonl:{line}", {"text": text}) for line, text in enumerate(contents, 1)]
    examples = [
        Example(record.place, tuple(3 + b for b in record.content["text"].encode()), (False, True))
        for i, record in enumerate(records)
        if i not in without
    ]
    return examples, records


def different(count: int) -> list[str]:
    return [f"text {i}" for i in range(count)]


def places(examples: Sequence[Example]) -> list[str]:
    return [example.place for example in examples]


def check_division(training: list[Example], fold: Fold) -> None:
    """Two disjoint parts that are everything, each in file order."""
    both = {*places(fold.fitting), *places(fold.validation)}
    assert len(fold.fitting) + len(fold.validation) == len(both) == len(training)
    for part in (fold.fitting, fold.validation):
        here = {*places(part)}
        assert list(part) == [example for example in training if example.place in here]


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_record_is_validated_in_one_fold_and_fitted_in_the_others(count: int, seed: int) -> None:
    training, records = made(different(40))
    folds = cross_folds(training, records, count, seed=seed)
    assert len(folds) == count
    for fold in folds:
        check_division(training, fold)
        assert abs(len(fold.validation) - 40 / count) < 1
    assert sorted(place for fold in folds for place in places(fold.validation)) == sorted(places(training))


def test_equal_records_stand_together_in_every_fold() -> None:
    texts = [f"text {i % 9}" for i in range(36)]
    training, records = made(texts)
    for fold in (*cross_folds(training, records, 4, seed=0), one_fold(training, records, seed=0)):
        fitted, validated = ({e.input_ids for e in part} for part in (fold.fitting, fold.validation))
        assert validated and not fitted & validated
        assert len(fold.validation) % 4 == 0  # each text stands there four times


def test_the_seed_alone_decides_the_folds_and_not_the_order_of_the_file() -> None:
    texts = different(30)
    training, records = made(texts)

    def validated(training: list[Example], records: list[Record], seed: int) -> list[set[tuple[int, ...]]]:
        folds = (*cross_folds(training, records, 3, seed=seed), one_fold(training, records, seed=seed))
        return [{example.input_ids for example in fold.validation} for fold in folds]

    assert validated(training, records, 5) == validated(training, records, 5)
    assert validated(training, records, 5) == validated(*made(texts[::-1]), 5)
    assert validated(training, records, 5) != validated(training, records, 6)


@pytest.mark.parametrize("texts", [different(3), ["one", "two", "three"] * 10], ids=["few", "equal"])
def test_more_folds_than_different_records_are_refused(texts: list[str]) -> None:
    training, records = made(texts)
    assert len(cross_folds(training, records, 3, seed=0)) == 3
    with pytest.raises(UsageError, match="--cv 4 needs at least 4 different training records") as caught:
        cross_folds(training, records, 4, seed=0)
    assert caught.value.hint == "give fewer folds, or more records"


def test_records_that_cannot_be_scored_fill_no_fold() -> None:
    """Four different records, one of which was dropped: of four folds one would be empty."""
    training, records = made(different(4), without=[2])
    with pytest.raises(UsageError, match="that can be scored"):
        cross_folds(training, records, 4, seed=0)
    training, records = made(different(12), without=[0, 5])
    folds = cross_folds(training, records, 3, seed=0)
    for fold in folds:
        check_division(training, fold)
    assert sum(len(fold.validation) for fold in folds) == 10


def test_below_eight_records_all_are_fitted() -> None:
    training, records = made(different(FEWEST_TO_VALIDATE - 1))
    assert one_fold(training, records, seed=0) == Fold(tuple(training), ())


@pytest.mark.parametrize(("count", "expected"), [(8, 2), (11, 2), (20, 4), (1000, 200), (4000, MOST_TO_VALIDATE)])
def test_a_fifth_of_the_records_validates_within_bounds(count: int, expected: int) -> None:
    training, records = made(different(count))
    fold = one_fold(training, records, seed=0)
    check_division(training, fold)
    assert len(fold.validation) == expected


@pytest.mark.parametrize(
    "texts", [["same"] * 40, ["same"] * 39 + ["other"], [*different(2)] * 8], ids=["one", "odd", "two"]
)
def test_a_few_records_many_times_over_never_leave_less_to_fit_than_to_validate(texts: list[str]) -> None:
    training, records = made(texts)
    for seed in range(6):
        fold = one_fold(training, records, seed=seed)
        check_division(training, fold)
        assert len(fold.fitting) >= len(fold.validation)
        assert fold.fitting and len({e.input_ids for e in training} - {e.input_ids for e in fold.fitting}) <= 1
