"""What the tables of a fit and of a comparison say, in sentences and cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from loracli.evaluation.comparison import NEAR, SIGNIFICANCE, Comparison, ComparisonRow, Draws, GuardScore, listed
from loracli.recipe.recipe import OTHER_ROWS, Recipe
from loracli.recipe.record import HeldOut, HeldOutRow
from loracli.system.display import count_text

_Row = TypeVar("_Row", ComparisonRow, HeldOutRow)
_SAME = 1e-9  # nats per token, which rounding alone may make


def verdict(table: HeldOut) -> str:
    """What the table says about the fit, in a sentence without its full stop; `_less_loss` has the percentages."""
    fitted, best = table.row("fit"), table.row(table.best_ingredient)
    alone = [row for row in table.rows if row.name not in OTHER_ROWS]
    adapter = f"your {'best ' if len(alone) > 1 else ''}adapter, {best.name}"
    unseen = " that it had not seen" if not table.parts else ", each scored by a fit that had not seen it"
    seen = f"{count_text(table.records, 'record')}{unseen}"
    if table.verdict == "too few records":  # whose interval says nothing
        from loracli.calibration.dataset import MIN_HELD_OUT  # which loads torch

        said, _ = _less_loss(fitted.difference, (-math.inf, math.inf), best.nats_per_token)
        return (
            f"Too few records to tell whether the composition is better than {adapter}: {said} on {seen}, and a "
            f"verdict needs at least {MIN_HELD_OUT} different ones: give more with --data, or others with --eval-data"
        )
    if max(abs(end) for end in (fitted.difference, *fitted.interval)) < _SAME:
        return f"The composition comes to {adapter}, alone: it has the same loss on {seen}"
    less = _less_loss(fitted.difference, fitted.interval, best.nats_per_token)
    measured = f"{less[0]} on {seen}{less[1]}"
    if table.verdict == "not better":
        how = "worse" if fitted.interval[0] > 0 else "not clearly better"
        return f"The composition is {how} than {adapter}: {measured}"
    static = [
        row for row in table.rows if row.name in ("uniform", "sum") and row.nats_per_token <= fitted.nats_per_token
    ]
    caveat = f", but {static[0].name} is as good without any fit" if static else ""
    if not table.controls:
        return f"The composition is better than {adapter}: {measured}{caveat}; it was not held against a fresh LoRA"
    control = table.controls[0]
    than = _less_loss(control.difference, control.interval, control.row.nats_per_token)
    if table.verdict == "better":
        return (
            f"The composition is better than {adapter}: {measured}{caveat}; and than a fresh LoRA trained on the same "
            f"records: {than[0]}{than[1]}"
        )
    return (
        f"The composition is no better than a fresh LoRA trained on the same records: {than[0]} on {seen}{than[1]}. "
        f"That it has {less[0]} than {adapter}, does not show that it uses what the adapters know: the form of the "
        "records alone may teach that much"
    )


def against_control(table: HeldOut) -> str:
    """How the fit stands to a fresh LoRA, in a sentence without its full stop; nothing where none was trained."""
    if not table.controls:
        return ""
    control = table.controls[0]
    lost = "" if control.interval[1] < 0 else ", so the fit is not shown to be better"
    return (
        f"{control.row.name}: a new LoRA trained on the same records; fit minus {control.row.name} "
        f"{control.difference:+.4f} nats per token, 95 % interval {interval_text(control.interval)}{lost}"
    )


def overfitted(recipe: Recipe) -> bool | None:
    """Whether the fit owes much of its training loss to its own records; None where that cannot be told.

        gap = held-out loss - training loss,    gap > gain / 3   and   gap > 2 SE sqrt(1 + n_held / n_train)

    The gain is that over the best adapter, 0 at least. To first order the weights that endless records would give have
    a loss in the middle of the two (Akaike 1974), so a gap of a third of the gain leaves a sixth of it to more records.
    SE is that of the held-out loss; the root adds that of the training loss, whose records vary as much if they are of
    the same kind: a gap that the draw of the records makes by itself passes about once in forty times. Weights that no
    step has moved fit nothing. With cross-fitting the two losses are of different weights: the held-out one of those
    that were fitted to fewer records, in fewer steps.
    """
    table, training = recipe.held_out_of_weights, recipe.fit.training_nats_per_token
    if table is None or training is None or table.standard_error is None or table.verdict == "too few records":
        return None
    if table.parts:
        return None
    fitted = table.row("fit")
    gap, records = fitted.nats_per_token - training, max(1, sum(data.records for data in recipe.data))
    chance = table.standard_error * math.sqrt(1 + table.records / records)
    return recipe.fit.largest_move > 0 and gap > max(-fitted.difference / 3, 2 * chance)


def training_gap(recipe: Recipe) -> str:
    """The loss on training and on held-out records, in a sentence without its full stop, and what a large gap says;
    nothing where either is not known."""
    table, training = recipe.held_out_of_weights, recipe.fit.training_nats_per_token
    if table is None or training is None:
        return ""
    held_out = table.row("fit").nats_per_token
    said = f"the fit on its own training records: {training:.4f} nats/token, on held-out ones {held_out:.4f}"
    if table.parts:
        return f"{said} by weights of fewer records"
    if not overfitted(recipe):
        return said
    if recipe.splits_data:
        return f"{said}: overfitted, more records would help"
    return f"{said}: overfitted, or harder records; more like the held-out ones would help"


def claim(found: Comparison) -> str:
    """Which way is best, in a sentence without its full stop."""
    best, rivals, named_best = found.row(found.best.name), found.best.rivals, found.best.called(found.best.name)
    if not rivals:
        return f"{named_best} has nothing to be compared with here"
    ways, records = f"{1 + len(rivals)} ways", count_text(found.records, "record")
    less = ""
    if best.name != found.best_ingredient:
        many = "best " if len(found.adapters) > 1 else ""
        said = _less_loss(best.difference, best.interval, found.row(found.best_ingredient).nats_per_token)
        less = f": {said[0]} than your {many}adapter, {found.best_ingredient}{said[1]}"
    lower = [row for row in found.rows if row.kind in ("base", "control") and row.nats_per_token < best.nats_per_token]
    below = "".join(f"; but {row.name} has a lower loss, {row.nats_per_token:.4f}" for row in lower)
    if found.best.clear:
        alone = "" if less else ", better alone than in any composition"
        return f"{named_best} is the best of {ways} on {records}{alone}{less}{below}"
    near = sorted((name for name, p in rivals.items() if p >= SIGNIFICANCE), key=lambda name: -rivals[name])
    if not near:
        from loracli.calibration.dataset import MIN_HELD_OUT  # which loads torch

        few = f"which are too few to tell: at least {MIN_HELD_OUT} different ones are needed"
        return f"{named_best} has the lowest loss of {ways} on {records}, {few}{below}"
    more = f" and {len(near) - NEAR} more" if len(near) > NEAR else ""
    shown = f"{', '.join(map(found.best.called, near[:NEAR]))}{more}"
    return (
        f"{named_best} has the lowest loss of {ways} on {records}, but is not clearly better than {shown}{less}{below}"
    )


def correction(found: Comparison) -> str:
    """How `claim` was judged: the p-values of the rivals, largest first."""
    shown = sorted(found.best.rivals.items(), key=lambda item: -item[1])
    near = ", ".join(f"{found.best.called(name)} {p:.2g}" for name, p in shown[:NEAR])
    more = f", {len(shown) - NEAR} more below" if len(shown) > NEAR else ""
    return f"p-value that another is as good, by Holm's correction for {len(shown)}: {near}{more}"


def _less_loss(difference: float, interval: tuple[float, float], loss: float) -> tuple[str, str]:
    """`94 % less loss` and ` (95 % sure: at least 86 %)`, or the difference in nats where the loss is 0.

    The share is 1 - loss_fit / loss_best = -difference / loss_best, and its interval is that of the paired difference
    divided by loss_best as it was measured. The ratio itself varies less over records where the two losses rise and
    fall together, so the interval errs to the wide side there; where it reaches 100 %, its lower end is said alone.

    Args:
        difference: of the way to the best adapter, nats per token.
        interval: of it, 95 %.
        loss: of the best adapter, nats per token.
    """
    if loss <= 0:
        return f"a difference of {difference:+.4f} nats per token", f" (95 % interval {interval_text(interval)})"
    share, low, high = (-100 * value / loss for value in (difference, interval[1], interval[0]))
    digits = 0 if high - low >= 1 else 1 if high - low >= 0.1 else 2
    nearest = min(abs(low), abs(high))
    if low * high > 0:  # an end that is not 0 is not shown as 0
        digits = next((count for count in range(digits, 4) if round(nearest, count)), 4)

    def signed(value: float, *, word: bool) -> str:
        size = f"{abs(value):.{digits}f} %"
        return f"{size} {'less' if value >= 0 else 'more'}" if word else size

    said = f"{signed(share, word=True)} loss"
    if high >= 100 and low > 0:
        return said, f" (95 % sure: at least {signed(low, word=False)})"
    if low < 0 <= high:
        return said, f" (95 % sure between {signed(low, word=True)} and {signed(high, word=True)})"
    near, far = sorted((abs(low), abs(high)))
    return said, f" (95 % sure between {near:.{digits}f} and {far:.{digits}f} %)"


def metric_claim(found: Comparison) -> str:
    """What the task metric says, in a sentence; nothing without one."""
    every = [(row, row.metric) for row in found.rows if row.metric is not None]
    measured = [pair for pair in every if pair[0].kind not in ("base", "control")]
    if not measured:
        return ""
    row, score = max(measured, key=lambda pair: (pair[1].mean, pair[0].name == found.best.name))
    above = "".join(f"; but {one.name} has {own.mean:.3f}" for one, own in every if own.mean > score.mean)
    first = [one for one, own in measured if own.mean == score.mean]
    if len(measured) > 1 and len(first) == len(measured):
        return f"by {found.metric}, no way is best: all have {score.mean:.3f}{above}"
    names = [row.name, *(one.name for one in first if one is not row)]
    said = f"{row.name} has the highest, {score.mean:.3f}"
    if len(names) > 1:
        said = f"{listed(names)} have the highest, {score.mean:.3f}, together"
    if all(one.kind != "ingredient" for one in first):  # else the best single adapter would be compared with itself
        test = "" if score.p_value is None else f"; McNemar's p = {score.p_value:.2g}"
        whose = f"{row.name} " if len(names) > 1 else ""
        interval = interval_text(score.interval, digits=3)
        said += f"; {whose}{score.difference:+.3f} to the best single adapter (95 % interval {interval}{test})"
    other = "" if found.best.name in names else f", where the loss is lowest with {found.best.name}"
    return f"by {found.metric}, {said}{other}{above}"


def best_first(rows: Sequence[_Row]) -> list[_Row]:
    """Rows of a table as they are shown: the lowest loss first."""
    return sorted(rows, key=lambda row: row.nats_per_token)


def interval_text(interval: tuple[float, float], *, digits: int = 4) -> str:
    """`-0.0123 to +0.0040`."""
    return f"{interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}"


LOSSES = ("nats/token", "difference", "95 % interval", "worse on")
DIFFERENCE = "difference: to the best single adapter"


def loss_cells(row: ComparisonRow | HeldOutRow, best_ingredient: str) -> list[str]:
    """The columns LOSSES; the row that the others are compared with has a loss alone."""
    if row.name == best_ingredient:
        return [f"{row.nats_per_token:.4f}", "", "", ""]
    return [
        f"{row.nats_per_token:.4f}",
        f"{row.difference:+.4f}",
        interval_text(row.interval),
        f"{row.worse_records:.0%}",
    ]


def flattered(found: Comparison) -> str:
    """That some of the records were fitted on, in a sentence; nothing if none was."""
    if not found.repeated_records:
        return ""
    return f"{found.repeated_records} of the records were calibrated on too: the table flatters what was fitted."


def remarks(found: Comparison) -> list[str]:
    """What there is to know of rows, which methods were left out and why, and what so many records can show."""
    said = [f"{row.name}: {note}" for row in best_first(found.rows) if (note := _note(row))]
    for reason in dict.fromkeys(skipped.reason for skipped in found.skipped):
        left = ", ".join(skipped.name for skipped in found.skipped if skipped.reason == reason)
        said.append(f"left out: {left}: {reason}")
    if found.detectable > 0:  # it is 0 where both are the same way
        pair = f"{found.detectable_of or 'the fit, or the best way,'} to {found.best_ingredient}"
        smallest = f"{found.detectable:.2g} nats per token, 4 times in 5"
        said.append(f"smallest difference of {pair} that so many records can show: {smallest}")
    return said


def _note(row: ComparisonRow) -> str:
    kept = ""
    if row.kept_energy is not None:
        kept = (
            f"its update has full rank, and is cut to rank {row.rank}, which keeps {row.kept_energy:.1%} of its energy"
        )
    return "; ".join(filter(None, [row.note, kept, _drawn(row.draws)]))


def _drawn(draws: Draws | None) -> str:
    """How the fit stands to the draws; a z-score of so few of them is an estimate by a few numbers."""
    if draws is None:
        return ""
    low, high, count = min(draws.nats_per_token), max(draws.nats_per_token), len(draws.nats_per_token)
    said = f"mean of {count} draws, {low:.4f} to {high:.4f}"
    if draws.z_score is None:
        return said
    where = "below" if draws.z_score >= 0 else "above"
    return (
        f"{said}; {draws.fit} lies {abs(draws.z_score):.1f} of their standard deviations {where} it (z-score "
        f"{draws.z_score:+.1f}; {count} draws are a rough guide)"
    )


def guard_title(found: Comparison) -> str:
    """Which records must not get worse, and by how much."""
    return f"what must not get worse: {found.guard}, by at most {found.margin:g} nats per token"


GUARDED = ("nats/token", "to base", "95 % interval", "")


def guard_cells(guard: GuardScore) -> list[str]:
    """The columns GUARDED."""
    return [
        f"{guard.nats_per_token:.4f}",
        f"{guard.difference.mean:+.4f}",
        interval_text(guard.difference.interval),
        "safe" if guard.safe else "NOT SHOWN SAFE",
    ]
