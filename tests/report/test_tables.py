"""What a notebook shows of a recipe and of a comparison, and that it keeps to itself there."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loracli.evaluation.comparison import Comparison
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.report.grid import grids
from loracli.system.document import decode
from tests.report.conftest import Story
from tests.report.test_report import Page

_SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<img src=x onerror=alert(1)>\u202e"


@pytest.fixture
def recipe(story: Story) -> Recipe:
    return load_recipe(story.recipe)


@pytest.fixture
def compared(story: Story) -> Comparison:
    document, wanted = json.loads(story.comparison.read_text()), {field.name for field in fields(Comparison)}
    found: Comparison = decode(Comparison, {key: document[key] for key in wanted}, "", [])
    return found


def test_a_recipe_shows_its_losses_and_every_weight(recipe: Recipe) -> None:
    page = Page(recipe._repr_html_())
    for row in recipe.held_out.rows:
        assert f"{row.nats_per_token:.4f}" in page.words
        compared_with = row.name == recipe.held_out.best_ingredient  # which has no difference
        assert compared_with or f"{row.difference:+.4f}" in page.words
    titles = {word for word in page.words if re.match(r"model\.layers\.\d+\.\S+: -?\d", word)}
    assert titles == {
        f"{cell.module}: {cell.weight:.3f}" + ("" if cell.error is None else f" ± {cell.error:.3f}")
        for grid in grids(recipe).values()
        for cell in grid.cells.values()
    }


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("better", "better by 0.94 nats"),
        ("not better", "not better: -0.94 nats"),
        ("too few records", "too few records: -0.94 nats"),
    ],
)
def test_a_recipe_says_in_a_line_what_the_table_says(recipe: Recipe, verdict: Any, said: str) -> None:
    row = replace(recipe.held_out.row("fit"), difference=-0.9392)
    shown = replace(recipe, held_out=replace(recipe.held_out, verdict=verdict, rows=(row,)))
    assert repr(shown) == f"<Recipe first + second, module, {said}>"


def test_of_edited_weights_nothing_is_said_that_the_fit_measured(recipe: Recipe) -> None:
    edited = replace(recipe, mixing=replace(recipe.mixing, weights_sha256="0" * 64))
    page = Page(edited._repr_html_())
    assert repr(edited) == "<Recipe first + second, module, weights edited after the fit>"
    assert "weights edited after the fit" in page.text and "95 % interval" not in page.text
    assert any(word.startswith("model.layers.0.") for word in page.words)  # the map is there


def test_a_comparison_shows_every_row_with_its_numbers(compared: Comparison) -> None:
    page = Page(compared._repr_html_())
    shown = compared.labelled()
    for row in shown.rows:
        assert row.name in page.words and f"{row.nats_per_token:.4f}" in page.words
    assert {"first", "second"} <= {row.name for row in shown.rows}


def test_names_of_strangers_stay_text_in_a_notebook(recipe: Recipe, compared: Comparison) -> None:
    names = dict.fromkeys([recipe.adapters[0].reference], HOSTILE)
    others = {adapter.reference: names.get(adapter.reference, adapter.reference) for adapter in recipe.adapters}
    for html in (recipe._renamed(others)._repr_html_(), compared.renamed(names)._repr_html_()):
        page = Page(html)
        assert not {name for name, _ in page.elements} & {"img", "script", "link", "iframe"}
        assert "&lt;img src=x onerror=alert(1)&gt;\\u202e" in html
        assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_style_reaches_our_element_alone_and_loads_nothing(recipe: Recipe) -> None:
    html = recipe._repr_html_()
    assert html.startswith('<div class="loracat"><style>') and html.endswith("</div>")
    style = html[html.index("<style>") + len("<style>") : html.index("</style>")]
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", style)
    selectors = [selector.strip() for rule in rules for selector in rule.split(",")]
    assert len(selectors) > 30 and all(re.match(r"\.loracat( |$)", selector) for selector in selectors)
    assert not re.search(r"url\(|@import|https?:(?!//www\.w3\.org/2000/svg)", html)


def test_the_readmes_picture_has_a_chart_of_losses_and_a_map_of_each_adapter(story: Story, recipe: Recipe) -> None:
    draw = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_picture.py"))["picture"]
    root = ElementTree.fromstring(draw(story.recipe))
    texts = [found.text or "" for found in root.iter(f"{_SVG}text")]
    labels = recipe.labels().values()
    assert [text for text in texts if text.startswith("weights of ")] == [f"weights of {label}" for label in labels]
    assert len(root.findall(f"{_SVG}svg")) == 2 + len(recipe.adapters)
