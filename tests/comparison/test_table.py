"""What a comparison says of losses that are known beforehand, against sums and loops by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loracli.calibration.render import Example
from loracli.comparison.inputs import CompareInputs
from loracli.comparison.settings import CompareSettings
from loracli.comparison.table import Evaluated, comparison_of, mean_of
from loracli.evaluation.comparison import Comparison, RowKind, Skipped
from loracli.evaluation.sentences import claim, remarks
from loracli.evaluation.statistics import RESAMPLES, detectable, holm
from loracli.fitting.mixing import Layout
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Scores
from loracli.model.reference import BaseReference

COUNT = 30
TOKENS = torch.randint(1, 12, (COUNT,), generator=torch.Generator().manual_seed(0)).double()
ONE, NONE = (torch.arange(COUNT) == 0).double(), torch.zeros(COUNT, dtype=torch.float64)  # right answers
INPUTS = CompareInputs(
    adapters=(),
    references=("a", "b"),
    recipes=(),
    base=BaseReference("tiny/base", Path("base"), None),
    test=(),
    guard=(),
    calibration=None,
    datamix=None,
    layout=Layout(("model.a",), ((2, 2),)),
    settings=CompareSettings(),
    repeated=3,
)


def losses(level: float, *, seed: int = 0) -> Scores:
    """About so many nats per token, another number for each record."""
    noise = torch.rand(COUNT, generator=torch.Generator().manual_seed(seed)).double()
    return Scores(TOKENS * (level + 0.3 * noise), TOKENS)


def row(
    name: str, kind: RowKind, scores: Scores, *, guard: Scores | None = None, values: Tensor | None = None
) -> Evaluated:
    return Evaluated(name, kind, scores, rank=4, guard=guard, values=values)


ROWS = [
    row("base", "base", losses(3.0, seed=1)),
    row("a", "ingredient", losses(2.0, seed=2)),
    row("b", "ingredient", losses(2.4, seed=3)),
    row("uniform", "method", losses(2.1, seed=4)),
    row("ties", "method", losses(1.955, seed=5)),
    row("fit", "fit", losses(1.95, seed=6)),
    row("random", "control", losses(1.0, seed=7)),
]


def compared(
    rows: list[Evaluated], *, margin: float = 0.02, seed: int = 0, metric: str | None = None, copies: int = 1
) -> Comparison:
    examples = [
        Example(
            f"x:{line}", (5 + line,) * (1 + int(tokens)), (False, *[True] * int(tokens)), task=[None, "odd"][line % 2]
        )
        for line, tokens in enumerate(TOKENS.tolist())
    ] * copies
    skipped = [Skipped("svd", "why not")]
    inputs = replace(INPUTS, settings=CompareSettings(margin=margin, fit=FitSettings(seed=seed)))
    return comparison_of(rows, skipped, inputs, examples=examples, guarded=examples, metric=metric)


def test_ten_copies_of_every_record_are_the_same_evidence_as_one() -> None:
    """Intervals, corrected p-values, McNemar's p and the detectable difference of each record ten times over."""
    answers = {name: torch.rand(COUNT, generator=torch.Generator().manual_seed(i)).round().double()
               for i, name in enumerate(row.name for row in ROWS)}  # fmt: skip
    rows = [replace(one, values=answers[one.name], guard=losses(1.0, seed=9 + i)) for i, one in enumerate(ROWS)]

    def times(scores: Scores) -> Scores:
        return Scores(scores.nats.repeat(10), scores.tokens.repeat(10))

    tenfold = [
        replace(one, scores=times(one.scores), guard=times(one.guard), values=one.values.repeat(10))  # type: ignore[arg-type, union-attr]
        for one in rows
    ]
    once, often = compared(rows, metric="exact"), compared(tenfold, metric="exact", copies=10)
    assert often.records == 10 * once.records and often.detectable == pytest.approx(once.detectable, rel=1e-9)
    assert often.best.rivals == pytest.approx(once.best.rivals)  # type: ignore[union-attr]
    for one, ten in zip(once.rows, often.rows, strict=True):
        assert ten.interval == pytest.approx(one.interval, rel=1e-9, abs=1e-12)
        assert ten.metric is not None and one.metric is not None and ten.guard is not None and one.guard is not None
        assert (ten.metric.mean, ten.metric.p_value) == pytest.approx((one.metric.mean, one.metric.p_value))
        assert ten.metric.interval == pytest.approx(one.metric.interval, rel=1e-9, abs=1e-12)
        assert ten.guard.difference.interval == pytest.approx(one.guard.difference.interval, rel=1e-9, abs=1e-12)


