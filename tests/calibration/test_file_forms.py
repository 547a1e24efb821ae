"""Data files as people have them: read, or named for what they are with a command that makes JSONL of them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loracli.calibration import file_forms
from loracli.calibration import records as sources
from loracli.calibration.records import CalibrationFile, DataSource, read_records
from loracli.errors import CalibrationError, UsageError

ROWS = [{"prompt": f'"q" {i}, é\n', "completion": f"a{i}\u2028"} for i in range(5)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def contents(file: CalibrationFile) -> list[dict[str, Any]]:
    return [record.content for record in file.records]


def refused(path: Path, **options: Any) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        read_records(path, **options)
    return caught.value


def run(command: str, folder: Path) -> None:
    """As it is shown, with this Python for the one it names."""
    (folder / "python").exists() or (folder / "python").symlink_to(sys.executable)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, cwd=folder, env=os.environ | path, timeout=60)


# What is read.


@pytest.mark.parametrize(
    "data",
    [ARRAY, json.dumps(ROWS).encode(), b"\xef\xbb\xbf \n" + ARRAY + b"\n\n", gzip.compress(JSONL), gzip.compress(ARRAY),
     gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:]), ARRAY.replace(b"\n", b"\r\n")],
    ids=["indented", "one line", "marked", "gzip", "gzipped array", "two members", "crlf"],
)  # fmt: skip
def test_an_array_and_gzip_are_read_whatever_the_name_and_the_hash_is_that_of_the_file(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "val.txt"
    path.write_bytes(data)
    file = read_records(path)
    assert contents(file) == ROWS
    assert [record.place for record in file.records] == [f"{path}:{number}" for number in range(1, 6)]
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_a_bad_record_of_an_array_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n\n{"text": 1}, 5, {"text": "b", "text": "c"},\n {"text": "d"}]')
    assert [problem.removeprefix(f"{path}:") for problem in refused(path).problems] == [
        "2: text: expected a string, got a number",
        "3: expected a JSON object, got a number",
        "4: the key 'text' appears twice in one object",
    ]
    assert [record.line for record in read_records(path, skip_bad=True).records] == [1, 5]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"text": "a"},\n{"text": }]', "2: not valid JSON: Expecting value (line 2 column 10)"),
        ('[{"text": "a"} {"text": "b"}]', "2: not valid JSON: a comma or the end of the array is missing before it"),
        ('[{"text": "a"}', "2: not valid JSON: a comma or the end of the array is missing before it"),
        ('[{"text": "a"}]x', "2: not valid JSON: something stands after the end of the array"),
        ('[{"text": "a"},]', "2: not valid JSON: Expecting value (line 1 column 16)"),
        ('[{"text": ' + "[" * 100_000, "1: nested too deeply"),
    ],
)
def test_an_array_that_breaks_off_is_named_at_the_record(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for skip_bad in (False, True):
        error = refused(path, skip_bad=skip_bad)
        assert error.problems == (f"{path}:{problem}",) and "--skip-bad" not in (error.hint or "")
        assert error.summary.endswith(f"nothing behind record {problem[0]} can be read") and error.hint


def test_an_array_on_the_first_of_several_lines_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "a"}]\n{"text": "b"}\n')
    assert refused(path).problems == (f"{path}:1: expected a JSON object, got a list",)


def test_an_array_is_cut_up_in_steps_that_grow_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in characters that are handed on, to the strict parser and once to the plain one."""

    def handed(count: int) -> int:
        data = json.dumps([{"text": "x" * 50}] * count).encode()
        return sum(len(item) for _, item in file_forms.numbered(data, file_forms.FileForm(None, array=True)))  # type: ignore[arg-type]

    assert handed(2000) == 2 * handed(1000)


# What is named.

