"""Truncation from factors equals truncation of the dense matrix."""

import math

import pytest
import torch

from loracli.algebra.factors import Factors
from loracli.algebra.truncate import truncate, truncate_for
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


def test_the_sign_of_singular_vectors_does_not_depend_on_the_basis() -> None:
    factors = random_factors(3)
    basis = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3 * torch.eye(3)
    other = Factors(torch.linalg.inv(basis) @ factors.lora_A.double(), factors.lora_B.double() @ basis, factors.scaling)
    torch.testing.assert_close(truncate(factors, 2).factors.lora_A, truncate(other, 2).factors.lora_A)


def second_moment(inner: int, samples: int = 200) -> torch.Tensor:
    """C = E[x x^T] (in, in) of inputs that prefer some directions by far."""
    generator = torch.Generator().manual_seed(9)
    spread = torch.logspace(1, -2, inner, dtype=torch.float64)
    x = torch.randn(samples, inner, generator=generator, dtype=torch.float64) * spread
    x = x @ torch.linalg.qr(torch.randn(inner, inner, generator=generator, dtype=torch.float64)).Q
    return x.T @ x / samples


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", [(40, 30), (40, 5)])
def test_a_cut_for_activations_is_the_best_by_the_dense_formula(rank: int, shape: tuple[int, int]) -> None:
    inner, out = shape
    factors = random_factors(8, in_features=inner, out_features=out, scaling=1.0).to(torch.float64)
    lora_A, exact, moment = factors.lora_A, factors.delta_weight(), second_moment(inner)
    reduced = lora_A @ moment @ lora_A.T
    inverse = torch.linalg.pinv(lora_A)
    damped = moment + 1e-4 * float(reduced.diagonal().mean()) * inverse @ inverse.T  # the damping, seen from x
    values, vectors = torch.linalg.eigh(damped)
    # W C W^T has the singular values of W C^1/2 squared; U_k U_k^T W is the best rank k (Eckart and Young).
    u = torch.linalg.svd(exact @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T).U[:, :rank]
    result = truncate_for(factors, rank, reduced)
    torch.testing.assert_close(result.factors.delta_weight(), u @ u.T @ exact, rtol=0, atol=1e-10 * float(exact.norm()))
    lost = float((result.factors.delta_weight() - exact).square().sum() / exact.square().sum())
    assert math.isclose(result.kept_energy, 1 - lost, abs_tol=1e-12)
    torch.testing.assert_close(result.factors.lora_A.norm(dim=1), result.factors.lora_B.norm(dim=0))


def test_a_cut_for_activations_changes_the_outputs_less_and_the_matrix_more_than_the_plain_one() -> None:
    factors = random_factors(8, in_features=40, out_features=30, scaling=1.0).to(torch.float64)
    exact, moment = factors.delta_weight(), second_moment(40)

    def changed(update: torch.Tensor) -> float:
        return float(((update - exact) @ moment @ (update - exact).T).trace())

    plain = truncate(factors, 3)
    aware = truncate_for(factors, 3, factors.lora_A @ moment @ factors.lora_A.T)
    assert changed(aware.factors.delta_weight()) < 0.9 * changed(plain.factors.delta_weight())
    assert aware.kept_energy < plain.kept_energy


def test_without_any_activation_the_cut_is_the_plain_one() -> None:
    factors = random_factors(5, scaling=1.0)
    found = truncate_for(factors, 2, torch.zeros(5, 5, dtype=torch.float64))
    torch.testing.assert_close(found.factors.delta_weight(), truncate(factors, 2).factors.delta_weight())
