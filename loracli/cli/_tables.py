"""Tables and sentences that more than one command prints."""

from __future__ import annotations

from loracli.cli._output import Output
from loracli.fit_certificate import FitCertificate
from loracli.recipe import HeldOut, Recipe

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


def search_lines(out: Output, recipe: Recipe) -> None:
    """How the mixing was found: the rungs with their starts, and what was chosen."""
    fit = recipe.fit
    out.line(f"search: {fit.passes:g} passes, largest move of a number {fit.largest_move:.3f}", style="bold")
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
    out.table([_heading(fit.criterion), "before", "probed", "unseen", "solution", "ridge"], rows, strong=strong)
    for rung in fit.rungs[1:]:
        out.line(f"{rung.kind}: {rung.why}")
    if fit.folds > 1:
        out.line(f"chosen by cross-validation over {fit.folds} folds")
    if fit.refitted:
        out.line("then fitted once more on all training records")
    if fit.certificate is not None:
        certificate_lines(out, recipe, fit.certificate)
    if fit.halvings:
        out.line(
            f"{fit.halvings} micro-batches were halved for want of memory: another run may differ in the last bits"
        )
    if fit.stopped:
        out.line(f"STOPPED EARLY: {fit.stopped}", style="bold")


def _heading(criterion: str) -> str:
    return "nats/token on validation" if criterion == NATS else f"1 - {criterion} on validation"


def certificate_lines(out: Output, recipe: Recipe, certificate: FitCertificate) -> None:
    """Where the weights stand: what is still to gain, how many the records determine, and which are far out."""
    labels = list(recipe.labels().values())
    bound = "" if certificate.certain else "at most "
    out.line(
        f"a Newton step would gain {bound}{certificate.decrement:.1e} nats per token; "
        f"gradient {certificate.gradient_norm:.1e}"
    )
    out.line(f"the records determine {certificate.effective_numbers:.1f} of the {recipe.mixing.numbers} numbers")
    far = [f"{group} of {labels[i]}" for group, places in certificate.extrapolated.items() for i in places]
    if far:
        more = f" and {len(far) - SHOWN_FAR} more" if len(far) > SHOWN_FAR else ""
        out.line(f"beyond 2 in size, where no adapter was trained: {', '.join(far[:SHOWN_FAR])}{more}")


def _loss(nats: float | None) -> str:
    return "" if nats is None else f"{nats:.4f}"


def held_out_lines(out: Output, recipe: Recipe) -> None:
    """The held-out table with the fit standing out, the losses by task, and what it says in a sentence."""
    table = recipe.public().held_out
    out.line(f"held out: {table.records} records of {table.name}, {table.scored_tokens} scored tokens", style="bold")
    rows = [
        [
            row.name,
            f"{row.nats_per_token:.4f}",
            f"{row.difference:+.4f}",
            _interval(row.interval),
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


def verdict(table: HeldOut) -> str:
    """What the table says about the fit, in a sentence."""
    fitted = table.row("fit")
    interval = f"{fitted.difference:+.4f} nats per token, 95 % interval {_interval(fitted.interval)}"
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


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}"
