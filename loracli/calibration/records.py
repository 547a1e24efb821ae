"""Calibration records: JSONL in the three shapes that TRL and mlx-lm users write, validated line by line.

    {"prompt": "...", "completion": "..."}                 scored: the completion
    {"messages": [{"role": "...", "content": "..."}]}      scored: the assistant turns
    {"text": "..."}                                        scored: everything

The first record decides the shape; every other must have it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loracli.errors import CalibrationError
from loracli.strict_json import StrictJsonError, parse_json

MAX_LINE_BYTES = 16 << 20
ROLES = ("system", "user", "assistant", "tool")

Shape = Literal["prompt-completion", "messages", "text"]

_KEYS: dict[Shape, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_HARMLESS = frozenset({"id", "task", "skill"})  # for the user's own book-keeping


@dataclass(frozen=True)
class Record:
    """One line of a calibration file.

    Args:
        line: its number, from 1.
        content: the keys of its shape; strings, or the list of messages.
    """

    line: int
    content: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of the content alone, the same for equal records wherever they stand."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file whose every line has been checked.

    Args:
        name: the file's name without its folder.
        sha256: of its bytes.
        shape: of all its records.
        records: in file order, blank lines left out.
        ignored_keys: keys that some record has and nobody reads.
    """

    name: str
    sha256: str
    shape: Shape
    records: tuple[Record, ...]
    ignored_keys: tuple[str, ...]


def read_records(path: str | Path) -> CalibrationFile:
    """Reads a JSONL file.

    Raises:
        CalibrationError: if the file cannot be read, is empty, or has bad lines: each as `file:line: path: reason`.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    records: list[Record] = []
    problems: list[str] = []
    ignored: set[str] = set()
    shape: Shape | None = None
    for number, line in _lines(data):
        try:
            fields = _parse_line(line)
            shape = shape or _shape_of(fields)
            records.append(Record(number, _content(fields, shape)))
            ignored |= fields.keys() - set(_KEYS[shape]) - _HARMLESS
        except _LineError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        total = len(problems) + len(records)
        raise CalibrationError(
            f"{len(problems)} of {total} records in {path} cannot be used",
            problems=tuple(problems),
            hint="each line is one JSON object: prompt and completion, or messages, or text",
        )
    if shape is None:
        raise CalibrationError(f"{path} holds no records", hint="write one JSON object on each line")
    return CalibrationFile(path.name, hashlib.sha256(data).hexdigest(), shape, tuple(records), tuple(sorted(ignored)))


class _LineError(Exception):
    """`path: reason` of one bad line."""


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    # Split on the byte, not with str.splitlines: U+2028 inside a string is no line end.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse_line(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _LineError(f"the line has {len(line)} bytes; at most {MAX_LINE_BYTES} are read")
    try:
        fields = parse_json(line)
    except StrictJsonError as error:
        raise _LineError(str(error)) from None
    if not isinstance(fields, dict):
        raise _LineError(f"expected a JSON object, got {_kind(fields)}")
    return fields


def _shape_of(fields: dict[str, Any]) -> Shape:
    for shape, keys in _KEYS.items():
        if keys[0] in fields:
            return shape
    if "chosen" in fields or "rejected" in fields:
        raise _LineError("chosen/rejected: preference data has no single completion to learn from")
    raise _LineError(f"has none of the keys prompt, messages, text; found: {', '.join(sorted(fields)) or 'nothing'}")


def _content(fields: dict[str, Any], shape: Shape) -> dict[str, Any]:
    missing = [key for key in _KEYS[shape] if key not in fields]
    if missing:
        raise _LineError(f"{missing[0]}: missing; the first record has the shape {shape}")
    if shape == "messages":
        if fields.get("tools"):
            raise _LineError("tools: tool definitions are not read; render the prompt and use prompt and completion")
        return {"messages": _messages(fields["messages"])}
    for key in _KEYS[shape]:
        empty_is_fine = key == "prompt"
        _check_text(fields[key], key, empty_is_fine=empty_is_fine)
    return {key: fields[key] for key in _KEYS[shape]}


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _LineError(f"messages: expected a list of messages, got {_kind(value)}")
    for index, message in enumerate(value):
        path = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _LineError(f"{path}: expected an object, got {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise _LineError(f"{path}.role: expected one of {', '.join(ROLES)}, got {json.dumps(role)}")
        _check_text(message.get("content"), f"{path}.content", empty_is_fine=role != "assistant")
        others = sorted(message.keys() - {"role", "content"})
        if others:
            raise _LineError(f"{path}.{others[0]}: only role and content are read")
    if value[0]["role"] == "assistant":
        raise _LineError("messages[0].role: an assistant turn with nothing before it")
    if not any(message["role"] == "assistant" for message in value):
        raise _LineError("messages: no assistant turn, so nothing is scored")
    return value


def _check_text(value: Any, path: str, *, empty_is_fine: bool) -> None:
    if not isinstance(value, str):
        raise _LineError(f"{path}: expected a string, got {_kind(value)}")
    if not empty_is_fine and not value.strip():
        raise _LineError(f"{path}: empty")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else kinds[type(value)]
