"""Calibration files: every bad line at once, each as `file:line: path: reason`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from loracli.calibration.records import MAX_LINE_BYTES, CalibrationFile, read_records
from loracli.errors import CalibrationError

PC = '{"prompt": "p", "completion": "c"}'
CHAT = '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'
TEXT = '{"text": "t"}'


def write(folder: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    path = folder / "val.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + end for line in lines))
    return path


def problems(path: Path) -> list[str]:
    """The problems of the file, without its folder."""
    with pytest.raises(CalibrationError) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    return [problem.replace(str(path), path.name) for problem in caught.value.problems]


def read(folder: Path, *lines: str | bytes) -> CalibrationFile:
    return read_records(write(folder, *lines))


# What is accepted.


@pytest.mark.parametrize(
    ("line", "shape"), [(PC, "prompt-completion"), (CHAT, "messages"), (TEXT, "text")], ids=["pc", "chat", "text"]
)
def test_the_first_record_decides_the_shape(tmp_path: Path, line: str, shape: str) -> None:
    file = read(tmp_path, line, line)
    assert file.shape == shape
    assert [record.content for record in file.records] == [json.loads(line)] * 2
    assert [record.line for record in file.records] == [1, 2]
    assert (file.name, file.ignored_keys) == ("val.jsonl", ())


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + PC.encode(), "", PC, end=b"\r\n")
    assert read_records(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    file = read(tmp_path, "", PC, "", "  \t", PC, "")
    assert [record.line for record in file.records] == [2, 5]


def test_a_byte_order_mark_and_crlf_are_no_content(tmp_path: Path) -> None:
    plain = read_records(write(tmp_path, PC, PC))
    marked = read_records(write(tmp_path, b"\xef\xbb\xbf" + PC.encode(), PC, end=b"\r\n"))
    assert marked.records == plain.records


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text(PC + "\n" + PC)
    assert len(read_records(path).records) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c"])
def test_a_unicode_line_separator_inside_a_string_ends_no_line(tmp_path: Path, separator: str) -> None:
    text = f"a{separator}b" if separator != "\x1c" else "a\\u001cb"
    file = read(tmp_path, PC, f'{{"prompt": "{text}", "completion": "c"}}', PC)
    assert [record.line for record in file.records] == [1, 2, 3]
    assert file.records[1].content["prompt"] == f"a{separator}b"


def test_a_carriage_return_alone_ends_no_line(tmp_path: Path) -> None:
    assert read(tmp_path, '{"prompt": "p",\r"completion": "c"}', PC).records[1].line == 2


def test_keys_that_nobody_reads_are_reported_once_and_left_out(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        '{"prompt": "p", "completion": "c", "source": 1, "id": 7, "task": "math", "skill": "x"}',
        '{"prompt": "p", "completion": "c", "answer": null, "source": 2}',
    )
    assert file.ignored_keys == ("answer", "source")
    assert file.records[0].content == {"prompt": "p", "completion": "c"}


def test_equal_contents_have_equal_fingerprints_whatever_stands_beside_them(tmp_path: Path) -> None:
    file = read(
        tmp_path, PC, '{"completion": "c",   "prompt": "p", "id": 3}', '{"prompt": "c", "completion": "p"}',
        '{"prompt": "p", "completion": "c "}',
    )  # fmt: skip
    prints = [record.fingerprint for record in file.records]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_an_empty_prompt_and_an_empty_system_turn_are_fine(tmp_path: Path) -> None:
    assert read(tmp_path, '{"prompt": "", "completion": "c"}').records[0].content["prompt"] == ""
    messages = [{"role": r, "content": c} for r, c in (("system", ""), ("user", ""), ("assistant", "a"), ("tool", ""))]
    assert read(tmp_path, json.dumps({"messages": messages})).records[0].content["messages"] == messages


# What is refused.


def chat(*turns: object) -> str:
    return json.dumps({"messages": list(turns)})


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
NO_KEYS = "has none of the keys prompt, messages, text; found: "


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        # JSON
        ('{"prompt": "p", "completion": }', "not valid JSON: Expecting value (column 31)"),
        ("nonsense", "not valid JSON: Expecting value (column 1)"),
        (PC + PC, "not valid JSON: Extra data (column 35)"),
        (b'{"prompt": "\xff", "completion": "c"}', "not UTF-8: byte 0xff at offset 12"),
        ('{"prompt": "p", "prompt": "q", "completion": "c"}', "the key 'prompt' appears twice in one object"),
        ('{"prompt": NaN, "completion": "c"}', "NaN is not a JSON number"),
        ('{"prompt": "\\ud800", "completion": "c"}', "a lone surrogate (\\ud800 to \\udfff) in a string"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        # the object
        ("[]", "expected a JSON object, got an empty list"),
        ("[1]", "expected a JSON object, got a list"),
        ('"text"', "expected a JSON object, got a string"),
        ("null", "expected a JSON object, got null"),
        ("true", "expected a JSON object, got true"),
        ("1.5", "expected a JSON object, got a number"),
        ("{}", NO_KEYS + "nothing"),
        ('{"b": 1, "a": 2}', NO_KEYS + "a, b"),
        ('{"completion": "c"}', NO_KEYS + "completion"),
        ('{"chosen": "a", "rejected": "b"}', "chosen/rejected: preference data has no single completion to learn from"),
        ('{"conversations": []}', NO_KEYS + "conversations"),
        # prompt and completion
        ('{"prompt": "p"}', "completion: missing; the first record has the shape prompt-completion"),
        ('{"prompt": null, "completion": "c"}', "prompt: expected a string, got null"),
        ('{"prompt": "p", "completion": 5}', "completion: expected a string, got a number"),
        ('{"prompt": "p", "completion": true}', "completion: expected a string, got true"),
        ('{"prompt": [], "completion": "c"}', "prompt: expected a string, got an empty list"),
        ('{"prompt": [{"role": "user"}], "completion": "c"}', "prompt: expected a string, got a list"),
        ('{"prompt": "p", "completion": {}}', "completion: expected a string, got an object"),
        ('{"prompt": "p", "completion": ""}', "completion: empty"),
        ('{"prompt": "p", "completion": " \\n\\t"}', "completion: empty"),
        # text
        ('{"text": null}', "text: expected a string, got null"),
        ('{"text": " "}', "text: empty"),
        # messages
        ('{"messages": []}', "messages: expected a list of messages, got an empty list"),
        ('{"messages": {}}', "messages: expected a list of messages, got an object"),
        ('{"messages": "hi"}', "messages: expected a list of messages, got a string"),
        (chat(USER, "hi"), "messages[1]: expected an object, got a string"),
        (chat(USER, {"content": "a"}), "messages[1].role: expected one of system, user, assistant, tool, got null"),
        (chat({"role": "human", "content": "u"}, ANSWER),
         'messages[0].role: expected one of system, user, assistant, tool, got "human"'),
        (chat({"role": ["user"], "content": "u"}, ANSWER),
         'messages[0].role: expected one of system, user, assistant, tool, got ["user"]'),
        (chat(USER, ANSWER, {"role": "user", "content": None}), "messages[2].content: expected a string, got null"),
        (chat(USER, {"role": "assistant"}), "messages[1].content: expected a string, got null"),
        (chat(USER, {"role": "assistant", "content": " "}), "messages[1].content: empty"),
        (chat({"role": "user", "content": [{"type": "text", "text": "u"}]}, ANSWER),
         "messages[0].content: expected a string, got a list"),
        (chat(USER, ANSWER | {"tool_calls": [], "name": "x"}), "messages[1].name: only role and content are read"),
        (chat(ANSWER, USER, ANSWER), "messages[0].role: an assistant turn with nothing before it"),
        (chat(USER), "messages: no assistant turn, so nothing is scored"),
        ('{"messages": [], "tools": [{"type": "function"}]}',
         "tools: tool definitions are not read; render the prompt and use prompt and completion"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_place_and_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    """Alone, so that the line decides the shape itself."""
    assert problems(write(tmp_path, "", line)) == [f"val.jsonl:2: {reason}"]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (PC, TEXT, "prompt: missing; the first record has the shape prompt-completion"),
        (PC, CHAT, "prompt: missing; the first record has the shape prompt-completion"),
        (CHAT, PC, "messages: missing; the first record has the shape messages"),
        (TEXT, PC, "text: missing; the first record has the shape text"),
    ],
)
def test_every_record_has_the_shape_of_the_first(tmp_path: Path, first: str, second: str, reason: str) -> None:
    assert problems(write(tmp_path, first, second)) == [f"val.jsonl:2: {reason}"]


def test_a_broken_first_line_does_not_decide_the_shape(tmp_path: Path) -> None:
    assert len(problems(write(tmp_path, "broken", TEXT, TEXT))) == 1


def test_all_bad_lines_are_reported_at_once_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, PC, "", "oops", PC, '{"prompt": 1, "completion": "c"}', "", "[]")
    assert problems(path) == [
        "val.jsonl:3: not valid JSON: Expecting value (column 1)",
        "val.jsonl:5: prompt: expected a string, got a number",
        "val.jsonl:7: expected a JSON object, got an empty list",
    ]
    with pytest.raises(CalibrationError, match="^3 of 5 records in ") as caught:
        read_records(path)
    assert caught.value.problems[0].startswith(f"{path}:3: ")  # clickable: with the path as it was given


def test_a_byte_order_mark_later_in_the_file_is_an_error_of_its_line(tmp_path: Path) -> None:
    [problem] = problems(write(tmp_path, PC, b"\xef\xbb\xbf" + PC.encode()))
    assert problem.startswith("val.jsonl:2: not valid JSON")


def test_a_line_beyond_the_limit_is_refused_and_one_within_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_LINE_BYTES == 16 << 20
    monkeypatch.setattr("loracli.calibration.records.MAX_LINE_BYTES", len(PC))
    assert len(read(tmp_path, PC).records) == 1
    assert problems(write(tmp_path, PC, PC + " ")) == [
        f"val.jsonl:2: the line has {len(PC) + 1} bytes; at most {len(PC)} are read"
    ]


@pytest.mark.parametrize("data", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_records_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "val.jsonl").write_bytes(data)
    with pytest.raises(CalibrationError, match="holds no records"):
        read_records(tmp_path / "val.jsonl")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(CalibrationError, match="cannot be read"):
            read_records(path)
