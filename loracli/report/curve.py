"""The loss of the steps of a search, stage by stage, with what each came to on validation records."""

from __future__ import annotations

from collections.abc import Sequence

from loracli.recipe.record import FitRecord, StageRecord
from loracli.report.html import svg, tag, text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360.0, 190.0, 42.0, 24.0, 22.0
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
        return LEFT + (WIDTH - LEFT - 8) * step / steps

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(loss, low), high)) / (high - low)

    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(tag("line", x1=LEFT, x2=WIDTH - 8, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:.3f}", x=LEFT - 4, y=y(value) + 4, text_anchor="end", class_="soft"))
    done = 0
    for index, stage in enumerate(stages):
        count = len(stage.losses)
        points = [(x(done + stage.steps * (i + 0.5) / count), y(loss)) for i, loss in enumerate(stage.losses)]
        line = " ".join(f"{a:.5g},{b:.5g}" for a, b in points)
        title = tag("title", text(f"{described(stage)}: {stage.steps} steps"))
        parts.append(tag("polyline", title, points=line, class_="curve other" if index % 2 else "curve"))
        done += stage.steps
        if stage.validation is not None and fit.criterion == NATS:
            said = tag("title", text(f"{described(stage)}: {stage.validation:.4f} on validation records"))
            parts.append(tag("circle", said, cx=x(done), cy=y(stage.validation), r=3.5))
    parts.append(tag("text", f"{steps} steps", x=WIDTH - 8, y=HEIGHT - 6, text_anchor="end", class_="soft"))
    parts.append(tag("text", "nats per token", x=2, y=12, class_="soft"))
    return tag("div", svg(WIDTH, HEIGHT, "loss of the steps of the search", *parts), class_="chart")


def described(stage: StageRecord) -> str:
    """`module from sum, ridge 0.001`."""
    where = f"{stage.rung} on all records" if stage.stage == "refit" else f"{stage.rung} from {stage.start}"
    return f"{where}, first steps" if stage.stage == "probe" else f"{where}, ridge {stage.ridge:g}"


def ridge_path(stages: Sequence[StageRecord]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each stage with its ridge and what it came to."""
    rows = [
        [
            described(stage),
            str(stage.steps),
            f"{stage.ridge:g}",
            "-" if stage.validation is None else f"{stage.validation:.4f}",
        ]
        for stage in stages
    ]
    return ["stage", "steps", "ridge", "validation"], rows
