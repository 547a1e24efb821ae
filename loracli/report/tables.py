"""The tables of losses, in the report and by themselves: what a notebook shows of a recipe and of a comparison.

A notebook's page is not ours: it has its own colours, light or dark, and its own rules. So the style keeps to what is
inside of our element, and takes the ink of what is around it.
"""

from __future__ import annotations

import re

from loracli.evaluation.comparison import (
    Comparison,
    ComparisonRow,
    best_first,
    claim,
    interval_text,
    metric_claim,
    verdict,
)
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import EDITED, HeldOut
from loracli.report.charts import PARTS_STYLE, heat_map, table, tag, text

_INSIDE = "loracat"  # class of the element that a notebook shows
_INKS = (
    f".{_INSIDE} {{ --ink: currentColor; --soft: currentColor; --line: rgba(128, 128, 128, .4); --card: transparent; "
    "--above: #d9822b; --below: #3b87d6; --good: #2da44e; --bad: #d1493c; }"
)


def held_out_table(found: HeldOut) -> str:
    """A recipe's losses on held-out records, the lowest first, with the fit standing out."""
    ordered = best_first(found.rows)
    rows = [
        [
            row.name,
            f"{row.nats_per_token:.4f}",
            f"{row.difference:+.4f}",
            interval_text(row.interval),
            f"{row.worse_records:.0%}",
        ]
        for row in ordered
    ]
    strong = next((i for i, row in enumerate(ordered) if row.name == "fit"), None)
    return table(["", "nats per token", "difference", "95 % interval", "worse on"], rows, strong=strong)


def comparison_table(found: Comparison) -> str:
    """Every way to compose, with the lowest loss standing out."""
    rows = best_first(found.rows)
    columns = ["", "rank", "nats per token", "difference", "95 % interval", "worse on"]
    metric = [f"{found.metric} (to best adapter)"] if found.metric else []
    guard = ["guard"] if found.guard else []
    strong = next((i for i, row in enumerate(rows) if row.name == found.best.name), None)
    return table([*columns, *metric, *guard], [_compared(row) for row in rows], strong=strong)


def _compared(row: ComparisonRow) -> list[str]:
    cells = [
        row.name,
        "-" if row.rank is None else str(row.rank),
        f"{row.nats_per_token:.4f}",
        f"{row.difference:+.4f}",
        interval_text(row.interval),
        f"{row.worse_records:.0%}",
    ]
    if row.metric is not None:
        cells.append(f"{row.metric.mean:.3f} ({interval_text(row.metric.interval)})")
    if row.guard is not None:
        cells.append(f"{row.guard.difference.mean:+.4f}, {'safe' if row.guard.safe else 'not shown safe'}")
    return cells


def claims(found: Comparison) -> list[str]:
    """What may be claimed, a paragraph for each measure."""
    return [tag("p", text(f"{sentence}.")) for sentence in filter(None, (claim(found), metric_claim(found)))]


def caption(content: str) -> str:
    """A paragraph that explains what is below it."""
    return tag("p", text(content), class_="soft")


def html_of(value: Recipe | Comparison) -> str:
    """A value as a notebook shows it: its table and what that says, and of a recipe the map of its weights."""
    return _recipe(value) if isinstance(value, Recipe) else _comparison(value.labelled())


def _recipe(recipe: Recipe) -> str:
    found = recipe.public().held_out_of_weights
    weights = f"mixing weights by {recipe.mixing.kind}; uniform, {1 / len(recipe.adapters):.3g}, has no colour"
    return _element(
        *(_measured(found) if found is not None else [caption(f"The {EDITED}: what the fit measured is not theirs.")]),
        caption(f"{weights[:1].upper()}{weights[1:]}. Each cell tells its number when it is pointed at."),
        heat_map(recipe),
    )


def _measured(found: HeldOut) -> list[str]:
    said = verdict(found)
    told = f"{found.records} records of {found.name}; difference in nats per token to {found.best_ingredient}"
    return [
        tag("p", text(f"{said[:1].upper()}{said[1:]}.")),
        caption(f"{told}, the best single adapter."),
        held_out_table(found),
    ]


def _comparison(found: Comparison) -> str:
    told = f"{found.records} records of {found.data}; difference in nats per token to {found.best_ingredient}"
    return _element(*claims(found), caption(f"{told}, the best single adapter."), comparison_table(found))


def _element(*content: str) -> str:
    return tag("div", tag("style", _INKS + _inside(PARTS_STYLE)), *content, class_=_INSIDE)


def _inside(style: str) -> str:
    """Rules that hold within our element alone; `style` has no rule inside another."""

    def narrowed(rule: re.Match[str]) -> str:
        selectors = ", ".join(f".{_INSIDE} {selector.strip()}" for selector in rule[1].split(","))
        return f"{selectors} {rule[2]}"

    return re.sub(r"([^{}]+)(\{[^{}]*\})", narrowed, style)
