"""The public names, and what importing them costs."""

import inspect
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import loracli
from loracli.errors import InputError, UsageError
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from tests.tiny import make_adapter, random_records, write_jsonl

LOADED = "import sys; import {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"


def exit_code(module: str) -> int:
    return subprocess.run([sys.executable, "-c", LOADED.format(module=module)], check=False).returncode


@pytest.mark.parametrize("module", ["loracli", "loracli.cli", "loracli.errors"])
def test_importing_loads_nothing_slow(module: str) -> None:
    assert exit_code(module) == 0


def test_the_check_for_slow_imports_can_fail() -> None:
    assert exit_code("loracli.algebra.factors") == 1


def test_every_public_name_resolves_and_no_other_does() -> None:
    assert loracli.__all__ == sorted(loracli.__all__, key=lambda name: (name.lower() == name, name))
    for name in loracli.__all__:
        assert getattr(loracli, name) is getattr(loracli, name)
        assert name in dir(loracli)
    with pytest.raises(AttributeError):
        loracli.no_such_name  # noqa: B018


def test_weights_by_hand_in_six_lines(tmp_path: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = [str(path) for path in two_adapters]
    composed = loracli.compose(adapters, [0.7, -0.3])
    composed.export(tmp_path / "cat")
    merged = composed.export(tmp_path / "merged", merge=True, rank=3)
    loracli.export_adapter(loracli.ExportRequest(adapters=adapters, weights=[0.7, -0.3]), tmp_path / "asked")

    written = [(tmp_path / name / "loracat.json").read_bytes() for name in ("cat", "asked")]
    assert written[0] == written[1] and merged.layout.rank == 3
    assert repr(composed.composition) == "<Composition first + second, 12 modules>"
    assert loracli.compose(two_adapters, {"#1": {"default": 0.7}, "#2": {"default": -0.3}}).composition.names()
    for how, hint in (
        ({"method": "ties"}, "ExportRequest(method=..., ...)"),
        ({"merged": True}, "did you mean merge?"),
    ):
        with pytest.raises(loracli.LoracatError) as refused:
            composed.export(tmp_path / "no", **how)
        assert hint in str(refused.value.hint)
    with pytest.raises(loracli.LoracatError, match="a rank is for a merge"):
        composed.export(tmp_path / "no", rank=3)
    with pytest.raises(loracli.LoracatError, match="1 number for 2 adapters"):
        loracli.compose(adapters, [0.7])


def test_the_four_steps_in_six_lines(tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(45))
    adapters = [loracli.fetch_adapter(str(path)) for path in two_adapters]
    recipe = loracli.fit_mixing(adapters, data, base=str(tiny_base), settings=loracli.FitSettings(passes=2))
    recipe.save(tmp_path / "recipe.json")
    exported = loracli.export_adapter(
        loracli.ExportRequest(tmp_path / "recipe.json", merge=True), tmp_path / "adapter-merged"
    )
    assert exported.layout.rank == 4
    size = f"{exported.size_bytes / 1e3:.1f} kB"
    assert repr(recipe).startswith("<Recipe first + second, module, ")
    assert repr(exported) == f"<Exported adapter-merged, first + second, rank 4, 12 modules, float32, {size}>"
    assert repr(loracli.read_adapter(adapters[0])) == "<LoraAdapter first, rank 4, 9 modules, float32>"
    inspected = loracli.inspect_adapters([str(path) for path in two_adapters])
    assert repr(inspected) == "<Inspection first + second, no problems>"
    assert (tmp_path / "adapter-merged" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: loracli.compose("./math", [1.0]), r"adapters is './math', but should be a list of"),
        (lambda: loracli.compose(["./math"], ["1"]), r"weights is \['1'\], but should be a list of numbers"),
        (lambda: loracli.inspect_adapters("./math"), "references is './math', but should be a list"),
        (lambda: loracli.fit_mixing("./math", "val.jsonl"), "adapters is './math', but should be a list"),
        (lambda: loracli.lint_adapter("./math", servers="vllm"), "servers is 'vllm', but should be a list of texts"),
        (lambda: loracli.verify_directory("out", adapters="./math"), "adapters is './math', but should be a list"),
        (lambda: loracli.CompareSettings(methods="sum"), "methods is 'sum', but should be a list of texts"),
        (lambda: loracli.generate_answers(loracli.GenerateRequest("out"), "Hi"), "prompts is 'Hi', but should be a"),
        (lambda: loracli.export_adapter("r.json", "out"), "request is 'r.json', but should be ExportRequest"),
        (lambda: loracli.ExportRequest("r.json", merge=True, rank="3"), "rank is '3', but should be a whole number or"),
        (lambda: loracli.ExportRequest("r.json", merge=True, rank=3.0), "rank is 3.0, but should be a whole number"),
        (lambda: loracli.ExportRequest("r.json", merge=True, rank=True), "rank is True, but should be a whole number"),
        (lambda: loracli.FitSettings(seed="x"), "seed is 'x', but should be a whole number"),
        (lambda: loracli.FitSettings(mixing=None), "mixing is None, but should be text"),
        (lambda: loracli.FitSettings(cv=2.5), "cv is 2.5, but should be a whole number or None"),
        (lambda: loracli.FitSettings(max_length=10.5), "max_length is 10.5, but should be a whole number"),
        (lambda: loracli.FitSettings(paper="yes"), "paper is 'yes', but should be True or False"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name_before_any_work(call: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        call()
    if reason.startswith("servers"):
        assert caught.value.hint == "for one of them give ['vllm']"
    if reason.startswith("request"):
        assert caught.value.hint == "for example ExportRequest('r.json')"


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: loracli.CompareSettings(methods="ties,dare"), "for several of them give ['ties', 'dare']"),
        (lambda: loracli.CompareSettings(controls=["fresh-lora"]), "for example Controls(fresh_lora=True)"),
        (lambda: loracli.CompareSettings(controls="random"), "for example Controls(random=True)"),
        (lambda: loracli.CompareSettings(controls=["nothing"]), None),
        (lambda: loracli.CompareSettings(fit={"cv": 4}), "for example FitSettings(cv=4)"),
        (lambda: loracli.CompareSettings(fit={"epochs": 4}), None),
        (lambda: loracli.compare_adapters("d.jsonl", metric="exact"), "for example TaskMetric('exact')"),
        (lambda: loracli.fit_mixing(["./a"], "d", settings={"passes": 3}), "for example FitSettings(passes=3)"),
        (lambda: loracli.fit_mixing(["./a"], "d", placement="cpu"), None),
        (lambda: loracli.fit_mixing(["./a"], [{"text": "t"}]), "of records in memory write a file, "),
        (lambda: loracli.fit_mixing(["./a"], "d", eval_data={"text": "t"}), "of records in memory write a file, "),
    ],
)
def test_an_argument_of_another_type_is_answered_with_a_call_that_can_be_made(call: Any, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert "DataSource" not in str(caught.value)
    said = caught.value.hint
    assert said == hint or (hint is not None and str(said).startswith(hint) and said.endswith("give its path"))
    if said is not None and said.startswith("for example"):
        assert eval(
            said.removeprefix("for example "), vars(loracli) | {n: getattr(loracli, n) for n in loracli.__all__}
        )


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"passes": 0}, "--passes 0 is not between 2 and 1000"),
        ({"passes": 1.0}, "--passes 1 is not between 2 and 1000"),
        ({"passes": 1.5}, "--passes 1.5 is not between 2 and 1000"),
        ({"learning_rate": 50.0}, "--learning-rate 50 is not between 1e-09 and 10.0"),
    ],
)
def test_a_setting_out_of_its_range_is_named_in_words_with_the_value_as_it_was_given(
    setting: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError) as caught:
        loracli.FitSettings(**setting)
    assert str(caught.value) == reason


