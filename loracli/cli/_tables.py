"""How results are shown to people: a recipe, a comparison, an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loracli.cli._output import Block, Output
from loracli.evaluation.comparison import Comparison, ComparisonRow, claim, interval_text, metric_claim, verdict
from loracli.progress import amount_text
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import EDITED, FitCertificate, HeldOut
from loracli.system.document import dtype_name

if TYPE_CHECKING:
    from loracli.export.export import Exported
    from loracli.export.loss import ExportLoss
    from loracli.export.refit import RefitRecord

COMPARED_TASKS = 12
KIND_ORDER = ("base", "ingredient", "method", "fit", "control")


def comparison_lines(out: Output, found: Comparison) -> None:
    """The table, what must not get worse, the tasks, and what may be claimed."""
    out.line(f"{found.records} records of {found.data}, {found.scored_tokens} scored tokens", style="bold")
    found = found.labelled()
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
        _compared_task_lines(out, found, rows)
    out.line(claim(found), style="bold")
    if found.metric:
        out.line(metric_claim(found), style="bold")
    out.line(
        f"with this many records a true difference of {found.detectable:.4f} nats per token is found 4 times in 5",
        style="dim",
    )
    if found.repeated_records:
        out.line(f"{found.repeated_records} of the records were calibrated on too: the table flatters what was fitted")


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


def _compared_task_lines(out: Output, found: Comparison, rows: list[ComparisonRow]) -> None:
    out.line("nats per token by task", style="bold")
    shown = found.tasks[:COMPARED_TASKS]
    cells = [[row.name, *(f"{task.nats_per_token[row.name]:.4f}" for task in shown)] for row in rows]
    out.table(["", *(f"{task.task} ({task.records})" for task in shown)], cells)
    if len(found.tasks) > COMPARED_TASKS:
        out.line(f"... and {len(found.tasks) - COMPARED_TASKS} more tasks in --json")
    out.line()


SHOWN_TASKS = 20
SHOWN_FAR = 5
NATS = "nats per token"


def data_lines(out: Output, recipe: Recipe) -> None:
    """What was fitted on, a line for each file."""
    for data in recipe.data:
        weight = "" if data.weight == 1 else f", weight {data.weight:g}"
        losses = {"bad lines left out": data.skipped, "cut": data.cut, "dropped": data.dropped}
        said = "".join(f", {count} {what}" for what, count in losses.items() if count)
        out.line(
            f"fitted on {data.records} records of {data.name} ({data.shape}, {data.scored_tokens} scored tokens"
            f"{weight}){said}"
        )


def weight_maps(out: Output, recipe: Recipe) -> None:
    """The weight of each module, layer by layer, a map for each adapter."""
    from loracli.report.grid import NO_MAP, grids, layer_numbers, short_names, span_of

    found, uniform = grids(recipe), 1 / len(recipe.adapters)
    if not found:
        out.line(f"no map of the weights: {NO_MAP}")
    span = span_of(found, uniform)
    for label, grid in found.items():
        out.line(f"weights of {label}, layer by module", style="bold")
        rows = []
        for row, number in zip(grid.rows, layer_numbers(grid.rows), strict=True):
            cells = [grid.cells.get((row, column)) for column in grid.columns]
            blocks = [None if c is None else Block(f"{c.weight:+.2f}", (c.weight - uniform) / span) for c in cells]
            rows.append((number, blocks))
        out.blocks(short_names(grid.columns), rows)
        out.line()


def search_lines(out: Output, recipe: Recipe) -> None:
    """How the mixing was found: the levels with their starts, and what was chosen."""
    fit = recipe.fit
    out.line(f"search: {fit.passes:g} passes, largest change of a weight {fit.largest_move:.3f}", style="bold")
    rows = []
    for rung in fit.rungs:
        for start in rung.starts:
            won = start.name == rung.chosen
            ridge = "" if rung.ridge is None or not won else f"{rung.ridge:g}"
            end = rung.validation if won else None
            rows.append(
                [f"{rung.kind} from {start.name}", *map(_loss, (start.before, start.after, start.unseen, end)), ridge]
            )
    strong = next((i for i, row in enumerate(rows) if row[4] and row[0].startswith(f"{recipe.mixing.kind} ")), None)
    out.table([_heading(fit.criterion), "start", "short try", "on unseen", "final", "ridge"], rows, strong=strong)
    for rung in fit.rungs[1:]:
        out.line(f"{rung.kind}: {rung.why}")
    if fit.folds > 1:
        out.line(f"chosen by cross-validation over {fit.folds} folds")
    if fit.refitted:
        out.line("then fitted once more on all training records")
    if recipe.certificate_of_weights is not None:
        _optimum_lines(out, recipe, recipe.certificate_of_weights)
    if fit.halvings:
        out.line(
            f"{fit.halvings} micro-batches were halved because memory ran out: another run may differ in the last bits"
        )
    if fit.stopped:
        out.line(f"STOPPED EARLY: {fit.stopped}", style="bold")


def _heading(criterion: str) -> str:
    return "nats/token on validation" if criterion == NATS else f"1 - {criterion} on validation"


def _optimum_lines(out: Output, recipe: Recipe, certificate: FitCertificate) -> None:
    """Where the weights stand: what is still to gain, how many the records determine, and which are far out."""
    labels = list(recipe.labels().values())
    bound = "" if certificate.certain else "at most "
    out.line(
        f"a Newton step would gain {bound}{certificate.decrement:.1e} nats per token; "
        f"gradient {certificate.gradient_norm:.1e}"
    )
    out.line(f"the records determine {certificate.effective_numbers:.1f} of the {recipe.mixing.numbers} weights")
    far = [f"{group} of {labels[i]}" for group, places in certificate.extrapolated.items() for i in places]
    if far:
        more = f" and {len(far) - SHOWN_FAR} more" if len(far) > SHOWN_FAR else ""
        out.line(f"above 2 or below -2, where no adapter was trained: {', '.join(far[:SHOWN_FAR])}{more}")


def _loss(nats: float | None) -> str:
    return "" if nats is None else f"{nats:.4f}"


def held_out_lines(out: Output, recipe: Recipe) -> None:
    """The held-out table with the fit standing out, the losses by task, and what it says in a sentence; nothing of
    them where the weights are not the fit's."""
    table = recipe.public().held_out_of_weights
    if table is None:
        out.line(f"{EDITED}: its table, verdict and certificate are not theirs and left out", style="bold")
        return
    out.line(f"held out: {table.records} records of {table.name}, {table.scored_tokens} scored tokens", style="bold")
    rows = [
        [
            row.name,
            f"{row.nats_per_token:.4f}",
            f"{row.difference:+.4f}",
            interval_text(row.interval),
            f"{row.worse_records:.0%}",
        ]
        for row in table.rows
    ]
    strong = next((i for i, row in enumerate(table.rows) if row.name == "fit"), None)
    out.table(["", "nats/token", "difference", "95 % interval", "worse on"], rows, strong=strong)
    out.line(f"difference: to the best single adapter, {table.best_ingredient}; below zero is better", style="dim")
    out.line()
    if len(table.tasks) > 1:
        _task_lines(out, table)
    out.line(verdict(table), style="bold")


