"""The page as text: HTML and SVG with every string escaped, its charts, and the frame that promises to load nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from loracli.recipe.recipe import Recipe
from loracli.recipe.record import FitRecord, StageRecord
from loracli.report.grid import NO_MAP, Grid, described, grids, layer_numbers, short_names, span_of
from loracli.system.escaping import html_text

text = html_text


def tag(name: str, *content: str, **attributes: str | float | None) -> str:
    """An element around safe content. `class_` stands for class, `fill_opacity` for fill-opacity; None is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{words}>{''.join(content)}</{name}>"


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, strong: int | None = None) -> str:
    """A table of plain strings that scrolls by itself where the screen is narrow; the first column is text."""
    head = tag("tr", *(tag("th", text(column), scope="col") for column in columns))
    body = [
        tag(
            "tr",
            tag("th", text(row[0]), scope="row"),
            *(tag("td", text(cell)) for cell in row[1:]),
            class_="strong" if index == strong else None,
        )
        for index, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def section(title: str, *content: str) -> str:
    """A part of the page with a heading."""
    return tag("section", tag("h2", text(title)), *content)


def folded(title: str, *content: str) -> str:
    """What is shown once its title is touched."""
    return tag("details", tag("summary", text(title)), *content)


def svg(width: float, height: float, label: str, *content: str) -> str:
    """A drawing of a size in its own units, which fills the width it is given; `label` is what it is read out as."""
    return tag(
        "svg",
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )


POLICY = "default-src 'none'; style-src 'unsafe-inline'"

PAGE_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --above: #b35900; --below: #0b5cad; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9aa4af; --line: #30363d;
  --card: #161b22; --above: #ff9d3d; --below: #58a6ff; --good: #3fb950; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
"""
PARTS_STYLE = """\
h3 { font-size: 1rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; padding: .75rem 1rem; background: var(--card); border-left: 4px solid var(--soft); }
.verdict.better { border-color: var(--good); }
.verdict.worse { border-color: var(--bad); }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.panel { min-width: 0; max-width: 30rem; }
.chart { max-width: 34rem; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); font-size: 10px; }
svg .above { fill: var(--above); } svg .below { fill: var(--below); }
svg .empty { fill: none; stroke: var(--line); stroke-dasharray: 2 2; }
svg .frame { fill: none; stroke: var(--line); }
svg .axis { stroke: var(--soft); stroke-width: 1; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .range { stroke: var(--ink); stroke-width: 2; } svg .curve { fill: none; stroke: var(--below); stroke-width: 1.5; }
svg .curve.other { stroke: var(--above); } svg .better { fill: var(--good); } svg .worse { fill: var(--bad); }
svg .better.range { stroke: var(--good); } svg .worse.range { stroke: var(--bad); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; } thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; } tr.strong * { font-weight: 700; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--below); }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def page(title: str, *content: str) -> str:
    """The whole document around safe content."""
    head = tag(
        "head",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        tag("title", text(title)),
        tag("style", PAGE_STYLE + PARTS_STYLE),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *content)), lang='en')}\n"


_INTERVALS_WIDTH, _INTERVALS_LEFT, _RIGHT, _INTERVALS_HEIGHT, _INTERVALS_TOP = 360.0, 112.0, 66.0, 20.0, 22.0
NAMED = 16  # characters of a row's name
_FAR = 4.0  # times the median difference


@dataclass(frozen=True)
class Line:
    """A row: its name, its difference, its interval, and whether it may set the range of the axis."""

    name: str
    difference: float
    interval: tuple[float, float]
    in_range: bool = True


