"""From the bytes of a data file to its records: JSON objects on lines, or one array of them, plain or gzipped.

Every other form is named for what it is, with one command that makes JSONL of it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from loracli.errors import CalibrationError

MAX_BYTES = 512 << 20  # of a file, and of what a compressed one holds
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20

_SPACE = re.compile(r"[ \t\n\r]*")
_ARRAY = re.compile(rb"\s*\[\s*\{")
_ENDS_IN_CR = re.compile(rb"\}[ \t]*\r\s*\{")
_PLAIN_END = re.compile(rb'["\d\]el}]\s*[}\]]\s*\Z')  # no zeros between its last characters
_HEADER_CELL = re.compile(r"[\w .\-/()]{1,60}")
# Keys that tell of a file beside the list of its records.
_ABOUT = ("version", "name", "description", "license", "author", "meta", "metadata", "info", "features", "config")
_FIRST_LINE = 1 << 16  # bytes of it that are looked at
# Names that make a line of words the header of a table.
_COLUMNS = frozenset(
    "answer chosen completion content conversation conversations id input instruction label messages output prompt "
    "query question response role source target task text".split()
)


@dataclass(frozen=True)
class FileForm:
    """How a file holds its records.

    Args:
        path: None for standard input.
        gzipped: whether it is compressed.
        array: whether it is one JSON array.
        names: what it calls some of what is read: {"prompt": "question"}.
    """

    path: Path | None
    gzipped: bool = False
    array: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    def rewritten(self, row: str = "r", *, where: str = "True", having: str = "") -> str:
        """A command that writes JSONL of `row` for each record `r` for which `where` holds, both in Python; what it is
        `having` they call `c`."""
        lines = self._opened('encoding="utf-8-sig"')
        rows = f"json.load({lines})" if self.array else f"map(json.loads, filter(str.strip, {lines}))"
        condition = (f" for c in [{having}]" if having else "") + ("" if where == "True" else f" if {where}")
        return self._command(f"import gzip, json, sys; [print(json.dumps({row})) for r in {rows}{condition}]", "kept")

    def of_object(self, key: str) -> str:
        """The command for one object that holds the records in a list under `key`."""
        opened = self._opened('encoding="utf-8-sig"')
        rows = f"json.load({opened})[{json.dumps(key)}]"
        return self._command(f"import gzip, json, sys; [print(json.dumps(r)) for r in {rows}]", "rows")

    def of_columns(self, *, indexed: bool) -> str:
        """The command for one object that holds a table's columns: lists, or objects with the rows' index as keys."""
        opened = self._opened('encoding="utf-8-sig"')
        columns = "map(dict.values, t.values())" if indexed else "t.values()"
        code = f"t = json.load({opened}); [print(json.dumps(dict(zip(t, r)))) for r in zip(*{columns})]"
        return self._command(f"import gzip, json, sys; {code}", "rows")

    def of_long_objects(self) -> str:
        """The command for objects that are written over several lines each, and begin on one of their own."""
        opened = self._opened('encoding="utf-8-sig"')
        rows = f'filter(str.strip, re.split("(?m)^(?={{)", {opened}.read()))'
        return self._command(f"import gzip, json, re, sys; [print(json.dumps(json.loads(r))) for r in {rows}]", "rows")

    def of_table(self, delimiter: str) -> str:
        """The command for a table with a head."""
        options = "" if delimiter == "," else f", delimiter={json.dumps(delimiter)}"
        opened = self._opened('encoding="utf-8-sig", newline=""')
        rows = f"csv.DictReader({opened}{options})"
        code = f"import csv, gzip, json, sys; csv.field_size_limit(2**30); [print(json.dumps(r)) for r in {rows}]"
        return self._command(code, "rows")

    def of_encoding(self, encoding: str) -> str:
        """The command for a text in another encoding."""
        opened = self._opened(f'encoding="{encoding}"')
        return self._command(f"import gzip, sys; sys.stdout.buffer.write({opened}.read().encode())", "utf8")

    def of_xml(self) -> str:
        """The command that makes a record of each child of the root, and fields of its children."""
        file = "gzip.open(sys.argv[1])" if self.gzipped else "sys.argv[1]"
        row = '{c.tag: "".join(c.itertext()) for c in r}'
        code = f"import gzip, json, sys; from xml.etree import ElementTree; rows = ElementTree.parse({file}).getroot()"
        return self._command(f"{code}; [print(json.dumps({row})) for r in rows]", "rows")

    def of_arrow(self, module: str, rows: str) -> str:
        """The command for a file that pyarrow reads."""
        code = f"import json, sys, {module}; [print(json.dumps(r, default=str)) for r in {rows}.to_pylist()]"
        return self._command(code, "rows")

    def unpacked(self, module: str) -> str:
        """The command for a file that a module of Python decompresses."""
        code = f"import {module}, shutil, sys; shutil.copyfileobj({module}.open(sys.argv[1]), sys.stdout.buffer)"
        return self._command(code, "unpacked")

    @property
    def word(self) -> str:
        """The file's name for a command line."""
        return shlex.quote("FILE" if self.path is None else str(self.path))

    def _opened(self, options: str) -> str:
        return f'gzip.open(sys.argv[1], "rt", {options})' if self.gzipped else f"open(sys.argv[1], {options})"

    def _command(self, code: str, kind: str) -> str:
        """Runs `code` on the file, into JSONL beside it; `kind` tells its name from that of the file."""
        name = "FILE" if self.path is None else str(self.path)
        stem = str(Path(name.removesuffix(".gz")).with_suffix(""))
        if not self.gzipped:
            code = code.replace("gzip, ", "", 1)
        target = f"{stem}.jsonl" if f"{stem}.jsonl" != name.removesuffix(".gz") else f"{stem}.{kind}.jsonl"
        return f"python -c {shlex.quote(code)} {self.word} > {shlex.quote(target)}"


