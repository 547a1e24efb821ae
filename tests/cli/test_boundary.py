"""The edge of the command: exit codes, what goes to which stream, one JSON document, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import loracli
from loracli.cli import app
from loracli.cli._output import SHOWN_PROBLEMS, Output, describe
from loracli.demo.run import example_folder
from loracli.errors import CalibrationError, LoracatError, UsageError
from loracli.system.escaping import visible
from tests.cli.process import environment
from tests.cli.project import FIT, run, tree

HEAVY = ("torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy", "tokenizers")


# Without torch: in processes of their own.

PROBE = f"""
import sys
code = 0
try:
    from loracli.cli import main
    main()
except SystemExit as stop:
    code = stop.code or 0
loaded = [name for name in {HEAVY!r} if name in sys.modules]
sys.stderr.write("\\nLOADED " + ",".join(loaded) + "\\n")
sys.exit(code)
"""


def probe(folder: Path, *words: str) -> tuple[int, str, str, list[str]]:
    """(exit code, stdout, stderr, heavy modules loaded) of a command line."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    talk, _, loaded = done.stderr.rpartition("\nLOADED ")
    return done.returncode, done.stdout, talk, [name for name in loaded.strip().split(",") if name]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_has_closed_is_no_traceback(tmp_path: Path, closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m loracli generate {closed}"
    ended = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert "Traceback" not in ended.stderr and ended.returncode in (2, 3)
    assert closed == "2>&-" or ended.stderr.startswith("error: ")


@pytest.mark.parametrize("words", ["--version", "--help", "env", "env --json", "env --quiet"])
def test_results_for_a_closed_standard_output_are_no_success(tmp_path: Path, words: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m loracli {words} >&-"
    ended = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "error: standard output: Bad file descriptor\n")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        ([], 2),
        (["--version"], 0),
        (["fit", "--help"], 0),
        (["export", "-h"], 0),
        (["fit", "--adapters", "--data", "x"], 2),
        (["fit", "--no-such-option", "--json"], 2),
        (["no-such-command"], 2),
    ],
    ids=str,
)
def test_help_version_and_usage_errors_load_no_torch(tmp_path: Path, words: list[str], code: int) -> None:
    returned, stdout, stderr, loaded = probe(tmp_path, *words)
    assert (returned, loaded) == (code, [])
    assert "\x1b" not in stdout + stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_probe_sees_torch_where_it_is_loaded(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    code, _, _, loaded = probe(tmp_path, "env")
    assert code == 0 and "torch" in loaded


def test_version_is_the_packages(tmp_path: Path) -> None:
    assert probe(tmp_path, "--version")[1] == f"loracat {loracli.__version__}\n"


# Everything else, in this process.


OTHER = [*FIT, "-o", "other.json"]
EXPORT = ["export"]
ELSEWHERE = ["--base", "base", "--base-revision", "main"]


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def nothing() -> None:
    pass


def broken_line() -> None:
    with open("calibration.jsonl", "a") as file:
        file.write('{"prompt": "x", "completion": \n')


def truncated_tensors() -> None:
    path = Path("know/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def nan_weights() -> None:
    edit_tensors(Path("form"), lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


def unknown_key() -> None:
    edit_config(Path("form"), from_the_future=True)


def dora() -> None:
    edit_config(Path("form"), use_dora=True)


def different_bases() -> None:
    edit_config(Path("form"), base_model_name_or_path="org/another")


def different_shapes() -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
        tensors[name] = torch.zeros(tensors[name].shape[0], 64)

    edit_tensors(Path("form"), widen)


def another_model() -> None:
    for name in ("know", "form"):
        edit_tensors(
            Path(name),
            lambda tensors: tensors.update(
                {k.replace(".layers.1.", ".layers.9."): tensors.pop(k) for k in list(tensors)}
            ),
        )


def changed_bytes() -> None:
    edit_tensors(Path("know"), lambda tensors: next(iter(tensors.values())).mul_(1.5))


def changed_config() -> None:
    edit_config(Path("form"), lora_alpha=17)


def missing_adapter() -> None:
    shutil.rmtree("form")


def missing_tensors() -> None:
    Path("form/adapter_model.safetensors").unlink()


def pickle_only() -> None:
    os.rename("form/adapter_model.safetensors", "form/adapter_model.bin")


def no_recipe() -> None:
    Path("recipe.json").unlink()


def damaged_recipe() -> None:
    document = json.loads(Path("recipe.json").read_text())
    del document["mixing"]
    document["dtype"] = 5
    Path("recipe.json").write_text(json.dumps(document))


def newer_recipe() -> None:
    document = json.loads(Path("recipe.json").read_text()) | {"loracat_recipe": 4}
    Path("recipe.json").write_text(json.dumps(document))


def taken_output() -> None:
    Path("adapter-cat").mkdir()


def photos_in_the_way() -> None:
    Path("adapter-cat").mkdir()
    Path("adapter-cat/photo.jpg").write_text("precious")


def base_is_an_adapter() -> None:
    shutil.copy("know/adapter_config.json", "base")


FAILURES: list[tuple[Callable[[], None], list[str], int, str | None]] = [
    (broken_line, OTHER, 3, "CalibrationError"),
    (truncated_tensors, OTHER, 3, "MalformedAdapter"),
    (nan_weights, OTHER, 3, "MalformedAdapter"),
    (unknown_key, OTHER, 3, "UnsupportedAdapter"),
    (dora, OTHER, 3, "UnsupportedAdapter"),
    (different_bases, [w for w in OTHER if w not in ("--base", "base")], 3, "IncompatibleAdapters"),
    (different_shapes, OTHER, 3, "IncompatibleAdapters"),
    (another_model, OTHER, 3, "BaseModelMismatch"),
    (missing_adapter, OTHER, 3, "AdapterNotFound"),
    (missing_tensors, OTHER, 3, None),
    (pickle_only, OTHER, 3, None),
    (nothing, [*OTHER, "--data", "missing.jsonl"], 3, "CalibrationError"),
    (nothing, [*OTHER, "--eval-data", "missing.jsonl"], 3, "CalibrationError"),
    (nothing, [*OTHER, "--base", "./missing"], 3, "InputError"),
    (taken_output, [*OTHER, "--base", "adapter-cat"], 3, "InputError"),
    (nothing, ["fuse", "--base", "./missing"], 3, "InputError"),
    (nothing, ["lint", "know", "--base", "./missing"], 3, "InputError"),
    (nothing, ["lint", "know", "--base", "form"], 3, "InputError"),
    (base_is_an_adapter, OTHER, 3, "InputError"),
    (nothing, [*OTHER, "--base-revision", "main"], 2, "UsageError"),
    (nothing, ["fuse", "--base", "base", "--base-revision", "main"], 2, "UsageError"),
    (nothing, ["export", "--method", "sum", "-a", "know", "-a", "form", *ELSEWHERE], 2, "UsageError"),
    (nothing, ["compare", "--data", "test.jsonl", *ELSEWHERE], 2, "UsageError"),
    (nothing, ["export", "--merge", "--data", "test.jsonl", *ELSEWHERE], 2, "UsageError"),
    (nothing, FIT, 2, "OutputExists"),
    (nothing, [*FIT, "-o", "know", "--force"], 2, "OutputExists"),
    (nothing, [*OTHER, "--mixing", "soup"], 2, "UsageError"),
    (nothing, [*OTHER, "--cv", "1"], 2, "UsageError"),
    (nothing, [*OTHER, "--cv", "50"], 2, "UsageError"),
    (nothing, [*OTHER, "--mixing", "nonsense"], 2, "UsageError"),
    (nothing, [*OTHER, "--holdout", "1.5"], 2, "UsageError"),
    (nothing, [*OTHER, "--passes", "nan"], 2, "UsageError"),
    (nothing, [*OTHER, "--seed", "-1"], 2, "UsageError"),
    (nothing, [*OTHER, "--dtype", "int8"], 2, "UsageError"),
    (nothing, [*OTHER, "--base", "org/not-looked-for", "--dtype", "int8"], 2, "UsageError"),
    (nothing, [*OTHER, "--base", "org/not-looked-for", "--device", "no-such-device"], 2, "UsageError"),
    (nothing, [*OTHER, "--device", "no-such-device"], 2, "UsageError"),
    (nothing, [*OTHER, "--device", "meta"], 2, "UsageError"),
    (nothing, [*OTHER, "--paper", "--ridge", "1"], 2, "UsageError"),
    (nothing, [*OTHER, "-a", "./know"], 2, "UsageError"),
    (nothing, [*OTHER, "-a", "calibration.jsonl"], 3, "AdapterNotFound"),
    (changed_bytes, EXPORT, 7, "IntegrityError"),
    (changed_config, EXPORT, 7, "IntegrityError"),
    (changed_bytes, ["export", "--merge"], 7, "IntegrityError"),
    (nothing, ["export", "--adapters", "form", "--adapters", "know"], 2, "UsageError"),
    (nothing, ["export", "--adapters", "know"], 2, "UsageError"),
    (missing_adapter, EXPORT, 3, "AdapterNotFound"),
    (truncated_tensors, EXPORT, 3, "MalformedAdapter"),
    (no_recipe, EXPORT, 3, "RecipeError"),
    (damaged_recipe, EXPORT, 3, "RecipeError"),
    (newer_recipe, EXPORT, 3, "RecipeError"),
    (taken_output, EXPORT, 2, "OutputExists"),
    (photos_in_the_way, ["export", "--force"], 2, "OutputExists"),
    (nothing, ["export", "-o", "recipe.json", "--force"], 2, "OutputExists"),
    (nothing, ["export", "-o", ".", "--force"], 2, "OutputExists"),
    (nothing, ["export", "--rank", "4"], 2, "UsageError"),
    (nothing, ["export", "--merge", "--rank", "0"], 2, "UsageError"),
    (nothing, ["export", "--dtype", "int8"], 2, "UsageError"),
    (nothing, ["export", "--profile", "nonsense"], 2, "UsageError"),
    (no_recipe, ["show"], 3, "RecipeError"),
    (damaged_recipe, ["show"], 3, "RecipeError"),
    (nan_weights, ["inspect", "know", "form"], 3, "MalformedAdapter"),
    (truncated_tensors, ["inspect", "know"], 3, "MalformedAdapter"),
    (nothing, ["inspect", "know", "--revision", "main"], 2, "UsageError"),
    (nothing, ["inspect", "./missing"], 3, "AdapterNotFound"),
    (nothing, ["inspect", ""], 3, "AdapterNotFound"),
    (nothing, ["inspect", "base"], 3, "AdapterNotFound"),
    (nothing, ["demo", "-o", "know"], 2, "OutputExists"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "words", "code", "kind"),
    FAILURES,
    ids=[f"{damage.__name__}-{' '.join(w for w in words if w not in FIT)}" for damage, words, _, _ in FAILURES],
)
def test_a_failure_has_its_code_its_document_and_leaves_nothing_behind(
    here: Path, damage: Callable[[], None], words: list[str], code: int, kind: str | None
) -> None:
    damage()
    before = tree(here)
    result = run(*words)
    assert result.exit_code == code
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert tree(here) == before

    result = run(*words, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["error"]["code"] == code
    assert document["loracat"] == 1 and document["error"]["message"]
    assert kind is None or document["error"]["kind"] == kind
    assert result.stderr.count("error: ") == 1  # one line, for stdout may be a file
    assert tree(here) == before


PARSE_ERRORS = [
    ["fit", "--no-such-option"],
    ["fit", "--adapters", "--data", "x"],
    ["fit", "--data", "x"],
    ["fit", "--adapters", "know", "--data", "x", "--seed", "one"],
    ["fit", "stray"],
    ["export", "a.json", "b.json"],
    ["inspect"],
    ["show", "--bad"],
    ["no-such-command"],
    ["--bad"],
]


@pytest.mark.parametrize("words", PARSE_ERRORS, ids=" ".join)
def test_a_command_line_that_cannot_be_parsed_is_a_usage_error_in_both_forms(here: Path, words: list[str]) -> None:
    before = tree(here)
    result = run(*words)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr
    result = run(*words, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["error"]["code"] == 2
    assert document["error"]["kind"] == "UsageError" and document["error"]["hint"]
    assert tree(here) == before


def test_bad_lines_are_listed_in_words_and_in_json(here: Path) -> None:
    lines = ['{"prompt": "x"}'] * (SHOWN_PROBLEMS + 5)
    Path("calibration.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + "\n".join(lines) + "\n")
    reason = "completion: missing; the file's shape is prompt-completion"
    stderr = run(*OTHER).stderr
    count = SHOWN_PROBLEMS + 5
    assert f"\n  calibration.jsonl:2 to {count + 1}, {count} lines: {reason}\n" in stderr  # all bad in the same way
    problems = json.loads(run(*OTHER, "--json").stdout)["error"]["problems"]
    assert problems == [f"calibration.jsonl:{number}: {reason}" for number in range(2, 2 + SHOWN_PROBLEMS + 5)]


def test_bad_lines_of_several_kinds_are_listed_one_by_one(here: Path) -> None:
    lines = ['{"prompt": 5, "completion": "b"}'] + ['{"prompt": "x"}'] * (SHOWN_PROBLEMS + 4)
    Path("calibration.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + "\n".join(lines) + "\n")
    stderr = run(*OTHER).stderr
    numbers = re.findall(r"^  calibration.jsonl:(\d+): ", stderr, re.MULTILINE)
    assert numbers == [str(number) for number in range(2, 2 + SHOWN_PROBLEMS)] and "  ... and 5 more\n" in stderr


def test_all_problems_of_a_recipe_are_in_the_document(here: Path) -> None:
    damaged_recipe()
    problems = json.loads(run("show", "--json").stdout)["error"]["problems"]
    assert "mixing: missing" in problems


# What is interrupted.

KILLED = """
import os, signal, sys
import loracli.export.write as export
def stop(path, *rest, **options):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.{signal})
    signal.pause()
export.write_tensors = stop
from loracli.cli import main
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_killed_export_leaves_nothing_behind(here: Path, name: str, code: int) -> None:
    before = tree(here)
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(signal=name), "export"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert tree(here) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=["INT", "TERM"])
def test_how_to_go_on_is_the_hint_of_the_document(monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    def fail(*_: object) -> None:
        stop.add_note("what was done is kept")
        raise stop

    monkeypatch.setattr("loracli.recipe.recipe.load_recipe", fail)
    assert json.loads(run("show", "x.json", "--json").stdout)["error"]["hint"] == "what was done is kept"


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["INT", "TERM"])
def test_an_interrupted_command_prints_one_document_and_a_line(
    monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr("loracli.recipe.recipe.load_recipe", fail)
    result = run("show", "x.json", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["code"] == code and result.stderr == f"{error['message']}\n"
    result = run("show", "x.json")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"{error['message']}\n")


# Hostile names.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 猫", "plain é 猫"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nerror: fake", "a\\nerror: fake"),
        ("\r\t\x07\x00", "\\r\\t\\x07\\x00"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\ud800", "\\ud800"),
        ("[bold]:smile:[/nope]", "[bold]:smile:[/nope]"),
    ],
)
def test_what_cannot_be_printed_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


HOSTILE = "evil\x1b]8;;http://x\x07[bold]:cat:[/nope]"
ESCAPED = "evil\\x1b]8;;http:\\x07[bold]:cat:[/nope]"


def test_a_hostile_directory_name_is_shown_escaped(here: Path) -> None:
    name = HOSTILE.replace("//x", "")
    shutil.copytree("know", name)
    result = run("inspect", f"./{name}")
    assert result.exit_code == 0 and f"./{ESCAPED}" in result.stdout
    result = run("inspect", f"./{name}", "--json")
    assert json.loads(result.stdout)["adapters"][0]["reference"] == f"./{name}"
    truncated = Path(name) / "adapter_model.safetensors"
    truncated.write_bytes(b"short")
    assert ESCAPED in run("inspect", f"./{name}").stderr


def test_a_hostile_data_file_name_is_shown_escaped(here: Path) -> None:
    name = "\x1b[2Jdata\nerror: fake.jsonl"
    Path(name).write_text("[]\n")
    stderr = run(*OTHER, "--data", name).stderr
    assert "\\x1b[2Jdata\\nerror: fake.jsonl:1: expected a JSON object" in stderr
    assert "\nerror: fake" not in stderr


def test_hostile_text_in_data_and_options_is_shown_escaped(here: Path) -> None:
    Path("calibration.jsonl").write_text('{"\\u001b[31m": 1}\n{"\\u001b[31m": 1, "\\u001b[31m": 2}\n')
    assert "\\x1b[31m" in run(*OTHER).stderr
    run("fit", "--\x1b[31m")
    run("\x1b[31m")
    run(*OTHER, "--mixing", "\x1b[31m")
    run("export", "\x1b[31m.json")


# Success.


def test_every_command_prints_exactly_one_document_on_success(here: Path) -> None:
    for words, key in (
        ([*OTHER, "--mixing", "adapter"], "verdict"),
        ([*OTHER, "--force", "--dry-run"], "plan"),
        (["show"], "recipe"),
        (["inspect", "know", "form"], "composable"),
        (["export"], "largest_relative_error"),
        (["export", "--merge", "--rank", "3"], "mean_kept_energy"),
        (["fetch", "./know"], "adapters"),
        (["env"], "env"),
    ):
        result = run(*words, "--json")
        assert result.exit_code == 0, words
        document = json.loads(result.stdout)
        assert document["loracat"] == 1 and key in document and "error" not in document
    assert sorted({path.name for path in here.iterdir()} - set(tree(example_folder()))) == [
        "adapter-cat",
        "adapter-merged",
        "other.json",
        "other.json.activations.safetensors",
        "recipe.json",
        "recipe.json.activations.safetensors",
    ]


def test_adapters_that_do_not_fit_are_a_result_of_inspect_with_code_3(here: Path) -> None:
    different_bases()
    result = run("inspect", "know", "form", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 3 and document["composable"] is False and "org/another" in document["problems"][0]
    assert "cannot be composed" in run("inspect", "know", "form").stdout


def test_quiet_prints_the_value_and_nothing_else(here: Path) -> None:
    assert run("export", "-q").stdout == "adapter-cat\n"
    result = run("export", "--merge", "-q", "-o", "m")
    assert (result.stdout, result.stderr) == ("m\n", "")
    assert run("show", "-q").stdout.strip() in ("better", "not better", "too few records")


def test_force_replaces_an_export_and_a_recipe(here: Path) -> None:
    assert run("export", "-q").exit_code == 0
    first = tree(here / "adapter-cat")
    (here / "adapter-cat" / "README.md").write_text("x")
    assert run("export", "-q", "--force").exit_code == 0
    assert tree(here / "adapter-cat") == first
    (here / "adapter-cat" / "stray").write_text("x")
    assert run("export", "-q", "--force").exit_code == 2
    (here / "adapter-cat" / "stray").unlink()
    before = (here / "recipe.json").read_bytes()
    assert run(*FIT, "--force").exit_code == 0
    assert (here / "recipe.json").read_bytes() == before


def test_a_recipe_can_be_exported_from_another_folder_and_with_moved_adapters(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export", "-q").exit_code == 0
    expected = (here / "adapter-cat" / "adapter_model.safetensors").read_bytes()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert run("export", "../recipe.json", "-q").exit_code == 0
    assert Path("adapter-cat/adapter_model.safetensors").read_bytes() == expected
    os.rename("../know", "moved")
    assert run("export", "../recipe.json", "-q", "-o", "x").exit_code == 3
    moved = run("export", "../recipe.json", "-q", "-o", "x", "--adapters", "moved", "--adapters", "../form")
    assert moved.exit_code == 0
    assert Path("x/adapter_model.safetensors").read_bytes() == expected


# The pieces.


def kinds(root: type[LoracatError]) -> list[type[LoracatError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("kind", kinds(LoracatError), ids=lambda kind: kind.__name__)
def test_every_error_ends_the_command_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, kind: type[LoracatError]
) -> None:
    def fail(*_: object) -> None:
        raise kind("it failed", hint="do this")

    monkeypatch.setattr("loracli.recipe.recipe.load_recipe", fail)
    result = run("show", "x.json")
    assert (result.exit_code, result.stdout) == (kind.exit_code, "")
    assert result.stderr == "error: it failed\nhint: do this\n"
    error = json.loads(run("show", "x.json", "--json").stdout)["error"]
    assert (error["code"], error["kind"], error["message"], error["hint"]) == (
        kind.exit_code, kind.__name__, "it failed", "do this",
    )  # fmt: skip


def test_the_codes_are_the_documented_ones() -> None:
    assert {kind.exit_code for kind in kinds(LoracatError)} == {1, 2, 3, 4, 5, 6, 7}
    drawn = loracli.errors.__doc__ or ""
    for kind in kinds(LoracatError):
        assert re.search(rf"\b{kind.__name__} +{kind.exit_code} ", drawn), kind


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("loracli.recipe.recipe.load_recipe", fail)
    for words in (["show", "x.json"], ["show", "x.json", "--json"]):
        assert isinstance(CliRunner().invoke(app, words).exception, ZeroDivisionError)


def test_an_error_describes_itself_with_its_place_and_problems() -> None:
    error = describe(UsageError("wrong", where="file:3", hint=None))
    assert error == {"code": 2, "kind": "UsageError", "message": "file:3: wrong", "hint": None}
    assert describe(CalibrationError("bad", problems=("f:1: x", "f:2: y")))["problems"] == ["f:1: x", "f:2: y"]


def test_a_document_is_refused_rather_than_written_with_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Output(as_json=True).document({"x": float("nan")})
    assert capsys.readouterr().out == ""
