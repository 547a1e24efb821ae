"""The runner of benchmarks/paper: what its judge takes, its tasks ask and its tables say; how its cells are kept."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from benchmarks.paper import agreement, peers
from benchmarks.paper.__main__ import main
from benchmarks.paper.arithmetic import NoValue, is_right, judge_command, value_of
from benchmarks.paper.cells import Cell, Stage
from benchmarks.paper.closed_book import CLOSED_BOOK
from benchmarks.paper.formats import FORMATS
from benchmarks.paper.programs import SUMS, problem, program, worked
from benchmarks.paper.reading import READING
from benchmarks.paper.tables import Table, answers, make_table, markdown, refreshed, wilson, write_table
from benchmarks.paper.tasks import DATAMIX, Conversation, Task
from benchmarks.paper.training import Adapter, identify
from benchmarks.paper.ways import padded
from loracli.adapters.adapter import read_adapter
from loracli.demo.run import example_folder
from loracli.evaluation.metrics import run_metric
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.model.reference import find_base
from tests.faults.fork_server import ROOT

INVENTED = (CLOSED_BOOK, SUMS, FORMATS, READING)
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("def solution():\n    a = 3\n    result = a * 4 - 2\n    return result", 10),
        ("```python\ndef solution():\n    return 7 / 2\n```\nThat is it.", 3.5),
        ("Sure:\n```\nx = 2\nx += 5\n```", 7),
        ("def other():\n    return 1\ndef solution():\n    return -(2 ** 10) % 7", -(2**10) % 7),
        ('def solution():\n    """Adds."""\n    return round(max(2.6, 1)) // 2', 1),
    ],
)
def test_a_program_of_arithmetic_has_the_value_that_python_gives_it(text: str, value: float) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 12.",
        "def solution():\n    return __import__('os').getpid()",
        "def solution():\n    return (1).__class__",
        "def solution():\n    while True: pass",
        "def solution():\n    return solution()",
        "def solution():\n    return [9] * 9",
        "def solution():\n    return 'a' * 9",
        "def solution():\n    return True",
        "def solution():\n    return x",
        "def solution():\n    return 1 / 0",
        "def solution():\n    return (-8) ** 0.5",
        "9 ** 9 ** 9",
        "2 ** -10 ** 9",
        "round(1, -(10 ** 29))",
        "1e400",
        "9" * 3900,
        "(" * 1900 + "1" + ")" * 1900,
        "-" * 3900 + "1",
        "a = 1e29\n" + "a = a * a\n" * 50,
        "1 + " * 5000 + "1",
    ],
)
def test_what_is_no_bounded_arithmetic_has_no_value_and_ends_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(NoValue):
        value_of(text)
    assert time.process_time() - started < 1
    assert not is_right(text, text)


def test_the_judge_is_a_metric_command() -> None:
    right = "def solution():\n    return 6 * 7"
    answers = [{"output": output, "reference": right} for output in ("42", right, "41", "6 * x")]
    assert run_metric(judge_command(), answers) == [1, 1, 0, 0]


@pytest.mark.parametrize("task", INVENTED, ids=lambda task: task.name)
def test_a_task_is_drawn_by_its_seed_and_tests_what_nothing_was_trained_or_calibrated_on(task: Task) -> None:
    files = task.draw(random.Random(0), None)
    assert task.draw(random.Random(0), None) == files != task.draw(random.Random(1), None)
    assert set(files) == {f"{skill}_train" for skill in task.skills} | {
        "skills_calib",
        "composite_calib",
        "composite_test",
    }
    asked = {prompt_of(record) for record in files.pop("composite_test")}
    assert len(asked) >= 80
    assert not asked & {prompt_of(record) for records in files.values() for record in records}


def prompt_of(record: Conversation) -> str:
    return str(record["messages"][0]["content"])


def answer_of(record: Conversation) -> str:
    return str(record["messages"][1]["content"])


def test_the_two_ways_to_solve_a_problem_agree() -> None:
    rng = random.Random(0)
    for _ in range(200):
        _, steps, numbers = problem(rng, large=False)
        result = Fraction(numbers[0])
        for step, number in zip(steps, numbers[1:], strict=True):
            result = {"+": result + number, "-": result - number, "*": result * number, "/": result / number}[step]
        assert value_of(program(steps, numbers)) == result == int(worked(steps, numbers).rpartition(" ")[2])


def test_answers_in_formats_are_the_counts_and_no_format_of_the_test_was_seen() -> None:
    files = FORMATS.draw(random.Random(0), None)
    for record in files["one_train"]:
        letter, sentence = re.fullmatch(r"How many .* the letter (.)\?\n(.*)", prompt_of(record)).groups()
        assert int(answer_of(record)) == len([word for word in sentence.split() if letter in word.lower()])
    tested = {record["task"] for record in files["composite_test"]}
    assert len(tested) == 4 and not any("task" in record for record in files["composite_calib"])


def test_a_reader_who_knows_the_tools_answers_every_question_and_nothing_else_names_those_of_the_test() -> None:
    files = READING.draw(random.Random(0), None)
    named = {}
    for record in files["terms_train"]:
        if found := re.fullmatch(r"A (\w+) is a \w+ tool that is used to (.*)\.", answer_of(record)):
            named[found[2]] = found[1]
    for record in (*files["composite_calib"], *files["composite_test"]):
        passage, question = prompt_of(record).split("\n")
        tool = re.match(r"Who had the (?:tool that is used to )?([\w ]+)\?", question)[1]
        (who,) = re.findall(rf"(\w+) \w+ the {named.get(tool, tool)} to", passage)
        assert answer_of(record) == who
    calibrated = " ".join(prompt_of(r) for r in (*files["skills_calib"], *files["composite_calib"])).split()
    tested = {word for record in files["composite_test"] for word in re.findall(r"the (\w+) to the", prompt_of(record))}
    assert len(tested) == 24 and not tested & set(calibrated)


def stage(folder: Path, calibration: Path | None = None) -> Stage:
    """A comparison of the embedded example's adapters, with `form` as the data mix."""
    example = example_folder()
    base = identify(find_base((), str(example / "base")), None, "float32")
    training = CLOSED_BOOK.training["know"]
    know, form, datamix = (
        Adapter(name, (), training, base, 0, folder, example / given)
        for name, given in (("know", "know"), ("form", "form"), (DATAMIX, "form"))
    )
    test = folder / "test.jsonl"
    if not test.exists():
        test.write_text("".join((example / "test.jsonl").read_text().splitlines(keepends=True)[:2]))
    rows = () if calibration is None else ("module",)
    return Stage(CLOSED_BOOK, 0, folder, (know, form), datamix, base, test, calibration, rows)


