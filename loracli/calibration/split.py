"""Which records are held out: decided by their content and the seed, so that equal records never stand on both
sides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

from loracli.calibration.records import Record

MIN_HELD_OUT = 20  # below this, a paired interval says nothing


def held_out_count(records: int, share: float) -> int:
    """`share` of the records, at least 20, at most half."""
    return min(max(math.ceil(share * records), MIN_HELD_OUT), records // 2)


def split_records(records: Sequence[Record], count: int, *, seed: int) -> tuple[list[Record], list[Record]]:
    """(kept, held out), each in file order.

    Records are ordered by a hash of seed and content, and whole groups of equal records are held out until there are
    `count`.
    """
    order = sorted({record.fingerprint for record in records}, key=lambda fingerprint: _key(seed, fingerprint))
    groups: dict[str, list[Record]] = {fingerprint: [] for fingerprint in order}
    for record in records:
        groups[record.fingerprint].append(record)
    chosen: set[str] = set()
    held = 0
    for fingerprint in order:
        if held >= count:
            break
        chosen.add(fingerprint)
        held += len(groups[fingerprint])
    return (
        [record for record in records if record.fingerprint not in chosen],
        [record for record in records if record.fingerprint in chosen],
    )


def split_files(
    files: Sequence[Sequence[Record]], share: float, *, seed: int
) -> tuple[list[list[Record]], list[list[Record]]]:
    """(kept, held out) of each file, so that each stands on both sides as far as it has different records.

    `held_out_count` of all records together, from each file by its size. A record that is held out of one file is held
    out of all.
    """
    total = sum(len(records) for records in files)
    count = held_out_count(total, share)
    chosen: set[str] = set()
    for records in files:
        part = min(-(-count * len(records) // total), len(records) // 2)
        chosen |= {record.fingerprint for record in split_records(records, part, seed=seed)[1]}
    return (
        [[record for record in records if record.fingerprint not in chosen] for records in files],
        [[record for record in records if record.fingerprint in chosen] for records in files],
    )


def dealt(records: Sequence[Record], count: int, *, seed: int) -> list[list[Record]]:
    """The records in `count` parts, each in file order; equal records in the same one."""
    order = sorted({record.fingerprint for record in records}, key=lambda fingerprint: _key(seed, fingerprint))
    part_of = {fingerprint: place % count for place, fingerprint in enumerate(order)}
    return [[record for record in records if part_of[record.fingerprint] == part] for part in range(count)]


Item = TypeVar("Item")


def shuffled(items: Sequence[Item], *, seed: int) -> list[Item]:
    """The items in an order that depends on the seed alone, the same on every machine."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: _key(seed, str(i)))]


def _key(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()
