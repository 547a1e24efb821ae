"""What the page says, that it says it safely, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loracli.errors import InputError, IntegrityError, OutputExists, UsageError
from loracli.evaluation.comparison import Comparison
from loracli.recipe.recipe import load_recipe
from loracli.report.grid import grids, numbers, short_names, span_of
from loracli.report.page import tag, text
from loracli.report.report import write_report
from loracli.system.document import decode
from tests.heard import Heard
from tests.report.conftest import Story


class Page(HTMLParser):
    """Its elements with their attributes, and its text; unclosed elements are an error."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        assert not self._open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name != "meta":
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_every_part_is_there_with_the_numbers_of_recipe_and_comparison(tmp_path: Path, story: Story) -> None:
    written = write_report(story.recipe, tmp_path / "r.html", comparison=story.comparison)
    page, recipe = Page((tmp_path / "r.html").read_text()), load_recipe(story.recipe)
    assert written.parts == (
        *("verdict", "comparison", "held out", "weights", "search", "interference", "provenance", "next"),
    )
    assert written.size_bytes == (tmp_path / "r.html").stat().st_size
    compared = json.loads(story.comparison.read_text())
    for row in (*compared["rows"], *({"nats_per_token": r.nats_per_token} for r in recipe.held_out.rows)):
        assert f"{row['nats_per_token']:.4f}" in page.words
    for module in recipe.modules:
        weights = recipe.weights_of(module.name) if module.name in recipe.mixing.weights else ()
        for weight in filter(None, weights):
            assert any(f"{module.name}: {weight:.3f}" in word for word in page.words)
    for adapter in recipe.adapters:
        assert adapter.sha256["adapter_model.safetensors"][:16] in page.words
    assert "by contains" in page.text and "first + second" in page.text


def test_recipe_and_comparison_are_taken_as_objects_too(tmp_path: Path, story: Story) -> None:
    document = json.loads(story.comparison.read_text())
    problems: list[str] = []
    comparison = decode(Comparison, {k: v for k, v in document.items() if k != "loracat"}, "", problems)
    write_report(load_recipe(story.recipe), tmp_path / "objects.html", comparison=comparison)
    write_report(story.recipe, tmp_path / "files.html", comparison=story.comparison)
    assert not problems and (tmp_path / "objects.html").read_bytes() == (tmp_path / "files.html").read_bytes()
    with pytest.raises(UsageError, match="the comparison compares x, y"):
        other = replace(comparison, adapters=("x", "y"))
        write_report(story.recipe, tmp_path / "other.html", comparison=other)


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path, story: Story) -> None:
    write_report(story.recipe, tmp_path / "r.html", comparison=story.comparison)
    page = Page((tmp_path / "r.html").read_text())
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"}
    for name, attributes in page.elements:
        assert not any(key.startswith("on") or key in ("href", "src", "xlink:href", "style") for key in attributes), (
            name
        )
    policies = [a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in (tmp_path / "r.html").read_text() and "@import" not in (tmp_path / "r.html").read_text()


def test_two_reports_are_the_same_bytes_and_name_no_path(tmp_path: Path, story: Story) -> None:
    for name in ("one.html", "two.html"):
        write_report(story.recipe, tmp_path / name, comparison=story.comparison)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert str(story.recipe.parent.parent) not in (tmp_path / "one.html").read_text()


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path, story: Story) -> None:
    trap = "<script>alert(1)</script>\"' \x1b[31m \u202e&amp;"
    recipe = load_recipe(story.recipe)
    hostile = replace(
        recipe,
        base=replace(recipe.base, id=trap),
        data=tuple(replace(data, name=trap) for data in recipe.data),
        held_out=replace(
            recipe.held_out, name=trap, tasks=tuple(replace(t, task=trap + t.task) for t in recipe.held_out.tasks)
        ),
        fit=replace(recipe.fit, settings={**recipe.fit.settings, trap: trap}, stopped=trap),
        versions={trap: trap},
    )
    write_report(hostile, tmp_path / "r.html")
    content = (tmp_path / "r.html").read_text()
    page = Page(content)
    assert "script" not in {name for name, _ in page.elements}
    assert "<script>alert(1)</script>" in page.text and "\\x1b[31m" in page.text and "\\u202e" in page.text
    assert "\x1b" not in content and "\u202e" not in content


