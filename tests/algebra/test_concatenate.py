"""Concatenation is the weighted sum of the dense updates."""

import math

import pytest
import torch

from loracli.algebra.factors import Factors, concatenate, mix, pad_rank, relative_error
from tests.algebra.test_factors import random_factors


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -1.7, 2.5), (0.0, 0.0, 0.0)])
def test_concatenation_equals_the_dense_weighted_sum_for_mixed_ranks_and_scalings(weights: tuple[float, ...]) -> None:
    updates = [random_factors(rank, seed=rank, scaling=rank / 2) for rank in (1, 3, 6)]
    dense = sum((w * u.delta_weight() for w, u in zip(weights, updates, strict=True)), torch.zeros(5, 7))
    result = concatenate(updates, weights)
    assert (result.rank, result.scaling) == (10, 1.0)
    torch.testing.assert_close(result.delta_weight(), dense, rtol=1e-13, atol=1e-13)


def test_concatenation_keeps_the_ingredients_values_of_a() -> None:
    updates = [random_factors(2, seed=1), random_factors(3, seed=2)]
    lora_A = concatenate(updates, [0.5, -2.0]).lora_A
    assert torch.equal(lora_A, torch.cat([u.lora_A for u in updates]).double())


def test_one_update_at_weight_one_comes_back_as_itself() -> None:
    update = random_factors(4, scaling=3.0)
    assert torch.equal(
        concatenate([update], [1.0]).delta_weight(), (3.0 * update.lora_B.double()) @ update.lora_A.double()
    )


def test_the_order_of_updates_does_not_matter() -> None:
    updates, weights = [random_factors(r, seed=r) for r in (2, 5)], [0.7, -0.2]
    swapped = concatenate(updates[::-1], weights[::-1])
    torch.testing.assert_close(concatenate(updates, weights).delta_weight(), swapped.delta_weight())


def test_a_missing_weight_is_an_error() -> None:
    with pytest.raises(ValueError):
        concatenate([random_factors(1), random_factors(1)], [1.0])


def test_relative_error_equals_the_dense_one() -> None:
    exact = random_factors(3, seed=1)
    written = Factors(exact.lora_A.bfloat16(), exact.lora_B.bfloat16(), exact.scaling)
    difference = (written.delta_weight() - exact.delta_weight()).norm() / exact.delta_weight().norm()
    assert math.isclose(relative_error(written, exact), float(difference), rel_tol=1e-9)
    assert relative_error(exact, exact) < 1e-15


def test_relative_error_of_a_zero_update() -> None:
    zero = Factors(torch.zeros(2, 7), torch.zeros(5, 2))
    assert relative_error(zero, zero) == 0.0
    assert relative_error(random_factors(1), zero) == math.inf


def test_padding_leaves_the_update_as_it_is() -> None:
    factors = random_factors(2)
    padded = pad_rank(factors, 5)
    assert padded.rank == 5
    torch.testing.assert_close(padded.delta_weight(), factors.delta_weight())
    with pytest.raises(ValueError):
        pad_rank(factors, 1)


def test_a_mixing_equals_the_dense_product_and_keeps_a() -> None:
    updates = [random_factors(rank, seed=rank, scaling=rank / 2) for rank in (1, 3)]
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lora_A = torch.cat([u.lora_A for u in updates]).double()
    lora_B = torch.cat([u.scaling * u.lora_B.double() for u in updates], dim=1)
    result = mix(updates, mixing)
    assert torch.equal(result.lora_A, lora_A) and result.scaling == 1.0
    torch.testing.assert_close(result.delta_weight(), lora_B @ mixing @ lora_A, rtol=1e-13, atol=1e-13)


def test_a_mixing_of_one_weight_each_is_the_weighted_sum() -> None:
    updates, weights = [random_factors(r, seed=r) for r in (2, 5)], [0.7, -0.2]
    mixing = torch.diag(torch.tensor([0.7] * 2 + [-0.2] * 5, dtype=torch.float64))
    expected = concatenate(updates, weights).delta_weight()
    torch.testing.assert_close(mix(updates, mixing).delta_weight(), expected)
