"""The charts of a report: differences with their intervals, the losses of the search, and weights as maps.

Each has the titles of its axes with their units, and a legend that says what every mark in it means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from statistics import median

from loracli.recipe.recipe import Recipe
from loracli.recipe.record import FitRecord, StageRecord
from loracli.report.grid import NO_MAP, Grid, described, grids, layer_numbers, short_names, span_of
from loracli.report.page import legend, paragraph, svg, tag, text

NATS = "nats per token"
_DECADE = 10.0  # values that span more have a logarithmic axis
_MOST_TICKS = 5


@dataclass(frozen=True)
class _Axis:
    """A range of values, and where in it each of them lies."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """From 0 at the low end to 1 at the high one, where what is beyond an end lies at it."""
        kept = min(max(value, self.low), self.high)
        if self.log:
            return (log10(kept) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return (kept - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers within the range, few enough to be read; its ends where there are no round ones."""
        if self.log:
            first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
            every = max(1, ceil((last - first + 1) / _MOST_TICKS))
            return [10.0**power for power in range(first, last + 1, every)]
        span = self.high - self.low
        if not 1e-300 < span < 1e300:
            return [self.low, self.high]
        size = 10.0 ** floor(log10(span / _MOST_TICKS))
        step = next(size * times for times in (1, 2, 5, 10) if span / (size * times) <= _MOST_TICKS)
        return [n * step for n in range(ceil(self.low / step), floor(self.high / step) + 1)]


_INTERVALS_WIDTH, _RIGHT, _ROW, _INTERVALS_TOP = 360.0, 62.0, 20.0, 22.0
_NAMED, _NAME_LETTER = 16, 6.2  # characters of a row's name, and the width of one
_FAR = 4.0  # times the median difference


@dataclass(frozen=True)
class Line:
    """A row: its name, its difference, its interval, whether it may set the range of the axis, and whether it is what
    the others are compared with."""

    name: str
    difference: float
    interval: tuple[float, float]
    in_range: bool = True
    reference: bool = False


def intervals_chart(lines: Sequence[Line], reference: str) -> str:
    """The differences to `reference`, in the order given. Rows out of the axis' range end in a triangle, and all have
    their number beside them."""
    axis = _range(lines)
    left = 14 + _NAME_LETTER * max((min(_NAMED, len(line.name)) for line in lines), default=0)
    plot = _INTERVALS_WIDTH - left - _RIGHT

    def x(value: float) -> float:
        return left + plot * axis.share(value)

    bottom = _INTERVALS_TOP + _ROW * len(lines)
    parts = []
    for value in axis.ticks():
        kind = "grid" if value else "axis"
        parts.append(tag("line", x1=x(value), x2=x(value), y1=_INTERVALS_TOP - 4, y2=bottom, class_=kind))
        parts.append(tag("text", text(f"{value:+g}" if value else "0"), x=x(value), y=12, text_anchor="middle"))
    for index, line in enumerate(lines):
        parts.append(_line(line, _INTERVALS_TOP + _ROW * (index + 0.5), x, axis))
    middle = left + plot / 2
    parts.append(
        tag("text", f"difference in {NATS}: left is better, right is worse", x=middle, y=bottom + 14, **_TITLE)
    )
    first = lines[0] if lines else None
    told = f"{first.name} has the lowest loss, {first.difference:+.4f} {NATS}" if first else "no rows"
    label = (
        f"Chart of {len(lines)} differences to {reference}, lowest loss first: {told}. The table below has all numbers."
    )
    return tag("div", svg(_INTERVALS_WIDTH, bottom + 20, label, *parts), _marks(lines, axis), class_="chart")


_TITLE = {"text_anchor": "middle", "class_": "soft"}


