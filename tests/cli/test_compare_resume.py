"""A comparison that was stopped goes on after its last row, and says what one that was left alone would have said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loracli.calibration.render import Example
from loracli.comparison.candidates import Candidate
from loracli.comparison.compare import _Comparison
from loracli.comparison.state import KeptRows
from loracli.comparison.table import Evaluated
from loracli.errors import LoracatError, OutOfResources, UsageError
from loracli.model.loss import Scores
from loracli.model.session import Session
from loracli.system.files import locked_directory
from tests.cli.project import run, tree

WORDS = [
    *"compare --adapters know form --data few.jsonl --base base --fit-data calibration.jsonl --passes 2".split(),
    *"--guard other.jsonl --methods adapter,ties,sum".split(),
]
FITTED, ROWS = ["adapter"], ["base", "know", "form", "uniform", "ties", "sum"]


class Measured:
    """The rows that were measured, in order; the one of the name `stop_at` raises what is set."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.stop_at: str | None = None
        self.error: BaseException = KeyboardInterrupt()

    def taken(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def few(here: Path) -> Path:
    lines = (here / "test.jsonl").read_text().splitlines(keepends=True)
    (here / "few.jsonl").write_text("".join(lines[:6]))
    (here / "other.jsonl").write_text("".join(lines[6:9]))
    lines = (here / "calibration.jsonl").read_text().splitlines(keepends=True)
    (here / "calibration.jsonl").write_text("".join(lines[:12]))
    return here


@pytest.fixture
def measured(few: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    seen, inner = Measured(), _Comparison._measure

    def measure(self: _Comparison, row: Any, *rest: Any) -> Any:
        if row.name == seen.stop_at:
            raise seen.error
        seen.names.append(row.name)
        return inner(self, row, *rest)

    monkeypatch.setattr(_Comparison, "_measure", measure)
    return seen


def state(folder: Path) -> Path:
    (found,) = folder.glob("loracat-compare-*.state")
    return found


def stopped(measured: Measured, at: str, *words: str) -> Any:
    measured.stop_at = at
    result = run(*(words or WORDS), "--json")
    measured.stop_at = None
    return result


def test_what_was_stopped_twice_ends_in_the_same_document_and_no_row_is_done_again(
    few: Path, measured: Measured
) -> None:
    before = tree(few)
    whole = run(*WORDS, "--json")
    assert whole.exit_code == 0 and tree(few) == before
    assert measured.taken() == [*FITTED, *ROWS]
    first = stopped(measured, "form", *WORDS, "-q")
    assert first.exit_code == 130 and measured.taken() == ["adapter", "base", "know"]
    kept = state(few)
    assert f"what was done is kept in {kept.name}: the same command with --resume goes on" in first.stderr
    second = stopped(measured, "sum", *WORDS, "--resume")
    assert second.exit_code == 130 and measured.taken() == ["form", "uniform", "ties"]
    assert "taken over, 3 of 7 rows: base, know, adapter" in second.stderr
    last = run(*WORDS, "--resume", "--json")
    assert last.exit_code == 0 and measured.taken() == ["sum"]
    assert last.stdout == whole.stdout
    assert tree(few) == before


def test_a_row_of_several_draws_is_kept_whole_and_none_of_one_that_was_not_finished(
    few: Path, measured: Measured
) -> None:
    words = [*WORDS, "--control", "random"]
    whole = run(*words, "--json")
    assert measured.taken() == [*FITTED, *["random"] * 5, *ROWS]
    stopped(measured, "base", *words)
    (kept,) = (p for p in state(few).glob("row-*.json") if '"random' in json.loads(p.read_text())["key"])
    content = kept.read_text()
    short = json.loads(content)
    short["numbers"]["draws"].pop()
    kept.write_text(json.dumps(short))
    refused = run(*words, "--resume")
    assert refused.exit_code == 3 and "which keeps the row random, is damaged" in refused.stderr
    kept.write_text(content)
    measured.taken()
    last = run(*words, "--resume", "--json")
    assert last.stdout == whole.stdout and measured.taken() == ROWS
    draws = next(row for row in json.loads(last.stdout)["rows"] if row["name"] == "random")["draws"]
    assert len(draws["nats_per_token"]) == 5


def test_more_methods_and_their_data_are_computed_beside_the_rows_that_are_done(few: Path, measured: Measured) -> None:
    """A longer list with calibration records, which the first run had no use for; `uniform` takes the scale once it is
    named, so it is another row then."""
    short = [*WORDS[:8], "--methods", "ties", "--scale", "0.5"]
    stopped(measured, "ties", *short)
    assert measured.taken() == ["base", "know", "form", "uniform"]
    longer = [*WORDS[:8], "--methods", "adapter,ties,uniform", "--scale", "0.5", *WORDS[8:12]]
    found = run(*longer, "--resume", "--json")
    assert found.exit_code == 0 and measured.taken() == ["adapter", "uniform", "ties"]
    assert found.stdout == run(*longer, "--json").stdout


def test_records_of_another_owner_are_other_records(few: Path, measured: Measured) -> None:
    words = [*WORDS[:8], "--methods", "regmean,sum", "--fit-data", "calibration.jsonl@know", "other.jsonl@form"]
    stopped(measured, "sum", *words)
    swapped = [*words[:-2], "calibration.jsonl@form", "other.jsonl@know"]
    refused = run(*swapped, "--resume")
    assert refused.exit_code == 3 and "changed: --fit-data" in refused.stderr, refused.stderr
    by_place = [*words[:-2], "calibration.jsonl@#1", "other.jsonl@#2"]
    assert run(*by_place, "--resume", "-q").exit_code == 0 and "regmean" in measured.names[:5]


def test_rows_on_other_tokens_are_measured_anew(few: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a chat template that writes the date has them on another day, with the same files."""
    stopped(measured, "form")
    assert measured.taken() == ["adapter", "base", "know"]
    rendered = Session.render

    def tomorrow(*args: Any, **options: Any) -> tuple[Example, ...]:
        return tuple(replace(example, input_ids=(*example.input_ids[:-1], 5)) for example in rendered(*args, **options))

    monkeypatch.setattr(Session, "render", tomorrow)
    last = run(*WORDS, "--resume", "--json")
    assert measured.taken() == [*FITTED, *ROWS]
    assert last.stdout == run(*WORDS, "--json").stdout


def test_without_resume_or_force_what_is_done_is_in_the_way(few: Path, measured: Measured) -> None:
    stopped(measured, "know")
    kept, folder = tree(few), state(few)
    measured.taken()
    refused = run(*WORDS)
    assert refused.exit_code == 2 and tree(few) == kept and not measured.names
    assert (
        f"a comparison of the same inputs was interrupted, and {folder.name} keeps what it has done" in refused.stderr
    )
    assert "go on with it: --resume; or start over: --force" in refused.stderr
    changed = run(*WORDS, "--seed", "3")
    assert changed.exit_code == 2 and "--resume would refuse it" in changed.stderr and "--seed" in changed.stderr
    assert "compare in another folder" in changed.stderr and "-o" not in changed.stderr
    forced = run(*WORDS, "--force", "-q")
    assert forced.exit_code == 0 and measured.names == [*FITTED, *ROWS] and not folder.exists()
    assert "is dropped: --resume would have gone on with it" in forced.stderr
    again = run(*WORDS, "--resume", "-q")
    assert (
        again.exit_code == 0 and f"there is no interrupted comparison in {folder.name}: starting over" in again.stderr
    )


def longer_by_one(name: str) -> None:
    path = Path(name)
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize(
    ("change", "words", "named"),
    [
        (lambda: longer_by_one("few.jsonl"), [], "data file 1, few.jsonl"),
        (lambda: longer_by_one("other.jsonl"), [], "guard file 1, other.jsonl"),
        (lambda: longer_by_one("calibration.jsonl"), [], "--fit-data"),
        (lambda: Path("base/generation_config.json").write_text("{}"), [], "base model"),
        (lambda: None, ["--density", "0.4"], "--density"),
        (lambda: None, ["--passes", "3"], "--passes"),
        (lambda: None, ["--generate", "exact"], "task metric"),
        (lambda: None, ["--dtype", "float16", "--batch-tokens", "99"], "--batch-tokens, --dtype"),
    ],
)
def test_what_has_changed_is_named_and_nothing_is_lost(
    few: Path, measured: Measured, change: Callable[[], object], words: list[str], named: str
) -> None:
    stopped(measured, "know")
    change()
    kept = tree(few)
    refused = run(*WORDS, *words, "--resume")
    assert refused.exit_code == 3 and refused.stderr.splitlines()[-2].endswith(
        f"belongs to another comparison; changed: {named}"
    ), refused.stderr
    assert "restore what has changed, or start over: --force in place of --resume" in refused.stderr
    assert tree(few) == kept


def test_garbage_is_refused_with_a_way_out(few: Path, measured: Measured) -> None:
    stopped(measured, "know")
    folder = state(few)
    base = next(path for path in folder.glob("row-*.json") if '"base' in json.loads(path.read_text())["key"])
    good = json.loads(base.read_text())
    for content, said in (
        (b"\xff", "not UTF-8"),
        (b"[" * 10_000, "nested too deeply"),
        (json.dumps({**good, "more": 1}).encode(), "more: unknown"),
        (json.dumps({**good, "rank": "high"}).encode(), "rank: expected"),
        (json.dumps({**good, "key": "other"}).encode(), "it is of another row"),
        (json.dumps({**good, "numbers": {**good["numbers"], "nats": [1.0]}}).encode(), "or of other records"),
        (json.dumps({**good, "numbers": {**good["numbers"], "tokens": [0.0] * 6}}).encode(), "no record can cost that"),
        (json.dumps({**good, "numbers": {**good["numbers"], "nats": [1e300] * 6}}).encode(), "no record can cost that"),
    ):
        base.write_bytes(content)
        refused = run(*WORDS, "--resume")
        assert refused.exit_code == 3 and said in refused.stderr, refused.stderr
        assert f"{folder.name}/{base.name}, which keeps the row base, is damaged" in refused.stderr
        assert "remove that file and go on with --resume, or start over: --force" in refused.stderr
        assert "Traceback" not in refused.stderr
    measured.taken()
    base.unlink()
    assert run(*WORDS, "--resume", "-q").exit_code == 0 and "base" in measured.taken()
    stopped(measured, "know")
    (folder / "identity.json").write_text('{"a": NaN}')
    for words, code in (["--resume"], 3), ([], 2):
        refused = run(*WORDS, *words)
        assert refused.exit_code == code and "is damaged: its identity.json cannot be read" in refused.stderr
        assert "--force" in refused.stderr
    assert run(*WORDS, "--force", "-q").exit_code == 0 and not folder.exists()


def test_a_rejected_input_leaves_nothing_unless_a_fit_was_done(few: Path, measured: Measured) -> None:
    measured.error, before = UsageError("no"), tree(few)
    assert stopped(measured, "ties", *WORDS[:8], "--methods", "ties").exit_code == 2 and tree(few) == before
    failed = stopped(measured, "ties")
    assert failed.exit_code == 2 and "with --resume goes on" in failed.stderr
    measured.taken()
    assert run(*WORDS, "--resume", "-q").exit_code == 0 and measured.taken() == ["ties", "sum"]


def test_where_nothing_can_be_kept_this_is_said_and_the_comparison_goes_on(
    few: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS[:8], "--methods", "sum"]
    stopped(measured, "know", *words)
    folder = state(few)
    with locked_directory(folder, Path("x")):
        for option in ("--resume", "--force"):
            assert run(*words, option).exit_code == 1
        kept = tree(few)
        beside = run(*words)
        assert beside.exit_code == 0 and tree(few) == kept
    assert "nothing of this comparison is kept if it is stopped: another process is writing its state" in beside.stderr
    folder.rename(few / "real")
    folder.symlink_to("real")
    linked = run(*words)
    assert linked.exit_code == 2 and "is a symbolic link" in linked.stderr and "-o" not in linked.stderr
    folder.unlink()

    def full(*_: object, **__: object) -> None:
        raise OutOfResources("no space left to write x")

    monkeypatch.setattr("loracli.fitting.journal.write_atomically", full)
    found = run(*words)
    assert found.exit_code == 0 and "is stopped: no space left to write x" in found.stderr and not folder.exists()


def test_rows_are_kept_until_the_result_is_written(
    few: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS[:8], "--methods", "sum"]

    def fails(*_: object) -> None:
        raise LoracatError("the result cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr("loracli.cli._output.Output.document", fails)
        assert run(*words).exit_code == 1
    measured.taken()
    assert run(*words, "--resume", "-q").exit_code == 0 and not measured.names


def test_what_a_task_metric_gives_comes_back_whatever_its_size(tmp_path: Path) -> None:
    scores = Scores(torch.tensor([2.0, 3.0]).double(), torch.tensor([1.0, 2.0]).double())
    values = torch.tensor([-3e12, 1e300], dtype=torch.float64)
    row = Evaluated("base", "base", scores, rank=None, values=values)
    kept = KeptRows(tmp_path)
    kept.write("key", row, fitted=False)
    candidate = Candidate("base", "base", lambda: None)  # type: ignore[arg-type, return-value]
    found = kept.recall("key", candidate, records=2, guard=0, answers=True)
    assert found is not None and found.values is not None and torch.equal(found.values, values)


def test_without_a_folder_nothing_is_kept_and_nothing_recalled() -> None:
    kept = KeptRows()
    kept.write("key", None, fitted=True)  # type: ignore[arg-type]
    assert kept.recall("key", None, records=1, guard=0, answers=False) is None  # type: ignore[arg-type]
    assert not kept.fitted


def test_lines_per_record_that_a_stopped_comparison_wrote_are_written_again(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "compare --adapters know form --data few.jsonl --base base --methods sum --per-record lines.jsonl".split()

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as the reader of its standard output goes away
        patch.setattr("loracli.cli._tables.comparison_lines", stops)
        assert run(*words).exit_code == 130
    lines = Path("lines.jsonl").read_bytes()
    Path("lines.jsonl").write_text('{"precious": 1}')
    refused = run(*words, "--resume")
    assert refused.exit_code == 2 and "lines.jsonl exists" in refused.stderr
    assert Path("lines.jsonl").read_text() == '{"precious": 1}'
    Path("lines.jsonl").write_bytes(lines.splitlines(keepends=True)[0])
    assert run(*words, "--resume").exit_code == 0 and Path("lines.jsonl").read_bytes() == lines
    assert run(*words, "--resume").exit_code == 2  # nothing to go on with any more
