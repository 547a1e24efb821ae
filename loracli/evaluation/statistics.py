"""What held-out records say: intervals, paired tests, whether one of many ways is the best beyond chance, how small a
difference so many records can show, and the held-out table.

Paired bootstrap over records: the unit that was drawn is the record, and all methods saw the same ones. Copies of a
record are one unit, as they tell nothing new.

The statistic is a ratio of sums, sum_n d_n / sum_n t_n with d_n the difference in nats and t_n the scored tokens of
record n, so long records weigh as they do in the loss. Percentile interval (Efron and Tibshirani 1993, chapter 13);
pairing as in arXiv 2411.00640.

McNemar's exact test: whether two ways of answering the same questions are equally often right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from loracli.calibration.dataset import MIN_HELD_OUT
from loracli.calibration.render import Example
from loracli.evaluation.comparison import SIGNIFICANCE, BestOf
from loracli.model.loss import Scores
from loracli.recipe.record import HeldOut, HeldOutControl, HeldOutRow, HeldOutTask, Verdict

RESAMPLES = 10_000
_LEVEL = 0.95
_ROUNDING = 1e-6  # nats per token of a record
_ROWS = 500  # resamples at a time, so that memory stays at a few megabytes per thousand records


def units_of(examples: Sequence[Example]) -> Tensor:
    """(n,) the unit that each record belongs to, from 0 in the order of their first records: copies are one."""
    places: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
    units = [places.setdefault((e.input_ids, e.scored), len(places)) for e in examples]
    return torch.tensor(units, dtype=torch.long)


def resampled(differences: Tensor, tokens: Tensor, *, seed: int = 0) -> Tensor:
    """(K, 10,000): sum(difference) / sum(tokens) of K differences over the same resampled records.

    Args:
        differences: (K, n) of one method minus another, for each record.
        tokens: (n,) scored tokens of each record.
        seed: of the resampling; the same seed draws the same records.
    """
    n = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    together = torch.cat([differences, tokens[None]]).T  # (n, K + 1)
    sums = []
    for start in range(0, RESAMPLES, _ROWS):
        rows = min(_ROWS, RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        times = torch.zeros(rows, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(rows, n).double())
        sums.append(times @ together)
    ratios = torch.cat(sums)
    return (ratios[:, :-1] / ratios[:, -1:]).T


def intervals(differences: Tensor, tokens: Tensor, *, seed: int = 0) -> list[tuple[float, float]]:
    """The 95 % interval of each of K differences, as `resampled` takes them: low and high, in nats per token."""
    tail = (1 - _LEVEL) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ends = torch.quantile(resampled(differences, tokens, seed=seed), levels, dim=1)  # (2, K)
    return [(low, high) for low, high in ends.T.tolist()]


def paired_interval(difference: Tensor, tokens: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """`intervals` of one difference (n,), nats of one method minus nats of the other."""
    return intervals(difference[None], tokens, seed=seed)[0]


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Two-sided p-value from the b + c records on which exactly one is right (McNemar 1947; exact binomial form).

        p = min(1, 2 P(X <= min(b, c))),    X ~ Binomial(b + c, 1/2)

    Args:
        first: (n,) whether each record is right.
        second: (n,) likewise, of the same records.
    """
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / (1 << (b + c)))


# z(1 - 0.05 / 2) + z(0.8): a test at 5 % on two sides finds a difference of so many standard errors four times in five.
_DETECTED = 1.959964 + 0.841621


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, so that the chance of any false claim stays below the level.

    The i-th smallest of m, counted from 1, becomes max over j <= i of min(1, (m - j + 1) p_j) (Holm 1979).
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def best_of(scores: Mapping[str, Scores], *, seed: int = 0) -> BestOf:
    """The way with the lowest loss, and for each other the corrected one-sided p-value that it is as good.

    Those that cost the same on every record are one way, which the first of them stands for.

    A p-value is the share of paired resamples in which the other is not worse, (1 + count) / (1 + resamples). Nothing
    is clear below 20 records, whose resamples say nothing.

    Args:
        scores: of each way on the same records.
        seed: of the resampling.
    """
    ways: list[list[str]] = []
    for name, own in scores.items():
        group = next((way for way in ways if _same(scores[way[0]], own)), None)
        if group is None:
            ways.append([name])
        else:
            group.append(name)
    best = min((way[0] for way in ways), key=lambda name: scores[name].nats_per_token)
    same = tuple(tuple(way) for way in ways if len(way) > 1)
    others = [way[0] for way in ways if way[0] != best]
    if not others:
        return BestOf(best, {}, clear=False, same=same)
    differences = torch.stack([scores[name].nats - scores[best].nats for name in others])
    draws = resampled(differences, scores[best].tokens, seed=seed)
    as_good = (draws <= 0).sum(dim=1).tolist()
    rivals = holm({name: (1 + count) / (1 + RESAMPLES) for name, count in zip(others, as_good, strict=True)})
    enough = len(scores[best].tokens) >= MIN_HELD_OUT
    return BestOf(best, rivals, clear=enough and all(p < SIGNIFICANCE for p in rivals.values()), same=same)


