"""Intervals against theory and a plain loop; corrections and sizes against textbook forms and simulation."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from loracli.calibration.render import Example
from loracli.evaluation.statistics import (
    best_of,
    detectable,
    held_out_table,
    holm,
    mcnemar,
    paired_interval,
    standard_error,
    static_points,
)
from loracli.model.loss import Scores


def test_the_interval_has_the_width_that_the_central_limit_theorem_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(400, generator=generator, dtype=torch.float64) * 3 - 0.5
    low, high = paired_interval(difference, torch.ones(400, dtype=torch.float64))
    error = float(difference.std()) / 20
    mean = float(difference.mean())
    assert abs(low - (mean - 1.96 * error)) < 0.1 * error
    assert abs(high - (mean + 1.96 * error)) < 0.1 * error


def test_the_interval_is_that_of_a_plain_loop_over_resampled_ratios() -> None:
    difference, tokens = torch.tensor([1.0, -2.0, 4.0, 0.5]).double(), torch.tensor([2.0, 10.0, 1.0, 3.0]).double()
    rng = random.Random(0)
    ratios = []
    for _ in range(20_000):
        drawn = [rng.randrange(4) for _ in range(4)]
        ratios.append(float(difference[drawn].sum() / tokens[drawn].sum()))
    ratios.sort()
    low, high = paired_interval(difference, tokens)
    assert abs(low - ratios[500]) < 0.1
    assert abs(high - ratios[19_500]) < 0.1


def test_the_interval_repeats_and_a_method_against_itself_is_zero() -> None:
    difference, tokens = torch.randn(30).double(), torch.ones(30).double()
    assert paired_interval(difference, tokens) == paired_interval(difference, tokens)
    assert paired_interval(torch.zeros(30).double(), tokens) == (0.0, 0.0)


def examples(count: int) -> list[Example]:
    """Different examples of two scored tokens each."""
    return [Example(f"x:{line}", (5, 6, 7 + line), (False, True, True)) for line in range(count)]


def scores(nats: list[float]) -> Scores:
    return Scores(torch.tensor(nats).double(), torch.full((len(nats),), 2.0, dtype=torch.float64))


def test_the_table_compares_with_the_best_adapter_and_gives_no_verdict_on_few_records() -> None:
    methods = {"base": scores([9.0] * 30), "a": scores([4.0] * 30), "b": scores([6.0] * 30), "fit": scores([3.0] * 30)}
    table = held_out_table(methods, ["a", "b"], examples=examples(30), name="x", seed=0)
    assert (table.best_ingredient, table.verdict) == ("a", "better")
    assert (table.records, table.scored_tokens, table.tasks) == (30, 60, ())
    assert (table.row("fit").difference, table.row("b").difference) == (-0.5, 1.0)
    assert table.row("fit").nats_per_token == 1.5
    assert table.row("base").worse_records == 1.0
    worse = held_out_table({**methods, "fit": scores([4.5] * 30)}, ["a", "b"], examples=examples(30), name="x", seed=0)
    assert worse.verdict == "not better"
    few = {name: Scores(score.nats[:19], score.tokens[:19]) for name, score in methods.items()}
    assert held_out_table(few, ["a", "b"], examples=examples(19), name="x", seed=0).verdict == "too few records"


def test_each_task_has_the_loss_of_its_own_records() -> None:
    """Against sums by hand; records without a task are in the whole table alone, and the counts are plain."""
    generator = torch.Generator().manual_seed(0)
    tasks = [["math", "code", None][i % 3] for i in range(30)]
    weights = [[1.0, 2.5][i % 2] for i in range(30)]
    rows = [
        replace(example, task=task, weight=weight)
        for example, task, weight in zip(examples(30), tasks, weights, strict=True)
    ]
    tokens = torch.tensor(weights).double() * 2
    methods = {n: Scores(torch.rand(30, generator=generator).double() * tokens, tokens) for n in ("base", "a", "fit")}
    table = held_out_table(methods, ["a"], examples=rows, name="x", seed=0)
    assert [(t.task, t.records, t.scored_tokens) for t in table.tasks] == [("code", 10, 20), ("math", 10, 20)]
    for task in table.tasks:
        assert list(task.nats_per_token) == ["base", "a", "fit"]
        for name, loss in task.nats_per_token.items():
            nats = sum(float(methods[name].nats[i]) for i in range(30) if tasks[i] == task.task)
            counted = sum(2 * weights[i] for i in range(30) if tasks[i] == task.task)
            assert abs(loss - nats / counted) < 1e-12
    assert table.scored_tokens == 60


def test_weighted_records_weigh_in_the_table_as_copies_would() -> None:
    """Losses, differences and intervals of weight 2 are those of every record twice: copies are drawn together."""
    generator = torch.Generator().manual_seed(1)
    nats = {name: torch.rand(24, generator=generator).double() for name in ("base", "a", "fit")}
    weight = torch.tensor([2.0] * 8 + [1.0] * 16).double()
    twice = torch.tensor([*range(8), *range(24)])
    weighted = {name: Scores(value * weight, 2 * weight) for name, value in nats.items()}
    copied = {name: Scores(value[twice], torch.full((32,), 2.0).double()) for name, value in nats.items()}
    one = held_out_table(weighted, ["a"], examples=examples(24), name="x", seed=0)
    rows = [replace(examples(24)[place], place=f"x:{line}") for line, place in enumerate(twice.tolist())]
    other = held_out_table(copied, ["a"], examples=rows, name="x", seed=0)
    assert (one.records, other.records, other.scored_tokens) == (24, 32, 64)
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-12)
    for row, copy in zip(one.rows, other.rows, strict=True):
        assert row.interval == pytest.approx(copy.interval, rel=1e-12)
        assert abs(row.nats_per_token - copy.nats_per_token) < 1e-12
        assert abs(row.difference - copy.difference) < 1e-12
    low, high = one.row("fit").interval
    assert low < one.row("fit").difference < high


def test_copies_of_few_records_give_no_verdict() -> None:
    methods = {"a": scores([4.0] * 60), "fit": scores([3.0] * 60)}
    for different, verdict in ((19, "too few records"), (20, "better")):
        rows = [replace(examples(different)[line % different], place=f"x:{line}") for line in range(60)]
        table = held_out_table(methods, ["a"], examples=rows, name="x", seed=0)
        assert (table.records, table.verdict) == (60, verdict)


def test_the_table_has_the_standard_error_of_the_fits_own_loss() -> None:
    nats = torch.rand(30, generator=torch.Generator().manual_seed(0)).double()
    methods = {"a": scores([4.0] * 30), "fit": Scores(nats, torch.full((30,), 2.0).double())}
    table = held_out_table(methods, ["a"], examples=examples(30), name="x", seed=0)
    assert table.standard_error == pytest.approx(float(nats.std()) / 2 / 30**0.5)
    one = {name: Scores(score.nats[:1], score.tokens[:1]) for name, score in methods.items()}
    assert held_out_table(one, ["a"], examples=examples(1), name="x", seed=0).standard_error is None


def test_static_points_are_base_each_alone_uniform_and_sum() -> None:
    assert static_points(["a", "b"]) == {
        "base": (0.0, 0.0), "a": (1.0, 0.0), "b": (0.0, 1.0), "uniform": (0.5, 0.5), "sum": (1.0, 1.0)
    }  # fmt: skip
    assert static_points(["a"]) == {"base": (0.0,), "a": (1.0,)}


def test_holm_gives_the_corrected_values_of_the_textbook_example() -> None:
    """0.01, 0.04, 0.03, 0.005 at four hypotheses; the third in order is held up by the second."""
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert {name: round(p, 10) for name, p in corrected.items()} == {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    assert holm({"only": 0.7}) == {"only": 0.7}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    """Holm's own wording: go up the ordered p-values until one exceeds alpha / (m - i + 1)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        values = (torch.rand(6, generator=generator) ** 4).tolist()
        p = {str(i): v for i, v in enumerate(values)}
        rejected = set()
        for place, name in enumerate(sorted(p, key=lambda n: p[n])):
            if p[name] > 0.05 / (6 - place):
                break
            rejected.add(name)
        assert {name for name, corrected in holm(p).items() if corrected <= 0.05} == rejected


