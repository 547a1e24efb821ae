"""What is held out: decided by content and seed, never by the order of the lines, and never on both sides."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest

from loracli.calibration.dataset import MIN_HELD_OUT, _held_out_count, _split_files, shuffled, split_records
from loracli.calibration.records import Record


def records(texts: list[str], file: str = "val.jsonl") -> list[Record]:
    return [Record(f"{file}:{line}", {"text": text}) for line, text in enumerate(texts, start=1)]


def texts_of(found: list[Record]) -> list[str]:
    return [record.content["text"] for record in found]


MANY = [f"record {i}" for i in range(100)]


def test_the_two_sides_are_all_records_in_file_order() -> None:
    kept, held = split_records(records(MANY), 30, seed=0)
    assert len(held) == 30
    assert sorted(r.line for r in kept + held) == list(range(1, 101))
    for side in (kept, held):
        assert [r.line for r in side] == sorted(r.line for r in side)


def test_the_same_seed_holds_out_the_same_and_another_seed_others() -> None:
    held = [texts_of(split_records(records(MANY), 30, seed=seed)[1]) for seed in (0, 0, 1, 2)]
    assert held[0] == held[1]
    assert held[0] != held[2] != held[3] != held[0]


def test_the_order_of_the_lines_does_not_matter() -> None:
    expected = set(texts_of(split_records(records(MANY), 30, seed=5)[1]))
    generator = random.Random(0)
    for _ in range(10):
        mixed = generator.sample(MANY, len(MANY))
        assert set(texts_of(split_records(records(mixed), 30, seed=5)[1])) == expected


def test_more_held_out_records_contain_the_fewer() -> None:
    few, more = (set(texts_of(split_records(records(MANY), count, seed=0)[1])) for count in (10, 40))
    assert few < more


def test_a_new_record_moves_few_others() -> None:
    """Adding lines to a file leaves what was held out held out, but for those that the new ones push across."""
    before = set(texts_of(split_records(records(MANY), 30, seed=0)[1]))
    after = set(texts_of(split_records(records([*MANY, "one more"]), 30, seed=0)[1]))
    assert len(before - after) <= 1


def test_equal_records_never_stand_on_both_sides() -> None:
    generator = random.Random(0)
    for seed in range(50):
        texts = generator.choices(MANY[:30], k=60)
        kept, held = split_records(records(texts), 20, seed=seed)
        assert not set(texts_of(kept)) & set(texts_of(held))
        assert len(kept) + len(held) == 60


def test_groups_of_equal_records_are_held_out_whole_until_there_are_enough() -> None:
    counts = Counter(random.Random(1).choices(MANY[:20], k=60))
    for seed in range(20):
        _, held = split_records(records(list(counts.elements())), 25, seed=seed)
        found = Counter(texts_of(held))
        assert all(found[text] == counts[text] for text in found)
        assert 25 <= len(held) < 25 + max(counts.values())


def test_a_count_of_zero_holds_out_nothing_and_of_all_everything() -> None:
    assert split_records(records(MANY), 0, seed=0)[1] == []
    assert split_records(records(MANY), 100, seed=0)[0] == []


def test_who_is_held_out_is_as_good_as_random() -> None:
    """Each record is held out about as often as any other: within five standard deviations over 400 seeds."""
    seen = Counter(t for seed in range(400) for t in texts_of(split_records(records(MANY[:20]), 5, seed=seed)[1]))
    for text in MANY[:20]:
        assert abs(seen[text] - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (1000, 0.2, 200),
        (101, 0.2, 21),
        (100, 0.2, 20),
        (99, 0.2, 20),
        (50, 0.2, 20),
        (40, 0.2, 20),
        (39, 0.2, 19),
        (10, 0.2, 5),
        (3, 0.2, 1),
        (1, 0.2, 0),
        (0, 0.2, 0),
        (1000, 0.9, 500),
        (1000, 0.01, 20),
        (1000, 0.5, 500),
    ],
)
def test_a_share_is_held_out_at_least_twenty_and_at_most_half(count: int, share: float, expected: int) -> None:
    assert MIN_HELD_OUT == 20
    assert _held_out_count(count, share) == expected


# Several files.


def test_one_file_is_split_as_it_is_alone() -> None:
    for count in (100, 41, 30, 3, 2):
        for share in (0.01, 0.2, 0.9):
            alone = split_records(records(MANY[:count]), _held_out_count(count, share), seed=3)
            assert _split_files([records(MANY[:count])], share, seed=3) == ([alone[0]], [alone[1]])


def test_every_file_stands_on_both_sides_by_its_size() -> None:
    files = [records([f"{name} {i}" for i in range(count)], name) for name, count in (("a", 100), ("b", 40), ("c", 2))]
    for seed in range(10):
        kept, held = _split_files(files, 0.2, seed=seed)
        assert [len(side) for side in held] == [21, 9, 1]  # 29 of 142, by size, rounded up
        for file, *sides in zip(files, kept, held, strict=True):
            assert sorted((r for side in sides for r in side), key=lambda r: r.line) == file


def test_small_files_together_hold_out_what_one_file_of_all_would() -> None:
    files = [records([f"{name} {i}" for i in range(40)], name) for name in "abcde"]
    assert sum(len(side) for side in _split_files(files, 0.2, seed=0)[1]) == _held_out_count(200, 0.2) == 40


def test_equal_records_of_different_files_never_stand_on_both_sides() -> None:
    generator = random.Random(0)
    for seed in range(50):
        files = [records(generator.choices(MANY[:60], k=count), str(count)) for count in (90, 30, 50)]
        kept, held = _split_files(files, 0.2, seed=seed)
        assert not {t for side in kept for t in texts_of(side)} & {t for side in held for t in texts_of(side)}
        assert all(len(one) + len(other) == len(file) for one, other, file in zip(kept, held, files, strict=True))


# Shuffling.


def test_a_shuffle_is_a_permutation_that_depends_on_the_seed_alone() -> None:
    items = list(range(50))
    one, same, other = (shuffled(items, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert sorted(one) == items != one
    assert shuffled([chr(i + 100) for i in items], seed=3) == [chr(i + 100) for i in one]


def test_the_shuffle_and_the_split_are_those_of_sha256() -> None:
    """The order is part of what a seed means, on every machine and in every version: a change moves every fit."""
    order = sorted(range(8), key=lambda i: hashlib.sha256(f"7:{i}".encode()).digest())
    assert shuffled("abcdefgh", seed=7) == ["abcdefgh"[i] for i in order]
    texts = MANY[:8]
    prints = {t: hashlib.sha256(json.dumps({"text": t}).encode()).hexdigest() for t in texts}
    first = min(texts, key=lambda t: hashlib.sha256(f"7:{prints[t]}".encode()).digest())
    assert texts_of(split_records(records(texts), 1, seed=7)[1]) == [first]
