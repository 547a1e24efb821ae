"""Which training records are descended on and which choose among what was found: one split, or K of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracli.calibration.dataset import dealt, split_records
from loracli.calibration.records import Record
from loracli.calibration.render import Example
from loracli.errors import UsageError

VALIDATION_SHARE = 0.2
FEWEST_TO_VALIDATE = 8  # below, every record is fitted on and the ridge stays strong
MOST_TO_VALIDATE = 512


@dataclass(frozen=True)
class Fold:
    """One division of the training records.

    Args:
        fitting: that are descended on.
        validation: that choices are made on; of the folds of a cross-validation, every record is in one.
    """

    fitting: tuple[Example, ...]
    validation: tuple[Example, ...]


def one_fold(training: Sequence[Example], records: Sequence[Record], *, seed: int) -> Fold:
    """A fifth of the records to choose with; none below 8 records.

    Args:
        training: examples.
        records: that they were rendered from.
        seed: of the split.
    """
    if len(training) < FEWEST_TO_VALIDATE:
        return Fold(tuple(training), ())
    count = min(max(2, round(VALIDATION_SHARE * len(training))), MOST_TO_VALIDATE)
    _, chosen = split_records(records, count, seed=seed)
    fold = _fold(training, chosen)
    # Equal records stand together, so a few of them many times over can leave nothing on one side.
    return fold if len(fold.fitting) >= len(fold.validation) > 0 else Fold(tuple(training), ())


def cross_folds(training: Sequence[Example], records: Sequence[Record], count: int, *, seed: int) -> tuple[Fold, ...]:
    """So many folds, by the content of the records, so that equal ones stand together.

    Raises:
        UsageError: if a fold would be empty.
    """
    folds = tuple(_fold(training, part) for part in dealt(records, count, seed=seed))
    if not all(fold.fitting and fold.validation for fold in folds):
        raise UsageError(
            f"--cv {count} needs at least {count} different training records that can be scored",
            hint="give fewer folds, or more records",
        )
    return folds


def _fold(training: Sequence[Example], chosen: Sequence[Record]) -> Fold:
    places = {record.place for record in chosen}
    return Fold(
        tuple(example for example in training if example.place not in places),
        tuple(example for example in training if example.place in places),
    )