@dataclass(frozen=True)
class Unreadable:
    """In place of a record: why it and all after it cannot be told apart."""

    reason: str


def decoded(data: bytes, path: Path | None, named: str) -> tuple[FileForm, bytes]:
    """The form of a file, and its text in UTF-8 without a byte order mark.

    Args:
        data: of the file.
        path: of it, None for standard input.
        named: what messages call it.
    Raises:
        CalibrationError: if it is compressed and damaged or too large, or in a form that is not read.
    """
    gzipped = data.startswith(_GZIP)
    text = _gunzip(data, named) if gzipped else data
    form = FileForm(path, gzipped)
    _check_form(text, form, named)
    text = text.removeprefix(_BOM)
    return FileForm(path, gzipped, _is_array(text)), text


def numbered(text: bytes, form: FileForm) -> Iterator[tuple[int, bytes | str | Unreadable]]:
    """Each record with its number from 1: that of its line, or, in an array, its own."""
    return _elements(text) if form.array else _lines(text)


def _lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    # Split on the byte, not with str.splitlines: U+2028 inside a string is no line end.
    for number, line in enumerate(io.BytesIO(text), start=1):
        if line.strip():
            yield number, line.removesuffix(b"\n")


def _elements(data: bytes) -> Iterator[tuple[int, str | Unreadable]]:
    """Each is cut out with a plain parser, so that a strict one can judge it alone."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield 1, Unreadable(f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}")
        return
    decoder, number = json.JSONDecoder(), 0
    place = text.index("[") + 1
    while True:
        number += 1
        begin = _after_space(text, place)
        try:
            end = decoder.raw_decode(text, begin)[1]
        except json.JSONDecodeError as error:
            yield number, Unreadable(f"not valid JSON: {error.msg} (line {error.lineno} column {error.colno})")
            return
        except (RecursionError, ValueError) as error:
            yield number, Unreadable("nested too deeply" if isinstance(error, RecursionError) else str(error))
            return
        yield number, text[begin:end]
        place = _after_space(text, end)
        if text[place : place + 1] == ",":
            place += 1
            continue
        if text[place : place + 1] != "]":
            yield number + 1, Unreadable("not valid JSON: a comma or the end of the array is missing before it")
        elif _after_space(text, place + 1) != len(text):
            yield number + 1, Unreadable("not valid JSON: something stands after the end of the array")
        return


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _is_array(text: bytes) -> bool:
    """Whether it is one array of objects, and not a first line with an array among other lines."""
    if not _ARRAY.match(text):
        return False
    start = len(text) - len(text.lstrip())
    line_end = text.find(b"\n", start)
    return line_end < 0 or not text[start:line_end].rstrip().endswith(b"]") or not text[line_end:].strip()


def _gunzip(data: bytes, named: str) -> bytes:
    found = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(_CHUNK):
                found += part
                if len(found) > MAX_BYTES:
                    too_large(f"{named} holds more than {MAX_BYTES >> 20} MiB when it is decompressed")
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{named} is a damaged gzip file: {error}", hint="fetch it again") from None
    return bytes(found)


def too_large(what: str) -> NoReturn:
    """Refuses a file beyond MAX_BYTES."""
    raise CalibrationError(what, hint="some hundreds of records are enough: give a sample of them")


def _check_form(data: bytes, form: FileForm, named: str) -> None:
    """Refuses what is neither JSONL nor a JSON array, by its first bytes."""

    def refuse(what: str, hint: str) -> NoReturn:
        raise CalibrationError(f"{named} is {what}, not JSONL", hint=hint)

    start = data[:_FIRST_LINE]
    if start.startswith(b"PAR1"):
        command = form.of_arrow("pyarrow.parquet", "pyarrow.parquet.read_table(sys.argv[1])")
        refuse("a Parquet file", f"with pyarrow installed: {command}")
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        opened = "open_file" if start.startswith(b"ARROW1") else "open_stream"
        command = form.of_arrow("pyarrow.ipc", f"pyarrow.ipc.{opened}(sys.argv[1]).read_all()")
        refuse("an Arrow file", f"with pyarrow installed: {command}")
    if start.startswith(b"PK\x03\x04") and (
        b"xl/workbook" in data or (form.path and form.path.suffix.lower() == ".xlsx")
    ):
        refuse("a spreadsheet (XLSX)", "save it as CSV, and give that: you are then shown what makes JSONL of it")
    if start[257:262] == b"ustar":
        refuse("a tar archive", f"unpack it, and give the file in it: tar -xf {form.word}")
    if start.startswith(b"PK\x03\x04"):
        refuse("a ZIP archive", f"unpack it: python -m zipfile -e {form.word} .")
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        refuse("compressed by zstd", f"unpack it: zstd -d {form.word}")
    for magic, module in ((b"BZh", "bz2"), (b"\xfd7zXZ\0", "lzma")):
        if start.startswith(magic):
            refuse(f"compressed by {'xz' if module == 'lzma' else module}", form.unpacked(module))
    encoding = _wide_encoding(start)
    if encoding is not None and not _PLAIN_END.search(data[-_FIRST_LINE:]):  # else its first line alone is damaged
        refuse(f"{encoding[:6].upper()} text", form.of_encoding(encoding))
    if start.startswith(b"version https://git-lfs"):
        refuse("a pointer of git LFS", "fetch the file itself: git lfs pull")
    if b"\n" not in data and _ENDS_IN_CR.search(data):
        refuse("text whose lines end in CR alone", form.of_encoding("utf-8-sig"))  # which reads CR as a line end
    first = start.removeprefix(_BOM).lstrip()
    if first[:14].lower().startswith((b"<!doctype html", b"<html")):
        refuse("an HTML page", "fetch the file itself")
    if first.startswith(b"<"):
        refuse("XML", form.of_xml())
    if first.startswith(b"{"):
        _check_objects(data, form, refuse)
    delimiter = _delimiter(first, form)
    if delimiter is not None:
        refuse("a table (CSV)" if delimiter != "\t" else "a table (TSV, CSV with tabs)", form.of_table(delimiter))


def _check_objects(data: bytes, form: FileForm, refuse: Callable[[str, str], NoReturn]) -> None:
    """Refuses what begins with an object that does not end with its line, or is all that the file holds."""
    text = data.removeprefix(_BOM).strip()
    first = text.split(b"\n", 1)[0].strip()
    if first.endswith(b"}") and len(first) < len(text):
        return  # lines of objects
    try:
        start = text.decode()
        fields, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return
    whole = end == len(start)
    key = _list_of_records(fields) if whole else None
    if key is not None:
        refuse(f"an object that holds its records in {key}", form.of_object(key))
    if whole and _are_columns(fields, list):
        written = "dataset.to_json(FILE) writes JSONL; of this file: "
        refuse("an object that holds lists, as of Dataset.to_dict()", f"{written}{form.of_columns(indexed=False)}")
    if whole and _are_columns(fields, dict):
        written = 'df.to_json(FILE, orient="records", lines=True) writes JSONL; of this file: '
        refuse("an object that holds columns, as of df.to_json()", f"{written}{form.of_columns(indexed=True)}")
    if len(first) < len(text) and (whole or start[end:].lstrip().startswith("{")):
        refuse("objects over several lines each", f"jq -c . writes JSONL; of this file: {form.of_long_objects()}")


def _are_columns(fields: dict[str, Any], kind: type) -> bool:
    """Whether an object is a table by columns: lists as long as each other, or objects with the same keys."""
    columns = list(fields.values())
    if not columns or not all(isinstance(column, kind) and column for column in columns):
        return False
    if kind is dict:  # with columns as the keys inside it is a table by rows
        return not all(name.isdigit() for name in fields) and all(
            column.keys() == columns[0].keys() for column in columns
        )
    turns = any(isinstance(value, dict) and {"role", "from"} & value.keys() for column in columns for value in column)
    return not turns and all(len(column) == len(columns[0]) for column in columns)


def _wide_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32, by the mark at the start or the zeros beside its first characters."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if len(start) >= 4 and start[1] == start[3] == 0 and start[0] and start[2]:
        return "utf-16-le"
    if len(start) >= 4 and start[0] == start[2] == 0 and start[1] and start[3]:
        return "utf-16-be"
    return None


def _list_of_records(fields: dict[str, Any]) -> str | None:
    """The key of the only list of a file that is one object, with no text beside it that could be a prompt or answer.

    None as well where its objects are the turns of a conversation.
    """
    lists = [key for key, value in fields.items() if isinstance(value, list)]
    if len(lists) != 1 or len(lists[0]) > 60 or not lists[0].isidentifier():
        return None
    [key] = lists
    others = [value for name, value in fields.items() if name not in (key, *_ABOUT)]
    turns = any(not isinstance(row, dict) or {"role", "from"} & row.keys() for row in fields[key])
    return key if fields[key] and not turns and not others else None


def _delimiter(first: bytes, form: FileForm) -> str | None:
    """What divides the head of a table; None if the first line is no such head."""
    line = first.split(b"\n", 1)[0].strip().decode(errors="replace")
    if not line or line[0] in "{[":
        return None
    suffixes = () if form.path is None else {suffix.lower() for suffix in form.path.suffixes}
    for delimiter in ("\t", ",", ";", "|"):
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]
        except csv.Error:
            continue
        if len(cells) > 1 and all(map(_HEADER_CELL.fullmatch, cells)) and len(set(cells)) == len(cells):
            if {".csv", ".tsv", ".tab"} & set(suffixes) or _COLUMNS & {cell.lower() for cell in cells}:
                return delimiter
    return "," if ".csv" in suffixes else "\t" if {".tsv", ".tab"} & set(suffixes) else None
