"""The page explains itself: verdict first, rows in order, axes with units, legends, and no number behind a pointer."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, replace
from html.parser import HTMLParser
from math import log10
from pathlib import Path
from typing import Any

import pytest

from loracli.evaluation.comparison import Comparison, ComparisonSettings, FitFile
from loracli.evaluation.sentences import best_first, verdict
from loracli.recipe.ingredients import read_ingredients
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.recipe.record import StageRecord
from loracli.report.charts import Line, intervals_chart, loss_curve
from loracli.report.commands import Files, made_by, what_next
from loracli.report.report import _interferences, _made_comparison, write_report
from loracli.system.document import decode
from tests.report.conftest import Story


class Shown(HTMLParser):
    """What a page shows: its text with the elements that it stands in, its tables row by row, and its commands."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.inside: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.folded: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.commands: list[str] = []
        self.feed(content)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((name, found))
        if name == "meta":
            return
        self.inside.append((name, found))
        if name == "table":
            self.tables[self._label()] = []
        elif name == "tr":
            self.tables[self._label()].append([])
        elif name in ("th", "td"):
            self.tables[self._label()][-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.inside.pop()[0] == name

    def handle_data(self, data: str) -> None:
        names = tuple(name for name, _ in self.inside)
        self.texts.append((names, data))
        if "table" in names and names[-1] in ("th", "td"):
            self.tables[self._label()][-1][-1] += data
        if names[-2:] == ("pre", "code"):
            self.commands.append(data)
        if any(name == "details" and "open" not in found for name, found in self.inside) and "table" in names:
            self.folded.append(data)

    def _label(self) -> str:
        return next(str(found["aria-label"]) for _, found in reversed(self.inside) if "scroll" in found.values())

    def drawn(self) -> list[str]:
        """The text of drawings, their tooltips aside."""
        return [data for names, data in self.texts if "svg" in names and names[-1] == "text"]


def shown(content: str) -> Shown:
    return Shown(f"<main>{content}</main>")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, story: Story) -> Shown:
    path = tmp_path_factory.mktemp("page") / "r.html"
    write_report(story.recipe, path, comparison=story.comparison)
    return Shown(path.read_text())


@pytest.fixture
def recipe(story: Story) -> Recipe:
    return load_recipe(story.recipe)


@pytest.fixture
def compared(story: Story, recipe: Recipe) -> Comparison:
    document, wanted = json.loads(story.comparison.read_text()), {field.name for field in fields(Comparison)}
    found: Comparison = decode(Comparison, {key: document[key] for key in wanted}, "", [])
    return found.renamed(recipe.labels())


def test_the_first_words_are_the_verdict_and_evidence_comes_before_details(whole: Shown, recipe: Recipe) -> None:
    seen = [(names[-1], data) for names, data in whole.texts if "main" in names]
    said = verdict(recipe.public().held_out)
    assert seen[0] == ("h1", f"{said[:1].upper()}{said[1:]}.")
    assert [data for name, data in seen if name == "h2"] == [
        *("Every way to compose", "On held-out records", "Mixing weights", "The search", "Interference"),
        *("How this was made", "What next"),
    ]


def test_rows_stand_lowest_loss_first_with_difference_and_interval_in_the_first_columns(
    whole: Shown, recipe: Recipe, compared: Comparison
) -> None:
    measured = recipe.public().held_out
    assert [row.name for row in measured.lines[len(measured.rows) :]] == ["fresh-lora"]
    for label, found, rows in (
        ("losses of every way to compose, lowest first", compared, compared.rows),
        ("losses on held-out records, lowest first", measured, measured.lines),
    ):
        head, *body = whole.tables[label]
        assert head[1:4] == ["difference", "95 % interval", "nats/token"]
        losses = [float(row[3]) for row in body]
        assert losses == sorted(losses) and {row[0] for row in body} == {row.name for row in rows}
        for cells in body:
            row = next(row for row in rows if row.name == cells[0])
            told = [f"{row.difference:+.4f}", f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}"]
            assert cells[1:3] == (["", ""] if row.name == found.best_ingredient else told)
    tips = [data.split(": ")[0] for names, data in whole.texts if names[-2:] == ("g", "title") and "interval" in data]
    assert tips[: len(compared.rows)] == [
        row[0] for row in whole.tables["losses of every way to compose, lowest first"][1:]
    ]


def test_interference_shows_what_is_most_alike_first(recipe: Recipe) -> None:
    adapter = read_ingredients(recipe)[0]
    kinds = sorted({name.rpartition(".")[2] for name in adapter.modules})
    moved = {name: module for name, module in adapter.modules.items() if not name.endswith(kinds[0])}
    names = [name for name in adapter.modules if name.endswith(kinds[0])]
    moved |= {name: adapter.modules[other] for name, other in zip(names, [*names[1:], names[0]], strict=True)}
    page = shown(_interferences(recipe.public(), [adapter, replace(adapter, modules=moved)]))
    [(_, *rows)] = page.tables.values()
    cosines = [abs(float(row[1])) for row in rows]
    assert rows[-1][0] == kinds[0] and cosines[-1] < cosines[0] == 1
    assert cosines == sorted(cosines, reverse=True)


