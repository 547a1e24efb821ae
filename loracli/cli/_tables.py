"""How results are shown to people: a recipe, a comparison, an export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loracli.cli._output import Block, Output
from loracli.evaluation.comparison import Comparison, ComparisonRow
from loracli.evaluation.sentences import (
    DIFFERENCE,
    GUARDED,
    LOSSES,
    against_control,
    best_first,
    claim,
    correction,
    flattered,
    guard_cells,
    guard_title,
    interval_text,
    loss_cells,
    metric_claim,
    remarks,
    training_gap,
    verdict,
)
from loracli.progress import amount_text
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import EDITED, INLINE_KINDS, FitCertificate, HeldOut
from loracli.system.display import count_text
from loracli.system.document import dtype_name

if TYPE_CHECKING:
    from loracli.comparison.layers import LayerEffects
    from loracli.export.export import Exported
    from loracli.export.loss import ExportLoss
    from loracli.export.refit import RefitRecord

COMPARED_TASKS = 12
_STILL = 0.01  # of a weight between 0 and 1, whose random start is spread over tenths
LOSSES_WIDTH = 54  # of these columns with the gaps before them
SHORTEST_NAME = 16
BAR_WIDTH = 40


def comparison_lines(out: Output, found: Comparison) -> None:
    """Which way is best, the table, what must not get worse, and the tasks; what it rests on with `-v`."""
    found = found.labelled()
    out.line(f"{claim(found)}.", style="bold")
    if found.metric:
        out.line(f"{metric_claim(found)}.", style="bold")
    if found.repeated_records:
        out.line(flattered(found))
    out.line()
    out.line(f"{found.records} records of {found.data}, {found.scored_tokens} scored tokens", style="bold")
    rows, more = best_first(found.rows), out.detailed
    names = table_names(out, [row.name for row in rows])
    columns = ["", *LOSSES, "rank", *([found.metric] if found.metric else [])]
    columns += ["perplexity", "to uniform", *(["metric, difference"] if found.metric else [])] if more else []
    cells = [_cells(row, names[row.name], found.best_ingredient, more=more) for row in rows]
    strong = next((i for i, row in enumerate(rows) if row.name == found.best.name), None)
    out.table(columns, cells, strong=strong)
    out.line(f"{DIFFERENCE}, {found.best_ingredient}; below zero is better", style="dim")
    for remark in remarks(found):
        out.line(remark, style="dim")
    if more and found.best.rivals:
        out.line(correction(found), style="dim")
    if found.guard:
        _guard_lines(out, found, rows)
    if len(found.tasks) > 1:
        _compared_task_lines(out, found, rows)


def table_names(out: Output, names: Sequence[str]) -> dict[str, str]:
    """How rows are called in a table: a name that leaves no room for the losses is cut in its middle, unless another
    one would be called the same."""
    room = max(SHORTEST_NAME, out.width - LOSSES_WIDTH)
    left, right = (room - 1) // 2, room - 1 - (room - 1) // 2
    cut = {name: name if len(name) <= room else f"{name[:left]}…{name[-right:]}" for name in names}
    shown = list(cut.values())
    return {name: short if shown.count(short) == 1 else name for name, short in cut.items()}


def _cells(row: ComparisonRow, name: str, best_ingredient: str, *, more: bool) -> list[str]:
    cells = [name, *loss_cells(row, best_ingredient), "" if row.rank is None else str(row.rank)]
    if row.metric is not None:
        cells.append(f"{row.metric.mean:.3f}")
    if more:
        uniform = row.against_uniform
        cells += [f"{row.perplexity:.4g}", "" if uniform is None else interval_text(uniform.interval)]
        if row.metric is not None:
            cells.append(f"{row.metric.difference:+.3f}, {interval_text(row.metric.interval, digits=3)}")
    return cells


def _guard_lines(out: Output, found: Comparison, rows: Sequence[ComparisonRow]) -> None:
    out.line()
    out.line(guard_title(found), style="bold")
    names = table_names(out, [row.name for row in rows])
    cells = [[names[row.name], *guard_cells(row.guard)] for row in rows if row.guard is not None and row.kind != "base"]
    out.table(["", *GUARDED], cells)


def _compared_task_lines(out: Output, found: Comparison, rows: Sequence[ComparisonRow]) -> None:
    out.line()
    out.line("nats per token by task", style="bold")
    shown, names = found.tasks[:COMPARED_TASKS], table_names(out, [row.name for row in rows])
    cells = [[names[row.name], *(f"{task.nats_per_token[row.name]:.4f}" for task in shown)] for row in rows]
    out.table(["", *(f"{task.task} ({task.records})" for task in shown)], cells)
    if len(found.tasks) > COMPARED_TASKS:
        out.line(f"... and {len(found.tasks) - COMPARED_TASKS} more tasks in --json")


SHOWN_TASKS = 20
SHOWN_FAR = 5
SHOWN_MODULES = 10
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


def layer_lines(out: Output, found: LayerEffects) -> None:
    """The loss, and its change when the composition is left out of a layer, with a bar as long as it."""
    from loracli.report.grid import layer_numbers

    edited = f" ({EDITED})" if found.weights_edited else ""
    out.line(f"{found.nats_per_token:.4f} nats per token with all layers of the composition{edited}", style="bold")
    if found.repeated_records:
        out.line(f"{found.repeated_records} of the records were calibrated on too: they flatter the composition.")
    out.line(f"{found.records} records of {found.data}, {found.scored_tokens} scored tokens; without a layer:")
    out.line()
    names = layer_numbers([effect.layer for effect in found.layers])
    largest = max(abs(effect.change) for effect in found.layers) or 1.0
    width = max(map(len, ("layer", *names)))
    out.line(f"{'layer':{width}}   change  std. error", style="bold")
    for name, effect in zip(names, found.layers, strict=True):
        error = "" if effect.standard_error is None else f"{effect.standard_error:.4f}"
        bar = ("#" if effect.change > 0 else "-") * round(BAR_WIDTH * abs(effect.change) / largest)
        out.line(f"{name:{width}}  {effect.change:+.4f}  {error:>10}  {bar}".rstrip())
    out.line("change: of the loss, in nats per token; # where the layer helps, - where it does harm", style="dim")


def _published(recipe: Recipe) -> str:
    """Where CAT as published began, and how far the fit came from there."""
    move = recipe.fit.largest_move
    still = ": they are still the random start" if move < _STILL else ""
    seed = recipe.fit.settings.get("seed", 0)
    return f"CAT as published: softmax weights from a random start, seed {seed}, moved by {move:.2g} at most{still}"


def weights_text(recipe: Recipe) -> str:
    """What was fitted: `44 weights (module)`, or the numbers of a mixing that is no weight for each adapter."""
    what = "weight" if recipe.mixing.kind in INLINE_KINDS else "number"
    kind: str = recipe.mixing.kind
    if recipe.fit.from_nothing:
        kind = "a new LoRA, which has nothing of the adapters"
    elif recipe.fit.half_from_nothing:
        kind = "the mean of trained factors and of a new LoRA"
    elif recipe.fit.recipe == "paper" and not recipe.mixing.edited:
        kind = f"{kind}; {_published(recipe)}"
    return f"{count_text(recipe.mixing.numbers, what)} ({kind})"


def stopped_lines(out: Output, recipe: Recipe) -> None:
    """That the fit ended early, where it did."""
    if recipe.fit.stopped:
        out.line(f"STOPPED EARLY: {recipe.fit.stopped}", style="bold")


def search_lines(out: Output, recipe: Recipe) -> None:
    """How the mixing was found: the levels with their starts, and what was chosen."""
    fit = recipe.fit
    out.line(f"search: {fit.passes:.3g} passes, largest change of a weight {fit.largest_move:.2f}", style="bold")
    rows = []
    for rung in fit.rungs:
        for start in rung.starts:
            won = start.name == rung.chosen
            penalty = "" if rung.ridge is None or not won else f"{rung.ridge:g}"
            end = rung.validation if won else None
            rows.append(
                [f"{rung.kind} from {start.name}", *map(_loss, (start.before, start.after, start.unseen, end)), penalty]
            )
    strong = next((i for i, row in enumerate(rows) if row[4] and row[0].startswith(f"{recipe.mixing.kind} ")), None)
    out.table([_heading(fit.criterion), "start", "short try", "on unseen", "final", "L2 penalty"], rows, strong=strong)
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


def _heading(criterion: str) -> str:
    return "validation, nats/token" if criterion == NATS else f"validation, 1 - {criterion}"


def _optimum_lines(out: Output, recipe: Recipe, certificate: FitCertificate) -> None:
    """Where the weights stand: what is still to gain, beside what so many records can show; how many weights those
    determine, and which are far out."""
    labels = list(recipe.labels().values())
    bound = "" if certificate.certain else "at most "
    if not unfinished_lines(out, recipe):
        left = f"{bound}{certificate.left:.1g} nats per token left to gain on the training records"
        rounding = (
            "" if certificate.noise is None else f", below {certificate.noise:.1g} the rounding of {recipe.dtype}"
        )
        out.line(f"{left} (below {_chance(recipe, certificate):.1g} it is chance{rounding})")
    out.line(
        f"your data support about {certificate.effective_numbers:.0f} of {count_text(recipe.mixing.numbers, 'weight')}"
    )
    far = [f"{group} of {labels[i]}" for group, places in certificate.extrapolated.items() for i in places]
    if far:
        more = f" and {len(far) - SHOWN_FAR} more" if len(far) > SHOWN_FAR else ""
        shown = f"{', '.join(far[:SHOWN_FAR])}{more}"
        out.line(f"weights above 2 or below -2 (extrapolation, no adapter was trained there): {shown}")


def unfinished_lines(out: Output, recipe: Recipe) -> bool:
    """Says so where the budget ended a fit above its optimum by more than chance, as far as the records can tell;
    whether it did."""
    certificate = recipe.certificate_of_weights
    if certificate is None or not certificate.certain:
        return False
    if certificate.left <= max(_chance(recipe, certificate), certificate.noise or 0.0):
        return False
    kind = recipe.mixing.kind
    rounds = [stage.validation for stage in recipe.fit.stages if (stage.rung, stage.stage) == (kind, "descent")]
    if len(rounds) > 1 and None not in rounds and rounds[-1] >= rounds[-2]:  # type: ignore[operator]
        return False  # the records that it was not fitted to gained nothing from more
    more = math.ceil(2 * recipe.fit.passes / max(recipe.fit.folds, 1))
    out.line(
        f"not at the optimum yet: {certificate.left:.1g} nats per token left to gain on the training records, "
        f"where {_chance(recipe, certificate):.1g} is chance; --passes {more} takes about twice as many steps"
    )
    return True


def _chance(recipe: Recipe, certificate: FitCertificate) -> float:
    """p / 2T nats per token, by which p numbers that T scored tokens determine differ from draw to draw."""
    return certificate.effective_numbers / (2 * sum(data.scored_tokens for data in recipe.data))


def _loss(nats: float | None) -> str:
    return "" if nats is None else f"{nats:.4f}"


def verdict_lines(out: Output, recipe: Recipe) -> None:
    """Whether the composition is better than the best adapter, in a sentence; that nobody knows where the weights are
    not the fit's."""
    table = recipe.public().held_out_of_weights
    if table is None:
        out.line(f"No verdict: {EDITED}. Its table, verdict and certificate are not theirs and left out.", style="bold")
    else:
        out.line(f"{verdict(table)}.", style="bold")
    stopped_lines(out, recipe)
    if recipe.fit.dropped and table is not None:
        labels = list(recipe.labels().values())
        names = ", ".join(labels[place] for place in recipe.fit.dropped)
        out.line(f"Dropped, as they could not be told from nothing, and cost no rank: {names}.")
    out.line()