def test_errors_of_an_output_and_of_a_rank_speak_to_those_who_call_a_function_too(
    tmp_path: Path, two_adapters: tuple[Path, Path]
) -> None:
    composed = loracli.compose(two_adapters, [1, 1])
    composed.export(tmp_path / "out")
    with pytest.raises(loracli.LoracatError) as taken:
        composed.export(tmp_path / "out")
    assert str(taken.value.hint).endswith("replace it: --force, in Python force=True")
    composed.export(tmp_path / "out", force=True)
    with pytest.raises(loracli.LoracatError) as refused:
        composed.export(tmp_path / "no", rank=3)
    assert str(refused.value.hint).endswith("merge=True")


def test_a_path_in_the_home_is_meant_so(
    tmp_path: Path, two_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    loracli.compose(two_adapters, [1, 1]).export("~/out")
    loracli.export_adapter(loracli.ExportRequest(adapters=two_adapters, weights=[1, 1]), Path("~/again"))
    assert {path.name for path in tmp_path.glob("home/*")} == {"out", "again"} and not Path("~").exists()


def test_numbers_of_numpy_and_any_iterable_are_taken_as_pythons_own(
    tmp_path: Path, two_adapters: tuple[Path, Path]
) -> None:
    written = []
    for name, rank, weights, kind in (("own", 3, [0.5, 2.0], list), ("numpy", np.int64(3), np.array([0.5, 2.0]), iter)):
        loracli.compose(kind(two_adapters), weights).export(tmp_path / name, merge=True, rank=rank)
        written.append([(tmp_path / name / file).read_bytes() for file in ("loracat.json", "adapter_config.json")])
    assert written[0] == written[1]


def test_a_base_may_be_a_path_which_is_a_directory_alone(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, base in (("text", str(tiny_base)), ("path", tiny_base)):
        loracli.compose(two_adapters, [1, 1], base=base).export(tmp_path / name)
    names = ("adapter_config.json", "loracat.json", "README.md")
    texts, paths = ([(tmp_path / name / file).read_bytes() for file in names] for name in ("text", "path"))
    assert texts == paths
    request = loracli.FuseRequest(adapters=two_adapters, weights=[1, 1], base=tiny_base)
    assert loracli.fuse_model(request, "fused", dry_run=True).modules
    assert loracli.lint_adapter("path", base=tiny_base).servers
    with pytest.raises(InputError, match="org/base is not a directory"):
        loracli.compose(two_adapters, [1, 1], base=Path("org/base"))


def test_the_text_of_an_error_with_several_reasons_says_the_first(two_adapters: tuple[Path, Path]) -> None:
    tables = {"#1": {"default": "x", "q_prj": 1}, "#2": {"default": 1}}
    with pytest.raises(UsageError) as caught:
        loracli.compose(two_adapters, tables)
    assert str(caught.value).startswith("the weights cannot be honoured: [#1] default: expected a number (and 1 more)")
    assert len(caught.value.problems) == 2 and caught.value.summary == "the weights cannot be honoured"


class Terminal(StringIO):
    """A stderr that a bar can be drawn on."""

    def isatty(self) -> bool:
        return True


WITH_PROGRESS = [name for name in loracli.__all__ if "progress" in inspect.signature(getattr(loracli, name)).parameters]


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In the test itself: pytest sets stderr anew after the fixtures."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", made := Terminal())
    return made


def ended(before: set[threading.Thread]) -> bool:
    """Whether nothing draws any more: Rich's thread has been told to end."""
    new = set(threading.enumerate()) - before
    for thread in new:
        thread.join(5.0)
    return not any(thread.is_alive() for thread in new)


def test_the_word_bar_draws_what_the_command_line_draws(
    monkeypatch: pytest.MonkeyPatch, two_adapters: tuple[Path, Path]
) -> None:
    before, terminal = set(threading.enumerate()), terminal_of(monkeypatch)
    found = loracli.lint_adapter(two_adapters[0], progress="bar")
    assert found == loracli.lint_adapter(two_adapters[0])
    assert "lint" in terminal.getvalue() and "━" in terminal.getvalue()
    assert ended(before)


def test_a_bar_is_off_the_screen_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @takes_bar
    def fail(*, progress: Progress | Bar = SILENT) -> None:
        drawn(progress).begin("work", 2, "B")
        raise ValueError("half way")

    before, terminal = set(threading.enumerate()), terminal_of(monkeypatch)
    with pytest.raises(ValueError, match="half way"):
        fail(progress="bar")
    assert "work" in terminal.getvalue() and ended(before)
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is cleared


def test_where_no_bar_can_be_drawn_what_one_should_know_is_said_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_base: Path
) -> None:
    idle = make_adapter(tmp_path / "idle", tiny_base, targets=("q_proj",), rank=2, alpha=2, seed=3)
    tensors = load_file(idle / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, idle / "adapter_model.safetensors")
    capsys.readouterr()
    loracli.lint_adapter(idle)
    assert capsys.readouterr().err == ""
    loracli.lint_adapter(idle, progress="bar")
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: ") and shown.out == "" and "\x1b" not in shown.err


@pytest.mark.parametrize("name", WITH_PROGRESS)
@pytest.mark.parametrize("given", ["bars", True, None], ids=str)
def test_another_word_is_refused_before_any_work(name: str, given: object, tmp_path: Path) -> None:
    parameters = inspect.signature(getattr(loracli, name)).parameters.values()
    needed = [tmp_path / "nothing" for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(loracli.LoracatError, match=rf"progress is '?{given}'?") as raised:
        getattr(loracli, name)(*needed, progress=given)
    assert raised.value.exit_code == 2 and '"bar"' in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


def test_every_public_function_that_works_for_long_takes_the_bar() -> None:
    functions = [name for name in loracli.__all__ if inspect.isfunction(getattr(loracli, name))]
    assert set(functions) - set(WITH_PROGRESS) == {"load_recipe"}
