"""Mixing weights as a map, layer by module, one panel for each adapter; colours run both ways from uniform, 1 / N."""

from __future__ import annotations

from loracli.recipe.recipe import Recipe
from loracli.report.grid import Grid, described, grids, layer_numbers, short_names, span_of
from loracli.report.html import svg, tag, text

WIDTH, LABELS, HEADER = 330.0, 34.0, 54.0
MOST_CELL = 46.0


def heat_map(recipe: Recipe) -> str:
    """The panels with their scale."""
    found, uniform = grids(recipe), 1 / len(recipe.adapters)
    span = span_of(found, uniform)
    panels = [
        tag("div", tag("h3", text(label)), _panel(label, grid, uniform, span), class_="panel")
        for label, grid in found.items()
    ]
    return _scale(uniform, span) + tag("div", *panels, class_="panels")


def _panel(label: str, grid: Grid, uniform: float, span: float) -> str:
    width = min(MOST_CELL, (WIDTH - LABELS) / max(1, len(grid.columns)))
    height = 16.0 if len(grid.rows) <= 32 else 9.0
    parts: list[str] = []
    if width > 8:
        parts = [_heading(name, LABELS + (i + 0.5) * width) for i, name in enumerate(short_names(grid.columns))]
    for r, (row, number) in enumerate(zip(grid.rows, layer_numbers(grid.rows), strict=True)):
        y = HEADER + r * height
        if height > 12 or r % 4 == 0:
            parts.append(tag("text", text(number), x=LABELS - 6, y=y + height - 4, text_anchor="end", class_="soft"))
        for c, column in enumerate(grid.columns):
            place = {"x": LABELS + c * width + 0.5, "y": y + 0.5, "width": width - 1, "height": height - 1}
            cell = grid.cells.get((row, column))
            if cell is None:
                parts.append(tag("rect", class_="empty", **place))
            else:
                parts.append(_colour(cell.weight, uniform, span, tag("title", text(described(cell))), **place))
    total = HEADER + len(grid.rows) * height + 2
    return svg(LABELS + len(grid.columns) * width + 24, total, f"weights of {label}, layer by module", *parts)


def _heading(name: str, x: float) -> str:
    return tag("text", text(name), x=0, y=0, font_size=10, transform=f"translate({x:.5g},{HEADER - 6:g}) rotate(-38)")


def _colour(weight: float, uniform: float, span: float, *content: str, **place: float) -> str:
    """Above uniform in one colour and below in the other, the stronger the farther; uniform is the page's own."""
    share = min(1.0, abs(weight - uniform) / span)
    fill = tag("rect", class_="above" if weight >= uniform else "below", fill_opacity=share, **place)
    return tag("g", fill, tag("rect", class_="frame", pointer_events="all", **place), *content)


def _scale(uniform: float, span: float) -> str:
    steps, width, left = 11, 24.0, 33.0
    parts = []
    for step in range(steps):
        weight = uniform + span * (2 * step / (steps - 1) - 1)
        parts.append(_colour(weight, uniform, span, x=left + step * width, y=2, width=width, height=12))
    for step in (0, (steps - 1) // 2, steps - 1):
        weight = uniform + span * (2 * step / (steps - 1) - 1)
        said = f"{weight:.2f}" + (" uniform" if step == (steps - 1) // 2 else "")
        parts.append(tag("text", text(said), x=left + (step + 0.5) * width, y=28, text_anchor="middle"))
    return tag("div", svg(WIDTH, 34, "the scale of the colours", *parts), class_="panel")