def held_out_lines(out: Output, recipe: Recipe) -> None:
    """The held-out table with the fit standing out, and the losses by task; nothing where the weights are not the
    fit's."""
    table = recipe.public().held_out_of_weights
    if table is None:
        return
    records = count_text(table.records, "record")
    out.line(f"held out: {records} of {table.name}, {table.scored_tokens} scored tokens", style="bold")
    if table.how:
        out.line(table.how)
    ordered = best_first(table.lines)
    names = table_names(out, [row.name for row in ordered])
    rows = [[names[row.name], *loss_cells(row, table.best_ingredient)] for row in ordered]
    strong = next((i for i, row in enumerate(ordered) if row.name == "fit"), None)
    out.table(["", *LOSSES], rows, strong=strong)
    out.line(f"{DIFFERENCE}, {table.best_ingredient}; below zero is better", style="dim")
    if against_control(table):
        out.line(against_control(table))
    if training_gap(recipe):
        out.line(training_gap(recipe))
    out.line()
    if len(table.tasks) > 1:
        _task_lines(out, table)


def _task_lines(out: Output, table: HeldOut) -> None:
    """Nats per token by task: a row for each task, a column for each method."""
    names = [row.name for row in best_first(table.rows)]
    short = table_names(out, names)
    rows = [
        [t.task, str(t.records), str(t.scored_tokens), *(f"{t.nats_per_token[name]:.4f}" for name in names)]
        for t in table.tasks[:SHOWN_TASKS]
    ]
    out.line("nats per token by task", style="bold")
    out.table(["", "records", "tokens", *(short[name] for name in names)], rows)
    if len(table.tasks) > SHOWN_TASKS:
        out.line(f"... and {len(table.tasks) - SHOWN_TASKS} more tasks in the recipe")
    out.line()