TABLE = 'question,answer\r\n"q, 1",a1\r\nq2,"a\n2"\r\n'
PAIRS = [{"question": "q, 1", "answer": "a1"}, {"question": "q2", "answer": "a\n2"}]


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("t.csv", TABLE.encode(), "a table (CSV)"),
        ("t.txt", b"\xef\xbb\xbf" + TABLE.encode(), "a table (CSV)"),
        ("t.csv.gz", gzip.compress(TABLE.encode(), mtime=0), "a table (CSV)"),
        ("semi", TABLE.replace("question,", "question;").replace('"q, 1",', '"q, 1";').replace("q2,", "q2;").encode(),
         "a table (CSV)"),
        ("t.tsv", b"question\tanswer\nq, 1\ta1\nq2\t\"a\n2\"\n", "a table (TSV, CSV with tabs)"),
        ("a b's.jsonl", "".join(json.dumps(r) + "\n" for r in PAIRS).encode("utf-16"), "UTF-16 text"),
        ("be", "".join(json.dumps(r) + "\n" for r in PAIRS).encode("utf-16-be"), "UTF-16 text"),
        ("u32.json", json.dumps(PAIRS).encode("utf-32"), "UTF-32 text"),
        ("mac.jsonl", "".join(json.dumps(r) + "\r" for r in PAIRS).encode(), "text whose lines end in CR alone"),
        ("mac.jsonl.gz", gzip.compress("\ufeff".encode() + "\r".join(map(json.dumps, PAIRS)).encode(), mtime=0),
         "text whose lines end in CR alone"),
        ("x.xml", b"<?xml version='1.0'?><rows><r><question>q, 1</question><answer>a1</answer></r>"
                  b"<r><question>q2</question><answer>a\n<b>2</b></answer></r></rows>", "XML"),
        ("o.json", json.dumps({"version": "1", "data": PAIRS}, indent=1).encode(),
         "an object that holds its records in data"),
        ("o.jsonl", json.dumps({"train": PAIRS}).encode(), "an object that holds its records in train"),
        ("o.json.gz", gzip.compress(json.dumps({"x": PAIRS}).encode(), mtime=0),
         "an object that holds its records in x"),
        ("z.jsonl.bz2", bz2.compress("".join(json.dumps(r) + "\n" for r in PAIRS).encode()), "compressed by bz2"),
        ("z.jsonl.xz", lzma.compress("".join(json.dumps(r) + "\n" for r in PAIRS).encode()), "compressed by xz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_another_form_is_named_and_the_command_shown_makes_jsonl_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    error = refused(Path(name))
    assert str(error) == f"{name} is {what}, not JSONL" and error.hint
    run(error.hint, tmp_path)
    [made] = [path for path in tmp_path.iterdir() if path.name not in (name, "python")]
    read = contents(read_records(made, fields="prompt=question,completion=answer"))
    assert read == [{"prompt": row["question"], "completion": row["answer"]} for row in PAIRS]


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"PAR1\x15\x04", "a Parquet file", "pyarrow.parquet.read_table(sys.argv[1])"),
        (b"ARROW1\0\0", "an Arrow file", "pyarrow.ipc.open_file(sys.argv[1])"),
        (b"\xff\xff\xff\xff\x10\0", "an Arrow file", "pyarrow.ipc.open_stream(sys.argv[1])"),
        (b"PK\x03\x04", "a ZIP archive", "python -m zipfile -e data ."),
        (b"PK\x03\x04" + b"\0" * 26 + b"xl/workbook.xml", "a spreadsheet (XLSX)", "save it as CSV"),
        (
            gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\0" + b"\0" * 249, mtime=0),
            "a tar archive",
            "tar -xf data",
        ),
        (b"\x28\xb5\x2f\xfd\0", "compressed by zstd", "zstd -d data"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of git LFS", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "an HTML page", "fetch the file itself"),
    ],
)
def test_what_needs_another_tool_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, what: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").write_bytes(data)
    error = refused(Path("data"))
    assert str(error) == f"data is {what}, not JSONL" and hint in (error.hint or "")


def test_carriage_returns_behind_an_object_are_looked_through_once(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}' + b"\r" * 200_000 + b"x")
    begun = time.process_time()
    assert "Extra data" in refused(path).problems[0]
    assert time.process_time() - begun < 5  # twenty and more where each is the beginning of a search


def _indexed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: {str(index): row[key] for index, row in enumerate(rows)} for key in rows[0]}


