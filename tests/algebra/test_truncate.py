"""Truncation from factors equals truncation of the dense matrix."""

import math

import pytest
import torch

from loracli.algebra.factors import Factors, Grams
from loracli.algebra.rounding import error_by_grams
from loracli.algebra.truncate import _truncated_by_grams, truncate, truncate_for
from tests.algebra.test_factors import random_factors


def test_no_more_energy_is_kept_than_there_is() -> None:
    for seed in range(60):  # some of which round up
        generator = torch.Generator().manual_seed(seed)
        lora_A, change = torch.randn(24, 64, generator=generator), torch.randn(64, 24, generator=generator)
        twice = Factors(torch.cat([lora_A, lora_A]), torch.cat([change, 0.1 * change], dim=1))
        assert truncate(twice, 24).kept_energy <= 1.0


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


def wide_stack(name: str) -> Factors:
    """Six updates of rank 16 beside each other, R = 96, as some real ones lie."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, columns = drawn(96, 140), drawn(120, 96)
    if name == "one lora_A":
        rows = rows[:16].repeat(6, 1)
    elif name == "scales far apart":
        rows[:16] *= 1e6
        columns[:, 16:32] *= 1e6
        columns[:, :16] *= 1e-6
    elif name == "falls fast":
        columns *= torch.logspace(0, -9, 96, dtype=torch.float64)
    elif name == "twice the same":
        rows[48:], columns[:, 48:] = rows[:48], columns[:, :48]
    elif name == CANCELLED:
        rows[48:], columns[:, 48:] = rows[:48], -columns[:, :48] * (1 + 1e-6)
    return Factors(rows, columns, 0.7)


CANCELLED = "an adapter and nearly its negative"


@pytest.mark.parametrize("rank", [4, 16, 47])
@pytest.mark.parametrize(
    "name", ["random", "one lora_A", "scales far apart", "falls fast", "twice the same", CANCELLED]
)
def test_a_cut_of_many_adapters_has_the_least_error_there_is(name: str, rank: int) -> None:
    factors = wide_stack(name)
    exact = factors.delta_weight()
    squares = torch.linalg.svdvals(exact).square()
    least = math.sqrt(float(squares[rank:].sum() / squares.sum()))
    result = truncate(factors, rank)
    error = float((result.factors.delta_weight() - exact).norm() / exact.norm())
    rounding = 1e-7 if name == CANCELLED else 1e-13  # digits that are cancelled within dW itself
    assert math.isclose(error, least, rel_tol=1e-6, abs_tol=rounding)
    assert math.isclose(result.kept_energy, 1 - least**2, abs_tol=1e-9)
    again = error_by_grams(result.factors, factors, Grams.of(factors))
    assert math.isclose(again, error, rel_tol=1e-6, abs_tol=rounding)


@pytest.mark.parametrize(
    ("name", "rank", "by_squares"),
    [("random", 47, True), ("falls fast", 16, True), ("falls fast", 60, False), ("one lora_A", 16, False)],
)
def test_squares_are_trusted_only_where_what_is_cut_off_stands_out(name: str, rank: int, by_squares: bool) -> None:
    factors = wide_stack(name)
    assert (_truncated_by_grams(factors, rank, Grams.of(factors)) is not None) == by_squares


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