def ratios(difference: Tensor, tokens: Tensor, *, seed: int = 0) -> Tensor:
    """Of sums over records drawn with replacement, one after the other: the bootstrap as it is told in a textbook.

    The drawn records are those that the package draws, 500 sets at a time.
    """
    generator, n = torch.Generator().manual_seed(seed), len(tokens)
    drawn = torch.cat([torch.randint(n, (500, n), generator=generator) for _ in range(RESAMPLES // 500)])
    return torch.stack([difference[r].sum() / tokens[r].sum() for r in drawn])


def direct_interval(difference: Tensor, tokens: Tensor, *, seed: int = 0) -> tuple[float, float]:
    low, high = torch.quantile(
        ratios(difference, tokens, seed=seed), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return low, high


def test_every_row_has_the_loss_and_the_difference_to_the_best_adapter_that_sums_by_hand_give() -> None:
    found = compared(ROWS)
    best = ROWS[1].scores
    assert (found.best_ingredient, found.records, found.scored_tokens) == ("a", COUNT, int(TOKENS.sum()))
    assert [r.name for r in found.rows] == [r.name for r in ROWS] and found.repeated_records == 3
    assert found.skipped == (Skipped("svd", "why not"),)
    assert (found.base, found.adapters, found.metric, found.guard) == ("tiny/base", ("a", "b"), None, None)
    for ours, given in zip(found.rows, ROWS, strict=True):
        loss = sum(given.scores.nats.tolist()) / sum(TOKENS.tolist())
        assert ours.kind == given.kind and ours.nats_per_token == pytest.approx(loss, rel=1e-12)
        assert ours.perplexity == pytest.approx(math.exp(loss), rel=1e-12)
        pairs = list(zip(given.scores.nats.tolist(), best.nats.tolist(), strict=True))
        assert ours.difference == pytest.approx(
            sum(x - y for x, y in pairs) / sum(TOKENS.tolist()), rel=1e-9, abs=1e-15
        )
        assert ours.worse_records == sum(x > y for x, y in pairs) / COUNT
        assert ours.metric is None and ours.guard is None


@pytest.mark.parametrize("seed", [0, 7])
def test_intervals_are_those_of_a_direct_bootstrap_over_the_same_records_for_all_rows(seed: int) -> None:
    found = compared(ROWS, seed=seed)
    for name in ("ties", "base"):
        given = next(r for r in ROWS if r.name == name).scores
        to_best = direct_interval(given.nats - ROWS[1].scores.nats, TOKENS, seed=seed)
        to_uniform = direct_interval(given.nats - ROWS[3].scores.nats, TOKENS, seed=seed)
        against = found.row(name).against_uniform
        assert against is not None
        assert found.row(name).interval == pytest.approx(to_best, abs=1e-9)
        assert against.interval == pytest.approx(to_uniform, abs=1e-9)


def test_a_row_that_costs_the_same_more_on_every_token_has_an_interval_of_no_width() -> None:
    """What two rows share cancels, as they are judged on the same drawn records."""
    dearer = replace(ROWS[4], name="dearer", scores=Scores(ROWS[1].scores.nats + 0.25 * TOKENS, TOKENS))
    found = compared([*ROWS, dearer]).row("dearer")
    assert found.interval == pytest.approx((0.25, 0.25)) and found.difference == pytest.approx(0.25)
    assert found.worse_records == 1.0


@pytest.mark.parametrize(
    ("others", "fit"),
    [
        ([("fit", "fit", 1.2), ("module", "method", 1.1)], "fit"),
        ([("a.json", "fit", 1.3), ("b.json", "fit", 1.2)], "b.json"),
        ([("auto", "method", 1.0), ("module", "method", 1.4)], "module"),
        ([("auto", "method", 1.6)], "auto"),
        ([("ties", "method", 1.2)], None),
    ],
)
def test_random_draws_are_one_row_of_their_mean_and_the_fit_has_a_z_score_against_them(
    others: list[tuple[str, RowKind, float]], fit: str | None
) -> None:
    """(mean - loss of the fit) / s with s as a textbook has it; more draws make no row of right or wrong answers."""
    draws = [
        replace(row("random", "control", losses(level), values=answers), guard=losses(level))
        for level, answers in ((1.5, ONE), (1.4, NONE), (1.55, NONE), (1.45, NONE), (1.6, NONE))
    ]
    rows = [replace(one, values=ONE) for one in ROWS[:4]]
    rows[0] = replace(rows[0], guard=losses(1.0))
    rows += [row(name, kind, losses(level), values=ONE) for name, kind, level in others]
    found = compared([*rows, mean_of(draws)], metric="exact")
    random, each = found.row("random"), [one.scores.nats_per_token for one in draws]
    mean = sum(each) / 5
    assert random.nats_per_token == pytest.approx(mean, rel=1e-12) and found.row("a").draws is None
    assert random.draws is not None and random.draws.nats_per_token == tuple(each) and random.draws.fit == fit
    assert random.metric is not None and random.metric.mean == pytest.approx(float(ONE.mean()) / 5)
    assert random.metric.p_value is None
    assert random.guard is not None and random.guard.nats_per_token == pytest.approx(mean)
    assert all(r.metric is not None and r.metric.p_value == 1.0 for r in found.rows if r.name != "random")
    (said,) = (remark for remark in remarks(found) if remark.startswith("random: "))
    assert f"mean of 5 draws, {min(each):.4f} to {max(each):.4f}" in said
    if fit is None:
        assert random.draws.z_score is None and "z-score" not in said
        return
    s = math.sqrt(sum((loss - mean) ** 2 for loss in each) / 4)
    z = (mean - found.row(fit).nats_per_token) / s
    assert random.draws.z_score == pytest.approx(z, rel=1e-9)
    where = "below" if z > 0 else "above"
    assert f"{fit} lies {abs(z):.1f} of their standard deviations {where} it (z-score {z:+.1f}; 5 draws are" in said


def test_draws_that_are_all_the_same_have_no_z_score() -> None:
    found = compared([*ROWS[:6], mean_of([ROWS[6]] * 5)]).row("random").draws
    assert found is not None and (found.fit, found.z_score) == ("fit", None)


def test_what_the_best_row_beats_is_corrected_for_the_number_of_rivals_and_controls_are_no_rivals() -> None:
    """p of each rival: the share of drawn sets on which it costs no more, counted in a loop; then Holm's correction."""
    found = compared(ROWS)
    fit = ROWS[5].scores.nats
    rivals = {r.name: r.scores.nats for r in ROWS if r.name in ("a", "b", "uniform", "ties")}
    raw = {n: (1 + int((ratios(x - fit, TOKENS) <= 0).sum())) / (1 + RESAMPLES) for n, x in rivals.items()}
    assert found.best.name == "fit" and found.best.rivals == pytest.approx(holm(raw))
    assert not found.best.clear and max(found.best.rivals.values()) > 0.05
    clear = compared([*ROWS[:5], row("fit", "fit", losses(1.0))])
    assert clear.best.clear and max(clear.best.rivals.values()) == pytest.approx(4 / (1 + RESAMPLES))


def test_of_rows_with_the_same_loss_the_first_is_named_and_none_is_clearly_the_best() -> None:
    alike = [row(name, "ingredient", losses(2.0)) for name in ("a", "b")]
    found = compared([ROWS[0], *alike, row("sum", "method", losses(2.0))])
    assert (found.best_ingredient, found.best.name, found.best.clear) == ("a", "a", False)
    assert found.best.rivals == {} and found.best.same == (("a", "b", "sum"),)
    assert claim(found) == "a (as are b and sum) has nothing to be compared with here"
    assert [r.worse_records for r in found.rows[1:]] == [0.0] * 3
    assert all(r.interval == (0.0, 0.0) for r in found.rows[1:])


def test_rows_that_cost_the_same_on_every_record_are_one_way_in_the_count_and_in_the_correction() -> None:
    """As if the copies were not there; a fit stands for the row that found the same again, and rounding is no more."""
    rounded = Scores(losses(1.0).nats * (1 + 1e-9), TOKENS)
    rows = [*ROWS[:5], row("module", "method", rounded), row("sum", "method", ROWS[4].scores)]
    found, alone = (
        compared([*rows, row("fit", "fit", losses(1.0))]),
        compared([*ROWS[:5], row("fit", "fit", losses(1.0))]),
    )
    assert (found.best.name, found.best.clear, found.best.rivals) == ("fit", True, alone.best.rivals)
    assert found.best.same == (("fit", "module"), ("ties", "sum"))
    assert claim(found).startswith("fit (as is module) is the best of 5 ways on 30 records")
    near = compared([*ROWS[:6], row("sum", "method", ROWS[4].scores)])
    assert "fit has the lowest loss of 5 ways on 30 records, but is not clearly better than ties (as is sum)" in claim(
        near
    )
    as_often = Scores(ROWS[4].scores.nats.flip(0) / TOKENS.flip(0) * TOKENS, TOKENS)  # other records cost as much
    assert compared([*ROWS[:5], row("sum", "method", as_often)]).best.same == ()


def test_what_so_many_records_would_show_is_judged_by_the_fit_and_without_one_by_the_best() -> None:
    def by(name: str) -> float:
        scores = next(r.scores for r in ROWS if r.name == name)
        return detectable(scores.nats - ROWS[1].scores.nats, TOKENS)

    assert (compared(ROWS).detectable, compared(ROWS).detectable_of) == (by("fit"), "fit")
    assert any("smallest difference of fit to a that so many records" in line for line in remarks(compared(ROWS)))
    worse_fit = [*ROWS[:5], row("fit", "fit", Scores(ROWS[5].scores.nats + TOKENS, TOKENS))]
    assert compared(worse_fit).best.name == "ties" and compared(worse_fit).detectable == pytest.approx(by("fit"))
    assert compared(ROWS[:5]).detectable == by("ties")
    assert compared(ROWS[:4]).detectable == by("uniform")  # the best of all is what it is judged against
    assert (compared(ROWS[:2]).detectable, compared(ROWS[:2]).detectable_of) == (0.0, "")


def test_without_uniform_nothing_is_compared_with_it() -> None:
    assert all(r.against_uniform is None for r in compared([*ROWS[:3], ROWS[4]]).rows)


def test_a_guard_row_is_safe_only_where_its_whole_interval_lies_below_the_margin() -> None:
    """The interval is a point here, so that the border can be met from both sides; the reference is the base."""
    base = losses(3.0, seed=1)
    ends = {"better": -0.5, "below": 0.0199, "border": 0.02, "above": 0.0201}
    guarded = [
        row("base", "base", base, guard=base),
        *(
            row(name, "ingredient", base, guard=Scores(base.nats + cost * TOKENS, TOKENS))
            for name, cost in ends.items()
        ),
        row("blind", "method", base),
    ]
    found = {r.name: r.guard for r in compared(guarded, margin=0.02).rows}
    assert found["blind"] is None
    for name, cost in {"base": 0.0, **ends}.items():
        guard = found[name]
        assert guard is not None and guard.difference.mean == pytest.approx(cost, abs=1e-9)
        assert guard.nats_per_token == pytest.approx(base.nats_per_token + cost)
        assert name == "border" or guard.safe is (cost < 0.02)
    wide = Scores(base.nats + TOKENS * torch.tensor([-1.0, 1.0] * (COUNT // 2)).double(), TOKENS)
    unsure = compared([guarded[0], row("a", "ingredient", base, guard=wide)], margin=0.02).row("a").guard
    assert unsure is not None and unsure.difference.interval[1] > 0.02 and not unsure.safe


def test_the_metric_is_paired_with_the_adapter_that_is_best_by_it_and_not_by_loss() -> None:
    right = {"base": 3, "a": 9, "b": 21, "ties": 27}
    judged = [replace(r, values=(torch.arange(COUNT) < right[r.name]).double()) for r in ROWS if r.name in right]
    found = compared(judged, metric="exact")
    assert found.best_ingredient == "a" and found.metric == "exact"
    scores = {r.name: r.metric for r in found.rows}
    best = (torch.arange(COUNT) < right["b"]).double()
    for name, count in right.items():
        score = scores[name]
        assert score is not None and score.mean == pytest.approx(count / COUNT)
        assert score.difference == pytest.approx((count - 21) / COUNT)
        values = (torch.arange(COUNT) < count).double()
        assert score.interval == pytest.approx(direct_interval(values - best, torch.ones(COUNT).double()), abs=1e-9)
        only = abs(count - 21)  # one alone is right on these records, and always the same one
        assert score.p_value == pytest.approx(min(1.0, 2 * 0.5**only))


def test_a_metric_between_right_and_wrong_has_no_test_of_counts() -> None:
    judged = [replace(r, values=torch.linspace(0, 1, COUNT).double()) for r in ROWS[:5]]
    assert all(r.metric is not None and r.metric.p_value is None for r in compared(judged).rows)


def test_a_hopeless_loss_has_a_perplexity_that_json_can_hold() -> None:
    lost = row("ties", "method", Scores(TOKENS * 1e4, TOKENS))
    assert math.isfinite(compared([*ROWS[:4], lost]).row("ties").perplexity)


def test_a_task_has_every_rows_loss_on_the_records_that_name_it() -> None:
    (task,) = compared(ROWS).tasks
    odd = torch.arange(COUNT) % 2 == 1
    assert (task.task, task.records, task.scored_tokens) == ("odd", COUNT // 2, int(TOKENS[odd].sum()))
    assert list(task.nats_per_token) == [r.name for r in ROWS]
    for given in ROWS:
        assert task.nats_per_token[given.name] == pytest.approx(float(given.scores.nats[odd].sum() / TOKENS[odd].sum()))
