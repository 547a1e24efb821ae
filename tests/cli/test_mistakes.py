"""What people mistype: each mistake is told as what, where and the way out, with its documented exit code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.project import run, tree

DATA = ["--data", "calibration.jsonl", "--base", "base", "-o", "other.json"]
ELSE = ["-o", "other.json"]
TWO = ["--adapters", "know", "form"]
FIT = ["fit", *TWO, *DATA]


def nothing() -> None:
    pass


def all_bad() -> None:
    Path("calibration.jsonl").write_text('{"prompt": "x"}\n' * 30)


def lists() -> None:
    for name in ("base/config.json", "recipe.json", "know/adapter_config.json"):
        Path(name).write_text("[]")
    Path("w.json").write_text('{"know": 1, "know": 2}')


def a_classifier() -> None:
    config = Path("know/adapter_config.json")
    config.write_text(config.read_text().replace("CAUSAL_LM", "SEQ_CLS"))


def whole_model() -> None:
    shutil.copytree("base", "merged")


def no_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("base", name).unlink(missing_ok=True)


def above() -> None:
    shutil.copytree("know", "runs/know")


def no_recipe() -> None:
    Path("recipe.json").unlink()
    Path("adapter-cat").mkdir()
    Path("model-fused").mkdir()
    Path("report.html").write_text("")


def an_export() -> None:
    shutil.copytree("know", "adapter-cat")


def another_name() -> None:
    os.symlink("know", "same")


# What is done first, what is typed, the exit code, and what the error and its hint say.
MISTAKES: list[tuple[Callable[[], None], list[str], int, list[str]]] = [
    (nothing, ["inspect", "knwo", "form"], 3, ["error: knwo: ", "hint: did you mean know?"]),
    (nothing, ["inspect", "./knwo"], 3, ["error: ./knwo: no such directory", "did you mean know?"]),
    (nothing, ["inspect", "KNOW"], 3, ["error: KNOW: ", "hint: did you mean know?"]),
    (nothing, ["inspect", "base/knwo"], 5, ["error: base/knwo: offline"]),  # nothing near lies there
    (nothing, ["inspect", "../project/knwo"], 3, ["no such directory", "did you mean ../project/know?"]),
    (above, ["inspect", "runs/knwo"], 5, ["error: runs/knwo: offline", "hint: did you mean runs/know?"]),
    (nothing, ["fit", *TWO, *ELSE, "-d", "calibration.json"], 3, ["cannot be read", "calibration.jsonl?"]),
    (nothing, ["show", "recipes.json"], 3, ["the recipe recipes.json cannot", "did you mean recipe.json?"]),
    (nothing, ["fit", *TWO, "-d", "test.jsonl", "--quantise", "nf5"], 2, ["--quantise nf5 is", "did you mean nf4?"]),
    (nothing, [*FIT, "--mixing", "modul"], 2, ["error: --mixing modul is not one of", "did you mean module?"]),
    (nothing, ["compare", *TWO, "-d", "test.jsonl", "-m", "tie"], 2, ["--methods tie is not", "did you mean ties?"]),
    (nothing, ["export", *TWO, "--method", "tie"], 2, ["error: --method tie", "did you mean ties?"]),
    (nothing, ["lint", "know", "--for", "vlm"], 2, ["error: --for vlm is not one of", "did you mean vllm?"]),
    (an_export, ["export", "-a", "know", "frm", "-w", "1", "1"], 3, ["error: frm: ", "did you mean form?"]),
    (an_export, ["export"], 2, ["error: adapter-cat exists"]),
    (nothing, ["fit", "-a", "know,form", *DATA], 3, ["error: know,form: ", "without quotes: know form"]),
    (nothing, ["fit", *TWO, *ELSE, "-d", "know"], 3, ["error: know cannot be read", "named with --adapters"]),
    (nothing, ["fit", "-a", "calibration.jsonl", *DATA], 3, ["a data file is not an adapter", "with --data"]),
    (nothing, ["fit", "know", "form", *DATA], 2, ["error: know form: ", "loracat fit --adapters know form"]),
    (nothing, ["compare", "know", "form", "-d", "test.jsonl"], 3, ["is an adapter", "as in --adapters know;"]),
    (nothing, [*FIT, "--fields", "Prompt=q"], 2, ["--fields Prompt=q: Prompt is not one of", "did you mean prompt?"]),
    (nothing, [*FIT, "--base", "bsae"], 3, ["error: no directory bsae is here", "did you mean base?"]),
    (nothing, [*FIT, "--base", "./bsae"], 3, ["error: the base model ./bsae", "did you mean base?"]),
    (nothing, [*FIT, "--base", "base/config.json"], 3, ["error: the base model base/config.json is not a directory"]),
    (nothing, ["lint", "know", "--base", "bsae"], 3, ["error: no directory bsae is here", "did you mean base?"]),
    (all_bad, FIT, 3, ["30 of 30 records", "  calibration.jsonl:1 to 30, 30 lines: completion: missing"]),
    (lists, ["lint", "form", "--base", "base"], 3, ["config.json cannot be read: it is not a JSON object\n"]),
    (lists, ["inspect", "know"], 3, ["error: know/adapter_config.json: it is not a JSON object\n"]),
    (lists, ["export", "-a", "form", "-w", "w.json"], 2, ["w.json cannot be read as JSON: the key 'know' appears"]),
    (a_classifier, ["export", "-a", "know", "-w", "1", "--data", "test.jsonl", "--base", "base"], 3,
     ["scoring records takes those of causal language models alone", "hint: leave --data out"]),
    (a_classifier, ["fuse", *TWO, "-w", "1", "1", "--base", "base"], 3,
     ["different task types", "hint: compose them first, with loracat export and --task-type SEQ_CLS"]),
    (nothing, ["export", "--merge", "--rank", "999"], 2, ["--rank 999 is above 24", "give at most --rank 24"]),
    (whole_model, ["fit", "-a", "know", "merged", *DATA], 3, ["error: merged: ", "looks like a whole model", "--base"]),
    (nothing, ["export", *TWO, "--method", "ties", "--rank", "500"], 2, ["--rank 500 is above", "give at most --rank"]),
    (whole_model, ["show", "merged"], 3, ["error: merged is a whole model, and a recipe is read here", "with --base"]),
    (whole_model, ["fuse", "merged", "--base", "base"], 3, ["error: merged is a whole model", "with --base"]),
    (whole_model, ["compare", "merged", "-d", "test.jsonl"], 3, ["error: merged is a whole model", "with --base"]),
    (whole_model, ["lint", "merged"], 3, ["error: merged: the directory holds no adapter_config", "a whole model"]),
    (whole_model, ["export", "merged", "-w", "1"], 2, ["merged stands in the place of a recipe", "a whole model"]),
    (nothing, ["export", "know", "-w", "1"], 2, ["know stands in the place of a recipe", "--adapters know"]),
    (no_tokenizer, FIT, 3, ["has no tokenizer", "save_pretrained"]),
    (nothing, ["export", "know", "form", "-w", "1", "1"], 2, ["know form: ", "loracat export --adapters know form"]),
    (nothing, ["export", *TWO, "recipe.json"], 2, ["recipe.json stands among", "export recipe.json --adapters know"]),
    (nothing, ["lint", "know", "--for", "vllm", "sglang"], 2, ["only one DIR", "between them: --for vllm,sglang"]),
    (nothing, ["fit", *TWO, *ELSE, "-d", "test.jsonl,calibration.jsonl"], 3, ["files: test.jsonl calibration.jsonl"]),
    (nothing, ["fit", *TWO, *ELSE, "-d", "test.jsonl:x"], 3, ["which is a number: test.jsonl:2"]),
    (no_recipe, ["export"], 3, ["error: the recipe recipe.json cannot be read"]),
    (no_recipe, ["fuse", "--base", "base"], 3, ["error: the recipe recipe.json cannot be read"]),
    (no_recipe, ["report"], 3, ["error: the recipe recipe.json cannot be read"]),
    (another_name, ["inspect", "know", "same"], 2, ["know and same are one adapter"]),
    (another_name, ["fit", "-a", "know", "same", *DATA], 2, ["know and same are one adapter"]),
    (nothing, [*FIT, "--lr", "1"], 2, ["No such option: --lr\nhint: it is called --learning-rate here"]),
    (nothing, [*FIT, "--epochs", "1"], 2, ["--epochs", "it is called --passes here"]),
    (nothing, ["inspect", "know form"], 3, ["error: know form: ", "hint: separate adapters by spaces, without quotes"]),
    (nothing, ["inspect", *TWO], 2, ["No such option: --adapters", "without an option: loracat inspect REF..."]),
    (nothing, ["fit", *TWO, "calibration.jsonl"], 2, ["'--data'", "calibration.jsonl looks like data: --data cali"]),
    (nothing, [*FIT, "-w", "1", "1"], 2, ["option: -w", "need no fit: `loracat export --adapters ... --weights 1 1`"]),
    (nothing, ["lint", "recipe.json"], 3, ["is not a directory", "`loracat export recipe.json` writes an adapter"]),
    (nothing, ["export", "--rank", "8.5"], 2, ["error: --rank 8.5 is not a whole number\nhint: see"]),
    (nothing, [*FIT, "--tolerance", "10%"], 2, ["error: --tolerance 10% is not a number\nhint: see"]),
    (nothing, [*FIT, "--mixing"], 2, ["'--mixing' requires an argument", "hint: see `loracat fit --help`"]),
    (nothing, [*FIT, "--cv", "1"], 2, ["error: --cv 1 is not between 2 and 100"]),
    (nothing, [*FIT, "--dtype", "BF16"], 2, ["error: --dtype BF16 is not one of", "did you mean bfloat16?"]),
    (nothing, [*FIT, "--mixing", "cat"], 2, ["did you mean module?"]),
    (nothing, [*FIT, "--format", "chat"], 2, ["did you mean messages?"]),
    (nothing, [*FIT, "--quantise", "4-bit"], 2, ["did you mean nf4?"]),
    (nothing, ["fit", *TWO, *ELSE, "-d", "*.jsonl"], 3, ["stands without quotes"]),
    (nothing, ["export", "--merge", "--dtype", "fp16"], 2, ["did you mean float16?"]),
    (nothing, ["export", "--merge", "--energy", "99"], 2, ["is not above 0", "hint: of 99 % give 0.99"]),
    (nothing, ["export", "--profile", "vllm"], 2, ["did you mean portable?"]),
    (nothing, ["export", *TWO, "--method", "fit"], 2, ["as its recipe: loracat export recipe.json"]),
    (nothing, ["fuse", "--merge", "--base", "base"], 2, ["option: --merge\nhint: `loracat export --merge`"]),
    (nothing, ["list"], 2, ["error: loracat has no command list", "`loracat inspect ADAPTER...`"]),
    (nothing, ["chat"], 2, ["error: loracat has no command chat", "`loracat generate`"]),
    (nothing, ["help"], 2, ["error: loracat has no command help", "`loracat COMMAND --help`"]),
    (nothing, ["version"], 2, ["error: loracat has no command version", "`loracat --version`"]),
    (nothing, ["merge"], 2, ["error: loracat has no command merge", "`loracat export --merge`"]),
    (nothing, ["train"], 2, ["error: loracat has no command train", "`loracat fit`"]),
    (nothing, ["exprot"], 2, ["error: loracat has no command exprot", "did you mean export?"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "words", "code", "said"),
    MISTAKES,
    ids=[" ".join(word for word in words if word not in DATA) for _, words, _, _ in MISTAKES],
)
def test_a_mistake_is_told_with_its_way_out(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[], None],
    words: list[str],
    code: int,
    said: list[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    first()
    before = tree(here)
    result = run(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    for part in said:
        assert part in result.stderr
    assert tree(here) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-a", "know", "frm", "-d", "test.jsonl"], 3, "error: frm: "),
        ([*TWO[:2], "org/form", "-d", "tset.jsonl"], 3, "error: tset.jsonl cannot be read"),
        ([*TWO, "-d", "test.jsonl", "--eval-data", "tset.jsonl"], 3, "error: tset.jsonl cannot be read"),
        ([*TWO, "-d", "test.jsonl:0"], 2, "error: the weight of test.jsonl:0 is not between"),
        ([*TWO, "-d", "test.jsonl", "--format", "chta"], 2, "error: --format chta is not one of"),
        ([*TWO, "-d", "test.jsonl", "--quantise", "nf5"], 2, "error: --quantise nf5 is not one of"),
        ([*TWO, "-d", "test.jsonl", "--shard"], 2, "error: --shard shares the base model out over processes"),
        ([*TWO, "-d", "test.jsonl"], 2, "error: recipe.json exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_was_mistyped_is_told_before_a_recipe_that_is_there(
    here: Path, words: list[str], code: int, said: str
) -> None:
    result = run("fit", *words, "--base", "base")
    assert result.exit_code == code and result.stderr.startswith(said)


def test_a_name_that_looks_the_same_is_told_apart(here: Path) -> None:
    """`café` of four letters is typed, and one of five code points is there; where the disk takes both, there is no
    mistake."""
    Path("know").rename("cafe\u0301")
    result = run("inspect", "caf\u00e9")
    if not Path("caf\u00e9").exists():
        assert result.exit_code == 3 and "hint: cafe\u0301 is there, which looks the same" in result.stderr


def test_a_failure_speaks_on_stderr_beside_its_document(here: Path) -> None:
    """Where stdout is a file, nobody sees the document."""
    plain, result = run("show", "x.json"), run("show", "x.json", "--json")
    assert result.stderr == plain.stderr.splitlines(keepends=True)[0]  # without the hint, which the document has
    assert json.loads(result.stdout)["error"]["hint"] in plain.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "know", "copy"],
        ["fit", "-a", "know", "copy", *DATA, "--dry-run"],
        ["export", "-a", "know", "copy", "--weights", "0.5", "0.5", "--dry-run", "--base", "base"],
        ["export", "-a", "know", "copy", "--method", "sum", "--dry-run", "--base", "base"],
        ["fuse", "-a", "know", "copy", "--method", "sum", "--dry-run", "--base", "base"],
    ],
    ids=lambda words: " ".join(words[:1]),
)
def test_a_copy_of_an_adapter_is_warned_of_wherever_it_would_count_twice(here: Path, words: list[str]) -> None:
    shutil.copytree("know", "copy")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: know and copy hold the same bytes") == 1
    assert "same bytes" not in run(*["form" if word == "copy" else word for word in words]).stderr


def test_few_records_for_many_weights_and_one_adapter_alone_are_said(here: Path) -> None:
    lines = Path("calibration.jsonl").read_text().splitlines(keepends=True)
    Path("five.jsonl").write_text("".join(lines[:5]))
    few = ["fit", *TWO, "--data", "five.jsonl", "--base", "base", "--dry-run"]
    assert "warning: 5 training records for 22 weights: give more" in run(*few).stderr
    Path("two.jsonl").write_text("".join(lines[:2]))
    assert "only 2 records in all: too few for a verdict" in run(*few[:4], "--data", "two.jsonl", *few[6:]).stderr
    assert "training records for" not in run(*FIT, "--dry-run").stderr
    assert "training records for" not in run(*few, "--mixing", "adapter").stderr
    assert "only its scale in each module is fitted" in run("fit", "-a", "know", *DATA, "--dry-run").stderr
    assert "only its scale" not in run(*FIT, "--dry-run").stderr
