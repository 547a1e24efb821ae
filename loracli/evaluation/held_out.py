"""The held-out table: base, each adapter alone, uniform, sum and the fit, against the best single adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loracli.calibration.dataset import MIN_HELD_OUT
from loracli.calibration.render import Example
from loracli.evaluation.bootstrap import paired_interval
from loracli.model.loss import Scores
from loracli.recipe.recipe import HeldOut, HeldOutRow, HeldOutTask

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
    scores: Mapping[str, Scores], references: Sequence[str], *, examples: Sequence[Example], name: str, seed: int
) -> HeldOut:
    """The table from each method's scores on the same n records.

    The verdict is `better` when the whole interval of fit minus best ingredient lies below zero, and none is given
    below 20 records.

    Args:
        scores: of each method whose loss is finite, an adapter among them, by the name of its row; the fit's is `fit`.
        references: the adapters' rows.
        examples: the n records.
        name: of the files that they came from.
        seed: of the bootstrap.
    """
    best = min((r for r in references if r in scores), key=lambda reference: scores[reference].nats_per_token)
    reference = scores[best]
    rows = []
    for method, score in scores.items():
        difference = score.nats - reference.nats
        low, high = paired_interval(difference, reference.tokens, seed=seed)
        rows.append(
            HeldOutRow(
                name=method,
                nats_per_token=score.nats_per_token,
                difference=float(difference.sum() / reference.tokens.sum()),
                interval=(low, high),
                worse_records=float((difference > 0).double().mean()),
            )
        )
    records = len(reference.tokens)
    fitted = next(row for row in rows if row.name == FIT)
    return HeldOut(
        name=name,
        records=records,
        scored_tokens=sum(example.scored_tokens for example in examples),
        best_ingredient=best,
        rows=tuple(rows),
        tasks=task_losses(scores, examples),
        verdict="too few records" if records < MIN_HELD_OUT else "better" if fitted.interval[1] < 0 else "not better",
    )


def task_losses(scores: Mapping[str, Scores], examples: Sequence[Example]) -> tuple[HeldOutTask, ...]:
    """Each task that some records name, in the order of their names, with every method's loss on its records."""
    tasks = []
    for task in sorted({example.task for example in examples if example.task is not None}):
        places = [index for index, example in enumerate(examples) if example.task == task]
        losses = {name: score.part(places).nats_per_token for name, score in scores.items()}
        tasks.append(HeldOutTask(task, len(places), sum(examples[i].scored_tokens for i in places), losses))
    return tuple(tasks)
