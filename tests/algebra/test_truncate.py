"""Truncation from factors equals truncation of the dense matrix."""

import math

import pytest
import torch

from loracli.algebra.factors import Factors
from loracli.algebra.truncate import truncate
from tests.algebra.test_factors import random_factors


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(40, 30), (6, 50), (50, 6)])
def test_truncation_is_the_best_approximation_of_the_dense_update(rank: int, shape: tuple[int, int]) -> None:
    factors = random_factors(8, in_features=shape[0], out_features=shape[1], scaling=0.7)
    u, s, vh = torch.linalg.svd(factors.delta_weight(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    result = truncate(factors, rank)
    torch.testing.assert_close(result.factors.delta_weight(), best, rtol=1e-6, atol=1e-9)
    assert result.factors.rank == rank
    assert math.isclose(result.kept_energy, float((s[:rank] ** 2).sum() / (s**2).sum()), rel_tol=1e-9)


def test_both_sides_carry_the_same_norms() -> None:
    factors = truncate(random_factors(5), 3).factors
    torch.testing.assert_close(factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0))


def test_nothing_is_lost_at_the_full_rank() -> None:
    factors = random_factors(3)
    result = truncate(factors, 10)
    assert result.factors.rank == 3
    assert result.kept_energy == 1.0
    torch.testing.assert_close(result.factors.delta_weight(), factors.delta_weight())


def test_a_zero_update_stays_zero_and_keeps_all_its_energy() -> None:
    result = truncate(Factors(torch.zeros(2, 7), torch.zeros(5, 2)), 1)
    assert result.kept_energy == 1.0
    assert not result.factors.delta_weight().any()


def test_the_sign_of_singular_vectors_does_not_depend_on_the_gauge() -> None:
    factors = random_factors(3)
    gauge = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3 * torch.eye(3)
    other = Factors(torch.linalg.inv(gauge) @ factors.lora_A.double(), factors.lora_B.double() @ gauge, factors.scaling)
    torch.testing.assert_close(truncate(factors, 2).factors.lora_A, truncate(other, 2).factors.lora_A)
