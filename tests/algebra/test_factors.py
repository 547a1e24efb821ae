"""Quantities from factors equal those of the dense float64 matrix."""

import math

import pytest
import torch

from loracli.algebra.factors import Factors, core, inner_product, lora_scaling, norm


def random_factors(
    rank: int, in_features: int = 7, out_features: int = 5, seed: int = 0, scaling: float = 1.5
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, in_features, generator=generator),
        torch.randn(out_features, rank, generator=generator),
        scaling,
    )


def test_scaling_is_alpha_over_rank_and_over_its_root_for_rslora() -> None:
    assert lora_scaling(32, 16, use_rslora=False) == 2
    assert lora_scaling(32, 16, use_rslora=True) == 8


def test_delta_weight_is_s_b_a() -> None:
    factors = random_factors(3, scaling=0.25)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for o in range(5):
        for i in range(7):
            expected[o, i] = 0.25 * sum(factors.lora_B[o, r].double() * factors.lora_A[r, i].double() for r in range(3))
    torch.testing.assert_close(factors.delta_weight(), expected)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (6, 9)])
def test_inner_product_and_norm_equal_the_dense_ones(ranks: tuple[int, int]) -> None:
    left, right = random_factors(ranks[0], seed=1), random_factors(ranks[1], seed=2, scaling=-0.5)
    dense = float((left.delta_weight() * right.delta_weight()).sum())
    assert math.isclose(inner_product(left, right), dense, rel_tol=1e-12)
    assert math.isclose(norm(left), float(left.delta_weight().norm()), rel_tol=1e-12)


@pytest.mark.parametrize("rank", [2, 12])
def test_core_reproduces_the_update_between_orthonormal_bases(rank: int) -> None:
    factors = random_factors(rank)
    q_b, middle, q_a = core(factors)
    torch.testing.assert_close(q_b @ middle @ q_a.T, factors.delta_weight())
    torch.testing.assert_close(q_b.T @ q_b, torch.eye(q_b.shape[1], dtype=torch.float64))
    torch.testing.assert_close(q_a.T @ q_a, torch.eye(q_a.shape[1], dtype=torch.float64))
