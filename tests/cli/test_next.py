"""What is printed to be copied runs as it stands, from a terminal of any width."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.cli._output import Output
from loracli.demo.run import DemoRow
from loracli.recipe.recipe import load_recipe
from tests.cli.project import FIT, run
from tests.conversion.training import train
from tests.pushing.conftest import hub  # noqa: F401  # a Hub that takes a push

# What a command cannot know, with what it is on this project.
PLACEHOLDERS = {"DATA.jsonl": "calibration.jsonl", "MODEL": "base"}

COMMANDS = {
    "fit": [*FIT, "-o", "the recipe.json"],
    "show": ["show"],
    "show, another name": ["show", "my recipe.json"],
    "report": ["report", "-o", "page.html"],
    "inspect": ["inspect", "know", "form"],
    "compare a recipe": ["compare", "my recipe.json", "--data", "test.jsonl", "--base", "base", "--methods", "uniform"],
    "compare adapters": [
        *"compare --adapters lower upper --data test.jsonl --base base --methods dare --density 0.95".split()
    ],
    "generate": ["generate", "--base", "base", "--prompt", "Who?", "--max-new-tokens", "2"],
    "generate, a directory": ["generate", "know", "--base", "base", "--prompt", "Who?", "--max-new-tokens", "2"],
    "fetch": ["fetch", "know", "form"],
    "fuse": ["fuse", "--base", "base", "-o", "the model"],
    "fuse adapters": [*"fuse --method sum --adapters know form --base base -o fused".split()],
    "fuse weights": [*"fuse --weights 1 0.5 --adapters know form --base base -o fused".split()],
}

FRESH = "whether a fresh LoRA does as well: "


class Narrow(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def printed(text: str) -> list[str]:
    return re.findall(r"^next: (.*)$", text, flags=re.MULTILINE)


def follow(talk: str) -> None:
    """Runs the one command that was printed."""
    [line] = printed(talk)
    assert "$" not in line
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)]
    assert words[0] == "loracat"
    if ">" in words:
        assert words[-2:] == [">", "comparison.json"]
        words = words[:-2]
    if "DATA.jsonl" in line and "--base" not in words:
        words += ["--base", "base"]  # which the adapters name by an id of the Hub, that these tests have not
    if words[1] == "fit":
        words += ["--dry-run"]
    after = run(*words[1:])
    refused = words[1] == "lint" and after.exit_code == 3  # by one of the servers, which is an answer
    assert after.exit_code == 0 or refused, f"{line}\n{after.stderr}"
    assert "error:" not in after.stderr


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 columns, that even what is no terminal is printed for."""
    monkeypatch.setattr("loracli.cli._output.PIPE_WIDTH", 60)
    console = Output.__init__.__globals__["_console"]

    def wrapping(stream: Any) -> Any:
        made = console(stream)
        made.soft_wrap = False
        return made

    monkeypatch.setitem(Output.__init__.__globals__, "_console", wrapping)


