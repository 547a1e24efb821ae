"""From FILE to checked records.

Where records come from: `FILE`, `FILE:WEIGHT`, or `-` for standard input.

Calibration records: JSONL, every line checked, in one of the shapes of `loracli.calibration.shapes`.

The first record whose keys are those of a shape decides; every other must have that shape too.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loracli.calibration.shapes import LineError, Shape, check_text, detect_shape, keys_of, kind_of, read_content
from loracli.errors import CalibrationError, UsageError
from loracli.progress import SILENT, Progress
from loracli.system.strict_json import StrictJsonError, parse_json

DataPaths: TypeAlias = str | Path | Sequence[str | Path]

STDIN = "-"
WEIGHTS = (1e-6, 1e6)  # least and greatest; losses are multiplied in float32


@dataclass(frozen=True)
class DataSource:
    """A file of records.

    Args:
        path: None for standard input.
        weight: how many times each scored token counts.
    """

    path: Path | None
    weight: float = 1.0

    def __str__(self) -> str:
        """As messages call it, so that an editor can open `file:line`."""
        return "<stdin>" if self.path is None else str(self.path)

    @property
    def name(self) -> str:
        """As recipes call it: without its folder."""
        return "<stdin>" if self.path is None else self.path.name

    def read(self) -> bytes:
        """Everything in it.

        Raises:
            CalibrationError: if it cannot be read.
        """
        try:
            return sys.stdin.buffer.read() if self.path is None else self.path.read_bytes()
        except OSError as error:
            raise CalibrationError(f"{self} cannot be read: {error.strerror}") from None


def parse_source(text: str | Path) -> DataSource:
    """`FILE`, `FILE:WEIGHT` or `-`; where a file of exactly that name exists, it is the file.

    Raises:
        UsageError: for a weight that is not between 1e-6 and 1e6.
    """
    text = str(text)
    file, colon, number = text.rpartition(":")
    weight = _number(number)
    if not colon or not file or weight is None or Path(text).exists():
        return DataSource(None if text == STDIN else Path(text))
    if not WEIGHTS[0] <= weight <= WEIGHTS[1]:  # also refuses NaN
        raise UsageError(f"the weight of {text} is not between {WEIGHTS[0]:g} and {WEIGHTS[1]:g}")
    return DataSource(None if file == STDIN else Path(file), weight)


def parse_sources(data: DataPaths) -> tuple[DataSource, ...]:
    """One source or several.

    Raises:
        UsageError: if there is none, or one is given twice.
    """
    texts = [data] if isinstance(data, (str, Path)) else list(data)
    sources = tuple(parse_source(text) for text in texts)
    if not sources:
        raise UsageError("no data file is given")
    seen: set[Path | None] = set()
    for source in sources:
        place = source.path and source.path.resolve()
        if place in seen:
            raise UsageError(f"{source} is given twice", hint=f"to count it twice, give it a weight: {source}:2")
        seen.add(place)
    return sources


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


MAX_LINE_BYTES = 16 << 20
MAX_CHOICES = 26
MAX_TASK_LENGTH = 100  # it becomes the head of a table
SHOWN_LINES = 20

_HARMLESS = frozenset({"id", "task", "skill", "choices"})  # beside what a shape reads


@dataclass(frozen=True)
class Record:
    """One line of a calibration file.

    Args:
        place: `file:line`, for messages.
        content: what is rendered, of one of three kinds: a text, prompt and completion, or a conversation.
        task: what it belongs to, for a table of its own; its key `task`, or `skill`.
        choices: texts that its last answer is one of, for a metric of multiple choice; its key `choices`.
    """

    place: str
    content: dict[str, Any]
    task: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def line(self) -> int:
        """The number of its line, from 1."""
        return int(self.place.rpartition(":")[2])

    @property
    def fingerprint(self) -> str:
        """sha256 of the content alone, the same for equal records wherever they stand."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file whose every line has been checked.

    Args:
        source: the file, with its weight.
        sha256: of its bytes.
        shape: of all its records.
        records: in file order, blank lines left out.
        ignored_keys: keys that some record has and nobody reads.
        skipped: numbers of the bad lines that were left out.
    """

    source: DataSource
    sha256: str
    shape: Shape
    records: tuple[Record, ...]
    ignored_keys: tuple[str, ...] = ()
    skipped: tuple[int, ...] = ()


def read_records(
    source: str | Path | DataSource,
    *,
    shape: Shape | None = None,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> CalibrationFile:
    """Reads a JSONL file.

    Args:
        source: the file, as `parse_source` takes it.
        shape: of the records; None to see it from them.
        skip_bad: leave bad lines out, and say which, as long as there is a good one.
        progress: told of bad lines that are left out.
    Raises:
        CalibrationError: if the file cannot be read, is empty, or has bad lines: each as `file:line: path: reason`.
    """
    if not isinstance(source, DataSource):
        source = parse_source(source)
    data = source.read()
    records: list[Record] = []
    problems: dict[int, str] = {}  # by line
    ignored: set[str] = set()
    for number, line in _lines(data):
        place = f"{source}:{number}"
        try:
            fields = _parse_line(line)
            shape = shape or detect_shape(fields)
            records.append(Record(place, read_content(fields, shape), _task(fields), _choices(fields)))
            ignored |= fields.keys() - keys_of(shape) - _HARMLESS
        except LineError as error:
            problems[number] = f"{place}: {error}"
    if not problems and not records:
        raise CalibrationError(f"{source} holds no records", hint="write one JSON object on each line")
    if shape is None or not records or (problems and not skip_bad):
        raise CalibrationError(
            f"{len(problems)} of {len(problems) + len(records)} records in {source} cannot be used",
            problems=tuple(problems.values()),
            hint=None if skip_bad else "mend these lines, or leave them out with --skip-bad",
        )
    if problems:
        progress.warn(skipped_lines(source, tuple(problems), next(iter(problems.values()))))
    digest = hashlib.sha256(data).hexdigest()
    return CalibrationFile(source, digest, shape, tuple(records), tuple(sorted(ignored)), tuple(problems))


def skipped_lines(source: DataSource, lines: tuple[int, ...], first_problem: str) -> str:
    """The warning that lines were left out: how many, the first numbers, and the first reason."""
    numbers = ", ".join(map(str, lines[:SHOWN_LINES])) + (", ..." if len(lines) > SHOWN_LINES else "")
    return f"{source}: {len(lines)} bad lines are left out: {numbers}; the first is {first_problem}"


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    # Split on the byte, not with str.splitlines: U+2028 inside a string is no line end.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse_line(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise LineError(f"the line has {len(line)} bytes; at most {MAX_LINE_BYTES} are read")
    try:
        fields = parse_json(line)
    except StrictJsonError as error:
        raise LineError(str(error)) from None
    if not isinstance(fields, dict):
        raise LineError(f"expected a JSON object, got {kind_of(fields)}")
    return fields


def _task(fields: dict[str, Any]) -> str | None:
    for key in ("task", "skill"):
        if fields.get(key) is not None:
            task = check_text(fields[key], key, may_be_empty=False)
            if len(task) > MAX_TASK_LENGTH:
                raise LineError(f"{key}: longer than {MAX_TASK_LENGTH} characters")
            return task
    return None


def _choices(fields: dict[str, Any]) -> tuple[str, ...]:
    """The options, where the key holds a list of different texts; other data sets use the key for other things."""
    value = fields.get("choices")
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_CHOICES:
        return ()
    texts = tuple(text for text in value if isinstance(text, str) and text)
    return texts if len(set(texts)) == len(value) else ()
