"""`FILE`, `FILE:WEIGHT` and `-`: what each is taken for."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from loracli.calibration.records import DataSource, _parse_source, parse_sources, read_records
from loracli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("val.jsonl", "val.jsonl", 1.0),
        ("val.jsonl:2", "val.jsonl", 2.0),
        ("a/b:c/val.jsonl:0.25", "a/b:c/val.jsonl", 0.25),
        ("val.jsonl:1e3", "val.jsonl", 1000.0),
        ("val.jsonl:", "val.jsonl:", 1.0),
        ("val.jsonl:two", "val.jsonl:two", 1.0),
        ("a:2/val.jsonl", "a:2/val.jsonl", 1.0),
        (":2", ":2", 1.0),
        ("-", None, 1.0),
        ("-:2", None, 2.0),
        ("./-", "-", 1.0),
    ],
)
def test_a_number_after_the_last_colon_is_a_weight(text: str, path: str | None, weight: float) -> None:
    assert _parse_source(text) == DataSource(None if path is None else Path(path), weight)


def test_a_file_of_exactly_that_name_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "val:2").write_text("")
    assert _parse_source(tmp_path / "val:2") == DataSource(tmp_path / "val:2")
    assert _parse_source(f"{tmp_path}/val:2:3") == DataSource(tmp_path / "val:2", 3.0)


def test_an_adapter_behind_a_file_that_there_is_says_whose_records_they_are(tmp_path: Path) -> None:
    """The first @ that has a file before it; what is behind it may have more of them."""
    (tmp_path / "val").write_text("")
    (tmp_path / "a@b").write_text("")
    val, odd = tmp_path / "val", tmp_path / "a@b"
    for text, source in (
        (f"{val}@math", DataSource(val, adapter="math")),
        (f"{val}:2@math", DataSource(val, 2.0, adapter="math")),
        (f"{val}@org/name@main", DataSource(val, adapter="org/name@main")),
        ("-@#2", DataSource(None, adapter="#2")),
        (f"{odd}", DataSource(odd)),
        (f"{odd}@#1", DataSource(odd, adapter="#1")),
        (f"{val}@", DataSource(Path(f"{val}@"))),
        (f"{tmp_path}/missing@math", DataSource(tmp_path / "missing@math")),
        ("@math", DataSource(Path("@math"))),
    ):
        assert _parse_source(text) == source
    assert parse_sources([f"{val}@math"], owned=True) == (DataSource(val, adapter="math"),)
    with pytest.raises(UsageError, match="has no use here"):
        parse_sources([f"{val}@math"])
    with pytest.raises(UsageError, match="is given twice") as caught:
        parse_sources([f"{val}@math", f"{val}@code"], owned=True)
    assert caught.value.hint == "without @ADAPTER it is for all adapters"


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e7", "1e-7"])
def test_a_weight_out_of_range_is_refused(weight: str) -> None:
    with pytest.raises(UsageError, match="is not between 1e-06 and 1e\\+06"):
        _parse_source(f"val.jsonl:{weight}")


def test_one_path_or_several_are_taken_and_none_or_one_twice_are_not(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert parse_sources(str(a)) == parse_sources(a) == parse_sources([a]) == (DataSource(a),)
    assert parse_sources((a, f"{b}:2")) == (DataSource(a), DataSource(b, 2.0))
    with pytest.raises(UsageError, match="no data file"):
        parse_sources([])
    (tmp_path / "link").symlink_to(a)
    for twice in (["-", "-"], [a, f"{a}:2"], [a, tmp_path / "x" / ".." / "a"], [a, tmp_path / "link"]):
        with pytest.raises(UsageError, match="is given twice") as caught:
            parse_sources(twice)
        assert "weight" in (caught.value.hint or "")


def test_standard_input_is_read_as_a_file_is_and_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'\xef\xbb\xbf{"text": "t"}\r\n\r\n{"text": "u"}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    file = read_records("-")
    assert [record.place for record in file.records] == ["<stdin>:1", "<stdin>:3"]
    assert (file.source.name, str(file.source)) == ("<stdin>", "<stdin>")