def intervals_chart(lines: Sequence[Line], label: str) -> str:
    """Rows out of the axis' range end in an arrow, and all have their number beside them."""
    low, high = _range(lines)
    plot = _INTERVALS_WIDTH - _INTERVALS_LEFT - _RIGHT

    def x(value: float) -> float:
        return _INTERVALS_LEFT + plot * (min(max(value, low), high) - low) / (high - low)

    bottom = _INTERVALS_TOP + _INTERVALS_HEIGHT * len(lines)
    parts = [tag("line", x1=x(0.0), x2=x(0.0), y1=_INTERVALS_TOP - 4, y2=bottom, class_="axis")]
    for value in (low, 0.0, high):
        parts.append(tag("text", text(f"{value:+.2g}" if value else "0"), x=x(value), y=12, text_anchor="middle"))
    for index, line in enumerate(lines):
        parts.append(_line(line, _INTERVALS_TOP + _INTERVALS_HEIGHT * (index + 0.5), x, low, high))
    return tag("div", svg(_INTERVALS_WIDTH, bottom + 4, label, *parts), class_="chart")


def _line(line: Line, y: float, x: Callable[[float], float], low: float, high: float) -> str:
    start, end = line.interval
    kind = "better" if end < 0 else "worse" if start > 0 else "unsure"
    name = line.name if len(line.name) <= NAMED else f"...{line.name[3 - NAMED :]}"
    parts = [
        tag("title", text(f"{line.name}: {line.difference:+.4f}, 95 % interval {start:+.4f} to {end:+.4f}")),
        tag("text", text(name), x=_INTERVALS_LEFT - 8, y=y + 4, text_anchor="end"),
        tag("line", x1=x(start), x2=x(end), y1=y, y2=y, class_=f"range {kind}"),
    ]
    if low <= line.difference <= high:
        parts.append(tag("circle", cx=x(line.difference), cy=y, r=4, class_=kind))
    else:
        edge, way = (x(high), -1) if line.difference > high else (x(low), 1)
        parts.append(tag("path", d=f"M{edge:g} {y:g} l{6 * way} -4 v8 z", class_=kind))
    parts.append(
        tag("text", text(f"{line.difference:+.3f}"), x=_INTERVALS_WIDTH - 2, y=y + 4, text_anchor="end", class_="soft")
    )
    return tag("g", *parts)


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    """Of the rows that may set it, and of zero, with a little room. A row that is far worse than most would press all
    others together, so it does not set it."""
    ends = [0.0, *(end for line in lines if line.in_range for end in line.interval)]
    sizes = [abs(line.difference) for line in lines if line.in_range and line.difference]
    low, high = min(ends), max(ends)
    if sizes:
        high = min(high, max(_FAR * median(sizes), -low))
    room = 0.05 * (high - low) or 0.01
    return low - room, high + room


_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_LEFT, _CURVE_BOTTOM, _CURVE_TOP = 360.0, 190.0, 42.0, 24.0, 22.0
NATS = "nats per token"


