"""Interference against dense float64 matrices and against what it must be."""

from __future__ import annotations

import pytest
import torch

from loracli.algebra.basis import _shared_space, interference
from loracli.algebra.factors import Factors

OUT, IN = 40, 60


def factors(rank: int, seed: int, scaling: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, IN, generator=generator)
    return Factors(lora_A, torch.randn(OUT, rank, generator=generator), scaling)


def test_the_cosine_is_that_of_the_dense_updates() -> None:
    first, second = factors(4, 1, 2.0), factors(6, 2, -0.5)
    a, b = first.delta_weight().flatten(), second.delta_weight().flatten()
    found = interference(first, second)
    assert found.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-9)
    assert interference(second, first).cosine == pytest.approx(found.cosine)


def test_shared_spaces_are_the_squared_cosines_of_the_principal_angles() -> None:
    """Against projectors onto the row and column spaces of the dense matrices: trace(P_1 P_2) / min rank."""
    first, second = factors(4, 1), factors(6, 2)
    found = interference(first, second)
    projectors = []
    for matrix in (first.delta_weight(), second.delta_weight()):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = s > 1e-9 * s[0]
        projectors.append((vh[kept].T @ vh[kept], u[:, kept] @ u[:, kept].T))
    (in_1, out_1), (in_2, out_2) = projectors
    assert found.input == pytest.approx(float(torch.trace(in_1 @ in_2)) / 4, abs=1e-9)
    assert found.output == pytest.approx(float(torch.trace(out_1 @ out_2)) / 4, abs=1e-9)


def test_an_update_shares_everything_with_itself_and_nothing_with_one_at_right_angles() -> None:
    first = factors(4, 1)
    itself = interference(first, Factors(first.lora_A * 3, first.lora_B, 0.2))
    assert itself.cosine == pytest.approx(1) and itself.input == pytest.approx(1) and itself.output == pytest.approx(1)
    basis = torch.linalg.qr(torch.randn(IN, 8, generator=torch.Generator().manual_seed(3)))[0]
    apart = interference(Factors(basis[:, :4].T, first.lora_B), Factors(basis[:, 4:].T, first.lora_B))
    assert abs(apart.cosine) < 1e-6 and apart.input < 1e-6 and apart.output == pytest.approx(1)


def test_two_random_spaces_share_what_chance_gives_them() -> None:
    """The larger rank over the dimension, in the mean."""
    generator = torch.Generator().manual_seed(5)
    draws = [
        _shared_space(
            torch.randn(50, 3, generator=generator).double(), torch.randn(50, 10, generator=generator).double()
        )
        for _ in range(200)
    ]
    assert sum(draws) / 200 == pytest.approx(10 / 50, abs=0.01)


def test_directions_without_length_and_updates_of_nothing_share_nothing() -> None:
    first = factors(4, 1)
    padded = Factors(torch.cat([first.lora_A, torch.zeros(3, IN)]), torch.cat([first.lora_B, torch.zeros(OUT, 3)], 1))
    assert interference(padded, factors(6, 2)).input == pytest.approx(interference(first, factors(6, 2)).input)
    nothing = Factors(torch.zeros(2, IN), torch.zeros(OUT, 2))
    found = interference(first, nothing)
    assert (found.cosine, found.input, found.output) == (0, 0, 0)
