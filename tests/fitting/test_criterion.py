"""Who descends on which records and who chooses on which; gains whose standard error a bootstrap confirms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
import torch

from loracli.adapters.adapter import read_adapter
from loracli.calibration.records import Record
from loracli.calibration.render import Example
from loracli.errors import UsageError
from loracli.fitting.criterion import (
    _MOST_TO_VALIDATE,
    FEWEST_TO_VALIDATE,
    Fold,
    Gain,
    cross_folds,
    gain,
    loss_criterion,
    one_fold,
)
from loracli.fitting.level import _joined
from loracli.fitting.mixing import make_diagonal, make_layout
from loracli.model.loss import Scores
from tests.fitting.planted import make_engine, planted


def scores_of(seed: int, count: int) -> tuple[Scores, Scores]:
    """Two mixings on records of 1 to 60 tokens, on which the longer ones gain less for each token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 61, (count,), generator=generator).double()
    before = tokens * (2 + torch.rand(count, generator=generator, dtype=torch.float64))
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return Scores(before, tokens), Scores(before - tokens * 0.05 - 0.8 * tokens.sqrt() * noise - 0.5, tokens)


def test_a_gain_is_the_formula_of_a_ratio_of_sums() -> None:
    before, after = scores_of(0, 40)
    d, t = (before.nats - after.nats).tolist(), before.tokens.tolist()
    mean = math.fsum(d) / math.fsum(t)
    spread = math.fsum((x - mean * n) ** 2 for x, n in zip(d, t, strict=True))
    found = gain(before, after)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(40 / 39 * spread) / math.fsum(t), rel=1e-12)
    assert found.mean == pytest.approx(before.nats_per_token - after.nats_per_token, rel=1e-9)


def test_records_of_equal_length_give_the_usual_error_of_a_mean() -> None:
    """With every record of 8 tokens, of the mean of d / 8: standard deviation over the square root of n."""
    d = [0.3, -0.1, 0.8, 0.4, 0.05]
    after = Scores(torch.zeros(5, dtype=torch.float64), torch.full((5,), 8.0, dtype=torch.float64))
    found = gain(Scores(torch.tensor(d, dtype=torch.float64), after.tokens), after)
    deviation = math.sqrt(sum((x - fmean(d)) ** 2 for x in d) / 4)
    assert found.mean == pytest.approx(fmean(d) / 8)
    assert found.standard_error == pytest.approx(deviation / math.sqrt(5) / 8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_standard_error_is_that_of_a_bootstrap_over_records(seed: int) -> None:
    """10,000 resamples give it to about one part in a hundred and forty; the linearisation adds order 1 / n."""
    before, after = scores_of(seed, 300)
    found = gain(before, after)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(300, (10_000, 300), generator=generator)
    means = (before.nats - after.nats)[chosen].sum(dim=1) / before.tokens[chosen].sum(dim=1)
    assert found.standard_error == pytest.approx(float(means.std()), rel=0.04)
    # The naive error of a mean over tokens, or over records of unequal length, is not within that.
    ratios = (before.nats - after.nats) / before.tokens
    assert float(ratios.std()) / math.sqrt(300) != pytest.approx(float(means.std()), rel=0.2)


def test_equal_scores_are_no_gain() -> None:
    scores, _ = scores_of(0, 30)
    assert gain(scores, scores) == Gain(0.0, 0.0)
    assert not gain(scores, scores).clear


def test_a_gain_is_clear_above_one_standard_error_and_only_in_its_direction() -> None:
    assert Gain(0.011, 0.01).clear and not Gain(0.01, 0.01).clear and not Gain(-0.5, 0.01).clear
    before, after = scores_of(0, 300)
    forward, back = gain(before, after), gain(after, before)
    assert forward.clear and not back.clear
    assert (back.mean, back.standard_error) == (-forward.mean, forward.standard_error)


def test_one_record_decides_nothing() -> None:
    before, after = (scores.part([3]) for scores in scores_of(0, 30))
    assert gain(before, after).standard_error == math.inf and not gain(before, after).clear


def test_joined_scores_are_those_of_all_records_in_order() -> None:
    _, whole = scores_of(0, 30)
    parts = [whole.part(range(11)), whole.part(range(11, 12)), whole.part(range(12, 30))]
    assert torch.equal(_joined(parts).nats, whole.nats) and torch.equal(_joined(parts).tokens, whole.tokens)


def test_the_loss_is_that_of_each_record_whatever_the_batches(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = [read_adapter(str(path)) for path in two_adapters]
    mixing = make_diagonal(make_layout(adapters), "adapter")
    with planted(tiny_base, adapters, torch.tensor([[1.0, 0.5]]), count=6) as (attached, examples, _):
        engine = make_engine(attached, examples)
        theta = mixing.constant([0.8, 0.3])
        small, large = (loss_criterion(engine, batch_tokens=size)(mixing, theta, examples, None) for size in (24, 512))
        backwards = loss_criterion(engine, batch_tokens=48)(mixing, theta, examples[::-1], None)
    assert engine.meter.validation == backwards.nats_per_token
    assert torch.equal(large.tokens, torch.full((6,), 23.0, dtype=torch.float64))
    torch.testing.assert_close(small.nats, large.nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backwards.nats.flip(0), large.nats, rtol=1e-5, atol=1e-5)
    assert float(large.nats.std()) > 0.1


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


@pytest.mark.parametrize(("count", "expected"), [(8, 2), (11, 2), (20, 4), (1000, 200), (4000, _MOST_TO_VALIDATE)])
def test_a_fifth_of_the_records_validates_within_bounds(count: int, expected: int) -> None:
    training, records = made(different(count))
    fold = one_fold(training, records, seed=0)
    check_division(training, fold)
    assert len(fold.validation) == expected


def test_a_dropped_record_is_not_one_of_those_that_are_set_aside() -> None:
    """Whichever of ten is dropped: the same fold as if it had never been there, with two records to choose with."""
    for dropped in range(10):
        training, records = made(different(10), without=[dropped])
        fold = one_fold(training, records, seed=0)
        check_division(training, fold)
        assert len(fold.validation) == 2
        assert fold == one_fold(training, [r for r in records if r.place in {e.place for e in training}], seed=0)


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