def _listed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [row[key] for row in rows] for key in rows[0]}


NESTED = [{"messages": [{"role": "user", "content": '}\n{"q":'}, {"role": "assistant", "content": f"a{i}"}],
           "meta": {}} for i in range(3)]  # fmt: skip


@pytest.mark.parametrize("rows", [ROWS, NESTED], ids=["texts", "turns"])
@pytest.mark.parametrize(
    ("write", "what", "way"),
    [
        (lambda rows: json.dumps(_indexed(rows)), "an object that holds columns, as of df.to_json()",
         'df.to_json(FILE, orient="records", lines=True) writes JSONL; of this file: '),
        (lambda rows: json.dumps(_listed(rows), indent=2), "an object that holds lists, as of Dataset.to_dict()",
         "dataset.to_json(FILE) writes JSONL; of this file: "),
        (lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows) + "\n", "objects over several lines each",
         "jq -c . writes JSONL; of this file: "),
        (lambda rows: "\ufeff" + "\r\n\r\n".join(json.dumps(row, indent=4).replace("\n", "\r\n") for row in rows),
         "objects over several lines each", "jq -c . writes JSONL; of this file: "),
    ],
    ids=["pandas", "datasets", "jq", "crlf"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_what_pandas_datasets_and_jq_write_is_named_with_their_own_way_and_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], write: Any, what: str, way: str, packed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(rows).encode()
    Path("val.json").write_bytes(gzip.compress(data) if packed else data)
    error = refused(Path("val.json"))
    assert str(error) == f"val.json is {what}, not JSONL"
    assert (error.hint or "").startswith(way)
    run((error.hint or "").removeprefix(way), tmp_path)
    assert [json.loads(line) for line in Path("val.jsonl").read_text().splitlines()] == rows
    assert len(read_records("val.jsonl").records) == len(rows)


def test_one_record_alone_is_read_and_a_table_by_rows_or_a_damaged_first_line_is_no_table_by_columns(
    tmp_path: Path,
) -> None:
    path = tmp_path / "val.json"
    for row in (NESTED[0], {"messages": NESTED[0]["messages"]}, {"text": "t"}):
        path.write_text(json.dumps(row))
        assert len(read_records(path).records) == 1
    for text in (
        json.dumps({str(index): row for index, row in enumerate(ROWS)}),
        json.dumps({"prompt": ["a", "b"], "completion": ["c"]}),
        '{"text": "a\n{"text": "b"}\n',
    ):
        path.write_text(text)
        assert refused(path).problems


def test_a_record_that_holds_a_list_is_a_record(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "val.jsonl", {"dialog": talk})
    assert contents(read_records(path, fields="messages=dialog")) == [{"messages": talk}]
    asked = {"prompt": "p", "completion": "c", "sources": [{"url": "u"}]}
    assert len(read_records(write(path, asked)).records) == 1
    assert (
        len(read_records(write(path, {"q": "p", "a": "c", "n": [{"u": 1}]}), fields="prompt=q,completion=a").records)
        == 1
    )


def test_lines_of_text_are_no_table(tmp_path: Path) -> None:
    for text in ("nonsense", "Dear Sir, I write to you", '"a", "b"', "one,two"):
        (tmp_path / "val.jsonl").write_text(text)
        assert refused(tmp_path / "val.jsonl").problems


# Limits.


def test_what_is_compressed_may_hold_no_more_than_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_forms, "_CHUNK", 1000)
    monkeypatch.setattr(file_forms, "MAX_BYTES", len(JSONL))
    path = tmp_path / "val.gz"
    path.write_bytes(gzip.compress(JSONL))
    assert len(read_records(path).records) == 5
    path.write_bytes(gzip.compress(JSONL + b"\n"))
    assert "MiB when it is decompressed" in str(refused(path))
    for damaged in (gzip.compress(JSONL)[:-9], gzip.compress(JSONL)[:20] + b"x" * 50, b"\x1f\x8b"):
        path.write_bytes(damaged)
        assert "is a damaged gzip file" in str(refused(path))


