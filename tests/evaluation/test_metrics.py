"""What counts as right, by the cases that graders get wrong; the user's own scorer, and what is said when it fails."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from loracli.errors import MetricError, UsageError
from loracli.evaluation.metrics import contains, is_exact, is_same_number, last_number, run_metric


def test_exact_forgives_white_space_at_the_ends_alone() -> None:
    assert is_exact(" Paris\n", "Paris")
    assert not is_exact("paris", "Paris")
    assert not is_exact("Paris.", "Paris")


def test_contains_reads_over_capitals_and_spacing() -> None:
    assert contains("It is  PARIS\nof course", "is paris")
    assert not contains("Pari s", "paris")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234.0),
        ("it costs $3.50.", 3.5),
        ("5-3", 3.0),
        ("x = -7", -7.0),
        ("(2)-1", 1.0),
        ("1,2,3", 3.0),
        ("1,234,5", 5.0),
        ("2e3", 2000.0),
        ("x = \N{MINUS SIGN}7", -7.0),
        ("5\N{MINUS SIGN}3", 3.0),
        ("0.5 or .25", 0.25),
        ("so 12 apples", 12.0),
        ("1e999", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_agree_within_the_relative_tolerance() -> None:
    assert is_same_number("about 100.005", "#### 100")
    assert not is_same_number("about 100.02", "#### 100")
    assert is_same_number("about 101", "100", tolerance=0.01)
    assert is_same_number("0", "0.0")
    assert not is_same_number("no idea", "4")
    assert not is_same_number("4", "no number")


ANSWERS = [
    {"line": 3, "prompt": "2+2=", "reference": "4", "output": "4", "task": None},
    {"line": 7, "prompt": "é?", "reference": "ü", "output": "no\nline", "task": "odd"},
]


def program(tmp_path: Path, code: str) -> str:
    path = tmp_path / "a scorer.py"
    path.write_text(f"import json, sys\n{code}\n")
    return shlex.join([sys.executable, str(path)])


def test_the_command_gets_every_field_and_its_numbers_come_back_in_order(tmp_path: Path) -> None:
    code = (
        "for line in sys.stdin:\n"
        "    a = json.loads(line)\n"
        "    assert sorted(a) == ['line', 'output', 'prompt', 'reference', 'task']\n"
        "    print(json.dumps({'score': a['line'] / 2}) if a['task'] else int(a['output'] == a['reference']))"
    )
    assert run_metric(program(tmp_path, code), ANSWERS) == [1.0, 3.5]


def test_what_a_model_wrote_reaches_no_shell(tmp_path: Path) -> None:
    trap = [{**ANSWERS[0], "output": f"$(touch {tmp_path}/gone); `touch {tmp_path}/gone`"}]
    assert run_metric(program(tmp_path, "print(1.5)") + " '$(touch gone)'", trap) == [1.5]
    assert not (tmp_path / "gone").exists() and not Path("gone").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print(1)", "wrote 1 lines for 2 answers"),
        ("print(1); print('NaN')", "line 2"),
        ("print(1); print('\"a\"')", "line 2"),
        ("print(1); print('{\"score\": null}')", "line 2"),
        ("print(1); print('1e999')", "line 2"),
        ("sys.exit('no such grader')", "ended with the code 1"),
    ],
)
def test_a_command_that_fails_or_writes_something_else_is_one_error(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(MetricError, match=words):
        run_metric(program(tmp_path, code), ANSWERS)


def test_true_and_false_are_taken_as_python_prints_them_and_json_has_them(tmp_path: Path) -> None:
    code = "[print(json.loads(line)['task'] is None) for line in sys.stdin]"
    assert run_metric(program(tmp_path, code), ANSWERS) == [1.0, 0.0]
    assert run_metric(program(tmp_path, "print('true'); print('false')"), ANSWERS) == [1.0, 0.0]


def test_a_line_that_is_no_number_is_shown_cut_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(MetricError) as caught:
        run_metric(program(tmp_path, "print('right ' * 50); print(1)"), ANSWERS)
    assert str(caught.value).endswith(f"has no `score`: {('right ' * 50)[:60]}...")
    assert "print(int(...))" in (caught.value.hint or "")


def test_the_hint_is_what_the_command_said(tmp_path: Path) -> None:
    with pytest.raises(MetricError) as caught:
        run_metric(program(tmp_path, "sys.exit('no such grader')"), ANSWERS)
    assert caught.value.hint == "no such grader"


def test_a_command_that_is_not_there_or_does_not_end(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no program"):
        run_metric(str(tmp_path / "missing"), ANSWERS)
    with pytest.raises(MetricError, match="longer than 0.2 seconds"):
        run_metric(program(tmp_path, "import time; time.sleep(60)"), ANSWERS, timeout=0.2)
    for broken in ("", "'a"):
        with pytest.raises(UsageError):
            run_metric(broken, ANSWERS)