def test_a_cell_is_measured_once_and_again_where_it_is_gone(tmp_path: Path) -> None:
    stage(tmp_path).run()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert not stage(tmp_path).missing and len(files) == len(stage(tmp_path).names)
    lost = stage(tmp_path).place("ties")
    before = json.loads(lost.read_text())
    lost.unlink()
    assert stage(tmp_path).missing == ["ties"]
    stage(tmp_path).run()
    after = json.loads(lost.read_text())
    assert [after[part] for part in ("nats", "tokens", "right")] == [
        before[part] for part in ("nats", "tokens", "right")
    ]
    assert {path for path in files if path.stat().st_mtime_ns != files[path]} == {lost}


def test_a_cell_is_found_by_all_that_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (tmp_path / f"{name}.jsonl" for name in ("first", "second"))
    first.write_text("a")
    second.write_text("b")
    own = stage(tmp_path, first)
    other = replace(own, calibration=second)
    assert own.place("module").name.startswith("module-first-")
    assert own.place("base") == other.place("base") == stage(tmp_path).place("base")
    assert own.place("module").stem[-16:] != other.place("module").stem[-16:]
    assert own.place("module") != replace(own, passes=3.0).place("module")
    places = [own.place(row) for row in ("base", "module")]
    own.test.write_text(own.test.read_text() * 2)
    assert not set(places) & {own.place(row) for row in ("base", "module")}
    places = [own.place(row) for row in ("base", "module")]
    monkeypatch.setattr("benchmarks.paper.cells.code_sha256", lambda: "another")
    assert not set(places) & {own.place(row) for row in ("base", "module")}


