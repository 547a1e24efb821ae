"""Damaged JSONL: the line that is reported is the line that was damaged."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracli.calibration.records import read_records
from loracli.errors import CalibrationError
from tests.faults.trials import Tally, trials

WORDS = ("sum", "é", "猫", "\u2028", "\u202e", '"', "\\", "{", "}", "[", "\t", "null", "0")


def record(draw: random.Random) -> dict[str, Any]:
    prompt, completion = ("".join(draw.choices(WORDS, k=draw.randrange(1, 8))) + "x" for _ in range(2))
    return {"prompt": prompt, "completion": completion}


def line_of(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def with_value(value: object) -> Callable[[dict[str, Any]], bytes]:
    return lambda record: line_of({**record, "completion": value})


# Each of these is wrong whatever the record is.
CLASSES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "cut": lambda record: line_of(record)[:-1],
    "half": lambda record: line_of(record)[: len(line_of(record)) // 2],
    "a comma more": lambda record: line_of(record)[:-1] + b",}",
    "single quotes": lambda record: b"{'prompt': 'x', 'completion': 'y'}",
    "a comment": lambda record: line_of(record) + b" // why",
    "two records": lambda record: line_of(record) * 2,
    "not UTF-8": lambda record: line_of(record).replace(b"x", b"\xff"),
    "UTF-16": lambda record: json.dumps(record).encode("utf-16"),
    "a NUL": lambda record: line_of(record) + b"\0",
    "a byte order mark": lambda record: b"\xef\xbb\xbf" + line_of(record),
    "text": lambda record: b"nonsense",
    "a list": lambda record: line_of([record]),
    "a string": lambda record: line_of("text"),
    "a number": lambda record: b"5",
    "null": lambda record: b"null",
    "an empty object": lambda record: b"{}",
    "a key missing": lambda record: line_of({"prompt": record["prompt"]}),
    "a key twice": lambda record: line_of(record)[:-1] + b', "prompt": "again"}',
    "another shape": lambda record: line_of({"messages": [{"role": "user", "content": "x"}]}),
    "preferences": lambda record: line_of({"chosen": "a", "rejected": "b"}),
    "a null value": with_value(None),
    "a number for text": with_value(5),
    "a list for text": with_value(["x"]),
    "an object for text": with_value({"x": "y"}),
    "an empty completion": with_value(""),
    "a blank completion": with_value(" \n\t"),
    "NaN": lambda record: line_of(record)[:-1] + b', "n": NaN}',
    "Infinity": lambda record: line_of(record)[:-1] + b', "n": -Infinity}',
    "a lone surrogate": lambda record: b'{"prompt": "\\ud800", "completion": "x"}',
    "brackets without end": lambda record: b"[" * 100_000,
}


def reported(path: Path) -> list[int]:
    """The lines that are refused."""
    try:
        read_records(path)
    except CalibrationError as error:
        found = [re.match(rf"{re.escape(str(path))}:(\d+): .", problem) for problem in error.problems]
        assert found and all(found), error.problems
        return [int(match[1]) for match in found if match]
    return []


def file_with(path: Path, draw: random.Random, damage: Callable[[bytes, dict[str, Any]], bytes]) -> tuple[int, bytes]:
    """Writes records, one of them damaged, with blank lines between; the number of that line, and what it is."""
    records = [record(draw) for _ in range(draw.randrange(3, 12))]
    lines = [line_of(one) for one in records]
    place = draw.randrange(1, len(lines))  # the first one decides the shape
    lines[place] = damage(lines[place], records[place])
    data, number = b"", 0
    for index, line in enumerate(lines):
        blank = draw.choice([0, 0, 0, 1, 2])
        data += b"\n" * blank + line + draw.choice([b"\n", b"\r\n"])
        if index <= place:
            number += blank + 1
    path.write_bytes(data)
    return number, lines[place]


@pytest.mark.parametrize("name", CLASSES)
def test_each_way_to_spoil_a_line_is_reported_at_its_line(tmp_path: Path, tally: Tally, name: str) -> None:
    draw = random.Random(name)
    for _ in range(3):
        number, line = file_with(tmp_path / "val.jsonl", draw, lambda line, record: CLASSES[name](record))
        assert reported(tmp_path / "val.jsonl") == [number], line[:200]
        tally.add("spoilt JSONL lines, 30 classes", "reported at its line")


def damaged(line: bytes, draw: random.Random) -> bytes:
    """Random bytes of one line, never a line end."""
    result = bytearray(line)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        place, byte = draw.randrange(len(result)), draw.choice([*range(10), *range(11, 256)])
        match draw.randrange(3):
            case 0:
                result[place] = byte
            case 1:
                result.insert(place, byte)
            case _:
                del result[place : place + draw.randrange(1, 5)]
    return bytes(result) or b"x"


def is_sound(line: bytes) -> bool:
    """By Python's own parser, and the two keys."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        value = json.loads(line.decode(), object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return False
    texts = [value.get(name) for name in ("prompt", "completion")] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) for text in texts) and bool(str(texts[-1]).strip())


@trials(200, 2000)
def test_random_damage_is_reported_at_its_line_and_nowhere_else(tmp_path: Path, tally: Tally, count: int) -> None:
    draw = random.Random(0)
    bad = 0
    for _ in range(count):
        number, line = file_with(tmp_path / "val.jsonl", draw, lambda line, record: damaged(line, draw))
        lines = reported(tmp_path / "val.jsonl")
        assert lines == ([] if is_sound(line) or not line.strip() else [number]), line
        bad += bool(lines)
        tally.add("JSONL with random damage", "reported at its line" if lines else "still sound")
    assert bad > count / 2