def test_a_file_beyond_the_limit_is_refused_and_so_is_what_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", len(JSONL))
    path = tmp_path / "val.jsonl"
    path.write_bytes(JSONL)
    assert len(read_records(path).records) == 5
    path.write_bytes(JSONL + b"\n")
    assert "val.jsonl has more than 0 MiB" in str(refused(path))
    assert "it is not a regular file" in str(refused(Path("/dev/zero")))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(JSONL * 9)))
    with pytest.raises(CalibrationError, match="<stdin> has more than"):
        read_records("-")


def test_a_fifo_is_refused_without_waiting_and_an_open_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    error = refused(tmp_path / "pipe")
    assert "it is not a regular file" in str(error) and "--data -" in (error.hint or "")
    reader, writer = os.pipe()
    os.write(writer, JSONL)
    os.close(writer)
    try:
        assert contents(read_records(f"/dev/fd/{reader}")) == ROWS  # as of <(...)
    finally:
        os.close(reader)


@pytest.mark.parametrize("grown", [b"x", b""], ids=["longer", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: bytes
) -> None:
    path = tmp_path / "val.jsonl"
    path.write_bytes(JSONL)
    within = DataSource._within

    def meanwhile(self: DataSource, file: Any) -> bytes:
        if grown:
            path.write_bytes(JSONL + grown)
        data = within(self, file)
        os.utime(path, (1, 1))
        return data

    monkeypatch.setattr(DataSource, "_within", meanwhile)
    assert str(refused(path)) == f"{path} changed while it was read"


# Other names.


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "option"),
    [
        ({"question": "q", "answer": "a"}, "prompt=question,completion=answer"),
        ({"id": 1, "query": "q", "response": "a"}, "prompt=query,completion=response"),
        ({"input": "q", "output": "a"}, "prompt=input,completion=output"),
        ({"instruction": "q", "response": "a"}, "prompt=instruction,completion=response"),
        *(({"instruction": "q", "context": empty, "response": "a"}, "input=context,output=response")
          for empty in ("", " ", None)),
        ({"Question": "q", "Answer": "a"}, "prompt=Question,completion=Answer"),
        ({"prompt": "q", "response": "a"}, "completion=response"),
        ({"instruction": "q", "context": "c", "response": "a"}, "input=context,output=response"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "instruction=question,output=response"),
        ({"system": "s", "question": "q", "response": "a"}, "instruction=question,output=response"),
        ({"preprompt": "s", "question": "q", "answer": "a"}, "instruction=question,system=preprompt,output=answer"),
        *(({key: "c", "question": "q", "answer": "a"}, f"instruction=question,input={key},output=answer")
          for key in ("passage", "document", "background", "knowledge", "evidence", "Context", "paragraph")),
        ({"instruction": "q", "input": "c", "target": "a"}, "output=target"),
        ({"input": "q", "context": "c", "output": "a"}, "instruction=input,input=context"),
        ({"query": "q", "response": "a", "history": [["h", "i"]]}, "instruction=query,output=response"),
        ({"query": "q", "response": "a", "chat_history": [["h", "i"]]},
         "instruction=query,history=chat_history,output=response"),
        ({"the question": "x", "question": "q", "my passage": "", "answer": "a"}, "prompt=question,completion=answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "completion=chosen"),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
          "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}, "messages=chosen"),
        ({"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
          "rejected": [{"role": "assistant", "content": "b"}]}, "completion=chosen"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "prompt=question,completion=chosen"),
        ({"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": []},
         "messages=chosen"),
        ({"Text": "q", "more": "a"}, "text=Text"),
        ({"id": "x", "completion": "q a", "Text": ""}, "text=completion"),
        ({"Messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages=Messages"),
    ],
)  # fmt: skip
def test_the_refusal_shows_the_option_that_reads_the_file(tmp_path: Path, row: dict[str, Any], option: str) -> None:
    path = write(tmp_path / "val.jsonl", row, row)
    error = refused(path)
    assert (error.hint or "").endswith(f"--fields {option}") and len(error.problems) == 2
    file = read_records(path, fields=option)
    texts = json.dumps(file.records[0].content)
    assert '"q' in texts and ('"a"' in texts or file.shape == "text") and ('\\nc"' in texts) == ("c" in row.values())
    assert ('"s"' in texts) == ("s" in row.values()) and ('"h"' in texts) == any("history" in key for key in row)
    assert file.shape == "alpaca" or not {"c", "s"} & {str(value) for value in row.values()}
    assert contents(read_records(DataSource(path, fields=option))) == contents(file)


@pytest.mark.parametrize(
    ("row", "typed", "option"),
    [
        ({"instruction": "q", "input": "c", "response": "a"}, "completion=response", "output=response"),
        ({"instruction": "q", "input": "c", "response": "a"}, "output=completion", "output=response"),
        ({"frage": "q", "response": "a"}, "prompt=frage", "prompt=frage,completion=response"),
        ({"prompt": "q", "response": "a"}, "prompt=frage", "completion=response"),
    ],
)
def test_the_option_shown_has_the_keys_of_the_file_whatever_was_typed_before(
    tmp_path: Path, row: dict[str, Any], typed: str, option: str
) -> None:
    path = write(tmp_path / "val.jsonl", row)
    assert (refused(path, fields=typed).hint or "").endswith(f"--fields {option}")
    assert len(read_records(path, fields=option).records) == 1


def test_a_record_of_several_shapes_is_answered_with_the_options(tmp_path: Path) -> None:
    path = write(tmp_path / "val.jsonl", {"instruction": "q", "input": "c", "output": "a", "text": "q c a"})
    assert refused(path).hint == "say which to read: --format text or --format alpaca"


SAID = {"role": "Assistant", "content": "hi"}
ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOLD = {"role": "tool", "content": "t"}


@pytest.mark.parametrize(
    ("talk", "read", "reason"),
    [
        ([SAID, SAID, *ASKED], ASKED, "chat: an assistant turn with nothing before it"),
        ([{"from": "gpt", "value": "hi"}, *ASKED], ASKED, "chat: an assistant turn with nothing before it"),
        (
            [*ASKED, TOLD | {"tool_call_id": "1", "name": "f"}, ASKED[1]],
            [*ASKED, TOLD, ASKED[1]],
            "chat: name, tool_call_id",
        ),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_the_command_shown_mends_turns_under_the_key_of_the_file(
    tmp_path: Path, talk: list[dict[str, Any]], read: list[dict[str, Any]], reason: str, array: bool
) -> None:
    path = tmp_path / "val.jsonl"
    rows = [{"chat": talk, "id": 1}, {"chat": ASKED, "id": 2}]
    path.write_text(json.dumps(rows)) if array else write(path, *rows)
    error = refused(path, fields="messages=chat")
    [problem] = error.problems
    assert reason.partition(": ")[2] in problem
    run((error.hint or "").partition(": ")[2], tmp_path)
    made = read_records(tmp_path / "val.kept.jsonl", fields="messages=chat")
    assert contents(made) == [{"messages": read}, {"messages": ASKED}]


def test_names_hold_where_a_record_has_them_and_what_they_hide_is_not_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "val.jsonl", {"prompt": "own", "question": "q", "answer": "a"}, {"prompt": "p", "completion": "c"}
    )
    file = read_records(path, fields="prompt = question , completion=answer")
    assert contents(file) == [{"prompt": "q", "completion": "a"}, {"prompt": "p", "completion": "c"}]
    assert file.ignored_keys == ("prompt",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing is not NAME=KEY"),
        ("prompt", "prompt is not NAME=KEY"),
        ("prompt=", "prompt= is not NAME=KEY"),
        ("question=prompt", "question is not one of text, prompt, completion"),
        ("prompt=a,prompt=b", "prompt is there twice"),
    ],
)
def test_names_that_cannot_be_understood_are_a_wrong_command(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "val.jsonl", {"text": "t"})
    with pytest.raises(UsageError) as caught:
        read_records(path, fields=text)
    assert reason in str(caught.value) and "prompt=question,completion=answer" in (caught.value.hint or "")
