"""Calibration files: every bad line at once, each as `file:line: path: reason`; what the shapes are is in
test_shapes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracli.calibration.records import _MAX_LINE_BYTES, CalibrationFile, DataSource, parse_sources, read_records
from loracli.errors import CalibrationError
from tests.heard import Heard

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
    assert [record.place for record in file.records] == [f"{tmp_path}/val.jsonl:{line}" for line in (1, 2)]
    assert (file.source, file.ignored_keys) == (DataSource(tmp_path / "val.jsonl"), ())


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


def test_the_task_of_a_record_is_kept_beside_its_content(tmp_path: Path) -> None:
    file = read(
        tmp_path, '{"text": "t", "task": "math"}', '{"text": "t", "skill": "code"}', '{"text": "t", "task": null}',
        '{"text": "t", "task": "a", "skill": 5}', '{"text": "t", "task": 0}',
    )  # fmt: skip
    assert [record.task for record in file.records] == ["math", "code", None, "a", "0"]
    assert len({record.fingerprint for record in file.records}) == 1
    assert file.ignored_keys == ()


def test_an_empty_prompt_and_an_empty_system_turn_are_fine(tmp_path: Path) -> None:
    assert read(tmp_path, '{"prompt": "", "completion": "c"}').records[0].content["prompt"] == ""
    messages = [{"role": r, "content": c} for r, c in (("system", ""), ("user", ""), ("assistant", "a"), ("tool", ""))]
    assert read(tmp_path, json.dumps({"messages": messages})).records[0].content["messages"] == messages[:3]


def test_roles_are_taken_whatever_their_capitals(tmp_path: Path) -> None:
    assert (
        read(tmp_path, CHAT.replace("user", "User").replace("assistant", "GPT")).records == read(tmp_path, CHAT).records
    )


# What is refused.


def test_a_comma_behind_each_object_is_named_and_skipping_offered_only_where_most_lines_are_good(
    tmp_path: Path,
) -> None:
    comma = "a comma behind the object"
    with pytest.raises(CalibrationError, match=comma) as caught:
        read_records(write(tmp_path, PC + ",", PC.replace("c", "longer") + ", ", PC))
    assert [problem.partition(":")[2] for problem in caught.value.problems] == [f"1: {comma}", f"2: {comma}"]
    assert str(caught.value.hint).startswith("write one object on each line with nothing between them")
    for bad, hint in ((1, "fix these lines, or leave them out with --skip-bad"), (2, "fix these lines")):
        with pytest.raises(CalibrationError) as caught:
            read_records(write(tmp_path, *["{"] * bad, PC))
        assert caught.value.hint == hint


NO_KEYS = "has none of the keys text, prompt, messages, conversations, instruction; found: "


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
        ('{"prompt": "p", "task": true, "completion": "c"}', "task: expected a string, got true"),
        ('{"prompt": "p", "task": 0.5, "completion": "c"}', "task: expected a string, got a number"),
        ('{"text": "t", "skill": " "}', "skill: empty"),
        (f'{{"text": "t", "task": "{"x" * 101}"}}', "task: longer than 100 characters"),
        ("[" * 90 + "]" * 90, "expected a JSON object, got a list"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ('{"text": "t", "task": ' + "[" * 90 + "]" * 90 + "}", "task: expected a string, got a list"),
        ('{"text": "t", "task": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_place_and_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    """Alone, so that the line decides the shape itself."""
    assert problems(write(tmp_path, "", line)) == [f"val.jsonl:2: {reason}"]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (PC, TEXT, "prompt: missing; the file's shape is prompt-completion"),
        (PC, CHAT, "prompt: missing; the file's shape is prompt-completion"),
        (CHAT, PC, "messages: missing; the file's shape is messages"),
        (TEXT, PC, "text: missing; the file's shape is text"),
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
    assert _MAX_LINE_BYTES == 16 << 20
    monkeypatch.setattr("loracli.calibration.records._MAX_LINE_BYTES", len(PC))
    assert len(read(tmp_path, PC).records) == 1
    assert problems(write(tmp_path, PC, PC + " ")) == [
        f"val.jsonl:2: the line has {len(PC) + 1} bytes; at most {len(PC)} are read"
    ]


def test_an_endless_integer_is_refused(tmp_path: Path) -> None:
    [problem] = problems(write(tmp_path, '{"text": "t", "n": ' + "1" * 5000 + "}"))
    assert "4300 digits" in problem


def test_the_shape_asked_for_is_required_of_every_line(tmp_path: Path) -> None:
    both = '{"text": "t", "prompt": "p", "completion": "c"}'
    assert problems(write(tmp_path, both)) == ["val.jsonl:1: has the keys of the shapes text, prompt-completion"]
    path = write(tmp_path, both, both)
    for shape, content in (("text", {"text": "t"}), ("prompt-completion", {"prompt": "p", "completion": "c"})):
        file = read_records(path, shape=shape)  # type: ignore[arg-type]
        assert file.shape == shape and [record.content for record in file.records] == [content] * 2
    with pytest.raises(CalibrationError) as caught:
        read_records(write(tmp_path, TEXT, PC), shape="prompt-completion")
    assert caught.value.problems == (f"{path}:1: prompt: missing; the file's shape is prompt-completion",)


# Bad lines left out.


def test_bad_lines_are_left_out_on_request_and_named(tmp_path: Path) -> None:
    heard = Heard()
    path = write(tmp_path, '{"prompt": "p"}', TEXT, "", "oops", TEXT, PC)
    file = read_records(path, skip_bad=True, progress=heard)
    assert (file.shape, [record.line for record in file.records], file.skipped) == ("text", [2, 5], (1, 4, 6))
    [warning] = heard.warnings
    assert warning.startswith(f"{path}: 3 bad lines are left out: 1, 4, 6; the first is {path}:1: completion: missing")


def test_of_many_bad_lines_the_first_numbers_are_said(tmp_path: Path) -> None:
    heard = Heard()
    file = read_records(write(tmp_path, TEXT, *["oops"] * 30), skip_bad=True, progress=heard)
    assert file.skipped == tuple(range(2, 32))
    assert ": 30 bad lines are left out: 2, 3, " in heard.warnings[0] and ", 21, ...; " in heard.warnings[0]


def test_a_file_of_bad_lines_alone_is_refused_even_so(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="^2 of 2 records") as caught:
        read_records(write(tmp_path, "oops", "[]"), skip_bad=True)
    assert len(caught.value.problems) == 2


def test_a_good_file_says_nothing(tmp_path: Path) -> None:
    heard = Heard()
    assert read_records(write(tmp_path, TEXT), skip_bad=True, progress=heard).skipped == ()
    assert heard.warnings == []


@pytest.mark.parametrize("data", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_records_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "val.jsonl").write_bytes(data)
    with pytest.raises(CalibrationError, match="holds no records"):
        read_records(tmp_path / "val.jsonl")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    circle = tmp_path / "circle.jsonl"
    circle.symlink_to(circle)
    for path in (tmp_path / "missing.jsonl", tmp_path, circle):
        (source,) = parse_sources([str(path)])
        assert source.path is not None
        with pytest.raises(CalibrationError, match="cannot be read"):
            read_records(source.path)


GOOD = st.builds(
    lambda text: json.dumps({"text": text}, ensure_ascii=False).encode(),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip),
)
BAD = (b"{", b"[]", b"null", b"\xff", b'{"text": ""}', b'{"text": 1}', b'{"text": "a", "text": "b"}', b"{}")


@given(st.lists(GOOD | st.sampled_from(BAD) | st.just(b""), max_size=8))
def test_every_line_is_a_record_or_a_problem_of_that_line(lines: list[bytes]) -> None:
    numbers = {
        good: [number for number, line in enumerate(lines, 1) if line and (line not in BAD) is good]
        for good in (True, False)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), *lines)
        if not any(lines):
            with pytest.raises(CalibrationError, match="no records"):
                read_records(path)
        if numbers[False]:
            assert [int(problem.split(":")[1]) for problem in problems(path)] == numbers[False]
        if numbers[True]:
            file = read_records(path, skip_bad=True)
            assert [record.line for record in file.records] == numbers[True]
            assert [record.content for record in file.records] == [json.loads(lines[n - 1]) for n in numbers[True]]
            assert list(file.skipped) == numbers[False]