def exported_summary(exported: Exported) -> str:
    """An adapter in half a line: rank, modules, dtype, size, layout."""
    layout = exported.layout
    return (
        f"  rank {layout.rank}, {count_text(len(layout.ranks), 'module')}, {dtype_name(exported.dtype)}, "
        f"{amount_text(exported.size_bytes, 'B')}, profile {layout.profile}"
    )


_NOTHING = 1e-9  # of the energy, which rounding alone takes


def certificate_lines(out: Output, exported: Exported) -> None:
    """How far the written adapter is from the composition."""
    from loracli.export.export import NOISE

    certificate = exported.certificate
    uncut = exported.merged and certificate.least_energy > 1 - _NOTHING
    if uncut or not exported.merged:
        error, rounding = certificate.largest_error, f"the rounding of {dtype_name(exported.dtype)}"
        exact = f"exact to {error:.1e}, {rounding}" if error <= NOISE else f"relative error {error:.2f}, {rounding}"
        out.line(f"  {'nothing was cut: ' if uncut else ''}{exact if error else 'exact'}")
        return
    out.line(
        f"  energy kept by the compression: {certificate.mean_energy:.2%} as the mean of the modules, "
        f"{certificate.least_energy:.2%} at least; relative error {certificate.largest_error:.2f} at most"
    )
    out.table(
        ["  module", "rank", "energy kept", "relative error"],
        [
            [f"  {module.name}", str(module.rank), f"{module.kept_energy:.2%}", f"{module.relative_error:.3f}"]
            for module in certificate.worst[:SHOWN_MODULES]
        ],
    )
    if len(certificate.worst) > SHOWN_MODULES:
        out.line(f"  ... and {len(certificate.worst) - SHOWN_MODULES} more, which keep more, in loracat.json")


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