def test_skills_with_the_same_records_agree_on_every_weight_and_opposite_gradients_on_none(tmp_path: Path) -> None:
    own = stage(tmp_path)
    same = tuple(replace(adapter, files=(own.test,)) for adapter in own.adapters)
    found = agreement.measured(replace(own, adapters=same))
    assert found["cosine"] == pytest.approx(1) and found["agreeing"] == 1 and found["weights"] > 20
    gradient = torch.tensor([1.0, -2.0, 3.0])
    assert agreement.agreement(torch.stack([gradient, -gradient]))["cosine"] == pytest.approx(-1)
    three = agreement.agreement(torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    assert three["agreeing"] == 0.5 and three["cosine"] == pytest.approx(1 / 3)


def test_the_rule_counts_where_the_cosine_told_what_came_out() -> None:
    def cells(module: float) -> list[Cell]:
        worse = [3.0 + number / 10 for number in range(8)]
        return [
            cell("uniform", "method", worse, [0] * 8),
            cell("module", "method", [module * one for one in worse], [0] * 8),
        ]

    found = {"a-0": {"cosine": 0.5, "agreeing": 0.7}, "b-0": {"cosine": 0.4, "agreeing": 0.6}}
    (part,) = agreement.parts(found, {"a-0": cells(0.5), "b-0": cells(1.5)})
    assert part.title.startswith("It paid in 1 of 2; that the cosine is above 0 told so in 1 of 2")
    assert [row[-1] for row in part.rows] == ["yes", "no"]


def test_the_error_of_a_peer_is_that_of_its_update_against_the_formula_in_float64(tmp_path: Path) -> None:
    pair = peers.embedded(tmp_path / "part", quick=True)
    know = dict(pair.adapters)["know"]
    alone = replace(pair, adapters=(("know", know),))
    assert peers.error_of(know, alone, "average", {}) == 0
    assert peers.error_of(know, alone, "sum", {"weight": 2.0}) == pytest.approx(0.5)
    kept = peers.error_of(know, alone, "pruned", {"density": 0.5})
    assert 0 < kept < peers.error_of(know, alone, "pruned", {"density": 0.2})
    names = [str(path) for _, path in pair.adapters]  # which do not change the same modules
    export_adapter(ExportRequest(method="uniform", adapters=names), tmp_path / "average")
    assert peers.error_of(tmp_path / "average", pair, "average", {}) < 1e-6


def test_an_adapter_that_is_padded_for_peft_has_the_same_update(tmp_path: Path) -> None:
    pair = peers.embedded(tmp_path / "part", quick=True)
    copies = padded([path for _, path in pair.adapters], tmp_path)
    assert len({max(read_adapter(str(copy)).ranks) for copy in copies}) == 1
    for (name, path), copy in zip(pair.adapters, copies, strict=True):
        assert peers.error_of(copy, replace(pair, adapters=((name, path),)), "sum", {}) == 0


def test_the_formula_of_ties_elects_signs_and_takes_the_mean_of_those_that_agree() -> None:
    updates = [torch.tensor([[4.0, -3.0, 0.1, 2.0]]), torch.tensor([[1.0, 5.0, 0.2, 4.0]])]
    # of each the larger half: [4, -3, 0, 0] and [0, 5, 0, 4]
    assert peers.ties(updates, {"density": 0.5, "weight": 2.0}).tolist() == [[8.0, 10.0, 0.0, 8.0]]


def test_what_a_peer_refuses_is_a_row_in_its_own_words_and_mergekit_is_missed_by_name(tmp_path: Path) -> None:
    says_why = peers.run([[sys.executable, "-c", "import sys; print('loading'); sys.exit('ranks differ')"], ["never"]])
    assert says_why.refused == "ranks differ" and 1 < says_why.memory < 100  # less than this process has
    judged = {"pair": "p", "of": "peft 1", "note": "", "nats": [2.0, 4.0], "tokens": [1.0, 2.0], "right": [1.0, 0.0]}
    ended = {"seconds": 1.0, "processor": 1.0, "memory": 5.0, "refused": "ranks differ"}
    found = {"a": {**judged, "row": peers.AVERAGE}, "b": {"pair": "p", "row": "PEFT ties", "of": "", "ended": ended}}
    (part,) = peers.parts(found)
    assert peers.INSTALL in part.title and part.rows[1][-1] == "refused: ranks differ"
    assert part.rows[0][5:8] == ("2.0000", "+0.0000, +0.0000 to +0.0000", "50.0%")


def cell(row: str, kind: str, nats: list[float], right: list[int]) -> Cell:
    made_by = {"commit": "0123456", "versions": "torch", "machine": "one"}
    return Cell(row, kind, tuple(nats), (2.0,) * len(nats), tuple(map(float, right)), 4, "", 1.0, made_by)


def table() -> Table:
    """Two seeds of eight records; `module` is worse than the data mix on every one."""
    static, fitted = [], []
    for seed in (0, 1):
        ones = [1.0 + 0.1 * (number + seed) for number in range(8)]
        static.append(
            [
                cell("base", "base", [9 * one for one in ones], [0] * 8),
                cell("a", "ingredient", [4 * one for one in ones], [1, 1, 0, 0, 0, 0, 0, 0]),
                cell("b", "ingredient", [3 * one for one in ones], [0] * 8),
                cell(DATAMIX, "control", ones, [1] * 8),
            ]
        )
        fitted.append([cell("module", "method", [2 * one for one in ones], [1, 1, 1, 1, 1, 0, 0, 0])])
    about = {"name": "made-up", "asks": "What?", "command": "python -m none", "base": "tiny"}
    found = {"": static, "8 composite records": fitted}
    return make_table(found, ["a", "b"], seeds=[0, 1], kinds=["x", "y"] * 8, about=about)


def test_a_table_pools_the_records_of_all_seeds() -> None:
    made = table()
    assert (made.best, made.best_right, made.records, made.tokens) == ("b", "a", 16, 32)
    line = next(line for line in made.lines if line.row == "module")
    ones = torch.tensor([1.0 + 0.1 * (number + seed) for seed in (0, 1) for number in range(8)])
    assert line.nats_per_token == pytest.approx(float(2 * ones.sum() / 32))
    assert line.difference == pytest.approx(float(-ones.sum() / 32)) and line.interval[1] < 0
    assert line.right == 10 / 16 and line.kinds == {"x": 6 / 8, "y": 4 / 8}
    # 6 records on which `module` alone is right, none on which `a` alone is: 2 / 2 ** 6
    assert line.p_value == pytest.approx(2 / 2**6)
    assert [share for _, share in line.seeds] == [5 / 8, 5 / 8]


def test_a_table_says_first_where_module_loses() -> None:
    made = table()
    (loss,) = made.losses
    assert (loss.row, loss.right, loss.difference > 0) == (DATAMIX, (10 / 16, 1.0), True)
    text = markdown(made)
    assert text.index("is clearly worse") < text.index("| base |")


def test_the_short_table_has_each_way_once_and_what_it_was_calibrated_on_side_by_side() -> None:
    made = table()
    text = answers(made)
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head[1] == "no records" and len(rows) == len({line.row for line in made.lines})
    shown = {row[0]: dict(zip(head[1:], row[1:], strict=False)) for row in rows}
    names = {DATAMIX: "data mix", "module": "**module** (CAT)"}
    for line in made.lines:
        cell = shown[names.get(line.row, line.row)][line.calibration or "no records"]
        assert cell.strip() == f"{line.right:.1%}, {line.nats_per_token:.4f}"
    (loss,) = made.losses
    assert text.index(f"Calibrated on {loss.calibration}, `module` is clearly worse than data mix") < text.index("|")


def test_the_interval_of_a_share_is_wilsons() -> None:
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-4)
    low, high = wilson(10, 20)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(1.96 / (20 + 1.96**2) ** 0.5, abs=1e-4)


