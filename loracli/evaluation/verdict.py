"""What a table says, in a sentence."""

from __future__ import annotations

from loracli.evaluation.comparison import Comparison
from loracli.recipe.recipe import HeldOut


def verdict(table: HeldOut) -> str:
    """What the table says about the fit, in a sentence."""
    fitted = table.row("fit")
    interval = f"{fitted.difference:+.4f} nats per token, 95 % interval {interval_text(fitted.interval)}"
    if table.verdict == "too few records":
        return f"too few held-out records for a verdict: {interval}"
    if table.verdict == "not better":
        return f"the fit does NOT beat {table.best_ingredient}: {interval}"
    static = [
        row for row in table.rows if row.name in ("uniform", "sum") and row.nats_per_token <= fitted.nats_per_token
    ]
    caveat = f", but {static[0].name} is as good without any fit" if static else ""
    alone = [row for row in table.rows if row.name not in ("base", "uniform", "sum", "fit")]
    best = f"{table.best_ingredient}, the best single adapter" if len(alone) > 1 else table.best_ingredient
    return f"the fit beats {best}: {interval}{caveat}"


def claim(found: Comparison) -> str:
    """What the table says, in a sentence."""
    best, rivals = found.row(found.best.name), found.best.rivals
    if not rivals:
        return f"{best.name} has no rival here"
    if found.best.clear:
        return f"{best.name} is the best of {1 + len(rivals)}, each other one at p < 0.05 after Holm's correction"
    near = {name: p for name, p in rivals.items() if p >= 0.05}
    shown = ", ".join(f"{name} (p = {p:.2g})" for name, p in sorted(near.items(), key=lambda item: -item[1])[:5])
    return f"{best.name} has the lowest loss of {1 + len(rivals)}, but is not clearly better than {shown}"


def metric_claim(found: Comparison) -> str:
    """What the task metric says, in a sentence; nothing without one."""
    measured = [
        (row, row.metric) for row in found.rows if row.metric is not None and row.kind not in ("base", "control")
    ]
    if not measured:
        return ""
    row, score = max(measured, key=lambda pair: pair[1].mean)
    test = "" if score.p_value is None else f"; McNemar's p = {score.p_value:.2g}"
    other = "" if row.name == found.best.name else f", where the loss is lowest with {found.best.name}"
    return (
        f"by {found.metric}, {row.name} is best with {score.mean:.3f}, {score.difference:+.3f} to the best single "
        f"adapter (95 % interval {interval_text(score.interval)}{test}){other}"
    )


def interval_text(interval: tuple[float, float]) -> str:
    """`-0.0123 to +0.0040`."""
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}"