def test_with_nothing_to_find_a_best_of_eight_is_claimed_once_in_twenty_at_most() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.ones(60).double()
    claims = 0
    for trial in range(40):
        noise = torch.randn(8, 60, generator=generator).double()
        scores = {str(i): Scores(5 + row, tokens) for i, row in enumerate(noise)}
        claims += best_of(scores, seed=trial).clear
    assert claims <= 4  # of 40; the expected number is below 2


def test_a_clear_winner_is_claimed_and_each_rival_has_its_p_value() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.ones(100).double()
    base = torch.rand(100, generator=generator).double()
    scores = {"near": Scores(base + 0.001, tokens), "best": Scores(base, tokens), "far": Scores(base + 1, tokens)}
    found = best_of(scores)
    assert found.name == "best" and found.clear and set(found.rivals) == {"near", "far"}
    swings = torch.tensor([0.31, -0.29] * 50).double()
    noisy = {**scores, "near": Scores(base + swings, tokens)}
    found = best_of(noisy)
    assert not found.clear and found.rivals["near"] > 0.05 > found.rivals["far"]
    assert best_of({"alone": scores["best"]}).rivals == {}


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    """Simulated with the two-sided test at 5 % that the size is for."""
    generator = torch.Generator().manual_seed(3)
    n, spread = 80, 0.7
    tokens = torch.ones(n).double()
    size = detectable(spread * torch.randn(20_000, generator=generator).double(), torch.ones(20_000).double())
    size *= math.sqrt(20_000 / n)
    found = 0
    for _ in range(2000):
        difference = size + spread * torch.randn(n, generator=generator).double()
        found += abs(float(difference.mean())) > 1.96 * standard_error(difference, tokens)
    assert 0.77 < found / 2000 < 0.84


def test_the_standard_error_is_the_deviation_of_resampled_ratios() -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 20, (300,), generator=generator).double()
    difference = tokens * torch.randn(300, generator=generator).double()
    drawn = torch.randint(300, (4000, 300), generator=generator)
    ratios = difference[drawn].sum(1) / tokens[drawn].sum(1)
    assert abs(standard_error(difference, tokens) / float(ratios.std()) - 1) < 0.06
    assert standard_error(difference[:1], tokens[:1]) == math.inf


def test_mcnemar_is_the_sign_test_on_the_records_that_one_alone_has_right() -> None:
    right = torch.tensor
    assert mcnemar(right([1, 1, 0]) == 1, right([1, 1, 0]) == 1) == 1.0
    assert mcnemar(torch.ones(5) == 1, torch.zeros(5) == 1) == 2 / 32
    first, second = torch.tensor([1] * 9 + [0] * 2 + [1] * 50) == 1, torch.tensor([0] * 9 + [1] * 2 + [1] * 50) == 1
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert mcnemar(first, second) == mcnemar(second, first) == expected
