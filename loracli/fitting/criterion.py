"""What chooses between fits: which training records are descended on and which choose, in one split or K folds, and the
score of each record that the choice was not fitted to.

Starts, ridges and kinds of mixing are chosen by the same criterion, and only through this file. The loss is the
default; a task metric has the same form: a cost of each record, and how much each record counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.calibration.dataset import dealt, plan_batches, split_records
from loracli.calibration.records import Record
from loracli.calibration.render import Example
from loracli.errors import UsageError
from loracli.evaluation.scorer import Scorer
from loracli.evaluation.statistics import standard_error
from loracli.fitting.engine import Engine
from loracli.fitting.mixing import Mixing
from loracli.model.loss import Scores

_VALIDATION_SHARE = 0.2
FEWEST_TO_VALIDATE = 6  # below, every record is fitted on and the ridge stays strong
_FOLDED_BELOW = 40  # records, of which a fifth says little
_FOLDS = 4
_MOST_TO_VALIDATE = 512


@dataclass(frozen=True)
class Fold:
    """One division of the training records.

    Args:
        fitting: that are descended on.
        validation: that choices are made on; of the folds of a cross-validation, every record is in one.
    """

    fitting: tuple[Example, ...]
    validation: tuple[Example, ...]


def divided(
    training: Sequence[Example], records: Sequence[Record], count: int | None, *, seed: int
) -> tuple[Fold, ...]:
    """How some records are divided to choose with: K folds; without a count 4 with 6 to 39 records, and a fifth set
    aside with more.

    Args:
        training: examples.
        records: that they were rendered from, those that were dropped among them.
        count: K, None to go by how many records there are.
        seed: of the division.
    Raises:
        UsageError: if there are too few different records for the count.
    """
    if count is not None:
        return cross_folds(training, records, count, seed=seed)
    different = len({record.fingerprint for record in _rendered(training, records)})
    if FEWEST_TO_VALIDATE <= len(training) < _FOLDED_BELOW and different >= _FOLDS:
        return cross_folds(training, records, _FOLDS, seed=seed)
    return (one_fold(training, records, seed=seed),)


def one_fold(training: Sequence[Example], records: Sequence[Record], *, seed: int) -> Fold:
    """A fifth of the records to choose with, at least two; none below 6 records.

    Args:
        training: examples.
        records: that they were rendered from, those that were dropped among them.
        seed: of the split.
    """
    if len(training) < FEWEST_TO_VALIDATE:
        return Fold(tuple(training), ())
    count = min(max(2, round(_VALIDATION_SHARE * len(training))), _MOST_TO_VALIDATE)
    _, chosen = split_records(_rendered(training, records), count, seed=seed)
    fold = set_aside(training, chosen)
    # Equal records stand together, so a few of them many times over can leave nothing on one side.
    return fold if len(fold.fitting) >= len(fold.validation) > 0 else Fold(tuple(training), ())


def cross_folds(training: Sequence[Example], records: Sequence[Record], count: int, *, seed: int) -> tuple[Fold, ...]:
    """So many folds, by the content of the records, so that equal ones stand together.

    Raises:
        UsageError: if a fold would be empty.
    """
    folds = tuple(set_aside(training, part) for part in dealt(_rendered(training, records), count, seed=seed))
    if not all(fold.fitting and fold.validation for fold in folds):
        raise UsageError(
            f"--cv {count} needs at least {count} different training records that can be scored",
            hint="give fewer folds, or more records",
        )
    return folds


def _rendered(training: Sequence[Example], records: Sequence[Record]) -> list[Record]:
    """The records whose examples are there: one that was dropped neither fits nor chooses."""
    places = {example.place for example in training}
    return [record for record in records if record.place in places]


def set_aside(training: Sequence[Example], chosen: Sequence[Record]) -> Fold:
    """The examples of some records apart from all others; either side may be empty."""
    places = {record.place for record in chosen}
    return Fold(
        tuple(example for example in training if example.place not in places),
        tuple(example for example in training if example.place in places),
    )


Criterion = Callable[[Mixing, Tensor, Sequence[Example], str | None], Scores]  # with the key of what is remembered

LEAST_GAIN = 0.005  # nats per token, that `auto` climbs for
LEAST_ANSWERS = 0.5  # right ones more, that `auto` climbs for where a task metric chooses
_TIE = 1e-4  # of a cost that goes by the loss, among solutions with the same answers


def loss_criterion(engine: Engine, *, batch_tokens: int) -> Criterion:
    """Nats of each record, weighed by its scored tokens: what the descent minimises.

    Raises (the criterion):
        NonFiniteLoss: naming the records.
    """

    def criterion(mixing: Mixing, theta: Tensor, examples: Sequence[Example], key: str | None) -> Scores:
        scores = engine.score(mixing, theta, plan_batches(examples, batch_tokens=batch_tokens), examples, key=key)
        engine.meter.validation = scores.nats_per_token
        return scores

    return criterion


def metric_criterion(
    engine: Engine, scorer_of: Callable[[Sequence[Example]], Scorer], *, batch_tokens: int
) -> Criterion:
    """What a task metric says, with the loss to decide between equal answers; every record counts the same.

        cost = 1 - value + 1e-4 l / (1 + l),    l the record's nats per token

    Args:
        engine: of the attached model.
        scorer_of: makes the scorer of some records, once for each set of them.
        batch_tokens: of a micro-batch of the loss.
    Raises (the criterion):
        NonFiniteLoss: naming the records.
        MetricError: if the user's command fails.
    """
    scorers: dict[tuple[str, ...], Scorer] = {}

    def criterion(mixing: Mixing, theta: Tensor, examples: Sequence[Example], key: str | None) -> Scores:
        places = tuple(example.place for example in examples)
        if places not in scorers:
            scorers[places] = scorer_of(examples)
        loss = engine.score(mixing, theta, plan_batches(examples, batch_tokens=batch_tokens), examples, key=key)
        nats = loss.nats / loss.tokens
        values = engine.answer(mixing, theta, scorers[places], examples, key=None if key is None else f"{key}, answers")
        costs = 1 - values + _TIE * nats / (1 + nats)
        scores = Scores(costs, torch.ones_like(costs))
        engine.meter.validation = scores.nats_per_token
        return scores

    return criterion


@dataclass(frozen=True)
class Gain:
    """How much less one mixing costs than another on the same n records.

        gain = sum_n (a_n - b_n) / sum_n t_n

    Args:
        mean: per scored token, or per record where a task metric chooses; above zero is a gain.
        standard_error: of the mean over records, as of a ratio of sums (Cochran 1977, section 6.4).
    """

    mean: float
    standard_error: float

    @property
    def clear(self) -> bool:
        """Whether it exceeds one standard error."""
        return self.mean > self.standard_error


def gain(before: Scores, after: Scores) -> Gain:
    """What `after` gains over `before`."""
    difference, tokens = before.nats - after.nats, before.tokens
    return Gain(float(difference.sum() / tokens.sum()), standard_error(difference, tokens))
