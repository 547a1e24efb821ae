"""Ranks from singular values, against the dense matrix and against trying every choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from loracli.algebra.factors import Factors, concatenate
from loracli.algebra.truncate import rank_for_energy, rank_within, ranks_for_bytes, ranks_for_energy, spectrum
from tests.algebra.test_factors import random_factors

SPECTRA = {
    "a": torch.tensor([9.0, 4.0, 1.0, 0.5], dtype=torch.float64),
    "b": torch.tensor([8.0, 6.0, 0.2], dtype=torch.float64),
    "c": torch.tensor([0.3, 0.1], dtype=torch.float64),
}


def kept(ranks: dict[str, int]) -> float:
    return sum(float(SPECTRA[name][:rank].sum()) for name, rank in ranks.items())


def every_choice() -> list[dict[str, int]]:
    ranges = [range(1, len(squares) + 1) for squares in SPECTRA.values()]
    return [dict(zip(SPECTRA, ranks, strict=True)) for ranks in itertools.product(*ranges)]


@pytest.mark.parametrize("shape", [(40, 30), (6, 50), (50, 6)])
def test_the_spectrum_is_that_of_the_dense_update(shape: tuple[int, int]) -> None:
    factors = random_factors(8, in_features=shape[0], out_features=shape[1], scaling=0.7)
    dense: Tensor = torch.linalg.svdvals(factors.delta_weight())[: min(8, *shape)]
    torch.testing.assert_close(spectrum(factors), dense.square(), rtol=1e-9, atol=1e-12)


def test_directions_that_are_only_rounding_count_as_none() -> None:
    one = random_factors(3, in_features=30, out_features=40)
    twice = concatenate([one, one], [1.0, 0.5])
    assert int((spectrum(twice) > 0).sum()) == 3
    assert rank_within(spectrum(twice), 0.0) == 3
    assert rank_within(spectrum(Factors(torch.zeros(2, 5), torch.zeros(4, 2))), 0.0) == 1


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 0.7, 0.999])
def test_a_tolerance_gives_the_smallest_rank_that_the_dense_error_allows(tolerance: float) -> None:
    factors = random_factors(8, in_features=40, out_features=30)
    singular = torch.linalg.svdvals(factors.delta_weight())[:8]
    error = [float(singular[k:].norm() / singular.norm()) for k in range(9)]
    smallest = next(k for k in range(1, 9) if error[k] <= tolerance + 1e-12)
    assert rank_within(spectrum(factors), tolerance) == smallest


@pytest.mark.parametrize("share", [0.1, 0.62, 0.9, 0.97, 1.0])
def test_one_rank_for_a_share_of_the_energy_is_the_smallest(share: float) -> None:
    total = sum(float(s.sum()) for s in SPECTRA.values())
    rank = rank_for_energy(list(SPECTRA.values()), share)
    assert kept({name: min(rank, len(s)) for name, s in SPECTRA.items()}) >= share * total - 1e-12
    if rank > 1:
        assert kept({name: min(rank - 1, len(s)) for name, s in SPECTRA.items()}) < share * total


@pytest.mark.parametrize("share", [0.1, 0.75, 0.9, 0.97, 1.0])
def test_ranks_for_a_share_take_the_fewest_bytes_where_modules_cost_the_same(share: float) -> None:
    total = sum(float(s.sum()) for s in SPECTRA.values())
    ranks = ranks_for_energy(SPECTRA, dict.fromkeys(SPECTRA, 10), share)
    assert kept(ranks) >= share * total - 1e-9
    enough = [sum(choice.values()) for choice in every_choice() if kept(choice) >= share * total - 1e-9]
    assert sum(ranks.values()) == min(enough)


@pytest.mark.parametrize("room", range(30, 100, 10))
def test_ranks_for_a_budget_keep_most_where_modules_cost_the_same(room: int) -> None:
    ranks = ranks_for_bytes(SPECTRA, dict.fromkeys(SPECTRA, 10), room)
    fitting = [choice for choice in every_choice() if 10 * sum(choice.values()) <= room]
    assert 10 * sum(ranks.values()) <= room
    assert math.isclose(kept(ranks), max(kept(choice) for choice in fitting))


def test_a_dear_module_gets_what_it_is_worth_for_its_bytes() -> None:
    costs = {"a": 100, "b": 10, "c": 1}  # b's second direction 0.6 a byte, c's 0.1, a's 0.04
    assert ranks_for_bytes(SPECTRA, costs, 111) == {"a": 1, "b": 1, "c": 1}
    assert ranks_for_bytes(SPECTRA, costs, 121) == {"a": 1, "b": 2, "c": 1}
    assert ranks_for_bytes(SPECTRA, costs, 122) == {"a": 1, "b": 2, "c": 2}
    with pytest.raises(ValueError, match="111"):
        ranks_for_bytes(SPECTRA, costs, 110)
