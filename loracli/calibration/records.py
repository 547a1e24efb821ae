"""From FILE to checked records: `FILE`, `FILE:WEIGHT`, or `-` for standard input; and `@ADAPTER` behind it where they
are the own ones of an adapter.

The first record whose keys are those of a shape of `calibration.shapes` decides; every other must have that shape too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeAlias

from loracli.calibration.fields import (
    SYSTEM_KEYS,
    DoubtfulMark,
    FileMarks,
    LineError,
    check_context,
    check_marks,
    check_media,
    check_text,
    grades,
    is_nothing,
    kind_of,
    parse_fields,
)
from loracli.calibration.file_forms import MAX_BYTES, FileForm, Unreadable, decoded, numbered, too_large
from loracli.calibration.shapes import Shape, detect_shape, keys_of, keys_of_shapes, read_content, shown_keys
from loracli.errors import CalibrationError, UsageError
from loracli.progress import SILENT, Progress
from loracli.system.files import CONFIG_FILE
from loracli.system.near import near_path
from loracli.system.strict_json import StrictJsonError, parse_json

_STDIN = "-"
# What a shell's <(...) gives, or /dev/stdin: a pipe that is open already, and so has somebody who writes.
_OPEN_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_WEIGHTS = (1e-6, 1e6)  # least and greatest; losses are multiplied in float32


@dataclass(frozen=True)
class DataSource:
    """A file of records.

    Args:
        path: None for standard input.
        weight: how many times each scored token counts.
        fields: other names of what is read of a record, as `prompt=question,completion=answer`; None for none.
        adapter: whose own records these are, by a name of it; None for records of all.
    """

    said_as: ClassVar[type] = Path  # to those who call a function, who give nothing else

    path: Path | None
    weight: float = 1.0
    fields: str | None = None
    adapter: str | None = None

    def __str__(self) -> str:
        """As messages call it, so that an editor can open `file:line`."""
        return "<stdin>" if self.path is None else str(self.path)

    @property
    def name(self) -> str:
        """As recipes call it: without its folder."""
        return "<stdin>" if self.path is None else self.path.name

    @property
    def read_once(self) -> bool:
        """Whether it is a pipe, which only one reader gets."""
        return self.path is None or str(self.path).startswith(_OPEN_PIPES)

    def read(self) -> bytes:
        """Everything in it.

        Raises:
            CalibrationError: if it cannot be read, is neither a file nor an open pipe, is too large, or changes
                while it is read.
        """
        try:
            if self.path is None:
                return self._within(sys.stdin.buffer)
            # O_NONBLOCK: opening a FIFO that nobody writes must not hang.
            descriptor = os.open(self.path, os.O_RDONLY | (0 if self.read_once else os.O_NONBLOCK))
            with open(descriptor, "rb") as file:
                before = os.fstat(descriptor)
                if self.read_once and not stat.S_ISDIR(before.st_mode):
                    return self._within(file)
                if not stat.S_ISREG(before.st_mode):
                    raise CalibrationError(
                        f"{self} cannot be read: it is not a regular file",
                        hint=f"of a pipe, give what it holds: cat {shlex.quote(str(self))} | loracat ... --data -",
                    )
                data = self._within(file)
                after = os.fstat(descriptor)
        except OSError as error:
            raise self._unreadable(error) from None
        if (len(data), after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise CalibrationError(f"{self} changed while it was read", hint="wait until it is written, or copy it")
        return data

    def check_there(self) -> None:
        """Raises CalibrationError if nothing is there; it is not read."""
        try:
            if self.path is not None:
                os.stat(self.path)
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> CalibrationError:
        return CalibrationError(f"{self} cannot be read: {error.strerror}", hint=self._way_out())

    def _way_out(self) -> str | None:
        """What to name instead of what is not a file."""
        if self.path is None:
            return None
        if (self.path / CONFIG_FILE).is_file():
            return f"it is an adapter, which is named with --adapters: --adapters {shlex.quote(str(self))}"
        first, comma, _ = str(self.path).partition(",")
        if comma and Path(first).is_file():
            return f"blanks separate files: {' '.join(map(shlex.quote, str(self.path).split(',')))}"
        file, colon, _ = str(self.path).rpartition(":")
        if colon and Path(file).is_file():
            return f"what stands behind the colon is a weight, which is a number: {shlex.quote(file)}:2"
        if "*" in self.path.name:
            return "the shell writes out a pattern that stands without quotes, where a file matches"
        return near_path(self.path, Path.is_file)

    def _within(self, file: BinaryIO) -> bytes:
        data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            too_large(f"{self} has more than {MAX_BYTES >> 20} MiB")
        return data


DataPaths: TypeAlias = str | Path | DataSource | Sequence[str | Path | DataSource]


def _parse_source(text: str | Path | DataSource) -> DataSource:
    """`FILE`, `FILE:WEIGHT` or `-`, and `@ADAPTER` behind a file that there is; where a file of exactly that name
    exists, it is the file.

    Raises:
        UsageError: for a weight that is not between 1e-6 and 1e6.
    """
    if isinstance(text, DataSource):
        return text
    text = str(text)
    if "@" in text and not Path(text).exists():
        for place in (place for place, letter in enumerate(text) if letter == "@"):
            source, adapter = _parse_weighted(text[:place]), text[place + 1 :]
            if adapter and (source.path is None or (text[:place] and source.path.exists())):
                return replace(source, adapter=adapter)
    return _parse_weighted(text)


def _parse_weighted(text: str) -> DataSource:
    file, colon, number = text.rpartition(":")
    weight = _number(number)
    if not colon or not file or weight is None or Path(text).exists():
        return DataSource(None if text == _STDIN else Path(text))
    if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:  # also refuses NaN
        raise UsageError(f"the weight of {text} is not between {_WEIGHTS[0]:g} and {_WEIGHTS[1]:g}")
    return DataSource(None if file == _STDIN else Path(file), weight)


def parse_sources(data: DataPaths, *, owned: bool = False) -> tuple[DataSource, ...]:
    """One source or several.

    Args:
        data: as they are typed, or parsed.
        owned: whether records may be one adapter's own.
    Raises:
        UsageError: if there is none, one is given twice, or records are an adapter's own where that says nothing.
    """
    texts = [data] if isinstance(data, (str, Path, DataSource)) else list(data)
    sources = tuple(_parse_source(text) for text in texts)
    if not sources:
        raise UsageError("no data file is given")
    seen: set[Path | None] = set()
    for source in sources:
        if source.adapter is not None and not owned:
            raise UsageError(
                f"whose records {source}@{source.adapter} are has no use here",
                hint=f"leave out @{source.adapter}; a method that goes by it, as regmean, takes it with --fit-data",
            )
        place = source.path and Path(os.path.realpath(source.path))
        if place in seen:
            shared = "without @ADAPTER it is for all adapters"
            hint = shared if source.adapter else f"to count it twice, give it a weight: {source}:2"
            raise UsageError(f"{source} is given twice", hint=hint)
        seen.add(place)
    return sources


def with_fields(data: DataPaths, fields: str | None) -> tuple[DataSource, ...]:
    """The sources, each with other names of what is read; they may be one adapter's own.

    Raises:
        UsageError: if a source or the names cannot be understood.
    """
    parse_fields(fields)
    return tuple(replace(source, fields=fields) for source in parse_sources(data, owned=True))


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


_MAX_LINE_BYTES = 16 << 20
_MAX_CHOICES = 26
_MAX_TASK_LENGTH = 100  # it becomes the head of a table
SHOWN_LINES = 20
_MAX_UNREAD = 100  # keys that are kept of a file, each of at most as many characters

_HARMLESS = frozenset({"id", "task", "skill", "choices"})  # beside what a shape reads


@dataclass(frozen=True)
class Record:
    """One line of a calibration file.

    Args:
        place: `file:line`, for messages; of a JSON array the number of the record.
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
        """The number of its line, or of the record in an array, from 1."""
        return int(self.place.rpartition(":")[2])

    @cached_property  # it is asked for by every way to divide and count
    def fingerprint(self) -> str:
        """sha256 of the content alone, the same for equal records wherever they stand; a completion of nothing is a
        text."""
        content = self.content
        if content.get("prompt") == "":
            content = {"text": content["completion"]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file whose every line has been checked.

    Args:
        source: the file, with its weight.
        sha256: of its bytes, as they are on disk.
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


@dataclass
class _Read:
    """What has been read of a file so far."""

    records: dict[int, Record] = field(default_factory=dict)  # by line, as are the others
    problems: dict[int, LineError] = field(default_factory=dict)
    doubtful: dict[int, Record] = field(default_factory=dict)  # whose problem is a label of 0
    marks: FileMarks = field(default_factory=FileMarks)
    broken: int | None = None  # the record of an array behind which nothing can be told apart
    ignored: set[str] = field(default_factory=set)
    graded: set[str] = field(default_factory=set)
    systems: set[str] = field(default_factory=set)


def read_records(
    source: str | Path | DataSource,
    *,
    shape: Shape | None = None,
    fields: str | None = None,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> CalibrationFile:
    """Reads a file of JSON objects: one on each line, or in one array; plain or gzipped.

    Args:
        source: the file, as `_parse_source` takes it.
        shape: of the records; None to see it from them.
        fields: other names of what is read, as `parse_fields` takes them; None for those of the source.
        skip_bad: leave bad lines out, and say which, as long as there is a good one.
        progress: told of bad lines that are left out, and of what is not read.
    Raises:
        UsageError: if `fields` cannot be understood.
        CalibrationError: if the file cannot be read, is in another form, is empty, or has bad lines: each as
            `file:line: path: reason`.
    """
    source = _parse_source(source)
    names = parse_fields(source.fields if fields is None else fields)
    data = source.read()
    form, text = decoded(data, source.path, str(source))
    form = replace(form, names=names)
    read = _Read()
    for number, line in numbered(text, form):
        if isinstance(line, Unreadable):
            read.broken = number
        try:
            record = _parse_line(line)
            shape = shape or detect_shape(_renamed(record, names), _there(record, names))
            _read_one(read, number, f"{source}:{number}", record, shape, names)
        except LineError as error:
            read.problems[number] = error
    if read.marks.classes:
        read.records |= read.doubtful
        read.problems = {number: error for number, error in read.problems.items() if number not in read.doubtful}
    for number, unmarked in read.marks.refused():
        if read.records.pop(number, None) is not None:
            read.problems[number] = unmarked
    problems = {number: f"{source}:{number}: {error}" for number, error in sorted(read.problems.items())}
    if not problems and not read.records:
        raise CalibrationError(f"{source} holds no records", hint="write one JSON object on each line")
    if shape is None or not read.records or (problems and not skip_bad) or read.broken:
        behind = f", and nothing behind record {read.broken} can be read" if read.broken else ""
        raise CalibrationError(
            f"{len(problems)} of {len(problems) + len(read.records)} records in {source} cannot be used{behind}",
            problems=tuple(problems.values()),
            hint=_way_out(read, form, skip_bad=skip_bad),
        )
    if problems:
        progress.warn(skipped_lines(source, tuple(problems), next(iter(problems.values()))))
    if read.systems:
        progress.note(f"{source}: {shown_keys(read.systems)}: becomes the first turn of its conversation")
    doubtful = read.marks.doubtful()
    if unread := read.ignored - read.graded - set(doubtful):
        progress.note(f"{source}: these keys are not read: {shown_keys(unread)}")
    if read.graded:
        progress.warn(f"{source}: {shown_keys(read.graded)}: not read; every answer is learnt, whatever its grade")
    if doubtful:
        progress.warn(f"{source}: {shown_keys(doubtful)}: not read; every answer is learnt, whatever it says")
    return CalibrationFile(
        source=source,
        sha256=hashlib.sha256(data).hexdigest(),
        shape=shape,
        records=tuple(record for _, record in sorted(read.records.items())),
        ignored_keys=tuple(sorted(key[:_MAX_UNREAD] for key in read.ignored)[:_MAX_UNREAD]),
        skipped=tuple(problems),
    )


def _read_one(
    read: _Read, number: int, place: str, record: dict[str, Any], shape: Shape, names: Mapping[str, str]
) -> None:
    """Takes one record in, if it can be used."""
    fields, known = _renamed(record, names), keys_of(shape)
    found = Record(place, read_content(fields, shape), _task(fields), _choices(fields))
    read.marks.count_label(fields)
    check_media(fields, known)
    check_context(fields, known | keys_of_shapes(fields), found.content)
    unread = fields.keys() - known - _HARMLESS
    read.ignored |= unread | _shadowed(record, names)
    read.graded |= grades(fields)
    read.systems |= {key for key in SYSTEM_KEYS if key in known and not is_nothing(fields.get(key))}
    try:
        check_marks(fields, has_answer=shape != "text", chosen="chosen" in names.values())
    except DoubtfulMark:
        read.doubtful[number] = found
        raise
    read.marks.add(number, fields, unread, has_answer=shape != "text")
    read.records[number] = found


def _way_out(read: _Read, form: FileForm, *, skip_bad: bool) -> str | None:
    """The hint for a file with bad lines: what mends all of a kind, if that is known."""
    if read.broken is not None:
        return f"fix the array at record {read.broken}: nothing behind it can be read, so it cannot be left out"
    found = next((error.way_out for error in read.problems.values() if error.way_out is not None), None)
    if found is not None:
        return found(form)
    if not read.records:
        return "fix these lines; docs/calibration-data.md has the shapes, and what to do about each refusal"
    if skip_bad:
        return None
    few = len(read.problems) <= len(read.records)
    return "fix these lines" + (", or leave them out with --skip-bad" if few else "")


def skipped_lines(source: DataSource, lines: tuple[int, ...], first_problem: str) -> str:
    """The warning that lines were left out: how many, the first numbers, and the first reason."""
    numbers = ", ".join(map(str, lines[:SHOWN_LINES])) + (", ..." if len(lines) > SHOWN_LINES else "")
    return f"{source}: {len(lines)} bad lines are left out: {numbers}; the first is {first_problem}"


def _parse_line(line: bytes | str | Unreadable) -> dict[str, Any]:
    if isinstance(line, Unreadable):
        raise LineError(line.reason)
    if len(line) > _MAX_LINE_BYTES:
        raise LineError(f"the line has {len(line)} bytes; at most {_MAX_LINE_BYTES} are read")
    try:
        fields = parse_json(line)
    except StrictJsonError as error:
        bare = (line.decode(errors="replace") if isinstance(line, bytes) else line).strip()
        if bare.startswith("{") and bare.endswith("},"):
            raise LineError("a comma behind the object", way_out=_without_commas) from None
        raise LineError(str(error)) from None
    if not isinstance(fields, dict):
        raise LineError(f"expected a JSON object, got {kind_of(fields)}")
    return fields


def _without_commas(form: FileForm) -> str:
    return "write one object on each line with nothing between them, or all in one array: [{...}, {...}]"


def _task(fields: dict[str, Any]) -> str | None:
    for key in ("task", "skill"):
        if (task := fields.get(key)) is not None:
            if isinstance(task, int) and not isinstance(task, bool):
                task = str(task)  # the number of a class
            task = check_text(task, key, may_be_empty=False)
            if len(task) > _MAX_TASK_LENGTH:
                raise LineError(f"{key}: longer than {_MAX_TASK_LENGTH} characters")
            return task
    return None


def _choices(fields: dict[str, Any]) -> tuple[str, ...]:
    """The options, where the key holds a list of different texts; other data sets use the key for other things."""
    value = fields.get("choices")
    if not isinstance(value, list) or not 2 <= len(value) <= _MAX_CHOICES:
        return ()
    texts = tuple(text for text in value if isinstance(text, str) and text)
    return texts if len(set(texts)) == len(value) else ()


def _renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The record with our names; a key that it lacks is left to what is missed later."""
    there = _there(fields, names)
    kept = {key: value for key, value in fields.items() if key not in there.values() and key not in there}
    return kept | {name: fields[key] for name, key in there.items()}


def _there(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """The names whose key the record has."""
    return {name: key for name, key in names.items() if key in fields}


def _shadowed(fields: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """Keys of the record whose names stand for another of its keys."""
    return {name for name, key in _there(fields, names).items() if name in fields and name != key}