def _same(first: Scores, second: Scores) -> bool:
    """Whether every record costs the same, up to what rounding alone may make."""
    return bool(((first.nats - second.nats).abs() <= _ROUNDING * first.tokens).all())


def standard_error(difference: Tensor, tokens: Tensor) -> float:
    """Of a ratio of sums over n >= 2 records, sum(d) / sum(t) (Cochran 1977, section 6.4); infinite below.

    SE = sqrt( n / (n - 1) * sum_n (d_n - ratio t_n)^2 ) / sum_n t_n
    """
    n, total = len(tokens), float(tokens.sum())
    if n < 2:
        return math.inf
    residual = difference - float(difference.sum()) / total * tokens
    return float((residual.square().sum() * n / (n - 1)).sqrt()) / total


def detectable(difference: Tensor, tokens: Tensor) -> float:
    """The true difference in nats per token that so many records would show with a probability of 80 %, judged by how
    much this one varies over records."""
    return _DETECTED * standard_error(difference, tokens)


FIT = "fit"


def static_points(references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The mixings that need no fit, by name: one weight for each adapter, the same in every module.

    `base` is 0, each adapter alone is 1 at its own place, `uniform` is 1/N (the paper's static CAT), `sum` is 1
    everywhere.
    """
    n = len(references)
    points: dict[str, tuple[float, ...]] = {"base": (0.0,) * n}
    for i, reference in enumerate(references):
        points[reference] = tuple(float(i == j) for j in range(n))
    if n > 1:
        points["uniform"] = (1.0 / n,) * n
        points["sum"] = (1.0,) * n
    return points


def held_out_table(
    scores: Mapping[str, Scores],
    references: Sequence[str],
    *,
    examples: Sequence[Example],
    name: str,
    seed: int,
    parts: int = 0,
    controls: Mapping[str, Scores] = MappingProxyType({}),
) -> HeldOut:
    """The table from each method's scores on the same n records.

    The verdict is `better` when the whole interval of fit minus best ingredient lies below zero, and that of fit minus
    each control; none is given below 20 different records. A claim of which every part has to be shown at 5 % needs no
    correction for their number: it is made falsely no more often than the part that is false (Berger 1982).

    Args:
        scores: of each method whose loss is finite, an adapter among them, by the name of its row; the fit's is `fit`.
        references: the adapters' rows.
        examples: the n records.
        name: of the files that they came from.
        seed: of the bootstrap.
        parts: of cross-fitting, 0 where the records were set apart.
        controls: scores of what knows nothing of the adapters, by name.
    """
    tasks, units = task_losses(scores, examples), units_of(examples)
    scores, controls = ({name: one.pooled(units) for name, one in them.items()} for them in (scores, controls))
    best = min((r for r in references if r in scores), key=lambda reference: scores[reference].nats_per_token)
    reference = scores[best]

    def row_of(method: str, score: Scores, other: Scores) -> HeldOutRow:
        difference = score.nats - other.nats
        return HeldOutRow(
            name=method,
            nats_per_token=score.nats_per_token,
            difference=float(difference.sum() / other.tokens.sum()),
            interval=paired_interval(difference, other.tokens, seed=seed),
            worse_records=float((difference > 0).double().mean()),
        )

    rows = [row_of(method, score, reference) for method, score in scores.items()]
    different, own = len(reference.tokens), scores[FIT]
    fitted = next(row for row in rows if row.name == FIT)
    held_against = []
    for control, score in controls.items():
        against = row_of(FIT, own, score)
        held_against.append(HeldOutControl(row_of(control, score, reference), against.difference, against.interval))
    return HeldOut(
        name=name,
        records=len(examples),
        scored_tokens=sum(example.scored_tokens for example in examples),
        best_ingredient=best,
        rows=tuple(rows),
        tasks=tasks,
        verdict=_verdict(different, fitted, held_against),
        parts=parts,
        standard_error=standard_error(own.nats, own.tokens) if different > 1 else None,
        controls=tuple(held_against),
    )


def _verdict(records: int, fitted: HeldOutRow, controls: Sequence[HeldOutControl]) -> Verdict:
    if records < MIN_HELD_OUT:
        return "too few records"
    if fitted.interval[1] >= 0:
        return "not better"
    return "better" if all(control.interval[1] < 0 for control in controls) else "no better than a fresh LoRA"


def task_losses(scores: Mapping[str, Scores], examples: Sequence[Example]) -> tuple[HeldOutTask, ...]:
    """Each task that some records name, in the order of their names, with every method's loss on its records."""
    tasks = []
    for task in sorted({example.task for example in examples if example.task is not None}):
        places = [index for index, example in enumerate(examples) if example.task == task]
        losses = {name: score.part(places).nats_per_token for name, score in scores.items()}
        tasks.append(HeldOutTask(task, len(places), sum(examples[i].scored_tokens for i in places), losses))
    return tuple(tasks)
