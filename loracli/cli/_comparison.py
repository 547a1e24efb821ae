"""How a comparison is shown to people."""

from __future__ import annotations

from loracli.cli._output import Output
from loracli.evaluation.comparison import Comparison, ComparisonRow, claim, interval_text, metric_claim

SHOWN_TASKS = 12
KIND_ORDER = ("base", "ingredient", "method", "fit", "control")


def comparison_lines(out: Output, found: Comparison) -> None:
    """The table, what must not get worse, the tasks, and what may be claimed."""
    out.line(f"{found.records} records of {found.data}, {found.scored_tokens} scored tokens", style="bold")
    found = _labelled(found)
    rows = sorted(found.rows, key=lambda row: KIND_ORDER.index(row.kind))
    metric = [found.metric] if found.metric else []
    columns = ["", "rank", "nats/token", "perplexity", "difference", "95 % interval", "to uniform", "worse on", *metric]
    strong = next((i for i, row in enumerate(rows) if row.name == found.best.name), None)
    out.table(columns, [_cells(row) for row in rows], strong=strong)
    out.line(f"difference: to the best single adapter, {found.best_ingredient}; below zero is better", style="dim")
    for row in rows:
        if row.note or row.kept_energy is not None:
            out.line(f"{row.name}: {_note(row)}", style="dim")
    out.line()
    if found.guard:
        _guard_lines(out, found, rows)
    if found.skipped:
        for reason in dict.fromkeys(skipped.reason for skipped in found.skipped):
            names = ", ".join(skipped.name for skipped in found.skipped if skipped.reason == reason)
            out.line(f"left out: {names}: {reason}", style="dim")
        out.line()
    if len(found.tasks) > 1:
        _task_lines(out, found, rows)
    out.line(claim(found), style="bold")
    if found.metric:
        out.line(metric_claim(found), style="bold")
    out.line(
        f"so many records show a true difference of {found.detectable:.4f} nats per token four times in five",
        style="dim",
    )
    if found.repeated_records:
        out.line(f"{found.repeated_records} of the records were calibrated on: the table flatters what was fitted")


def _labelled(found: Comparison) -> Comparison:
    """Local adapters by as many of their last names as tell them from the other rows."""
    others = [row.name for row in found.rows if row.kind != "ingredient"]
    names: dict[str, str] = {}
    for reference in found.adapters:
        parts, rest = reference.rstrip("/").split("/"), [other for other in found.adapters if other != reference]
        if len(parts) > 2 or parts[0] in (".", ".."):
            tails = ("/".join(parts[-count:]) for count in range(1, len(parts)))
            taken = [*others, *rest]
            names[reference] = next((t for t in tails if not any(f"/{o}".endswith(f"/{t}") for o in taken)), reference)
    return found.renamed(names)


def _cells(row: ComparisonRow) -> list[str]:
    uniform = row.against_uniform
    cells = [
        row.name,
        "" if row.rank is None else str(row.rank),
        f"{row.nats_per_token:.4f}",
        f"{row.perplexity:.4g}",
        f"{row.difference:+.4f}",
        interval_text(row.interval),
        "" if uniform is None else interval_text(uniform.interval),
        f"{row.worse_records:.0%}",
    ]
    if row.metric is not None:
        cells.append(f"{row.metric.mean:.3f} ({interval_text(row.metric.interval)})")
    return cells


def _note(row: ComparisonRow) -> str:
    kept = "" if row.kept_energy is None else f"rank {row.rank} keeps {row.kept_energy:.1%} of its energy"
    return "; ".join(filter(None, [row.note, kept]))


def _guard_lines(out: Output, found: Comparison, rows: list[ComparisonRow]) -> None:
    out.line(f"what must not get worse: {found.guard}, by at most {found.margin:g} nats per token", style="bold")
    cells = [
        [
            row.name,
            f"{row.guard.nats_per_token:.4f}",
            f"{row.guard.difference.mean:+.4f}",
            interval_text(row.guard.difference.interval),
            "safe" if row.guard.safe else "NOT SHOWN SAFE",
        ]
        for row in rows
        if row.guard is not None and row.kind != "base"
    ]
    out.table(["", "nats/token", "to base", "95 % interval", ""], cells)
    out.line()


def _task_lines(out: Output, found: Comparison, rows: list[ComparisonRow]) -> None:
    out.line("nats per token by task", style="bold")
    shown = found.tasks[:SHOWN_TASKS]
    cells = [[row.name, *(f"{task.nats_per_token[row.name]:.4f}" for task in shown)] for row in rows]
    out.table(["", *(f"{task.task} ({task.records})" for task in shown)], cells)
    if len(found.tasks) > SHOWN_TASKS:
        out.line(f"... and {len(found.tasks) - SHOWN_TASKS} more tasks in --json")
    out.line()
