"""`loracat generate` on the embedded example: what is shown, what is typed, and what of an answer is seen."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loracli.cli import app
from loracli.cli._output import Output
from loracli.cli.generate import _Screen
from loracli.generating.generate import Answer
from tests.cli.project import document, run
from tests.cli.test_terminal import STYLE

QUESTION = "Where does Cleo Vesely live?"
ASK = ["generate", "--base", "base", "--max-new-tokens", "8"]
FOUR = ["base", "know", "form", "fit"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every answer that text."""

    def say(text: str) -> None:
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained("base")(text, add_special_tokens=False).input_ids

        def answer(model: Any, prompt: Sequence[int], tell: Callable[[int], None], **_: Any) -> tuple[list[int], bool]:
            for token in tokens:
                tell(token)
            return tokens, True

        monkeypatch.setattr("loracli.generating.generate.told_answer", answer)

    return say


def test_answers_stand_one_below_the_other_and_quiet_is_the_compositions_alone(here: Path) -> None:
    found = document(*ASK, "-p", QUESTION)
    assert list(found["answers"]) == FOUR and found["composition"] == "fit" and found["prompt"] == QUESTION
    assert len({answer["text"] for answer in found["answers"].values()}) > 1
    shown = run(*ASK, "-p", QUESTION)
    assert shown.stdout == "".join(f"{name}\n  {found['answers'][name]['text']}\n\n" for name in FOUR)
    assert shown.stderr.endswith("next: loracat export recipe.json\n") and "--raw" in shown.stderr
    assert run(*ASK, "-q", "-p", QUESTION).stdout == found["answers"]["fit"]["text"] + "\n"


def test_a_prompt_comes_from_standard_input_without_the_end_of_its_last_line(here: Path) -> None:
    given = run(*ASK, "-q", "-p", QUESTION).stdout
    assert run(*ASK, "-q", "-p", "-", input=f"{QUESTION}\n".encode()).stdout == given
    refused = run(*ASK, "-p", "-", input=b"\xff\xfe")
    assert refused.exit_code == 2 and "the prompt is not UTF-8" in refused.stderr


def test_a_directory_is_asked_beside_the_base_and_lint_is_named(here: Path) -> None:
    shown = run("generate", "know", *ASK[1:], "-p", QUESTION)
    assert [line for line in shown.stdout.splitlines() if line and not line.startswith(" ")] == ["base", "know"]
    assert shown.stderr.endswith("next: loracat lint know --base base\n")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "no prompt is given, and there is no terminal", '--prompt "..."'),
        (["--json"], "--json prints one answer of each", '--prompt "..."'),
        (["-p", ""], "the prompt is empty", ""),
        (["-p", "x", "--max-new-tokens", "0"], "--max-new-tokens 0 is not between 1 and", ""),
    ],
    ids=["no prompt", "json", "empty", "tokens"],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str, hint: str
) -> None:
    monkeypatch.setattr("loracli.generating.generate.find_base", None)
    refused = run(*ASK, *words)
    said = refused.stdout if "--json" in words else refused.stderr
    assert refused.exit_code == 2 and message in said and hint.replace('"', '\\"' if "--json" in words else '"') in said


def test_missing_and_damaged_inputs_end_with_3(here: Path) -> None:
    assert run("generate", "missing.json", *ASK[1:], "-p", "x").exit_code == 3
    assert run("generate", "base", *ASK[1:], "-p", "x").exit_code == 3  # a directory without an adapter
    Path("recipe.json").write_text("{}")
    assert run(*ASK, "-p", "x").exit_code == 3


def test_no_escape_of_an_answer_reaches_the_terminal(here: Path, told: Callable[[str], None]) -> None:
    told("a\x1b]0;title\x07\nb\x1b[2J\tc")
    for words, lines in (([], ["  a\\x1b]0;title\\x07", "  b\\x1b[2J    c"]), (["-q"], ["a\\x1b]0;title\\x07"])):
        shown = run(*ASK, *words, "-p", "x")
        assert all(line in shown.stdout.splitlines() for line in lines), shown.stdout
        assert all(character.isprintable() or character == "\n" for character in shown.stdout)
    found = run(*ASK, "--json", "-p", "x").stdout
    assert "\x1b" not in found and json.loads(found)["answers"]["fit"]["text"].startswith("a\x1b]0;title\x07\nb")


def test_an_empty_answer_is_said_and_one_that_was_cut_too(here: Path, told: Callable[[str], None]) -> None:
    assert run(*ASK[:-1], "1", "-p", QUESTION).stdout.count("  (--max-new-tokens ended it)\n") == 4
    told("")
    assert run(*ASK, "-p", "x").stdout == "".join(f"{name}\n  (nothing)\n\n" for name in FOUR)
    assert run(*ASK, "-q", "-p", "x").stdout == "\n"


@pytest.mark.parametrize("end", ["\n", ""], ids=["empty line", "end of input"])
def test_lines_that_are_typed_are_a_conversation(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{QUESTION}\nAnd you?\n{end}"))
    with pytest.raises(SystemExit) as ended:
        app([*ASK, "-q"])
    captured = capsys.readouterr()
    assert ended.value.code == 0 and captured.err.count("> ") == 3
    assert captured.out.splitlines()[0] == run(*ASK, "-q", "-p", QUESTION).stdout.strip()
    assert len(captured.out.splitlines()) == 2


WORDS = "The quick brown fox, whose name is not known here, jumps over dogs that lie in the sun. " * 3


@pytest.mark.parametrize("width", [60, 100])
def test_an_answer_is_broken_between_words_whatever_pieces_it_comes_in(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    text = f"{WORDS}\n\n    return 1\n{'日本' * 60} {'x' * 150}"
    shown = []
    for size in (1, 3, 7, len(text)):

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr(sys, "stdout", screen := Terminal())
        for name, value in {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)
        listener = _Screen(Output())
        listener.begin("fit")
        for place in range(0, len(text), size):
            listener.piece(text[place : place + size])
        listener.finish(Answer(text, (), "end", ()))
        shown.append(STYLE.sub("", screen.getvalue()))
    from rich.cells import cell_len

    assert len(set(shown)) == 1
    lines = shown[0].splitlines()
    assert max(map(cell_len, lines)) <= width and lines[0] == "fit" and "      return 1" in lines
    assert all(not line or line.startswith("  ") for line in lines[1:])
    broken = " ".join(line.strip() for line in lines[1:])
    assert broken.startswith(" ".join(WORDS.split()))
    assert "".join(broken.split()) == "".join(text.split())