def test_text_and_attributes_are_escaped() -> None:
    assert tag("p", text("a<b>&\"'"), title='"><x>', fill_opacity=0.5, class_="c", x=None) == (
        '<p title="&quot;&gt;&lt;x&gt;" fill-opacity="0.5" class="c">a&lt;b&gt;&amp;&quot;&#x27;</p>'
    )


def test_without_a_comparison_or_its_adapters_the_page_leaves_their_parts_out_and_says_so(
    tmp_path: Path, story: Story
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "recipe.json").write_bytes(story.recipe.read_bytes())
    listener = Heard()
    written = write_report(moved / "recipe.json", tmp_path / "r.html", progress=listener)
    assert written.parts == ("verdict", "held out", "weights", "search", "provenance", "next")
    assert any("no interference" in said for said in listener.warnings)


def test_an_adapter_that_changed_is_an_error(tmp_path: Path, story: Story, two_adapters: tuple[Path, Path]) -> None:
    first, second = map(str, two_adapters)
    for adapters, kind in (([second, second], IntegrityError), ([second, first], UsageError)):
        with pytest.raises(kind):
            write_report(story.recipe, tmp_path / "r.html", adapters=adapters)
    assert not list(tmp_path.iterdir())


def test_a_comparison_of_something_else_is_refused(tmp_path: Path, story: Story) -> None:
    document = json.loads(story.comparison.read_text())
    unfitted = {**document, "rows": [row for row in document["rows"] if row["name"] != "fit"]}
    for content, kind, words in (
        ("{", InputError, "comparison"),
        ("[]", InputError, "not a JSON object"),
        (json.dumps({**document, "rows": 3}), InputError, "rows: expected"),
        (json.dumps({k: v for k, v in document.items() if k != "best"}), InputError, "best"),
        (json.dumps(unfitted), UsageError, "does not compare this recipe's fit"),
        (json.dumps({**document, "adapters": ["x", "y"]}), UsageError, "compares x, y"),
        (json.dumps({"loracat": 1, "error": {"code": 3}}), InputError, "is not a comparison"),
        (json.dumps({"loracat": 1, "error": {"message": "no base"}}), InputError, "failed: no base"),
    ):
        path = tmp_path / "c.json"
        path.write_text(content)
        with pytest.raises(kind, match=words):
            write_report(story.recipe, tmp_path / "r.html", comparison=path)
    with pytest.raises(InputError, match="cannot be read"):
        write_report(story.recipe, tmp_path / "r.html", comparison=tmp_path / "none.json")
    assert not (tmp_path / "r.html").exists()


def test_an_existing_file_is_replaced_with_force_only(tmp_path: Path, story: Story) -> None:
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(OutputExists):
        write_report(story.recipe, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "mine"
    write_report(story.recipe, tmp_path / "r.html", force=True)
    with pytest.raises(OutputExists, match="is a directory"):
        write_report(story.recipe, tmp_path, force=True)


def test_the_grid_has_every_weight_in_its_layer_and_under_its_name(story: Story) -> None:
    recipe = load_recipe(story.recipe)
    found = grids(recipe)
    assert list(found) == ["first", "second"]
    cells = 0
    for index, grid in enumerate(found.values()):
        for (row, column), cell in grid.cells.items():
            assert cell.module == f"{row}.{column}" and cell.weight == recipe.weights_of(cell.module)[index]
            cells += 1
    assert cells == sum(w is not None for row in recipe.mixing.weights.values() for w in row) == recipe.mixing.numbers
    first = found["first"]
    assert first.rows == tuple(f"model.layers.{i}" for i in range(3))
    assert set(short_names(first.columns)) == {"q_proj", "v_proj", "up_proj", "o_proj"}
    assert span_of(found, 0.5) == max(0.25, max(abs(c.weight - 0.5) for g in found.values() for c in g.cells.values()))
    columns, rows = numbers(recipe)
    assert columns == ["module", "first", "second"] and len(rows) == 12
    errors = recipe.fit.certificate
    assert errors is None or any("±" in cell for row in rows for cell in row) == any(
        e is not None for row in errors.standard_errors.values() for e in row
    )


def test_the_curve_draws_every_stage(tmp_path: Path, story: Story) -> None:
    write_report(story.recipe, tmp_path / "r.html")
    recipe = load_recipe(story.recipe)
    content = (tmp_path / "r.html").read_text()
    drawn = re.findall(r'<polyline points="([^"]*)"', content)
    assert [len(points.split()) for points in drawn] == [len(s.losses) for s in recipe.fit.stages]
    assert f"{sum(s.steps for s in recipe.fit.stages)} steps" in content