def test_every_axis_has_a_title_with_its_unit_and_every_drawing_a_text(whole: Shown) -> None:
    drawn = whole.drawn()
    assert drawn.count("difference in nats per token: left is better, right is worse") == 2
    assert drawn.count("module") == drawn.count("layer") == 2 and drawn.count("weight") == 1
    assert any(text.startswith("nats per token") for text in drawn)
    assert any(re.fullmatch(r"\d+ steps of the search", text) for text in drawn)
    pictures = [found for name, found in whole.elements if name == "svg"]
    charts = [found for found in pictures if found.get("aria-hidden") != "true"]
    assert len(charts) == 6  # two of differences, a scale, two maps, a curve
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 20 for found in charts)
    heads = [found for name, found in whole.elements if name == "th"]
    assert heads and all(found.get("scope") in ("row", "col") for found in heads)


def test_every_number_behind_a_pointer_stands_in_an_open_table(whole: Shown, recipe: Recipe) -> None:
    _, *rows = whole.tables["the weights as numbers"]
    by_module = {row[0]: row[1:] for row in rows}
    for module in recipe.modules:
        weights = [weight for weight in recipe.weights_of(module.name) if weight is not None]
        told = [float(cell.split(" ± ")[0]) for cell in by_module[module.name] if cell != "-"]
        assert told == pytest.approx(weights, abs=5e-5)
        assert any(f"{weights[0]:.2f}" == text for text in whole.drawn())
    _, *stages = whole.tables["the stages"]
    assert [row[1] for row in stages] == [str(stage.steps) for stage in recipe.fit.stages]
    assert not {row[0] for row in rows} & set(whole.folded)
    assert any("seed" in data for data in whole.folded)  # which shows that what is folded is found


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        (Line("a", -0.2, (-0.3, -0.1)), "better", "better: the whole 95 % interval is below zero"),
        (Line("a", 0.2, (0.1, 0.3)), "worse", "worse: the whole interval is above zero"),
        (Line("a", 0.2, (-0.1, 0.5)), "unsure", "not clear: zero lies in the interval"),
        (Line("a", 0.0, (0.0, 0.0), reference=True), "reference", "what the others are compared with"),
        (Line("a", 9.0, (8.0, 10.0), in_range=False), "worse", "arrow: farther than the chart goes"),
    ],
)
def test_the_legend_says_what_is_drawn_and_nothing_else(line: Line, kind: str, words: str) -> None:
    page = shown(intervals_chart([line, Line("b", -0.1, (-0.2, -0.05))], "b"))
    told = [data.strip() for names, data in page.texts if names[-1] == "span"]
    assert words in told
    assert len(told) == len({"better", kind}) + (words.startswith("arrow"))
    assert any(kind in (found.get("class") or "").split() for _, found in page.elements)


def heights(content: str) -> list[float]:
    return [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]*)"', content)[0].split()]


@pytest.mark.parametrize(
    ("losses", "log"),
    [((8.0, 4.0, 2.0, 1.0), False), ((8.0, 0.8, 0.08), True), ((10.0, 5.0, 0.0), False), ((1e-300, 1e300), True)],
)
def test_losses_over_more_than_a_decade_have_a_log_scale(recipe: Recipe, losses: tuple[float, ...], log: bool) -> None:
    stage = StageRecord("module", "sum", "descent", 0.0, len(losses), None, losses)
    content = loss_curve(replace(recipe.fit, criterion="nats per token", stages=(stage,)))
    assert ("nats per token, log scale" in shown(content).drawn()) == log
    values = [log10(loss) for loss in losses] if log else list(losses)
    y = heights(content)
    drawn = [(one - y[-1]) / (y[0] - y[-1]) for one in y]
    assert drawn == pytest.approx([(v - values[-1]) / (values[0] - values[-1]) for v in values], abs=1e-3)
    assert "losses of batches" not in content and "the same as the better start goes on" in content


def test_a_comparison_says_what_compare_prints(story: Story, whole: Shown, compared: Comparison) -> None:
    from loracli.evaluation.sentences import claim, guard_title, remarks

    said = [data for _, data in whole.texts]
    assert f"{claim(compared)}." in said and set(remarks(compared)) <= set(said)
    title = guard_title(compared)
    assert f"W{title[1:]}" in said and compared.guard is not None
    _, *rows = whole.tables[title]
    assert [row[0] for row in rows] == [row.name for row in best_first(compared.rows) if row.kind != "base"]


