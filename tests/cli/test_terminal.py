"""What reaches a terminal and what reaches a pipe: colours, widths, encodings, and a reader that goes away."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from loracli.cli import app
from loracli.cli._help import Panel
from loracli.cli._options import PlacementOptions
from loracli.cli._output import TALK, Output, Talk, print_anything
from loracli.cli._tables import held_out_lines
from loracli.cli.fit import EPILOG
from loracli.cli.inspect import inspect
from loracli.cli.show import LayerOptions, show
from loracli.recipe.record import HeldOut, HeldOutRow
from tests.cli.process import COMMAND, environment, on_terminal, piped
from tests.cli.project import run

STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("words", "variables", "colours"),
    [
        ([], {}, True),
        ([], {"NO_COLOR": "1"}, False),
        ([], {"TERM": "dumb"}, False),
        (["--color", "never"], {}, False),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
        ([], {"LORACAT_COLOR": "never"}, False),
    ],
    ids=str,
)
def test_colours_on_a_terminal(here: Path, words: list[str], variables: dict[str, str], colours: bool) -> None:
    code, sent = on_terminal("show", *words, cwd=here, variables=variables)
    assert code == 0
    assert any(match != "\x1b[0m" for match in re.findall(r"\x1b\[3[0-9;]*m|\x1b\[[34]8;[0-9;]*m", sent)) is colours
    if not colours:
        assert "\x1b[3" not in sent
    assert "\x1b" not in STYLE.sub("", sent)


@pytest.mark.parametrize(("words", "colours"), [([], False), (["--color", "always"], True)], ids=str)
def test_colours_in_a_pipe(here: Path, words: list[str], colours: bool) -> None:
    assert ("\x1b[" in piped("show", *words, cwd=here).stdout) is colours
    assert ("\x1b[" in piped("show", "missing.json", *words, cwd=here).stderr) is colours
    assert "\x1b" not in piped("show", "--json", *words, cwd=here).stdout


@pytest.mark.parametrize("variables", [{"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {}], ids=str)
def test_no_bar_is_drawn_where_it_cannot_be_drawn_over(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Whatever is said of colours."""

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return variables.get("TERM") == "dumb"

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = Output()
    out.begin("work", 2, "modules")
    out.advance("work", 1)
    out.finish("work")
    assert stream.getvalue() == ""


def test_a_bar_vanishes_from_a_terminal(here: Path) -> None:
    code, sent = on_terminal("lint", "know", cwd=here)
    assert code == 0 and "━" in sent and "\x1b[2K" in sent  # drawn, and the line erased
    assert sent.rindex("\x1b[2K") > sent.rindex("━")


WIDE = [f"column-{letter}" for letter in "abcdefghij"]


ROWS = [["first", *map(str, range(10))], ["second", *map(str, range(10, 20))]]


def table(width: int, monkeypatch: pytest.MonkeyPatch, rows: list[list[str]] = ROWS) -> list[str]:
    """A table as a terminal of that width shows it."""
    return shown(width, monkeypatch, lambda out: out.table(["", *WIDE], rows))


