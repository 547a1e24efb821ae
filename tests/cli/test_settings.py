"""Options from variables and files: which of them holds, what is refused, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from loracli.cli import app
from loracli.cli._settings import RULES, TABLE, options_of, read_settings
from loracli.fitting.settings import FitSettings
from tests.cli.project import FIT, run, tree

INPUTS = 'adapters = ["know", "form"]\ndata = ["calibration.jsonl"]\nbase = "base"\n'
ROOT = Path(__file__).parents[2]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, with its folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    path = tmp_path / "xdg" / "loracat" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def plan(*words: str) -> dict[str, Any]:
    """What `loracat fit --dry-run` would do."""
    result = run("fit", "--dry-run", "--json", *words)
    assert result.exit_code == 0, result.stdout
    content: dict[str, Any] = json.loads(result.stdout)["plan"]
    return content


def test_the_command_line_wins_over_variables_and_they_over_the_projects_file_and_it_over_the_users(
    here: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user.write_text(f"[fit]\n{INPUTS}passes = 3\n")
    assert plan()["passes"] == 4 * 3  # of each fold
    Path("loracat.toml").write_text("[fit]\npasses = 4\n")
    assert plan()["passes"] == 4 * 4 and plan()["adapters"] == ["know", "form"]
    Path("run.toml").write_text("[fit]\npasses = 5\n")
    assert plan("--config", "run.toml")["passes"] == 4 * 5
    monkeypatch.setenv("LORACAT_CONFIG", "run.toml")
    assert plan()["passes"] == 4 * 5  # of each fold
    monkeypatch.setenv("LORACAT_FIT_PASSES", "6")
    assert plan("--config", "run.toml")["passes"] == 4 * 6
    assert plan("--passes", "7")["passes"] == 4 * 7


def test_lists_and_flags_come_from_files_and_variables(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run.toml").write_text(f"[fit]\n{INPUTS}paper = true\n")
    monkeypatch.setenv("LORACAT_CONFIG", "run.toml")
    assert plan()["passes"] == 1  # the published recipe takes one pass
    monkeypatch.setenv("LORACAT_FIT_PAPER", "0")
    assert plan()["passes"] == FitSettings().budget(4, plan()["training_records"])
    monkeypatch.setenv("LORACAT_FIT_ADAPTERS", "form know")
    assert plan()["adapters"] == ["form", "know"]
    assert plan("-a", "know")["adapters"] == ["know"]
    for word in ("YES", "on"):
        monkeypatch.setenv("LORACAT_FIT_PAPER", word)
        assert plan()["passes"] == 1
    shown = run("fit", "--dry-run").stderr
    assert "from LORACAT_FIT_PAPER: --paper\n" in shown and "from LORACAT_FIT_ADAPTERS: --adapters\n" in shown
    monkeypatch.setenv("LORACAT_FIT_PASSES", "many")
    result = run("fit")
    assert result.exit_code == 2 and "the variable LORACAT_FIT_PASSES: --passes " in result.stderr


def test_a_file_speaks_of_every_command_and_of_the_shared_options(here: Path) -> None:
    Path("run.toml").write_text('quiet = true\n[export]\nmerge = true\nrank = 3\n[fit]\nmixing = "core"\n')
    assert run("export", "--config", "run.toml").stdout == "adapter-merged\n"
    document = json.loads(run("export", "--config", "run.toml", "--force", "--json").stdout)
    assert document["rank"] == 3


def test_what_a_file_sets_is_told(here: Path) -> None:
    Path("loracat.toml").write_text('color = "never"\n[export]\nmerge = true\n')
    assert "from loracat.toml: --merge\n" in run("export", "--dry-run").stderr
    assert "from loracat.toml: --merge, --color\n" in run("export", "--dry-run", "-v").stderr
    assert "from loracat.toml" not in run("export", "--dry-run", "-q").stderr + run("show").stderr


REFUSED = """
tokn = 1
quiet = 3
passes = 1
[fit]
adapters = "know"
token = "hf_canary"
mixng = "core"
paper = 1
seed = [1]
since = 1979-05-27
[fitt]
a = 1
[fetch]
token = "hf_canary"
[show]
json = true
config = "x"
"""


def test_everything_that_cannot_be_honoured_is_named_at_once(here: Path) -> None:
    Path("run.toml").write_text(REFUSED)
    before = tree(here)
    result = run(*FIT, "-o", "new.json", "--config", "run.toml", "--json")
    assert result.exit_code == 2 and tree(here) == before
    problems = json.loads(result.stdout)["error"]["problems"]
    assert [problem.split(": ")[1] for problem in problems] == [
        "tokn", "quiet", "passes", "fit.adapters", "fit.token", "fit.mixng", "fit.paper", "fit.seed", "fit.since",
        "fitt", "fetch.token", "show.json", "show.config",
    ]  # fmt: skip
    assert all(problem.startswith("run.toml: ") for problem in problems)
    said = "\n".join(problems)
    assert "did you mean mixing?" in said and "did you mean fit?" in said and "such as [fit]" in said
    assert "HF_TOKEN" in said and "hf_canary" not in said
    spoken = run("show", "--config", "run.toml").stderr
    assert all(f"  {problem}\n" in spoken for problem in problems)


@pytest.mark.parametrize(
    "content", ["[fit", "\xff", "a = " + "[" * 5000, "x" * (1 << 21)], ids=["cut", "bytes", "deep", "large"]
)
def test_a_file_that_is_none_is_refused(here: Path, content: str) -> None:
    Path("run.toml").write_text(content[:20] if content == "\xff" else content, encoding="latin-1")
    result = run("show", "--config", "run.toml")
    assert result.exit_code == 2 and "run.toml" in result.stderr and result.stdout == ""
    assert run("show", "--config", "missing.toml").exit_code == 2
    assert run("show", "--config", ".").exit_code == 2


PARTS = ".".join("a" * 10)  # one dot more than a key may have


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (".".join("a" * 30_000) + " = 1", 1),
        (f"[fit]\n\n[{PARTS}]", 3),
        (f"[[{PARTS}]]", 1),
        ('"a" . ' * 9 + "'a' = 1", 1),
        (f"a = {{b = 1, {PARTS} = 1}}", 1),
        (f'a = {{b = """\n"" """, {PARTS} = 1}}', 2),
        (f'a = {{b = """x"""", {PARTS} = 1}}', 1),
        (f"a = {{b = '''\n# ' '''', {PARTS} = 1}}", 2),
        (f'a = {{b = "\\"", {PARTS} = 1}} # "', 1),
    ],
)
def test_a_key_of_many_parts_is_refused_before_it_is_parsed(
    here: Path, monkeypatch: pytest.MonkeyPatch, content: str, line: int
) -> None:
    """The parser takes the square of them in time and memory."""
    monkeypatch.setattr("tomllib.loads", None)
    Path("loracat.toml").write_text(content)
    result = run("show", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 2 and error["kind"] == "SettingsError" and len(result.stdout) < 1000
    assert error["problems"][0].startswith(f"loracat.toml: line {line}: the key ")


def test_dots_in_strings_comments_and_numbers_are_no_parts_of_a_key(here: Path) -> None:
    dots = "a." * 20
    strings = f"'{dots}', \"{dots}\", \"\"\"\n{dots}\"\"\", '''{dots}'''"
    Path("loracat.toml").write_text(f"# {dots}\n[fit]\nadapters = [{strings}]  # {dots}\nridge = 1.5\n")
    assert run("show").exit_code == 0


@pytest.mark.parametrize(("number", "reason"), [("1" * 5000, "thousands of digits"), ("0x" + "f" * 9000, "64 bits")])
def test_a_number_that_is_too_long_is_one_error(here: Path, number: str, reason: str) -> None:
    Path("loracat.toml").write_text(f"[fit]\nseed = {number}\n")
    result = run("show", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 2 and error["kind"] == "SettingsError" and reason in error["problems"][0]


def test_a_value_that_an_option_rejects_is_named_with_its_file(here: Path) -> None:
    Path("loracat.toml").write_text('[fit]\nseed = "one"\n')
    assert "error: loracat.toml: --seed " in run(*FIT).stderr


def options_of_every_command() -> dict[str, dict[str, Any]]:
    command: Any = typer.main.get_command(app)
    return {name: options_of(one) for name, one in command.commands.items()}


def test_the_table_of_what_an_unasked_file_may_say_knows_every_option_and_no_other() -> None:
    every = {f"{command}.{option}" for command, options in options_of_every_command().items() for option in options}
    named = {option for row in TABLE for option in row.options}
    assert sum(len(row.options) for row in TABLE) == len(named)
    assert {option for option in every if option not in named} - {
        option for option in every if option.partition(".")[2] in named
    } == set(), "give each new option a row in loracli/cli/_settings.py and in docs/configuration.md"
    known = every | {option.partition(".")[2] for option in every}
    assert named <= known


def test_the_page_prints_that_table() -> None:
    words = {"no": "no", "inside": "inside the folder", "yes": "yes"}
    rows = [f"| {', '.join(f'`{o}`' for o in r.options)} | {words[r.rule]} | {r.why} |" for r in TABLE]
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "\n".join(rows)


@pytest.mark.parametrize("option", sorted(option for option, row in RULES.items() if row.rule == "no"))
def test_what_an_unasked_file_may_not_set_is_refused_and_may_stand_elsewhere(
    here: Path, user: Path, option: str
) -> None:
    command, _, long = option.rpartition(".")
    commands = options_of_every_command()
    command = command or next(name for name, options in commands.items() if long in options)
    value = "true" if commands[command][long].is_flag else '"x"'
    Path("loracat.toml").write_text(f"[{command}]\n{long} = {value}\n")
    before = tree(here)
    result = run("show", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["code"] == 2 and error["kind"] == "SettingsError"
    assert error["problems"] == [f"loracat.toml: {command}.{long}: {RULES[option].why}"]
    assert "--config loracat.toml" in error["hint"] and tree(here) == before
    assert run("show", "--config", "loracat.toml").exit_code == 0
    Path("loracat.toml").rename(user)
    assert run("show").exit_code == 0


def test_what_only_the_user_may_set_is_said_to_be_so_beside_what_is_wrong_and_env_reports_both(here: Path) -> None:
    Path("loracat.toml").write_text('[fit]\nadapters = "know form"\nforce = true\n')
    refused, env = run("fit"), run("env")
    assert refused.exit_code == 2 and "fit.adapters: expected a list of text\n" in refused.stderr
    assert "fit.force: replaces what is there, and loracat.toml is in force without having" in refused.stderr
    assert "; --config loracat.toml says that you trust it" in refused.stderr
    assert (
        env.exit_code == 0
        and "warning: no file is in force: 2 settings cannot be honoured; loracat.toml: fit" in env.stderr
    )


def test_quiet_above_the_tables_hides_nothing(here: Path) -> None:
    Path("loracat.toml").write_text("quiet = true\n[export]\nmerge = true\n")
    result = run("export", "--dry-run")
    assert result.exit_code == 2 and "loracat.toml: quiet: hides" in result.stderr


@pytest.mark.parametrize(
    "value", ["/etc/x", "../x", "~/x", "link/x", "a/../../x", "inside/../../x", "hf://../../x", "hf://x"]
)
@pytest.mark.parametrize("option", sorted(option for option, row in RULES.items() if row.rule == "inside"))
def test_a_path_in_an_unasked_file_stays_in_the_folder(here: Path, option: str, value: str) -> None:
    Path("link").symlink_to(here.parent)
    Path("hf:").symlink_to(here.parent)
    commands = options_of_every_command()
    command = next(name for name, options in commands.items() if option in options and f"{name}.{option}" not in RULES)
    multiple = commands[command][option].multiple
    for text, taken in (
        (value, False),
        (f"{value}:2", False),
        (f"{value}:2@a", False),
        (f"{value}@a", False),
        ("inside/x", True),
        (str(here / "x"), True),
    ):
        Path("loracat.toml").write_text(f"[{command}]\n{option} = {json.dumps([text] if multiple else text)}\n")
        result = run("show")
        assert (result.exit_code == 0) == taken, (text, result.stderr)
        said = f"{command}.{option}: {text!r} is not inside of the folder: it has to be {RULES[option].why}\n"
        assert taken or f"loracat.toml: {said}" in result.stderr, result.stderr


def test_an_unasked_file_names_no_hidden_output_nor_standard_input_but_adapters_on_the_hub(here: Path) -> None:
    for content, taken in (
        ('[report]\noutput = ".bashrc"', False),
        ('[report]\noutput = ".git/hooks/x"', False),
        ('[report]\noutput = "./soup.html"', True),
        ('[fit]\ndata = ["-"]', False),
        ('[fit]\ndata = ["val.jsonl:2"]', True),
        ('[fit]\nadapters = ["org/a@v1", "hf://org/b@main/sub"]', True),
    ):
        Path("loracat.toml").write_text(content + "\n")
        assert (run("show").exit_code == 0) == taken, content


def test_an_unasked_file_overwrites_nothing(here: Path) -> None:
    """What it could do when `log` truncated a file and `force` replaced one."""
    (here.parent / "rc").write_text("precious")
    Path("recipe.html").write_text("precious")
    for content in (
        f'[fit]\nlog = "{here.parent}/rc"',
        '[fit]\nlog = "recipe.html"',
        '[report]\noutput = "recipe.html"',
    ):
        Path("loracat.toml").write_text(content + "\n")
        assert run(*FIT, "--mixing", "adapter", "-o", "other.json").exit_code in (0, 2) and run("report").exit_code == 2
        assert (here.parent / "rc").read_text() == Path("recipe.html").read_text() == "precious"
        Path("other.json").unlink(missing_ok=True)


def test_a_folder_brings_no_program_along(here: Path, user: Path) -> None:
    """A project's file is read without being asked for; one that is named, or the user's own, may name a program."""
    Path("loracat.toml").write_text('[fit]\nmetric-command = "touch run"\n')
    result = run(*FIT, "--dry-run")
    assert result.exit_code == 2 and "fit.metric-command" in result.stderr
    assert run(*FIT, "--dry-run", "--config", "loracat.toml").exit_code == 0
    user.write_text('[fit]\nmetric-command = "cat"\n')
    Path("loracat.toml").rename("run.toml")
    assert run(*FIT, "--dry-run").exit_code == 0
    user.unlink()
    assert run(*FIT, "--dry-run", "--config", "run.toml").exit_code == 0


def test_a_variable_that_names_no_option_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACAT_FETCH_TOKEN", "hf_canary")
    result = run("fetch", "./know")
    assert result.exit_code == 2 and "LORACAT_FETCH_TOKEN" in result.stderr and "HF_TOKEN" in result.stderr
    assert "hf_canary" not in result.stderr
    assert run("show").exit_code == 0  # it is no variable of that command
    monkeypatch.setenv("LORACAT_SHOW_RECIPES", "x")
    assert "LORACAT_SHOW_RECIPES" in run("show").stderr
    monkeypatch.setenv("LORACAT_FIT_ADAPTER", "know form")
    assert "LORACAT_FIT_ADAPTER" in run("fit").stderr  # rather than that --adapters is missing


def test_a_recipe_repeats_its_fit_to_the_same_bytes(here: Path, user: Path) -> None:
    user.write_text("[fit]\nridge = 0.5\nseed = 9\n")  # what a recipe leaves to the default, it leaves to the default
    given = ["--data", "calibration.jsonl", "--eval-data", "test.jsonl", "--base", "base"]
    result = run("fit", "--config", "recipe.json", *given, "-o", "again.json")
    assert result.exit_code == 0, result.stderr
    assert Path("again.json").read_bytes() == Path("recipe.json").read_bytes()
    Path("large.json").write_text(Path("recipe.json").read_text() + " " * (2 << 20))
    assert run("fit", "--config", "large.json", *given, "-o", "third.json", "--dry-run").exit_code == 0


def test_a_recipe_sets_all_that_it_records_wherever_it_lies(here: Path) -> None:
    document = json.loads(Path("recipe.json").read_text().replace('"form"', '"org/form"'))
    document["fit"]["settings"] |= {"ridge": 0.0, "seed": 3, "holdout": 0.0, "paper": False, "select_by": "exact"}
    document["base"]["quantisation"], document["loracat_recipe"] = "nf4", 7
    document["adapters"][1] |= {"repo_id": "org/form", "commit": "a" * 40, "subfolder": "best"}
    Path("elsewhere").mkdir()
    Path("elsewhere/soup.json").write_text(json.dumps(document))
    command: Any = typer.main.get_command(app)
    commands = {name: options_of(one) for name, one in command.commands.items()}
    found = {s.option: s.value for s in read_settings(Path("elsewhere/soup.json"), commands)}
    assert set(found) <= set(commands["fit"])
    assert found["adapters"] == ["./elsewhere/know", f"hf://org/form@{'a' * 40}/best"]
    assert (found["ridge"], found["seed"], found["holdout"], found["paper"]) == (0.0, 3, 0.0, False)
    assert (found["select-by"], found["dtype"], found["passes"]) == ("exact", document["dtype"], 2.0)
    assert found["quantise"] == "nf4"


def test_a_recipe_is_no_configuration_of_what_it_does_not_record(here: Path) -> None:
    assert run("export", "--config", "recipe.json").exit_code == 2
    document = json.loads(Path("recipe.json").read_text())
    document["fit"]["settings"]["metric_command"] = "0" * 64
    Path("soup.json").write_text(json.dumps(document))
    result = run(*FIT, "-o", "new.json", "--config", "soup.json")
    assert result.exit_code == 2 and "--metric-command" in result.stderr


def test_env_tells_what_is_in_force_and_where_it_comes_from(
    here: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORACAT_BROWSER", raising=False)
    user.write_text("[fit]\npasses = 3\n")
    Path("loracat.toml").write_text('color = "never"\n')
    monkeypatch.setenv("LORACAT_EXPORT_RANK", "4")
    monkeypatch.setenv("LORACAT_QUIET", "0")
    monkeypatch.setenv("LORACAT_NONSENSE", "hf_canary")
    document = json.loads(run("env", "--json").stdout)
    assert document["config_files"] == [str(user), "loracat.toml"]
    assert document["settings"] == [
        {"origin": str(user), "command": "fit", "option": "passes", "value": 3},
        {"origin": "loracat.toml", "command": None, "option": "color", "value": "never"},
        {"origin": "LORACAT_EXPORT_RANK", "command": "export", "option": "rank", "value": "4"},
        {"origin": "LORACAT_NONSENSE", "command": None, "option": None, "value": None},
        {"origin": "LORACAT_QUIET", "command": None, "option": "quiet", "value": "0"},
    ]
    spoken = run("env").stdout
    assert all(text in spoken for text in ("fit --passes", "export --rank", "LORACAT_NONSENSE", str(user)))
    assert "hf_canary" not in spoken
    assert json.loads(run("env", "--config", "recipe.json", "--json").stdout)["config_files"] == [
        str(user),
        "recipe.json",
    ]
    for name in ("EXPORT_RANK", "QUIET", "NONSENSE"):
        monkeypatch.delenv(f"LORACAT_{name}")
    assert f"settings from {user}, loracat.toml\n" in run("env").stdout
