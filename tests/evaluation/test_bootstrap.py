"""The interval against theory and a plain loop."""

import random

import torch

from loracli.evaluation.bootstrap import paired_interval
from loracli.evaluation.held_out import held_out_table, static_points
from loracli.evaluation.scores import Scores


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


def scores(nats: list[float]) -> Scores:
    return Scores(torch.tensor(nats).double(), torch.full((len(nats),), 2.0, dtype=torch.float64))


def test_the_table_compares_with_the_best_adapter_and_gives_no_verdict_on_few_records() -> None:
    methods = {"base": scores([9.0] * 30), "a": scores([4.0] * 30), "b": scores([6.0] * 30), "fit": scores([3.0] * 30)}
    table = held_out_table(methods, ["a", "b"], name="x", seed=0)
    assert (table.best_ingredient, table.verdict) == ("a", "better")
    assert (table.row("fit").difference, table.row("b").difference) == (-0.5, 1.0)
    assert table.row("fit").nats_per_token == 1.5
    assert table.row("base").worse_records == 1.0
    worse = held_out_table({**methods, "fit": scores([4.5] * 30)}, ["a", "b"], name="x", seed=0)
    assert worse.verdict == "not better"
    few = {name: Scores(score.nats[:19], score.tokens[:19]) for name, score in methods.items()}
    assert held_out_table(few, ["a", "b"], name="x", seed=0).verdict == "too few records"


def test_static_points_are_base_each_alone_uniform_and_sum() -> None:
    assert static_points(["a", "b"]) == {
        "base": (0.0, 0.0), "a": (1.0, 0.0), "b": (0.0, 1.0), "uniform": (0.5, 0.5), "sum": (1.0, 1.0)
    }  # fmt: skip
    assert static_points(["a"]) == {"base": (0.0,), "a": (1.0,)}