def divide(adapter: str) -> None:
    """Writes a layer of it into `lower` and the other into `upper`, which are better together."""
    tensors = load_file(Path(adapter, "adapter_model.safetensors"))
    for layer, half in enumerate(("lower", "upper")):
        shutil.copytree(adapter, half)
        kept = {name: tensor for name, tensor in tensors.items() if f".layers.{layer}." in name}
        save_file(kept, Path(half, "adapter_model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("narrow")
def test_the_next_command_runs_as_it_is_printed(here: Path, name: str) -> None:
    shutil.copy("recipe.json", "my recipe.json")
    divide("form")
    done = run(*COMMANDS[name])
    assert done.exit_code == 0, done.stderr
    follow(done.stderr)


@pytest.mark.usefixtures("here", "narrow")
def test_what_asks_for_a_fresh_lora_after_a_fit_runs_as_it_is_printed() -> None:
    """Where the fit trained none; with names that a shell would cut, and options of the fit."""
    questions = Path("test.jsonl").read_text().splitlines(keepends=True)
    Path("the test.jsonl").write_text("".join(questions[:24]))  # are compared faster
    shutil.copy("calibration.jsonl", "my data.jsonl")
    words = "fit --adapters know form --base base --passes 2 --max-length 64 --dtype float32 --control none -o".split()
    words += ["a recipe.json", "--data", "my data.jsonl:2", "--eval-data", "the test.jsonl"]
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    [line] = re.findall(rf"^{FRESH}(.*)$", done.stderr, flags=re.MULTILINE)
    after = run(*shlex.split(line)[1:])
    assert after.exit_code == 0, f"{line}\n{after.stderr}"
    assert "fresh-lora" in after.stdout
    for option in ("--max-length 64", "--dtype float32", "--passes 2", "--base base", "'my data.jsonl:2'"):
        assert option in line


@pytest.mark.parametrize("piped", [False, True])
def test_nothing_asks_for_a_fresh_lora_where_its_files_are_not_there(here: Path, piped: bool) -> None:
    words = "fit --adapters know form --base base --passes 2 --mixing adapter --control none -o new.json".split()
    words += ["--data"]
    words += ["-", "--eval-data", "test.jsonl"] if piped else ["test.jsonl"]
    done = run(*words, input=Path("calibration.jsonl").read_bytes() if piped else None)
    assert done.exit_code == 0, done.stderr
    assert FRESH not in done.stderr and printed(done.stderr)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("loracat/demo-base", []),
        ("./the base", ["--base", "./the base"]),
        ("/data/llama", ["--base", "MODEL"]),
        (None, ["--base", "MODEL"]),
        ("the\u3164base", ["--base", "MODEL"]),  # which is here, with a letter that nobody sees
    ],
)
def test_inspect_names_the_base_where_a_fit_would_not_find_it(here: Path, named: str | None, words: list[str]) -> None:
    for adapter in ("know", "form"):
        config = Path(adapter, "adapter_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    shutil.copytree("base", "the base")
    shutil.copytree("base", "the\u3164base")
    [line] = printed(run("inspect", "know", "form").stderr)
    assert shlex.split(line) == ["loracat", "fit", "--adapters", "know", "form", "--data", "DATA.jsonl", *words]


@pytest.mark.parametrize("commit", [None, "0" * 40])
def test_report_names_the_base_where_it_is_a_directory(here: Path, commit: str | None) -> None:
    recipe = json.loads(Path("recipe.json").read_text())
    recipe["base"]["commit"] = commit
    Path("recipe.json").write_text(json.dumps(recipe))
    [line] = printed(run("report").stderr)
    assert ("--base MODEL" in line) == (commit is None)


@pytest.mark.usefixtures("narrow")
def test_the_next_command_of_a_demo_runs(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself is run elsewhere; here the folder is there, but for its exports."""
    row = DemoRow("fit", 0.1, 1, 2)
    recipe = load_recipe(project / "recipe.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loracli.demo.run.run_demo", lambda folder, **_: made(folder))

    def made(folder: Path) -> Any:
        shutil.copytree(project, folder, dirs_exist_ok=True)
        questions = (folder / "test.jsonl").read_text().splitlines(keepends=True)
        (folder / "test.jsonl").write_text("".join(questions[:24]))  # are compared faster
        return SimpleNamespace(rows=[row], recipe=recipe, seconds=1.0)

    done = run("demo", "-o", "my example")
    assert done.exit_code == 0, done.stderr
    follow(done.stderr)
    [line] = printed(run("demo").stderr)
    assert line == "loracat demo -o example"


@pytest.mark.usefixtures("here", "narrow")
def test_the_next_command_of_a_push_runs(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("hub").add("loracat/demo-base", {"config.json": b"{}"})
    assert run("export", "-o", "my adapter").exit_code == 0
    done = run("push", "my adapter", "org/name")
    assert done.exit_code == 0, done.stderr
    follow(done.stderr)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dora", [False, True])
def test_the_next_command_of_a_conversion_runs(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    """Of a DoRA adapter, and of a pickle file whose adapter is one, which is to be converted next."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "base")
    adapter = train(tmp_path / "dora", tiny_base, use_dora=True).path
    words = ["convert", str(adapter), "-o", "a converted one"]
    if dora:
        done = run(*words, "--base", "base")
    else:
        tensors = load_file(adapter / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(tensors, adapter / "adapter_model.bin")
        done = run(*words, "--from-pickle")
    assert done.exit_code == 0, done.stderr
    assert ("convert" in printed(done.stderr)[0].split()[1]) != dora
    follow(done.stderr)


@pytest.mark.parametrize("width", [30, 60, 80])
def test_a_terminal_gets_what_is_copied_in_one_piece(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    result, talk = Narrow(), Narrow()
    monkeypatch.setattr(sys, "stdout", result)
    monkeypatch.setattr(sys, "stderr", talk)
    for name, value in (("COLUMNS", str(width)), ("NO_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    out, command = Output(), "loracat export --adapters " + " ".join(f"org/adapter-{n}" for n in range(20))
    out.hint(command)
    out.hint(command, what="in Python")
    out.line(f"  {command}", whole=True)
    out.line(command)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) for stream in (talk, result)]
    assert plain[0] == f"next: {command}\nin Python: {command}\n"
    first, *rest = plain[1].splitlines()
    assert first == f"  {command}" and len(rest) > 1 and max(map(len, rest)) <= width


@pytest.mark.usefixtures("narrow")
def test_what_loads_an_adapter_is_python_and_says_so(here: Path) -> None:
    talk = run(*"export --method sum --adapters know form --base base -o".split(), "a new adapter").stderr
    [line] = [line for line in talk.splitlines() if line.startswith("in Python: ")]
    compile(line.removeprefix("in Python: "), "line", "exec")
    assert '"a new adapter"' in line and "next: " not in talk


@pytest.mark.usefixtures("here")
def test_where_weights_do_not_help_the_fit_names_what_goes_further() -> None:
    """Random adapters do not help."""
    better = run(*FIT, "-o", "better.json")
    for name in ("know", "form"):
        tensors = load_file(Path(name, "adapter_model.safetensors"))
        drawn = torch.Generator().manual_seed(0)
        random = {
            key: torch.randn(t.shape, generator=drawn).mul(t.float().std()).to(t.dtype) for key, t in tensors.items()
        }
        save_file(random, Path(name, "adapter_model.safetensors"), metadata={"format": "pt"})
    words = "fit --adapters know form --base base --passes 2 --data calibration.jsonl".split()
    words += ["--eval-data", "test.jsonl", "-o"]
    done, further = run(*words, "new.json"), run(*words, "all.json", "--mixing", "core")
    assert "not clearly better" in done.stdout and "try --mixing auto" in done.stderr
    assert "try --mixing auto" not in further.stderr + better.stderr
