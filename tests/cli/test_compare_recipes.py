"""compare of several recipes: each fit is the row that it is alone, on the same records, and what cannot be one table
is refused with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loracli.evaluation.comparison import Comparison
from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import BaseForm, RecipeMixing
from loracli.system.document import decode
from tests.cli.project import document, run
from tests.cli.test_documents import check

WITH = "--data few.jsonl --base base --dtype float32 --methods uniform".split()


@pytest.fixture
def several(here: Path) -> Path:
    """The project with a few records, and beside its recipe three that have only `form`, at the weight 0.5."""
    lines = (here / "test.jsonl").read_text().splitlines(keepends=True)
    (here / "few.jsonl").write_text("".join(lines[:12]))
    recipe = load_recipe("recipe.json")
    table = recipe.held_out
    alone = replace(
        recipe,
        adapters=recipe.adapters[1:],
        fit=replace(recipe.fit, certificate=None),
        held_out=replace(table, best_ingredient="form", rows=tuple(row for row in table.rows if row.name != "know")),
    )
    modules = [group for group, row in recipe.mixing.weights.items() if row[1] is not None]
    tensors = {f"{module}.mixing": 0.5 * torch.eye(alone.adapters[0].rank, dtype=torch.float64) for module in modules}
    half = dict.fromkeys(modules, (0.5,))
    for name, mixing in (
        ("half.json", RecipeMixing("adapter", {"*": (0.5,)}, 1)),
        ("core.json", RecipeMixing("core", half, 1, tensors=tensors)),
        ("other/recipe.json", RecipeMixing("module", half, 1)),
    ):
        (here / name).parent.mkdir(exist_ok=True)
        replace(alone, mixing=mixing).save(here / name)
    return here


def losses(found: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["nats_per_token"] for row in found["rows"]}


def test_each_fit_is_the_row_that_it_is_alone(several: Path) -> None:
    """An adapter that two recipes name, from two folders, is one row; adapters of others have no part in a fit."""
    found = document("compare", "half.json", "recipe.json", "core.json", "other/recipe.json", *WITH)
    check(found, "compare")
    together = losses(found)
    fits = ["half.json", "project/recipe.json", "core.json", "other/recipe.json"]
    assert list(together) == ["base", "form", "know", "uniform", *fits]
    alone = losses(document("compare", "recipe.json", *WITH))
    half = losses(document("compare", "half.json", *WITH))
    assert together["project/recipe.json"] == pytest.approx(alone["fit"], abs=1e-5)
    assert half["fit"] != pytest.approx(half["form"], abs=1e-3)
    for name in ("half.json", "core.json", "other/recipe.json"):
        assert together[name] == pytest.approx(half["fit"], abs=1e-5)
    for name in ("base", "know", "form", "uniform"):
        assert together[name] == pytest.approx(alone[name], abs=1e-5)
    ranks = {row["name"]: row["rank"] for row in found["rows"]}
    assert [ranks[name] for name in fits] == [ranks["form"], ranks["uniform"], ranks["form"], ranks["form"]]
    assert [one["adapters"] for one in found["recipes"]] == [["form"], ["know", "form"], ["form"], ["form"]]
    problems: list[str] = []
    decode(Comparison, {key: value for key, value in found.items() if key != "loracat"}, "", problems)
    assert not problems


def test_fits_are_paired_with_the_other_rows(several: Path) -> None:
    """Difference and interval of a fit, to the same best adapter, are those of the comparison of it alone."""
    together = {row["name"]: row for row in document("compare", "recipe.json", "half.json", *WITH)["rows"]}
    alone = {row["name"]: row for row in document("compare", "recipe.json", *WITH)["rows"]}
    for key in ("difference", "interval", "worse_records"):
        assert together["recipe.json"][key] == pytest.approx(alone["fit"][key], abs=1e-4)


def test_the_table_and_the_next_command_go_by_the_files(several: Path) -> None:
    shown = run("compare", "half.json", "recipe.json", *WITH)
    assert shown.exit_code == 0, shown.stderr
    rows = [line.split()[0] for line in shown.stdout.splitlines() if line]
    assert {"half.json", "recipe.json"} <= set(rows) and "fit" not in rows
    assert run("compare", "half.json", "recipe.json", *WITH, "-q").stdout == "recipe.json\n"
    assert "next: loracat export recipe.json\n" in shown.stderr
    moved = run("compare", "half.json", "recipe.json", *WITH, "--adapters", "./form", "./know")
    assert "next: loracat export recipe.json --adapters ./know ./form\n" in moved.stderr
    assert moved.stdout == shown.stdout


def test_a_report_takes_the_comparison_of_several_recipes(several: Path) -> None:
    found = run("compare", "half.json", "recipe.json", *WITH, "--json").stdout
    (several / "both.json").write_text(found)
    for name in ("half.json", "recipe.json"):
        made = run("report", name, "--comparison", "both.json", "--force")
        assert made.exit_code == 0, made.stderr
        page = (several / "report.html").read_text()
        assert all(f"{loss:.4f}" in page for loss in losses(json.loads(found)).values())
    other = run("report", "core.json", "--comparison", "both.json", "--force")
    assert other.exit_code == 2 and "does not compare this recipe's fit" in other.stderr


def test_a_report_of_changed_weights_refuses_what_was_compared_before(several: Path) -> None:
    (several / "before.json").write_text(run("compare", "recipe.json", *WITH, "--json").stdout)
    assert run("report", "recipe.json", "--comparison", "before.json").exit_code == 0
    change("recipe.json", lambda fields: next(iter(fields["mixing"]["weights"].values())).__setitem__(0, 0.7))
    refused = run("report", "recipe.json", "--comparison", "before.json", "--force")
    assert refused.exit_code == 2 and "this one before it was changed" in refused.stderr
    again = document("compare", "recipe.json", *WITH)
    assert {row["name"]: row["note"] for row in again["rows"]}["fit"] == "weights edited after the fit"


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(Path(name).read_text())
    edit(fields)
    Path(name).write_text(json.dumps(fields))


def _templates(fields: dict[str, Any]) -> None:
    fields["data"][0]["template_sha256"] = "d" * 64


@pytest.mark.parametrize(
    ("edit", "said", "way_out"),
    [
        (lambda r: r["base"].update(id="org/other"), "the base models are loracat/demo-base and org/other", "--base"),
        (lambda r: r["base"].update(config_sha256="e" * 64), "the configs of the base model", "--base"),
        (lambda r: r["fit"]["settings"].update(max_length=512), "at most 1024 and 512", "--max-length"),
        (_templates, "the chat templates have the sha256", "tokenizer"),
        (
            lambda r: r["adapters"][0]["sha256"].update({"adapter_config.json": "f" * 64}),
            "form is one adapter in recipe.json and another in half.json",
            "a name that tells them apart",
        ),
        (
            lambda r: r["fit"]["settings"].update(modules_to_save="average"),
            "the modules that replace the base's",
            "--modules-to-save",
        ),
    ],
)
def test_what_cannot_be_one_table_is_refused_by_name(several: Path, edit: Any, said: str, way_out: str) -> None:
    change("recipe.json", lambda fields: fields["data"][0].update(template_sha256="c" * 64))
    change("half.json", edit)
    result = run("compare", "recipe.json", "half.json", *WITH)
    assert result.exit_code == 2 and result.stdout == ""
    assert "recipe.json" in result.stderr and "half.json" in result.stderr
    assert said in result.stderr and "compare them one at a time" in result.stderr and way_out in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["half.json", "./half.json"], "the recipe half.json is given twice"),
        (["half.json", "recipe.json", "--control", "random", "--fit-data", "calibration.jsonl"], "adapter and module"),
        (["ties", "half.json"], "the row ties would be both a recipe's fit and another way to compose"),
        (["half.json", "other/form"], "the row form would be both a recipe's fit and an adapter"),
        (["half.json", "missing.json"], "the recipe missing.json cannot be read"),
    ],
)
def test_names_and_controls_of_several_recipes(several: Path, words: list[str], said: str) -> None:
    for name in ("ties", "other/form"):
        load_recipe("half.json").save(name)
    result = run("compare", *words, *WITH)
    assert result.exit_code in (2, 3) and said in result.stderr and result.stdout == ""


@pytest.mark.parametrize("fitted", [None, "nf4", "fp4"])
def test_a_fit_on_other_numbers_of_the_base_is_said(fitted: BaseForm | None, here: Path) -> None:
    """A base is made fp4 by nobody, and in full precision where that is asked for."""
    recipe = load_recipe("recipe.json")
    replace(recipe, base=replace(recipe.base, quantisation=fitted)).save(here / "other.json")
    lines = (here / "test.jsonl").read_text().splitlines(keepends=True)
    (here / "few.jsonl").write_text("".join(lines[:4]))
    result = run("compare", "other.json", *WITH, *(["--quantise", "none"] if fitted == "nf4" else []))
    assert result.exit_code == 0
    words = f"warning: fit was fitted with linear layers of the base in {fitted}, and here they are in full precision"
    assert (words in result.stderr) is (fitted is not None)


def test_without_the_package_of_its_quantisation_a_recipe_is_refused_with_both_ways_out(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracli.model.quantisation.find_spec", lambda name: None)
    recipe = load_recipe("recipe.json")
    replace(recipe, base=replace(recipe.base, quantisation="nf4")).save(here / "other.json")
    names = set(here.iterdir())
    scored = "--data test.jsonl --base base".split()
    for words, name in (
        (["compare", "other.json"], "fit"),
        (["show", "other.json", "--layers"], "fit"),
        (["export", "other.json", "--merge", "--refit"], "the recipe"),
    ):
        result = run(*words, *scored)
        assert result.exit_code == 2 and set(here.iterdir()) == names, result.stderr
        assert f"{name} was fitted with linear layers of the base kept in nf4, and the package" in result.stderr
        assert "pip install 'loracat[bitsandbytes]', or --quantise none" in result.stderr
