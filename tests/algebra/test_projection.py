"""The projection is the least-squares solution over dense updates."""

import pytest
import torch

from loracli.algebra.basis import projection
from loracli.algebra.factors import Factors, concatenate, mix
from tests.algebra.test_factors import random_factors

UPDATES = [random_factors(rank, seed=rank, scaling=0.1 * 10.0**rank) for rank in (1, 2, 3)]


def dense_solution(composed: Factors, updates: list[Factors]) -> torch.Tensor:
    """By torch.linalg.lstsq on the dense matrices."""
    columns = torch.stack([u.delta_weight().flatten() for u in updates], dim=1)
    return torch.linalg.lstsq(columns, composed.delta_weight().flatten()[:, None]).solution.flatten()


def values(found: tuple[float | None, ...]) -> torch.Tensor:
    assert None not in found
    return torch.tensor([w or 0.0 for w in found], dtype=torch.float64)


def test_weights_of_a_weighted_sum_come_back() -> None:
    found = values(projection(concatenate(UPDATES, [0.5, -2.0, 3.0]), UPDATES))
    torch.testing.assert_close(found, torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64))


def test_a_full_mixing_has_the_weights_of_the_dense_least_squares() -> None:
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    composed = mix(UPDATES, mixing)
    torch.testing.assert_close(values(projection(composed, UPDATES)), dense_solution(composed, UPDATES))


def test_an_update_of_its_own_is_projected_too() -> None:
    composed = random_factors(5, seed=8)
    torch.testing.assert_close(values(projection(composed, UPDATES)), dense_solution(composed, UPDATES))


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_dependent_updates_share_the_weight_by_their_norms(scale: float) -> None:
    """The pair x, scale x: of all weights with w_1 + scale w_2 = 3, those where both carry the same share."""
    update = random_factors(3)
    pair = [update, Factors(update.lora_A, update.lora_B, update.scaling * scale)]
    found = values(projection(concatenate([update], [3.0]), pair))
    torch.testing.assert_close(found, torch.tensor([1.5, 1.5 / scale], dtype=torch.float64))


def test_an_adapter_that_changes_nothing_there_has_no_weight() -> None:
    zero = Factors(torch.ones(2, 7), torch.zeros(5, 2))
    assert projection(random_factors(2), [None, zero]) == (None, None)
    found = projection(concatenate(UPDATES[:1], [0.25]), [None, UPDATES[0], zero])
    assert found[0] is None and found[2] is None
    assert found[1] == pytest.approx(0.25)


def test_the_projection_of_nothing_is_nothing() -> None:
    assert projection(Factors(torch.zeros(1, 7), torch.zeros(5, 1)), UPDATES) == (0.0, 0.0, 0.0)
