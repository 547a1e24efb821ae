"""Differences with their 95 % intervals, a line for each row, around zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from loracli.report.html import svg, tag, text

WIDTH, LEFT, RIGHT, HEIGHT, TOP = 360.0, 112.0, 66.0, 20.0, 22.0
NAMED = 16  # characters of a row's name
FAR = 4.0  # times the median difference


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
    plot = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + plot * (min(max(value, low), high) - low) / (high - low)

    bottom = TOP + HEIGHT * len(lines)
    parts = [tag("line", x1=x(0.0), x2=x(0.0), y1=TOP - 4, y2=bottom, class_="axis")]
    for value in (low, 0.0, high):
        parts.append(tag("text", text(f"{value:+.2g}" if value else "0"), x=x(value), y=12, text_anchor="middle"))
    for index, line in enumerate(lines):
        parts.append(_line(line, TOP + HEIGHT * (index + 0.5), x, low, high))
    return tag("div", svg(WIDTH, bottom + 4, label, *parts), class_="chart")


def _line(line: Line, y: float, x: Callable[[float], float], low: float, high: float) -> str:
    start, end = line.interval
    kind = "better" if end < 0 else "worse" if start > 0 else "unsure"
    name = line.name if len(line.name) <= NAMED else f"...{line.name[3 - NAMED :]}"
    parts = [
        tag("title", text(f"{line.name}: {line.difference:+.4f}, 95 % interval {start:+.4f} to {end:+.4f}")),
        tag("text", text(name), x=LEFT - 8, y=y + 4, text_anchor="end"),
        tag("line", x1=x(start), x2=x(end), y1=y, y2=y, class_=f"range {kind}"),
    ]
    if low <= line.difference <= high:
        parts.append(tag("circle", cx=x(line.difference), cy=y, r=4, class_=kind))
    else:
        edge, way = (x(high), -1) if line.difference > high else (x(low), 1)
        parts.append(tag("path", d=f"M{edge:g} {y:g} l{6 * way} -4 v8 z", class_=kind))
    parts.append(tag("text", text(f"{line.difference:+.3f}"), x=WIDTH - 2, y=y + 4, text_anchor="end", class_="soft"))
    return tag("g", *parts)


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    """Of the rows that may set it, and of zero, with a little room. A row that is far worse than most would press all
    others together, so it does not set it."""
    ends = [0.0, *(end for line in lines if line.in_range for end in line.interval)]
    sizes = [abs(line.difference) for line in lines if line.in_range and line.difference]
    low, high = min(ends), max(ends)
    if sizes:
        high = min(high, max(FAR * median(sizes), -low))
    room = 0.05 * (high - low) or 0.01
    return low - room, high + room