def _marks(lines: Sequence[Line], axis: _Axis) -> str:
    """What the marks of the rows mean, as far as there are such."""

    def mark(kind: str) -> str:
        return tag("line", x1=2, x2=26, y1=7, y2=7, class_=f"range {kind}") + tag(
            "circle", cx=14, cy=7, r=4, class_=kind
        )

    kinds = [_kind(line) for line in lines]
    said = {
        "better": "better: the whole 95 % interval is below zero",
        "worse": "worse: the whole interval is above zero",
        "unsure": "not clear: zero lies in the interval",
        "reference": "what the others are compared with",
    }
    entries = [
        (tag("circle", cx=14, cy=7, r=4, class_=kind) if kind == "reference" else mark(kind), words)
        for kind, words in said.items()
        if kind in kinds
    ]
    if any(not axis.low <= line.difference <= axis.high for line in lines):
        entries.append((tag("path", d="M20 7 l-9 -5 v10 z"), "arrow: farther than the chart goes"))
    return legend(*entries)


def _kind(line: Line) -> str:
    start, end = line.interval
    return "reference" if line.reference else "better" if end < 0 else "worse" if start > 0 else "unsure"


def _line(line: Line, y: float, x: Callable[[float], float], axis: _Axis) -> str:
    (start, end), kind = line.interval, _kind(line)
    name = line.name if len(line.name) <= _NAMED else f"...{line.name[3 - _NAMED :]}"
    parts = [
        tag("title", text(f"{line.name}: {line.difference:+.4f}, 95 % interval {start:+.4f} to {end:+.4f}")),
        tag("text", text(name), x=x(axis.low) - 8, y=y + 4, text_anchor="end"),
        tag("line", x1=x(start), x2=x(end), y1=y, y2=y, class_=f"range {kind}"),
    ]
    if axis.low <= line.difference <= axis.high:
        parts.append(tag("circle", cx=x(line.difference), cy=y, r=4, class_=kind))
    else:
        way = -1 if line.difference > axis.high else 1
        parts.append(tag("path", d=f"M{x(line.difference):g} {y:g} l{8 * way} -5 v10 z", class_=kind))
    number = "0" if line.reference else f"{line.difference:+.4f}"
    parts.append(tag("text", text(number), x=_INTERVALS_WIDTH - 2, y=y + 4, text_anchor="end", class_="soft"))
    return tag("g", *parts)


def _range(lines: Sequence[Line]) -> _Axis:
    """Of the rows that may set it, and of zero, with a little room. A row that is far worse than most would press all
    others together, so it does not set it."""
    ends = [0.0, *(end for line in lines if line.in_range for end in line.interval)]
    sizes = [abs(line.difference) for line in lines if line.in_range and line.difference]
    low, high = min(ends), max(ends)
    if sizes:
        high = min(high, max(_FAR * median(sizes), -low))
    room = 0.05 * (high - low) or 0.01
    return _Axis(low - room, high + room)


_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_LEFT, _CURVE_BOTTOM, _CURVE_TOP = 360.0, 220.0, 46.0, 40.0, 36.0
_NUMBERED = 12.0  # width of a stage that has room for its number
_STAGES = {
    "probe": "losses of batches in the first steps from a start",
    "descent": "the same as the better start goes on",
    "refit": "the same once more, on all training records",
}


