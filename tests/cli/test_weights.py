"""Weights by hand as they are typed: a recipe's weights as a file and back, and every way to get them wrong."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import RecipeMixing
from tests.cli.project import document, run, tree

TENSORS = "adapter_model.safetensors"
AB = ["--adapters", "know", "form"]
BOTH = "[know]\ndefault = 1\n[form]\ndefault = 1\n"


def test_the_first_line_of_a_recipes_weights_exports_the_recipes_own_bytes(here: Path) -> None:
    """For each kind of mixing that has weights: the command is the one that the file itself says."""
    fitted = load_recipe("recipe.json")
    kinds: dict[Any, dict[str, Any]] = {
        "module": dict(fitted.mixing.weights),
        "layer": {f"model.layers.{layer}": (0.1 + layer / 7, -layer / 3) for layer in range(2)},
        "adapter": {"*": (1 / 3, -1.1)},
    }
    for kind, rows in kinds.items():
        replace(fitted, mixing=RecipeMixing(kind, rows, 2)).save(f"{kind}.json", force=True)
        assert run("export", f"{kind}.json", "-o", f"of-{kind}").exit_code == 0
        shown = run("show", f"{kind}.json", "--weights")
        assert shown.exit_code == 0 and shown.stderr == ""
        Path(f"{kind}.toml").write_text(shown.stdout)
        first = shown.stdout.splitlines()[0]
        assert first == "# loracat export --adapters ./know ./form --weights THIS-FILE"
        words = shlex.split(first.removeprefix("# loracat ").replace("THIS-FILE", f"{kind}.toml"))
        assert run(*words, "-o", f"hand-{kind}").exit_code == 0
        assert Path(f"hand-{kind}", TENSORS).read_bytes() == Path(f"of-{kind}", TENSORS).read_bytes()
    assert '"0" = ' not in Path("layer.toml").read_text() and "\n1 = " in Path("layer.toml").read_text()
    assert "default = -1.1" in Path("adapter.toml").read_text()
    shown = run("show", "module.json", "--weights", "--quiet")
    assert shown.stdout == Path("module.toml").read_text()
    Path("document.json").write_text(json.dumps(document("show", "module.json", "--weights")))
    assert run("export", *AB, "--weights", "document.json", "-o", "document").exit_code == 0
    assert Path("document", TENSORS).read_bytes() == Path("of-module", TENSORS).read_bytes()


def test_the_first_line_names_no_base_that_only_its_user_knows(here: Path) -> None:
    fitted = load_recipe("recipe.json")
    adapters = tuple(replace(adapter, base_model="/home/me/llama") for adapter in fitted.adapters)
    local = replace(fitted, adapters=adapters, base=replace(fitted.base, id="llama", commit=None))
    local.save("local.json")
    assert "--base path/to/base --weights THIS-FILE" in run("show", "local.json", "--weights").stdout.splitlines()[0]


def test_a_folder_with_a_recipe_exports_the_adapters_that_are_named(here: Path) -> None:
    """Or numbers would meet the recipe that lies there."""
    for spelled in (["1", "-1"], ["1,-1"], ["1", "--weights", "-1"], ["--weights=-1"]):
        given = ["--weights", "1", *spelled] if spelled[0].startswith("--") else ["--weights", *spelled]
        assert run("export", *given, *AB, "-o", "out", "--force").exit_code == 0
        assert json.loads(Path("out/loracat.json").read_text())["weights"] == {
            "#1": {"default": 1.0},
            "#2": {"default": -1.0},
        }
    assert "set by hand: 1, -1." in Path("out/README.md").read_text()
    assert "--weights 1 -1 --adapters path/to/know path/to/form" in Path("out/README.md").read_text()
    checked = run("verify", "out", *AB)
    assert checked.exit_code == 0 and "not checked" not in checked.stdout
    Path("loracat.toml").write_text('[export]\nadapters = ["know", "form"]\nweights = ["0.7", "0.3"]\nmerge = true\n')
    assert run("export", "-o", "set").exit_code == 0
    assert json.loads(Path("set/loracat.json").read_text())["weights"]["#1"] == {"default": 0.7}


def test_adapters_alone_and_an_adapter_as_a_recipe_name_the_way_out(here: Path) -> None:
    Path("recipe.json").unlink()
    alone = run("export", *AB)
    assert alone.exit_code == 2 and "there is no recipe.json here" in alone.stderr
    assert "hint: add --weights 1 1, or --method sum, or name a recipe before --adapters" in alone.stderr
    assert run("export", *AB, "--weights", "1", "1").exit_code == 0
    Path("know").rename("kn ow")
    taken = run("export", "./kn ow", "--merge", "--rank", "2")
    assert taken.exit_code == 3 and "error: kn ow is an adapter, and a recipe is read here" in taken.stderr
    typed = re.search(r"as in (--adapters [^;]*);", taken.stderr)
    assert typed is not None
    one = ["--weights", "1", "--merge", "--rank", "2", "-o", "again"]
    assert run("export", *shlex.split(typed[1]), *one).exit_code == 0


def test_a_compression_that_cuts_nothing_says_so_in_the_place_of_a_table(here: Path) -> None:
    said = run("export", "-a", "know", "-w", "1", "--merge", "-o", "whole").stdout
    assert "  nothing was cut: exact" in said and "energy kept" not in said
    assert "energy kept by the compression" in run("export", "-a", "know", "-w", "1", "--merge", "--rank", "1").stdout


def test_a_number_too_few_is_told_before_an_output_that_is_in_the_way(here: Path) -> None:
    Path("adapter-cat").mkdir()
    for words in (("export", *AB, "-w", "0.7"), ("fuse", *AB, "--base", "base", "-w", "0.7", "-o", "adapter-cat")):
        said = run(*words)
        assert said.exit_code == 2 and "--weights has 1 number for 2 adapters: 0.7" in said.stderr


def test_a_recipe_that_nobody_named_is_told_of(here: Path) -> None:
    said = run("export", *AB, "-o", "fitted")
    assert said.exit_code == 0 and "the weights are those of recipe.json, as neither --weights" in said.stderr
    assert "the weights are those of" not in run("export", "recipe.json", *AB, "-o", "named").stderr
    fused = run("fuse", *AB, "--base", "base", "-o", "model", "--dry-run")
    assert "the weights are those of recipe.json, as neither --weights" in fused.stderr
    asked = ("generate", *AB, "--base", "base", "--prompt", "a", "--max-new-tokens", "1")
    assert "the weights are those of recipe.json" in run(*asked).stderr
    assert "the weights are those of" not in run("generate", "recipe.json", *asked[1:]).stderr


# What is typed behind `loracat export --adapters know form`, the file weights.toml, the exit code, what the error says,
# and a word of the way out.
AWKWARD: list[tuple[list[str], str | None, int, str, str]] = [
    (["--weights"], None, 2, "needs at least one value", ""),
    (["--weights", ""], None, 2, "'' is neither a number nor a file", "0.7 0.3"),
    (["--weights", "0.7"], None, 2, "1 number for 2 adapters", "one for each"),
    (["--weights", "1", "2", "3"], None, 2, "3 numbers for 2 adapters: 1, 2, 3", "one for each"),
    (["--weights", "0.7", "0,3"], None, 2, "3 numbers for 2 adapters: 0.7, 0, 3", "a comma separates two numbers"),
    (["--weights", "weights.toml"], "\ufeff[know]\ndefault = 1", 2, "form", "table"),
    (["--weights", "0.7,"], None, 2, "'' is not a number", "0.7 0.3"),
    (["--weights", "0.7", "x"], None, 2, "'x' is not a number", "0.7 0.3"),
    (["--weights", "1_0", "1"], None, 2, "'1_0' is not a number", "0.7 0.3"),
    (["--weights", "nan", "1"], None, 2, "nan is not a weight", "0.7 0.3"),
    (["--weights", "1", "-inf"], None, 2, "-inf is not a weight", "0.7 0.3"),
    (["--weights", "1e9", "1"], None, 2, "1e+09 is beyond 1e+06", "0.7 0.3"),
    (["--weights", "1e999", "1"], None, 2, "inf is not a weight", "0.7 0.3"),
    (["--weights", "0", "-0"], None, 2, "every weight is 0", "0.7 0.3"),
    (["--weights", "weights.toml", "0.3"], BOTH, 2, "numbers or one file, not both", "0.7 0.3"),
    (["--weights", "weights.toml", "b.toml"], BOTH, 2, "numbers or one file, not both", "0.7 0.3"),
    (["--weights", "weights.txt"], None, 2, "neither a number nor a file ending in .toml or .json", "0.7 0.3"),
    (["--weights", "gone.toml"], None, 2, "gone.toml cannot be read: No such file", "0.7 0.3"),
    (["--weights", "know.json"], None, 2, "know.json cannot be read", "0.7 0.3"),
    (["--weights", "weights.toml"], "", 2, "has no table of an adapter", "default"),
    (["--weights", "weights.toml"], "[know\n", 2, "cannot be read as TOML", "fix weights.toml"),
    (["--weights", "weights.toml"], "a.b.c.d.e.f.g.h.i.j = 1", 2, "more than 8 dots", "fix weights.toml"),
    (["--weights", "weights.toml"], f"[know]\ndefault = {'1' * 5000}", 2, "thousands of digits", "fix"),
    (["--weights", "weights.toml"], BOTH.replace("1", "inf"), 2, "inf is not a weight", "default"),
    (["--weights", "weights.toml"], BOTH.replace("1", "2020-01-01"), 2, "expected a number", "default"),
    (["--weights", "weights.toml"], "[know]\ndefault = 1", 2, "no table for the adapter form (#2)", "a table for each"),
    (
        ["--weights", "weights.toml"],
        BOTH + "[fork]\n",
        2,
        "[fork]: names none of the adapters, which are know",
        "a table",
    ),
    (["--weights", "weights.toml"], BOTH + '["#1"]\n', 2, "a second table of one adapter", "a table"),
    (["--weights", "weights.toml"], BOTH + '"*.k_prj" = 2', 2, "no module of the adapter; near: *.k_proj", "patterns"),
    (["--weights", "weights.toml"], BOTH + "q_poj = 2", 2, "near: ", "patterns"),
    (["--weights", "weights.toml"], BOTH + "0-4 = 2", 2, "the adapter has layers 0 to 1", "layers as 0-7"),
    (["--weights", "weights.toml"], BOTH + "experts = 2", 2, "experts: no module of the adapter", "patterns"),
    (["--weights", "weights.toml"], BOTH + "0-1 = 2\n1 = 3", 2, "0-1 gives model.layers.1", "layers"),
    (["--weights", "weights.toml"], BOTH + "model.layers = 2", 2, "quote a name that has dots", "patterns"),
    (["--weights", "weights.toml"], "[know]\nmlp = 1\n[form]\ndefault = 1", 2, "and 7 more modules", "default = 0"),
    (["--weights", "1", "1", "--method", "sum"], None, 2, "--weights and --method both say", "give one"),
    (["--weights", "1", "1", "--scale", "2"], None, 2, "--density, --scale and --seed are for a method", "leave them"),
    (["--weights", "1", "1", "--rank", "3"], None, 2, "a rank is for a merge", "--merge"),
    (["--weights", "1", "1", "1", "-a", "./know"], None, 2, "are one adapter", "leave one"),
]


@pytest.mark.parametrize(
    ("words", "file", "code", "what", "way_out"), AWKWARD, ids=[str(i) for i in range(len(AWKWARD))]
)
def test_what_cannot_be_honoured_is_one_error_with_the_way_out(
    here: Path, words: list[str], file: str | None, code: int, what: str, way_out: str
) -> None:
    Path("know.json").mkdir()
    if file is not None:
        Path("weights.toml").write_text(file)
    before = tree(here)
    result = run("export", *AB, *words)
    assert result.exit_code == code and what in result.stderr, result.stderr
    assert result.stderr.count("error: ") <= 1 and way_out in result.stderr, result.stderr
    assert result.stdout == "" and tree(here) == before
