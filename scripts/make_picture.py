"""Draws the README's picture: of a recipe, the held-out losses and the weights, as `loracat report` shows them.

    loracat demo -o demo
    python scripts/make_picture.py demo/recipe.json docs/report.svg

One SVG without scripts or fonts of its own, in light and dark.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from loracli.evaluation.sentences import best_first
from loracli.recipe.recipe import load_recipe
from loracli.report.charts import Line, heat_map, intervals_chart
from loracli.report.page import _PAGE_STYLE, PARTS_STYLE
from loracli.system.escaping import html_text

_GAP, _HEADING, _LEFT = 24.0, 28.0, 360.0


def picture(recipe_path: Path) -> str:
    """The chart of losses on the left, the map of each adapter's weights on the right."""
    recipe = load_recipe(recipe_path)
    table, labels = recipe.held_out, recipe.labels()
    lines = [
        Line(
            labels.get(row.name, row.name),
            row.difference,
            row.interval,
            row.name != "base",
            row.name == table.best_ingredient,
        )
        for row in best_first(table.rows)
    ]
    best = labels.get(table.best_ingredient, table.best_ingredient)
    chart = _parts(intervals_chart(lines, best))[0]
    scale, _, *panels = _parts(heat_map(recipe))  # the second is the key of an empty cell
    at = max(_LEFT, _size(chart)[0]) + _GAP
    left = [
        _heading(f"nats per token, minus {best}", 0.0, 0.0),
        _placed(chart, 0.0, _HEADING),
    ]
    right, x, tallest = [], at, 0.0
    for label, panel in zip(labels.values(), panels, strict=True):
        width, height = _size(panel)
        right += [_heading(f"weights of {label}", x, 0.0), _placed(panel, x, _HEADING)]
        x, tallest = x + width + _GAP, max(tallest, height)
    right.append(_placed(scale, at, _HEADING + tallest + 8))
    width, height = x, _HEADING + max(_size(chart)[1], tallest + 8 + _size(scale)[1])
    style = "svg svg { display: inline; width: auto; height: auto; }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 {width + 12:g} {height + 24:g}" '
        f'width="{width + 12:g}" role="img" aria-label="{html_text(table.verdict)}">\n'
        f"<style>{_PAGE_STYLE}{PARTS_STYLE}{style}\n.heading {{ font: 600 13px system-ui, sans-serif; }}</style>\n"
        '<rect x="-12" y="-8" width="100%" height="100%" style="fill: var(--page)"/>\n'
        + "\n".join([*left, *right, "</svg>", ""])
    )


def _parts(html: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", html, re.DOTALL)


def _size(svg: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
    assert found is not None
    return float(found[1]), float(found[2])


def _placed(svg: str, x: float, y: float) -> str:
    width, height = _size(svg)
    return svg.replace("<svg ", f'<svg x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" ', 1)


def _heading(text: str, x: float, y: float) -> str:
    return f'<text class="heading" x="{x:g}" y="{y + 14:g}">{html_text(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's picture of a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.write_text(picture(arguments.recipe), encoding="utf-8")


if __name__ == "__main__":
    main()