def loss_curve(fit: FitRecord) -> str:
    """The losses of all stages end to end; circles are validation losses, where they are in the same unit. The scale is
    logarithmic where the losses span more than a decade."""
    stages = [(number, stage) for number, stage in enumerate(fit.stages, start=1) if stage.losses]
    validated = fit.criterion == NATS
    dots = [s.validation for _, s in stages if s.validation is not None] if validated else []
    values = [*(loss for _, stage in stages for loss in stage.losses), *dots]
    low, high = min(values), max(values)
    axis = _Axis(low, high if high > low else low + 1.0, log=low > 0 and high > _DECADE * low)
    steps = sum(stage.steps for _, stage in stages)
    right, bottom = _CURVE_WIDTH - 8, _CURVE_HEIGHT - _CURVE_BOTTOM

    def x(step: float) -> float:
        return _CURVE_LEFT + (right - _CURVE_LEFT) * step / max(1, steps)

    def y(loss: float) -> float:
        return bottom - (bottom - _CURVE_TOP) * axis.share(loss)

    parts = [tag("text", f"{NATS}{', log scale' if axis.log else ''}", x=2, y=12, class_="soft")]
    for value in axis.ticks():
        parts.append(tag("line", x1=_CURVE_LEFT, x2=right, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:g}", x=_CURVE_LEFT - 4, y=y(value) + 4, text_anchor="end", class_="soft"))
    for value in _Axis(0.0, max(1, steps)).ticks():
        parts.append(tag("text", f"{value:g}", x=x(value), y=bottom + 14, **_TITLE))
    parts.append(
        tag("text", f"{steps} steps of the search", x=(_CURVE_LEFT + right) / 2, y=_CURVE_HEIGHT - 8, **_TITLE)
    )
    done = 0
    for number, stage in stages:
        parts.append(_stage(number, stage, done, x, y))
        done += stage.steps
        if stage.validation is not None and validated:
            said = tag("title", text(f"{_stage_label(stage)}: {stage.validation:.4f} on validation records"))
            parts.append(tag("circle", said, cx=x(done), cy=y(stage.validation), r=3.5))
    kinds = {stage.stage for _, stage in stages}
    entries = [
        (tag("line", x1=2, x2=26, y1=7, y2=7, class_=f"curve {kind}"), said)
        for kind, said in _STAGES.items()
        if kind in kinds
    ]
    entries.append((tag("text", "1", x=14, y=11, **_TITLE), "a stage, by its number in the table below"))
    if dots:
        entries.append((tag("circle", cx=14, cy=7, r=3.5), "validation loss of what a stage came to"))
    label = f"Chart of the loss in {steps} steps of the search, in {NATS}, from {low:.4g} to {high:.4g}."
    return tag("div", svg(_CURVE_WIDTH, _CURVE_HEIGHT, label, *parts), legend(*entries), class_="chart")


def _stage(number: int, stage: StageRecord, done: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """A stage's line between the steps where it began and ended, under its number."""
    count, (start, end) = len(stage.losses), (x(done), x(done + stage.steps))
    points = [(x(done + stage.steps * (i + 0.5) / count), y(loss)) for i, loss in enumerate(stage.losses)]
    title = tag("title", text(f"{_stage_label(stage)}: {stage.steps} steps"))
    line = tag("polyline", title, points=" ".join(f"{a:.5g},{b:.5g}" for a, b in points), class_=f"curve {stage.stage}")
    if end - start < _NUMBERED:
        return line
    return tag("text", str(number), x=(start + end) / 2, y=_CURVE_TOP - 8, **_TITLE) + line


def _stage_label(stage: StageRecord) -> str:
    """`module from sum, ridge 0.001`."""
    where = f"{stage.rung} on all records" if stage.stage == "refit" else f"{stage.rung} from {stage.start}"
    return f"{where}, first steps" if stage.stage == "probe" else f"{where}, ridge {stage.ridge:g}"


def ridge_path(fit: FitRecord) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each stage, in the order of the search, with its ridge and what it came to."""
    rows = [
        [
            f"{number}: {_stage_label(stage)}",
            str(stage.steps),
            f"{stage.ridge:g}",
            "-" if stage.validation is None else f"{stage.validation:.4f}",
        ]
        for number, stage in enumerate(fit.stages, start=1)
    ]
    validation = f"validation, {NATS if fit.criterion == NATS else f'1 - {fit.criterion}'}"
    return ["stage", "steps", "ridge (L2 penalty)", validation], rows


_WIDTH, _LABELS, _HEADER = 330.0, 34.0, 62.0
_MOST_LABELS, _LETTER = 130.0, 5.5
_MOST_CELL, _LABELLED_CELL = 46.0, 26.0  # the widest, and the narrowest with its number in it
_TINT = 0.55  # the strongest colour, on which a number can still be read


def heat_map(recipe: Recipe) -> str:
    """The panels with their scale."""
    found, uniform = grids(recipe), 1 / len(recipe.adapters)
    if not found:
        return paragraph(f"{NO_MAP}.")
    span = span_of(found, uniform)
    panels = [
        tag("div", tag("h3", text(label)), _panel(label, grid, uniform, span), class_="panel")
        for label, grid in found.items()
    ]
    empty = any(len(grid.cells) < len(grid.rows) * len(grid.columns) for grid in found.values())
    nothing = (tag("rect", x=2, y=2, width=24, height=10, class_="empty"), "the adapter changes nothing there")
    return _scale(uniform, span) + (legend(nothing) if empty else "") + tag("div", *panels, class_="panels")


def _panel(label: str, grid: Grid, uniform: float, span: float) -> str:
    names = layer_numbers(grid.rows)
    left = min(_MOST_LABELS, max(_LABELS, 10 + _LETTER * max(map(len, names), default=0)))
    width = min(_MOST_CELL, (_WIDTH - left) / max(1, len(grid.columns)))
    height = 16.0 if len(grid.rows) <= 32 else 9.0
    parts = [
        tag("text", "module", x=left, y=10, class_="soft"),
        tag("text", "layer", x=2, y=_HEADER - 6, class_="soft"),
    ]
    if width > 8:
        parts += [_heading(name, left + (i + 0.5) * width) for i, name in enumerate(short_names(grid.columns))]
    for r, (row, name) in enumerate(zip(grid.rows, names, strict=True)):
        y = _HEADER + r * height
        if height > 12 or r % 4 == 0:
            parts.append(tag("text", text(name), x=left - 6, y=y + height - 4, text_anchor="end", class_="soft"))
        for c, column in enumerate(grid.columns):
            place = {"x": left + c * width + 0.5, "y": y + 0.5, "width": width - 1, "height": height - 1}
            cell = grid.cells.get((row, column))
            if cell is None:
                parts.append(tag("rect", class_="empty", **place))
                continue
            inside = tag("title", text(described(cell)))
            if height > 12 and width >= _LABELLED_CELL:
                inside += tag("text", f"{cell.weight:.2f}", x=left + (c + 0.5) * width, y=y + 11.5, class_="inside")
            parts.append(_colour(cell.weight, uniform, span, inside, **place))
    total = _HEADER + len(grid.rows) * height + 2
    said = f"Map of the weights of {label}: {len(grid.cells)} modules, by layer."
    return svg(left + len(grid.columns) * width + 24, total, said, *parts)


def _heading(name: str, x: float) -> str:
    return tag("text", text(name), x=0, y=0, font_size=10, transform=f"translate({x:.5g},{_HEADER - 6:g}) rotate(-38)")


def _colour(weight: float, uniform: float, span: float, *content: str, **place: float) -> str:
    """Above uniform in one colour and below in the other, the stronger the farther; uniform is the page's own."""
    share = _TINT * min(1.0, abs(weight - uniform) / span)
    fill = tag("rect", class_="above" if weight >= uniform else "below", fill_opacity=share, **place)
    return tag("g", fill, tag("rect", class_="frame", pointer_events="all", **place), *content)


def _scale(uniform: float, span: float) -> str:
    steps, width, left = 11, 24.0, 33.0
    parts = [tag("text", "weight", x=left + steps * width + 5, y=12, class_="soft")]
    for step in range(steps):
        weight = uniform + span * (2 * step / (steps - 1) - 1)
        parts.append(_colour(weight, uniform, span, x=left + step * width, y=2, width=width, height=12))
    for step in (0, (steps - 1) // 2, steps - 1):
        weight = uniform + span * (2 * step / (steps - 1) - 1)
        said = f"{weight:.2f}" + (" uniform" if step == (steps - 1) // 2 else "")
        parts.append(tag("text", text(said), x=left + (step + 0.5) * width, y=28, text_anchor="middle"))
    label = f"The scale of the colours: weights from {uniform - span:.2f} to {uniform + span:.2f} around {uniform:.2f}."
    return tag("div", svg(left + steps * width + 45, 34, label, *parts), class_="panel")