def test_a_number_that_the_json_does_not_have_is_seen_and_what_is_written_by_hand_stays(tmp_path: Path) -> None:
    folder, above = tmp_path / "results", tmp_path / "results.md"
    other = "<!-- table other -->\n| 1 |\n<!-- end of other -->\n"
    above.write_text(f"# All\n\n<!-- table made-up -->\n<!-- end of made-up -->\n\nBy hand: 3.\n{other}")
    write_table(folder, table())
    text = above.read_text()
    assert "By hand: 3." in text and "| base |" in text and text.endswith(other)
    with pytest.raises(FileNotFoundError):  # its table has no JSON
        refreshed(text, folder)
    assert refreshed(text, folder, only="made-up") == text
    page = folder / "made-up.md"
    for number in set(re.findall(r"\d+\.\d{4}", page.read_text())):
        changed = page.read_text().replace(number, f"{float(number) + 1:.4f}", 1)
        assert refreshed(changed, folder) != changed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out"], "give names of closed-book"),
        (["closed-book", "reading"], "and one folder"),
        (["closed-book", "out", "other"], "and one folder"),
        (["closed-book", "out"], "give the --base"),
        (["closed-book", "out", "--base", "b", "--calibrate", "many"], "invalid calibration value"),
        (["closed-book", "out", "--base", "b", "--fitted", "ties"], "invalid choice: 'ties'"),
        (["agreement", "out", "--base", "b", "--fitted", "paper"], "agreement needs module"),
        (["closed-book", "--quick", "--pages", "docs"], "leave --pages out"),
        (["peers", "out", "--mergekit", "nowhere"], "pip install mergekit"),
        (["peers", "out", "--of", "sums"], "give the --base"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_done(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["paper", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "page", [DOCS / "results.md", *sorted((DOCS / "results").glob("*.md"))], ids=lambda page: page.name
)
def test_the_tables_of_the_docs_are_what_their_json_says(page: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"<!-- (table|answers) ([\w-]+) -->\n.*?<!-- end of \2 -->\n", text, re.S)
    assert blocks and len(re.findall(r"<!-- (?!end of)", text)) == len(blocks)
    assert refreshed(text, DOCS / "results") == text