def test_an_early_stop_is_said_under_the_verdict(tmp_path: Path, recipe: Recipe) -> None:
    write_report(replace(recipe, fit=replace(recipe.fit, stopped="a loss is not finite")), tmp_path / "r.html")
    seen = [data for names, data in Shown((tmp_path / "r.html").read_text()).texts if "main" in names]
    assert seen[1] == "STOPPED EARLY: a loss is not finite"


def test_names_in_commands_are_single_words_of_a_shell_and_no_options(recipe: Recipe) -> None:
    trap, option = "a b'; touch gone #\n.jsonl", "--force"
    named = replace(recipe, data=(replace(recipe.data[0], name=trap), replace(recipe.data[0], name=option, weight=2.0)))
    [fit] = [step.line for step in made_by(named, Files(), None) if " fit " in step.line]
    words = shlex.split(fit)
    place = words.index("--data")
    assert "\n" not in fit and words[place + 1 : place + 3] == [trap.replace("\n", "\\n"), "./--force:2"]


def test_adapters_of_the_hub_are_fetched_and_pinned_and_places_outside_are_not_told(recipe: Recipe) -> None:
    first, second = recipe.adapters
    hub = replace(first, reference="org/x", repo_id="org/x", subfolder="sub", commit="0" * 40)
    inside = replace(second, reference="runs/second")
    pinned = replace(recipe, base=replace(recipe.base, commit="1" * 40))
    for adapters, word in (((hub, inside), "./runs/second"), ((hub, replace(second, reference="../s")), "path/to/s")):
        steps = made_by(replace(pinned, adapters=adapters), Files(), None)
        assert steps[0].line == "loracat fetch recipe.json --with-base"
        words = shlex.split(steps[1].line)
        assert words[3:5] == [f"hf://org/x@{'0' * 40}/sub", word]
        assert words[words.index("--base") + 1 :][:3] == [f"hf://{recipe.base.id}", "--base-revision", "1" * 40]


def test_the_command_of_a_comparison_is_made_of_its_settings_and_of_an_older_one_says_that_they_lack(
    recipe: Recipe, compared: Comparison
) -> None:
    files = (FitFile("val.jsonl", "0" * 64, 1.0, None), FitFile("know.jsonl", "1" * 64, 2.0, 2))
    options = {
        "seed": 3,
        "passes": 2.5,
        "max_length": 1024,
        "rank": None,
        "scale": 1.0,
        "density": 0.3,
        "skip_bad": True,
    }
    made = ComparisonSettings(("all",), ("fresh-lora", "datamix"), options, "bfloat16", None, files, {"loracat": "9.9"})
    found = replace(compared, metric="exact", guard=None, settings=made)

    def of(one: Comparison) -> Any:
        (step,) = [s for s in made_by(recipe, Files("r.json", "c.json"), one) if " compare " in s.line]
        return step

    words = shlex.split(of(found).line)
    assert words[words.index("--generate") :] == [
        *"--generate exact --methods all --control fresh-lora datamix path/to/datamix".split(),
        *"--fit-data val.jsonl know.jsonl:2@#2 --dtype bfloat16 --seed 3 --passes 2.5 --density 0.3 --skip-bad".split(),
        *"--json > c.json".split(),
    ]
    assert of(found).why == "Compares the ways to compose."
    of_all = replace(made, methods=("data-free",), controls=(), options={"seed": 0}, fit_data=())
    assert of(replace(found, settings=of_all)).line.endswith("--generate exact --dtype bfloat16 --json > c.json")
    assert "Not recorded: the settings" in of(replace(found, settings=None)).why
    assert "seed 3, loracat 9.9" in _made_comparison(made) and "know.jsonl" in _made_comparison(made)
    assert "is not recorded" in _made_comparison(None)


def test_what_did_better_is_what_comes_next(recipe: Recipe, compared: Comparison) -> None:
    won = replace(compared, best=replace(compared.best, name="sum"))
    lines = [step.line for step in what_next(recipe, Files("r.json", "c.json"), won)]
    assert lines[:2] == ["loracat export r.json --method sum", "loracat export r.json --merge"]
    sum_row = next(row for row in compared.rows if row.name == "sum")
    own = replace(compared, rows=(*compared.rows, replace(sum_row, name="regmean")))
    won = replace(own, best=replace(own.best, name="regmean"))
    line = next(step.line for step in what_next(recipe, Files("r.json", "c.json"), won))
    assert line == "loracat export r.json --method regmean --fit-data DATA.jsonl"
    alone = [step.line for step in what_next(recipe, Files("r.json"), None)]
    assert alone[0] == "loracat export r.json --merge" and alone[-1].endswith("--json > comparison.json")
