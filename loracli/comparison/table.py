"""From what every way to compose scored on the same records to the comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracli.calibration.dataset import MIN_HELD_OUT
from loracli.calibration.render import Example
from loracli.comparison.inputs import CompareInputs
from loracli.comparison.settings import UNIFORM
from loracli.evaluation.comparison import (
    Comparison,
    ComparisonRow,
    Difference,
    Draws,
    GuardScore,
    MetricScore,
    RecipeRow,
    RowKind,
    Skipped,
)
from loracli.evaluation.statistics import best_of, detectable, intervals, mcnemar, task_losses, units_of
from loracli.model.loss import Scores

_BASE, INGREDIENT = "base", "ingredient"
# For the best; not the base, nor a control. Of rows that are one way the first is named, for what can be exported as it
# is needs no fit again.
_CONTENDERS: tuple[RowKind, ...] = ("ingredient", "fit", "method")
_FITS = ("module", "auto")  # what random adapters stand against without a recipe: what was fitted on them too first


@dataclass(frozen=True)
class Evaluated:
    """One way to compose, measured.

    Args:
        name: of its row.
        kind: of its row.
        scores: on the test records.
        rank: of the one adapter it would be exported as; None for the base model alone.
        kept_energy: share of |dW|^2 over all modules that this rank keeps; None where nothing is lost.
        weights: one for each adapter where it is the same in every module, None otherwise.
        note: what a reader has to know.
        guard: on the guard records, None without any.
        values: (n,) of the task metric on each test record, None without one.
        draws: nats per token of each draw, where it is the mean of several; () otherwise.
    """

    name: str
    kind: RowKind
    scores: Scores
    rank: int | None
    kept_energy: float | None = None
    weights: tuple[float, ...] | None = None
    note: str = ""
    guard: Scores | None = None
    values: Tensor | None = None
    draws: tuple[float, ...] = ()


def mean_of(draws: Sequence[Evaluated]) -> Evaluated:
    """The mean of what the draws of one row cost each record, and of their answers; one draw as it is."""
    first, *others = draws
    if not others:
        return first
    guards, values = [one.guard for one in draws if one.guard], [one.values for one in draws if one.values is not None]
    return replace(
        first,
        scores=_mean_scores([one.scores for one in draws]),
        guard=_mean_scores(guards) if guards else None,
        values=torch.stack(values).mean(0) if values else None,
        draws=tuple(one.scores.nats_per_token for one in draws),
    )


def _mean_scores(draws: Sequence[Scores]) -> Scores:
    return Scores(torch.stack([one.nats for one in draws]).mean(0), draws[0].tokens)


def comparison_of(
    rows: Sequence[Evaluated],
    skipped: Sequence[Skipped],
    inputs: CompareInputs,
    *,
    examples: Sequence[Example],
    guarded: Sequence[Example],
    metric: str | None,
) -> Comparison:
    """The comparison.

    Args:
        rows: base, ingredients, methods, fits, controls, each with a finite loss; an ingredient is among them.
        skipped: what was left out.
        inputs: what was compared, and with which margin and seed.
        examples: the n test records.
        guarded: the guard records.
        metric: name of the task metric, None without one.
    """
    data, guard = (", ".join(file.source.name for file in files) for files in (inputs.test, inputs.guard))
    margin, seed = inputs.settings.margin, inputs.settings.fit.seed
    tasks, units = task_losses({row.name: row.scores for row in rows}, examples), units_of(examples)
    rows = [_pooled(row, units, units_of(guarded)) for row in rows]
    best = min((r for r in rows if r.kind == INGREDIENT), key=lambda row: row.scores.nats_per_token)
    table = _Table(rows, best, margin, seed, units.bincount().double())
    contenders = {row.name: row.scores for kind in _CONTENDERS for row in rows if row.kind == kind}
    smallest, judged = _detectable(rows, best)
    return Comparison(
        data=data,
        base=inputs.base.id,
        adapters=inputs.references,
        records=len(examples),
        scored_tokens=sum(example.scored_tokens for example in examples),
        best_ingredient=best.name,
        rows=table.rows(),
        skipped=tuple(skipped),
        tasks=tasks,
        best=best_of(contenders, seed=seed),
        detectable=smallest,
        detectable_of=judged,
        metric=metric,
        guard=guard or None,
        margin=margin,
        repeated_records=inputs.repeated,
        recipes=tuple(
            RecipeRow(one.row, one.recipe.sha256(), tuple(inputs.references[place] for place in one.places))
            for one in inputs.recipes
        ),
    )


def record_lines(rows: Sequence[Evaluated], examples: Sequence[Example]) -> Iterator[dict[str, str | float | None]]:
    """Of every row what each test record costs in nats over its scored tokens, and what the task metric gives its
    answer, as documents of a line."""
    for row in rows:
        values = [None] * len(examples) if row.values is None else row.values.tolist()
        numbers = zip(examples, row.scores.nats.tolist(), row.scores.tokens.tolist(), values, strict=True)
        for example, nats, tokens, value in numbers:
            line = {"row": row.name, "record": example.place, "task": example.task, "nats": nats, "tokens": tokens}
            yield line if value is None else {**line, "value": value}


def _pooled(row: Evaluated, units: Tensor, guard_units: Tensor) -> Evaluated:
    """The row with copies of a record as one; its values are sums over the copies."""
    values = row.values
    return replace(
        row,
        scores=row.scores.pooled(units),
        guard=None if row.guard is None else row.guard.pooled(guard_units),
        values=None if values is None else Scores(values, torch.ones_like(values)).pooled(units).nats,
    )


def _detectable(rows: Sequence[Evaluated], best: Evaluated) -> tuple[float, str]:
    """Between the best ingredient and the fit, the best of several, or without one the best of the others; and its
    name."""
    others = [row for row in rows if row.kind in _CONTENDERS and row is not best]
    judged = min(
        [row for row in others if row.kind == "fit"] or others, key=lambda row: row.scores.nats_per_token, default=best
    )
    found = detectable(judged.scores.nats - best.scores.nats, best.scores.tokens)
    return (found, judged.name) if math.isfinite(found) and judged is not best else (0.0, "")


class _Table:
    """All rows at once, so that their intervals come from the same resampled records."""

    def __init__(self, rows: Sequence[Evaluated], best: Evaluated, margin: float, seed: int, copies: Tensor) -> None:
        self._evaluated, self._best, self._margin, self._seed, self._copies = rows, best, margin, seed, copies
        self._uniform = next((row for row in rows if row.name == UNIFORM), None)

    def rows(self) -> tuple[ComparisonRow, ...]:
        best = self._best.scores
        to_best = self._differences([row.scores.nats - best.nats for row in self._evaluated], best.tokens)
        to_uniform: Sequence[Difference | None] = [None] * len(to_best)
        if self._uniform is not None:
            other = self._uniform.scores
            to_uniform = self._differences([row.scores.nats - other.nats for row in self._evaluated], other.tokens)
        metrics, guards = self._metrics(), self._guards()
        return tuple(
            ComparisonRow(
                name=row.name,
                kind=row.kind,
                nats_per_token=row.scores.nats_per_token,
                perplexity=math.exp(min(row.scores.nats_per_token, 700.0)),
                difference=difference.mean,
                interval=difference.interval,
                against_uniform=against,
                worse_records=float((row.scores.nats > best.nats).double().mean()),
                rank=row.rank,
                kept_energy=row.kept_energy,
                note=row.note,
                weights=row.weights,
                metric=metric,
                guard=guard,
                draws=self._draws(row) if row.draws else None,
            )
            for row, difference, against, metric, guard in zip(
                self._evaluated, to_best, to_uniform, metrics, guards, strict=True
            )
        )

    def _draws(self, row: Evaluated) -> Draws:
        fits = [other for other in self._evaluated if other.kind == "fit"]
        fits = fits or [other for name in _FITS for other in self._evaluated if other.name == name][:1]
        if not fits:
            return Draws(row.draws, None, None)
        fit = min(fits, key=lambda other: other.scores.nats_per_token)
        below, deviation = row.scores.nats_per_token - fit.scores.nats_per_token, statistics.stdev(row.draws)
        return Draws(row.draws, fit.name, below / deviation if deviation > 0 else None)

    def _differences(self, differences: Sequence[Tensor], tokens: Tensor) -> list[Difference]:
        found = intervals(torch.stack(list(differences)), tokens, seed=self._seed)
        total = tokens.sum()
        return [Difference(float(d.sum() / total), i) for d, i in zip(differences, found, strict=True)]

    def _metrics(self) -> list[MetricScore | None]:
        """Against the ingredient that is best by the metric."""
        values = [row.values for row in self._evaluated]
        whole = [row.values for row in self._evaluated if not row.draws]  # a mean of draws is between right and wrong
        alone = [row.values for row in self._evaluated if row.kind == INGREDIENT and row.values is not None]
        if not alone:
            return [None] * len(values)
        best = max(alone, key=lambda v: float(v.sum()))
        every = self._copies
        binary = all(bool(((v == 0) | (v == every)).all()) for v in whole if v is not None)
        found: list[MetricScore | None] = []
        for row, v in zip(self._evaluated, values, strict=True):
            if v is None:
                found.append(None)
                continue
            (difference,) = self._differences([v - best], every)
            p = mcnemar(v == every, best == every) if binary and not row.draws else None
            found.append(MetricScore(float(v.sum() / every.sum()), difference.mean, difference.interval, p))
        return found

    def _guards(self) -> list[GuardScore | None]:
        base = next((row.guard for row in self._evaluated if row.kind == _BASE), None)
        if base is None:
            return [None] * len(self._evaluated)
        found: list[GuardScore | None] = []
        for row in self._evaluated:
            if row.guard is None:
                found.append(None)
                continue
            (difference,) = self._differences([row.guard.nats - base.nats], base.tokens)
            safe = len(base.tokens) >= MIN_HELD_OUT and difference.interval[1] < self._margin
            found.append(GuardScore(row.guard.nats_per_token, difference, safe))
        return found
