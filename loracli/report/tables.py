"""The tables of losses, in the report and by themselves: what a notebook shows of a recipe and of a comparison.

A notebook's page is not ours: it has its own colours, light or dark, and its own rules. So the style keeps to what is
inside of our element, and takes the ink of what is around it.
"""

from __future__ import annotations

import re

from loracli.evaluation.comparison import Comparison, ComparisonRow
from loracli.evaluation.sentences import LOSSES, best_first, claim, interval_text, loss_cells, metric_claim, verdict
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import EDITED, HeldOut, HeldOutRow
from loracli.report.charts import heat_map
from loracli.report.page import PARTS_STYLE, paragraph, table, tag

_INSIDE = "loracat"  # class of the element that a notebook shows
_INKS = (
    f".{_INSIDE} {{ --ink: currentColor; --soft: currentColor; --line: rgba(128, 128, 128, .4); --card: transparent; "
    "--above: #d9822b; --below: #3b87d6; --good: #2da44e; --bad: #d1493c; }"
)


def held_out_table(found: HeldOut) -> str:
    """A recipe's losses on held-out records, the lowest first, with the fit standing out."""
    ordered = best_first(found.lines)
    rows = [[row.name, *_losses(row, found.best_ingredient)] for row in ordered]
    strong = next((i for i, row in enumerate(ordered) if row.name == "fit"), None)
    return table("losses on held-out records, lowest first", _COLUMNS, rows, strong=strong)


def comparison_table(found: Comparison) -> str:
    """Every way to compose, the lowest loss first and standing out."""
    rows = best_first(found.rows)
    columns = [*_COLUMNS, "rank", *([f"{found.metric} (to best adapter)"] if found.metric else [])]
    cells = [
        [
            row.name,
            *_losses(row, found.best_ingredient),
            "-" if row.rank is None else str(row.rank),
            *([] if row.metric is None else [f"{row.metric.mean:.3f} ({interval_text(row.metric.interval)})"]),
        ]
        for row in rows
    ]
    strong = next((i for i, row in enumerate(rows) if row.name == found.best.name), None)
    return table("losses of every way to compose, lowest first", columns, cells, strong=strong)


_COLUMNS = ("adapter or method", *LOSSES[1:3], LOSSES[0], LOSSES[3])


def _losses(row: ComparisonRow | HeldOutRow, best_ingredient: str) -> list[str]:
    """The cells of a row, the difference and its interval first: what a narrow screen shows without scrolling."""
    nats, difference, interval, worse = loss_cells(row, best_ingredient)
    return [difference, interval, nats, worse]


def claims(found: Comparison) -> list[str]:
    """What may be claimed, a paragraph for each measure."""
    return [paragraph(f"{sentence}.") for sentence in filter(None, (claim(found), metric_claim(found)))]


def html_of(value: Recipe | Comparison) -> str:
    """A value as a notebook shows it: its table and what that says, and of a recipe the map of its weights."""
    return _recipe(value) if isinstance(value, Recipe) else _comparison(value.labelled())


def _recipe(recipe: Recipe) -> str:
    found = recipe.public().held_out_of_weights
    weights = f"mixing weights by {recipe.mixing.kind}; uniform, {1 / len(recipe.adapters):.3g}, has no colour"
    return _element(
        *(
            _measured(found)
            if found is not None
            else [paragraph(f"The {EDITED}: what the fit measured is not theirs.", soft=True)]
        ),
        paragraph(f"{weights[:1].upper()}{weights[1:]}. Each cell names its module when it is pointed at.", soft=True),
        heat_map(recipe),
    )


def _measured(found: HeldOut) -> list[str]:
    said = verdict(found)
    told = f"{found.records} records of {found.name}; difference in nats per token to {found.best_ingredient}"
    return [
        paragraph(f"{said[:1].upper()}{said[1:]}."),
        paragraph(f"{told}, the best single adapter.", soft=True),
        held_out_table(found),
    ]


def _comparison(found: Comparison) -> str:
    told = f"{found.records} records of {found.data}; difference in nats per token to {found.best_ingredient}"
    return _element(*claims(found), paragraph(f"{told}, the best single adapter.", soft=True), comparison_table(found))


def _element(*content: str) -> str:
    return tag("div", tag("style", _INKS + _inside(PARTS_STYLE)), *content, class_=_INSIDE)


def _inside(style: str) -> str:
    """Rules that hold within our element alone; `style` has no rule inside another."""

    def narrowed(rule: re.Match[str]) -> str:
        selectors = ", ".join(f".{_INSIDE} {selector.strip()}" for selector in rule[1].split(","))
        return f"{selectors} {rule[2]}"

    return re.sub(r"([^{}]+)(\{[^{}]*\})", narrowed, style)