def shown(width: int, monkeypatch: pytest.MonkeyPatch, show: Callable[[Output], None]) -> list[str]:
    """What a terminal of that width shows."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show(Output())
    return [STYLE.sub("", line).rstrip() for line in screen.getvalue().splitlines()]


def test_a_cell_wider_than_the_terminal_is_folded_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.WIDE", ["wide"])
    lines = table(20, monkeypatch, [["first", "x" * 70 + "end"]])
    assert max(map(len, lines)) <= 20 and "".join("".join(lines).split()).endswith("x" * 14 + "end")
    assert sum(line.count("x") for line in lines) == 70


def test_a_table_too_wide_for_a_terminal_comes_in_parts_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (40, 60, 80, 120):
        lines = table(width, monkeypatch)
        assert max(map(len, lines)) <= width
        words = " ".join(lines).split()
        assert [word for word in words if word.startswith("column")] == WIDE
        for name, numbers in (("first", range(10)), ("second", range(10, 20))):
            rows = [line.split() for line in lines if line.startswith(name)]
            assert [cell for row in rows for cell in row[1:]] == [str(number) for number in numbers]
            assert (len(rows) > 1) is (width < 120)


def test_names_of_modules_stay_whole_at_60_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "  model.layers.31.self_attn.o_proj"
    heads, row = ["  module", "rank", "energy kept", "relative error"], [name, "16", "98.37%", "0.128"]
    lines = shown(60, monkeypatch, lambda out: out.table(heads, [row]))
    assert max(map(len, lines)) <= 60
    assert [line.split() for line in lines if name.strip() in line] == [
        [name.strip(), *row[1:3]],
        [name.strip(), row[3]],
    ]


def test_a_long_name_of_an_adapter_leaves_the_losses_beside_it_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"organisation/a-very-long-name-of-an-adapter-{number}" for number in ("one", "two")]
    rows = [HeldOutRow(name, 1.0 + i, float(i), (i - 0.5, i + 0.5), 0.5) for i, name in enumerate([*names, "fit"])]
    table = HeldOut("test.jsonl", 24, 240, names[0], tuple(rows), (), "not better")
    untold = SimpleNamespace(training_nats_per_token=None)
    named = SimpleNamespace(
        public=lambda: SimpleNamespace(held_out_of_weights=table), held_out_of_weights=table, fit=untold
    )
    lines = shown(80, monkeypatch, lambda out: held_out_lines(out, named))  # type: ignore[arg-type]
    [heading] = [line for line in lines if line.split()[:1] == ["nats/token"]]
    assert heading.endswith("95 % interval  worse on") and max(map(len, lines)) <= 80
    cut = [line.split()[0] for line in lines if "…" in line]
    assert len(set(cut)) == 2 and all(len(name) == 26 and name.startswith("organisation") for name in cut)
    assert {name[-3:] for name in cut} == {"one", "two"}


def test_a_long_name_of_an_adapter_is_cut_in_every_table_that_has_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {name: f"an-adapter-with-a-really-long-name-of-{name}" for name in ("know", "form")}
    for name, other in long.items():
        Path(name).rename(other)
        Path("recipe.json").write_text(Path("recipe.json").read_text().replace(f'"{name}"', f'"{other}"'))
    cut = ["an-adap…-of-know", "an-adap…-of-form"]
    options = {"weights": False, "search": False, "layers": LayerOptions(), "placement": PlacementOptions()}
    lines = shown(60, monkeypatch, lambda out: show(recipe=Path("recipe.json"), **options, out=out))  # type: ignore[arg-type]
    for name in cut:  # the losses, `worse on`, rank to sha256, and the head of its weights
        assert [line.split()[:1] for line in lines].count([name]) == 4
    lines = shown(60, monkeypatch, lambda out: inspect(references=list(long.values()), out=out))
    assert any(line.startswith(" · ".join(cut)) for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_a_result_or_of_a_help_is_broken_by_the_terminal(here: Path, width: int) -> None:
    for words in (["show"], ["fit", "--help"], ["--help"]):
        code, sent = on_terminal(*words, cwd=here, width=width)
        lines = STYLE.sub("", sent).splitlines()
        assert code == 0 and max(map(len, lines)) <= width


def test_what_an_encoding_lacks_is_replaced_or_escaped(here: Path) -> None:
    (here / "know").rename(here / "knöw·猫")
    variables = {"PYTHONIOENCODING": "ascii"}
    done = piped("inspect", "knöw·猫", "form", cwd=here, variables=variables)
    assert done.returncode == 0, done.stderr
    assert "kn\\xf6w|\\u732b" in done.stdout and "| form" in done.stdout
    assert json.loads(piped("show", "naïve.json", "--json", cwd=here, variables=variables).stdout)["error"]["code"] == 3
    done = piped("show", "naïve.json", cwd=here, variables=variables)
    assert done.returncode == 3 and "na\\xefve.json" in done.stderr


def test_streams_that_cannot_be_told_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()


@pytest.mark.parametrize("words", [["show"], ["show", "--json"], ["fit", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away_ends_a_command_quietly(here: Path, words: list[str]) -> None:
    """Whether the pipe is full when it closes, as behind `head`, or was closed before the first line."""
    with subprocess.Popen(
        [*COMMAND, *words],
        cwd=here,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN),  # as Python itself has it
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert (process.returncode, said) == (1, "")


def test_v_tells_what_was_done_and_vv_adds_the_traceback(here: Path) -> None:
    assert "lint: " not in run("lint", "know").stderr
    assert re.search(r"^lint: 6 servers in [\d.]+ s", run("lint", "know", "-v").stderr, re.MULTILINE)
    plain, loud = run("show", "x.json"), run("show", "x.json", "-vv")
    assert "Traceback" not in plain.stderr + run("show", "x.json", "-v").stderr
    assert loud.stderr.startswith("Traceback") and loud.stderr.endswith(plain.stderr)
    assert "RecipeError" in loud.stderr and loud.stdout == ""
    content: Any = json.loads(run("show", "x.json", "-vv", "--json").stdout)
    assert content["error"]["code"] == 3


def test_how_one_command_talks_is_forgotten_by_the_next(here: Path) -> None:
    run("show", "x.json", "-vv", "--color", "never", "--json")
    assert "Traceback" not in run("show", "x.json").stderr
    assert TALK.get() == Talk()


def test_no_arguments_print_the_help_and_are_a_usage_error(here: Path) -> None:
    alone, asked = run(), run("--help")
    assert (alone.exit_code, asked.exit_code) == (2, 0)
    assert alone.stdout == asked.stdout and "Start:\n" in alone.stdout and alone.stderr == ""
    assert run("-h").stdout == asked.stdout
    assert run("-V").stdout == run("--version").stdout
    for name in ("fit", "show", "env"):
        assert run(name, "-h").stdout == run(name, "--help").stdout


def test_examples_can_be_copied_line_by_line(here: Path) -> None:
    text = run("fit", "--help").stdout
    examples = text[text.index("Examples:\n") : text.index("\n\nMain options:")]
    commands = [shlex.split(line) for line in examples.replace("\\\n", " ").splitlines()[1:]]
    assert commands == [shlex.split(example) for example in EPILOG.split("·")]  # as the shell reads the broken lines


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_help_has_every_word_whole_and_no_line_wider_than_the_screen(width: int) -> None:
    """Every word of every text of a command, at each width, and nothing of how Typer writes types."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root, info_name="loracat", terminal_width=width, **root.context_settings)
    for name, command in root.commands.items():
        text = command.get_help(typer.Context(command, context, info_name=name))
        texts = [command.help, *(p.help for p in command.params)]
        words = {word for one in texts for word in str(one).split()}
        assert words <= set(text.split()), name
        assert max(map(len, text.splitlines())) <= width, name
        assert not re.search(r"\[\[|<\w+[>\[]|\]\.\.\.", text), name


def test_options_stand_under_headings_where_they_are_many() -> None:
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        text = run(name, "--help").stdout
        own = [p for p in command.params if p.param_type_name == "option" and p.rich_help_panel]
        own = [p for p in own if not {"--json", "--quiet"} & set(p.opts)]
        found = [title for title in Panel if f"\n{title}:\n" in text]
        assert found == (
            [panel for panel in Panel if panel in {p.rich_help_panel for p in own}] if len(own) > 8 else []
        )
        for option in own:
            assert len(re.findall(rf"^  (?:-\w, )?{max(option.opts, key=len)}(?: |$)", text, re.MULTILINE)) == 1
        places = [text.index(f"\n{title}:\n") for title in ("Examples", *found)]
        assert places == sorted(places)  # the examples first


def test_the_commands_stand_in_groups_of_what_is_done_with_them() -> None:
    text = run("--help").stdout
    headings = [line for line in text.splitlines() if re.fullmatch(r"\w+:", line)]
    assert headings == ["Examples:", "Start:", "Ship:", "Judge:", "Other:", "Options:"]
    assert re.findall(r"^  ([a-z]+)  ", text, re.MULTILINE) == (
        "demo inspect fit show generate export lint verify fuse push compare report fetch convert env".split()
    )
