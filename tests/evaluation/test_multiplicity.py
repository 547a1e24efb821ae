"""Corrections and sizes against their textbook forms and against simulation."""

from __future__ import annotations

import math

import torch

from loracli.evaluation.statistics import best_of, detectable, holm, mcnemar, standard_error
from loracli.model.loss import Scores


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