def loss_curve(fit: FitRecord) -> str:
    """The losses of all stages end to end; circles are validation losses, where they are in the same unit."""
    stages = [stage for stage in fit.stages if stage.losses]
    steps = sum(stage.steps for stage in stages)
    dots = [s.validation for s in stages if s.validation is not None] if fit.criterion == NATS else []
    values = sorted(loss for stage in stages for loss in stage.losses)
    low = min([values[0], *dots])
    high = max([values[int(0.98 * (len(values) - 1))], *dots])  # a few wild steps do not set the scale
    high = high if high > low else low + 1.0

    def x(step: float) -> float:
        return _CURVE_LEFT + (_CURVE_WIDTH - _CURVE_LEFT - 8) * step / steps

    def y(loss: float) -> float:
        height = _CURVE_HEIGHT - _CURVE_TOP - _CURVE_BOTTOM
        return _CURVE_TOP + height * (high - min(max(loss, low), high)) / (high - low)

    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(tag("line", x1=_CURVE_LEFT, x2=_CURVE_WIDTH - 8, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:.3f}", x=_CURVE_LEFT - 4, y=y(value) + 4, text_anchor="end", class_="soft"))
    done = 0
    for index, stage in enumerate(stages):
        count = len(stage.losses)
        points = [(x(done + stage.steps * (i + 0.5) / count), y(loss)) for i, loss in enumerate(stage.losses)]
        line = " ".join(f"{a:.5g},{b:.5g}" for a, b in points)
        title = tag("title", text(f"{_stage_label(stage)}: {stage.steps} steps"))
        parts.append(tag("polyline", title, points=line, class_="curve other" if index % 2 else "curve"))
        done += stage.steps
        if stage.validation is not None and fit.criterion == NATS:
            said = tag("title", text(f"{_stage_label(stage)}: {stage.validation:.4f} on validation records"))
            parts.append(tag("circle", said, cx=x(done), cy=y(stage.validation), r=3.5))
    corner = {"x": _CURVE_WIDTH - 8, "y": _CURVE_HEIGHT - 6}
    parts.append(tag("text", f"{steps} steps", **corner, text_anchor="end", class_="soft"))
    parts.append(tag("text", "nats per token", x=2, y=12, class_="soft"))
    return tag("div", svg(_CURVE_WIDTH, _CURVE_HEIGHT, "loss of the steps of the search", *parts), class_="chart")


def _stage_label(stage: StageRecord) -> str:
    """`module from sum, ridge 0.001`."""
    where = f"{stage.rung} on all records" if stage.stage == "refit" else f"{stage.rung} from {stage.start}"
    return f"{where}, first steps" if stage.stage == "probe" else f"{where}, ridge {stage.ridge:g}"


def ridge_path(stages: Sequence[StageRecord]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each stage with its ridge and what it came to."""
    rows = [
        [
            _stage_label(stage),
            str(stage.steps),
            f"{stage.ridge:g}",
            "-" if stage.validation is None else f"{stage.validation:.4f}",
        ]
        for stage in stages
    ]
    return ["stage", "steps", "ridge", "validation"], rows


_WIDTH, _LABELS, _HEADER = 330.0, 34.0, 54.0
_MOST_CELL = 46.0


def heat_map(recipe: Recipe) -> str:
    """The panels with their scale."""
    found, uniform = grids(recipe), 1 / len(recipe.adapters)
    if not found:
        return tag("p", text(f"{NO_MAP}."))
    span = span_of(found, uniform)
    panels = [
        tag("div", tag("h3", text(label)), _panel(label, grid, uniform, span), class_="panel")
        for label, grid in found.items()
    ]
    return _scale(uniform, span) + tag("div", *panels, class_="panels")


def _panel(label: str, grid: Grid, uniform: float, span: float) -> str:
    width = min(_MOST_CELL, (_WIDTH - _LABELS) / max(1, len(grid.columns)))
    height = 16.0 if len(grid.rows) <= 32 else 9.0
    parts: list[str] = []
    if width > 8:
        parts = [_heading(name, _LABELS + (i + 0.5) * width) for i, name in enumerate(short_names(grid.columns))]
    for r, (row, number) in enumerate(zip(grid.rows, layer_numbers(grid.rows), strict=True)):
        y = _HEADER + r * height
        if height > 12 or r % 4 == 0:
            parts.append(tag("text", text(number), x=_LABELS - 6, y=y + height - 4, text_anchor="end", class_="soft"))
        for c, column in enumerate(grid.columns):
            place = {"x": _LABELS + c * width + 0.5, "y": y + 0.5, "width": width - 1, "height": height - 1}
            cell = grid.cells.get((row, column))
            if cell is None:
                parts.append(tag("rect", class_="empty", **place))
            else:
                parts.append(_colour(cell.weight, uniform, span, tag("title", text(described(cell))), **place))
    total = _HEADER + len(grid.rows) * height + 2
    return svg(_LABELS + len(grid.columns) * width + 24, total, f"weights of {label}, layer by module", *parts)


def _heading(name: str, x: float) -> str:
    return tag("text", text(name), x=0, y=0, font_size=10, transform=f"translate({x:.5g},{_HEADER - 6:g}) rotate(-38)")


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
    return tag("div", svg(_WIDTH, 34, "the scale of the colours", *parts), class_="panel")
