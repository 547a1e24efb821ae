"""List options that take several words: against argparse's nargs="+" with action="extend", which does it natively."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loracli.cli import app
from loracli.cli._command import GreedyCommand

Parsed = dict[str, Any]
ParseError: Any = typer.BadParameter.__mro__[1]


def greedy(argv: list[str]) -> Parsed | None:
    """What a GreedyCommand makes of the words; None for a usage error."""
    seen: Parsed = {}
    app = typer.Typer()

    @app.command(cls=GreedyCommand)
    def command(
        adapters: Annotated[list[str] | None, typer.Option("--adapters", "-a")] = None,
        extra: Annotated[list[str] | None, typer.Option("--extra", "-x")] = None,
        seed: Annotated[str | None, typer.Option("--seed", "-s")] = None,
        force: Annotated[bool, typer.Option("--force", "-f")] = False,
        verbose: Annotated[int, typer.Option("--verbose", "-v", count=True)] = 0,
    ) -> None:
        seen.update(adapters=adapters or [], extra=extra or [], seed=seed, force=force, verbose=verbose)

    try:
        typer.main.get_command(app).main(list(argv), standalone_mode=False)
    except ParseError:
        return None
    return seen


class Strict(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def oracle(argv: list[str]) -> Parsed | None:
    parser = Strict(allow_abbrev=False, add_help=False)
    parser.add_argument("--adapters", "-a", nargs="+", action="extend", default=[])
    parser.add_argument("--extra", "-x", nargs="+", action="extend", default=[])
    parser.add_argument("--seed", "-s")
    parser.add_argument("--force", "-f", action="store_true")
    parser.add_argument("--verbose", "-v", action="count", default=0)
    try:
        return vars(parser.parse_args(argv))
    except ValueError:
        return None


VALUES = ("a", "b", "-", "org/name@v1", "./x", "hf://org/n", "k=v", "two words", "1", "é", "--data.jsonl"[2:], "")


ONE = st.sampled_from(VALUES)
SOME = st.lists(ONE, max_size=3)
LISTS = st.sampled_from(["--adapters", "-a", "--extra", "-x"])
# List options in every spelling, with none to three values, scalars, flags, stray words.
PARTS = st.one_of(
    st.builds(lambda option, values: [option, *values], LISTS, SOME),
    st.builds(
        lambda option, one, values: [f"{option}={one}", *values], st.sampled_from(["--adapters", "--extra"]), ONE, SOME
    ),
    st.builds(lambda option, one: [option + one], st.sampled_from(["-a", "-x", "-s"]), st.sampled_from(VALUES[:5])),
    st.builds(lambda option, one: [option, one], st.sampled_from(["--seed", "-s"]), ONE),
    st.builds(lambda one: [f"--seed={one}"], ONE),
    st.sampled_from([["--force"], ["-f"], ["--verbose"], ["-vv"], ["--unknown"]]),
)


def test_every_command_line_means_what_argparse_takes_it_for() -> None:
    accepted: list[bool] = []

    @settings(derandomize=True, max_examples=500, deadline=None, database=None)
    @given(st.lists(PARTS, max_size=5))
    def check(parts: list[list[str]]) -> None:
        argv = [word for part in parts for word in part]
        expected = oracle(argv)
        assert greedy(argv) == expected
        accepted.append(expected is not None and max(len(expected["adapters"]), len(expected["extra"])) > 1)

    check()
    assert 50 < sum(accepted) < 450  # the cases are neither all errors nor all trivial


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapters", "a", "b"],
        ["--adapters", "a", "--adapters", "b"],
        ["--adapters=a", "--adapters=b"],
        ["--adapters=a", "--adapters", "b"],
        ["--adapters", "a", "-a", "b"],
        ["-a", "a", "b"],
        ["-aa", "-ab"],
        ["-a", "a", "--adapters=b"],
    ],
    ids=" ".join,
)
def test_the_named_forms_all_mean_the_same(argv: list[str]) -> None:
    rest: Parsed = {"extra": [], "seed": "7", "force": True, "verbose": 0}
    for words in ([*argv, "--seed", "7", "-f"], ["--seed", "7", "-f", *argv], ["-f", *argv, "--seed=7"]):
        assert greedy(words) == {"adapters": ["a", "b"], **rest}


def test_the_order_of_the_words_is_kept() -> None:
    parsed = greedy(["-a", "3", "1", "-f", "-a", "2", "--adapters=0"])
    assert parsed is not None and parsed["adapters"] == ["3", "1", "2", "0"]


@pytest.mark.parametrize("argv", [["--adapters"], ["-a"], ["--adapters", "--force"], ["a"], ["--adapters=a", "b"]])
def test_a_list_option_without_a_value_and_a_value_without_its_option_are_refused(argv: list[str]) -> None:
    assert greedy(argv) is None


def test_words_after_a_double_dash_belong_to_no_option() -> None:
    assert greedy(["-a", "a", "--"]) == greedy(["-a", "a"])
    assert greedy(["-a", "a", "--", "b"]) is None


def test_a_value_that_looks_like_an_option_passes_behind_its_own_option() -> None:
    parsed = greedy(["--seed", "-3", "-a", "a"])
    assert parsed is not None and (parsed["seed"], parsed["adapters"]) == ("-3", ["a"])
    parsed = greedy(["--seed", "--adapters", "-a", "a"])
    assert parsed is not None and (parsed["seed"], parsed["adapters"]) == ("--adapters", ["a"])


@pytest.mark.parametrize("number", ["-1", "-0.5", "-.5", "-1,2", "-1,-2", "-inf"])
def test_a_negative_number_is_a_value_and_begins_no_option(number: str) -> None:
    parsed = greedy(["-x", "1", number, "-f", "-s", "-3", "--adapters", number, "a"])
    assert parsed == {"extra": ["1", number], "force": True, "seed": "-3", "adapters": [number, "a"], "verbose": 0}


# The real command.


class Captured(Exception):
    pass


@pytest.fixture
def fitted_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The adapters and the data file that `loracat fit` would work on."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for name in ("a/adapter_config.json", "val.jsonl", "x.jsonl", "y.jsonl"):  # only that they are there is looked at
        Path(name).touch()

    def run(*words: str) -> Any:
        seen: list[Any] = []

        def prepare(adapters: list[str], data: list[str], **_: Any) -> None:
            seen.extend((list(adapters), list(data)))
            raise Captured

        monkeypatch.setattr("loracli.fitting.inputs.prepare_fit", prepare)
        result = CliRunner().invoke(app, ["fit", *words])
        return seen if isinstance(result.exception, Captured) else result

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["--adapters", "./a", "org/b@v1", "--data", "val.jsonl"],
        ["--data", "val.jsonl", "--adapters", "./a", "org/b@v1"],
        ["-d", "val.jsonl", "-a", "./a", "-a", "org/b@v1"],
        ["-a", "./a", "org/b@v1", "--data=val.jsonl"],
        ["--adapters=./a", "--data", "val.jsonl", "--adapters=org/b@v1", "--seed", "3", "--force"],
    ],
    ids=" ".join,
)
def test_fit_takes_adapters_in_every_form(fitted_with: Any, words: list[str]) -> None:
    assert fitted_with(*words) == [["./a", "org/b@v1"], ["val.jsonl"]]


@pytest.mark.parametrize(
    "words",
    [
        ["-a", "./a", "--data", "x.jsonl", "y.jsonl:2", "-"],
        ["--data", "x.jsonl", "-a", "./a", "-d", "y.jsonl:2", "-"],
        ["--data", "x.jsonl", "--data=y.jsonl:2", "-d-", "-a", "./a"],
    ],
    ids=" ".join,
)
def test_fit_takes_data_files_in_every_form_and_a_dash_for_standard_input(fitted_with: Any, words: list[str]) -> None:
    assert fitted_with(*words) == [["./a"], ["x.jsonl", "y.jsonl:2", "-"]]


def test_fit_refuses_adapters_without_a_value(fitted_with: Any) -> None:
    result = fitted_with("--adapters", "--data", "val.jsonl")
    assert result.exit_code == 2 and result.stdout == ""
    assert "--adapters" in result.stderr and "needs at least one value" in result.stderr


def test_fit_refuses_to_go_without_adapters_or_data(fitted_with: Any) -> None:
    assert "--adapters" in fitted_with("--data", "val.jsonl").stderr
    assert "--data" in fitted_with("--adapters", "a").stderr
