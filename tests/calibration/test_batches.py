"""Micro-batches: every scored token is predicted at the position before it, once, under the budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from loracli.calibration.dataset import Batch, make_batch, plan_batches
from loracli.calibration.render import Example


def random_examples(count: int, *, seed: int = 0, longest: int = 40) -> list[Example]:
    """Examples of different lengths; tokens from 1 on, so that no token looks like padding."""
    generator = random.Random(seed)
    examples = []
    for line in range(1, count + 1):
        length = generator.randint(2, longest)
        scored = [False, *(generator.random() < 0.5 for _ in range(length - 1))]
        scored[generator.randrange(1, length)] = True
        examples.append(Example(f"val.jsonl:{line}", tuple(generator.choices(range(1, 1000), k=length)), tuple(scored)))
    return examples


def predictions(batch: Batch) -> set[tuple[int, int, int, tuple[int, ...]]]:
    """(record, place, label, tokens seen) of everything that the batch scores, read off its tensors."""
    width = batch.input_ids.shape[1]
    found = []
    for position, label, owner in zip(
        batch.positions.tolist(), batch.labels.tolist(), batch.owners.tolist(), strict=True
    ):
        row, column = divmod(position, width)
        assert row == owner
        seen = tuple(batch.input_ids[row, : column + 1].tolist())
        found.append((batch.indices[row], column + 1, label, seen))
    assert len(set(found)) == len(found)
    return set(found)


def brute_force(examples: list[Example]) -> set[tuple[int, int, int, tuple[int, ...]]]:
    """The same from the definition: token t is predicted from the tokens before t."""
    return {
        (index, place, example.input_ids[place], example.input_ids[:place])
        for index, example in enumerate(examples)
        for place in range(1, len(example.input_ids))
        if example.scored[place]
    }


@pytest.mark.parametrize("budget", [1, 40, 100, 512, 100_000])
def test_every_scored_token_is_predicted_once_from_what_stands_before_it(budget: int) -> None:
    examples = random_examples(57)
    batches = plan_batches(examples, batch_tokens=budget)
    found = [prediction for batch in batches for prediction in predictions(batch)]
    assert len(found) == len(set(found)) == sum(batch.scored_tokens for batch in batches)
    assert set(found) == brute_force(examples)
    assert len(found) == sum(example.scored_tokens for example in examples)


@pytest.mark.parametrize("budget", [1, 40, 100, 512, 100_000])
def test_each_record_is_in_one_batch_and_the_budget_is_kept(budget: int) -> None:
    examples = random_examples(57, seed=1)
    batches = plan_batches(examples, batch_tokens=budget)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(57))
    for batch in batches:
        assert batch.tokens == batch.input_ids.numel()
        assert batch.tokens <= budget or len(batch.indices) == 1


def test_no_batch_could_take_one_more_record() -> None:
    examples = random_examples(57, seed=2)
    batches = plan_batches(examples, batch_tokens=200)
    for batch, following in zip(batches, batches[1:], strict=False):
        next_length = len(examples[following.indices[0]].input_ids)
        assert next_length * (len(batch.indices) + 1) > 200


def test_a_budget_that_fits_exactly_is_used() -> None:
    examples = [Example(str(i), (1, 2, 3, 4), (False, True, True, True)) for i in range(6)]
    assert [batch.indices for batch in plan_batches(examples, batch_tokens=12)] == [(0, 1, 2), (3, 4, 5)]
    assert [batch.indices for batch in plan_batches(examples, batch_tokens=11)] == [(0, 1), (2, 3), (4, 5)]


def test_records_are_sorted_by_length_and_ties_keep_their_order() -> None:
    examples = random_examples(57, seed=3, longest=6)
    order = [i for batch in plan_batches(examples, batch_tokens=30) for i in batch.indices]
    assert order == sorted(range(57), key=lambda i: (len(examples[i].input_ids), i))


def test_padding_is_on_the_right_and_the_width_is_that_of_the_longest() -> None:
    examples = random_examples(9, seed=4)
    batch = make_batch(examples, range(9))
    lengths = [len(example.input_ids) for example in examples]
    assert batch.input_ids.shape == (9, max(lengths))
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        assert tuple(batch.input_ids[row, :length].tolist()) == example.input_ids
        assert not batch.input_ids[row, length:].any()


def test_padding_is_never_scored_nor_a_label_even_where_a_token_equals_it() -> None:
    """Masks are by place: a record that holds the padding's id, or ends with it, loses nothing."""
    examples = [
        Example("1", (5, 0, 0), (False, True, True)),
        Example("2", (5, 6, 7, 0, 0), (False, False, True, True, True)),
    ]
    batch = make_batch(examples, (0, 1))
    assert batch.labels.tolist() == [0, 0, 7, 0, 0]
    assert batch.positions.tolist() == [0, 1, 6, 7, 8]
    assert batch.owners.tolist() == [0, 0, 1, 1, 1]


def test_a_batch_takes_the_records_in_the_order_asked_for() -> None:
    examples = random_examples(5, seed=5)
    batch = make_batch(examples, iter((3, 1)))
    assert batch.indices == (3, 1)
    assert tuple(batch.input_ids[0, : len(examples[3].input_ids)].tolist()) == examples[3].input_ids


def test_the_plan_is_the_same_every_time() -> None:
    one, two = (plan_batches(random_examples(30), batch_tokens=100) for _ in range(2))
    assert [b.indices for b in one] == [b.indices for b in two]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))


def test_no_records_make_no_batches() -> None:
    assert plan_batches([], batch_tokens=100) == []


def test_a_weighted_record_lends_its_weight_to_each_of_its_scored_tokens() -> None:
    examples = [
        replace(example, weight=weight)
        for example, weight in zip(random_examples(9, seed=6), [1.0, 2.0, 0.25] * 3, strict=True)
    ]
    batch = make_batch(examples, range(9))
    assert batch.weights is not None and batch.weights.dtype == torch.float64
    assert batch.weights.tolist() == [examples[owner].weight for owner in batch.owners.tolist()]
    assert batch.scored_tokens == sum(example.weight * example.scored_tokens for example in examples)


def test_records_that_count_once_carry_no_weights() -> None:
    batch = make_batch(random_examples(5), range(5))
    assert batch.weights is None and batch.scored_tokens == len(batch.labels)