def _task_lines(out: Output, table: HeldOut) -> None:
    """Nats per token by task: a row for each task, a column for each method."""
    names = [row.name for row in table.rows]
    rows = [
        [t.task, str(t.records), str(t.scored_tokens), *(f"{t.nats_per_token[name]:.4f}" for name in names)]
        for t in table.tasks[:SHOWN_TASKS]
    ]
    out.line("nats per token by task", style="bold")
    out.table(["", "records", "tokens", *names], rows)
    if len(table.tasks) > SHOWN_TASKS:
        out.line(f"... and {len(table.tasks) - SHOWN_TASKS} more tasks in the recipe")
    out.line()


def exported_summary(exported: Exported) -> str:
    """An adapter in half a line: rank, modules, dtype, size, layout."""
    layout = exported.layout
    return (
        f"  rank {layout.rank}, {len(layout.ranks)} modules, {dtype_name(exported.dtype)}, "
        f"{amount_text(exported.size_bytes, 'B')}, profile {layout.profile}"
    )


def certificate_lines(out: Output, exported: Exported) -> None:
    """How far the written adapter is from the composition."""
    certificate = exported.certificate
    if not exported.merged:
        rounding = f" to {certificate.largest_error:.1e}, the rounding of {dtype_name(exported.dtype)}"
        out.line(f"  exact{rounding if certificate.largest_error else ''}")
        return
    out.line(
        f"  energy kept by the compression: {certificate.mean_energy:.2%} on average, "
        f"{certificate.least_energy:.2%} at least; relative error {certificate.largest_error:.2f} at most"
    )
    out.table(
        ["  module", "rank", "energy kept", "relative error"],
        [
            [f"  {module.name}", str(module.rank), f"{module.kept_energy:.2%}", f"{module.relative_error:.3f}"]
            for module in certificate.worst
        ],
    )


def export_loss_lines(out: Output, loss: ExportLoss) -> None:
    """The loss of the composition and of what was written."""
    rows = [["  composition", f"{loss.before:.4f}"], ["  export", f"{loss.after:.4f}"]]
    out.table(["  on held-out records", "nats per token"], rows)
    out.line(
        f"  {loss.records} records, {loss.scored_tokens} scored tokens; difference {loss.difference:+.4f}, "
        f"95 % interval {interval_text(loss.interval)}"
    )


def refit_lines(out: Output, refit: RefitRecord) -> None:
    """The losses of a refit, and what was kept."""
    loss = refit.loss
    rows = [("composition", loss.composition), ("truncation", loss.truncated), ("refit", loss.refitted)]
    rows = rows if refit.kept == "refit" else rows[:2]
    out.table(["  on held-out records", "nats per token"], [[f"  {name}", f"{nats:.4f}"] for name, nats in rows])
    gain = f"a gain of {refit.gain:.4f} on the validation records, standard error {refit.standard_error:.4f}"
    if refit.kept == "refit":
        out.line(
            f"  {loss.records} records, {loss.scored_tokens} scored tokens; refit minus truncation "
            f"{loss.refitted - loss.truncated:+.4f}, 95 % interval {interval_text(loss.interval)}"
        )
        out.line(f"  refitted: {refit.numbers} numbers, {gain}")
    else:
        out.line(f"  the truncation is kept: {gain}")
    if refit.stopped is not None:
        out.warn(f"the refit stopped early: {refit.stopped}")
