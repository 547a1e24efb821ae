"""The leading left singular vectors are those of the full SVD, as a space, to float64's rounding over the gap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loracli.algebra import truncate as leading
from loracli.algebra.truncate import leading_left


def with_spectrum(n: int, m: int, values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
    return (u * values) @ v.T


@pytest.mark.parametrize("decay", [0.3, 1.0])
@pytest.mark.parametrize("count", [1, 9])
def test_space_and_values_are_those_of_the_full_svd(decay: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(400, 500, torch.arange(1, 401, dtype=torch.float64) ** -decay)

    def no_dense(*_: object) -> None:
        raise AssertionError("all eigenvectors were computed")

    monkeypatch.setattr(leading, "_DENSE_SHARE", 0.9)
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: no_dense() if m.shape[0] == 400 else original(m))
    values, vectors = leading_left(matrix, count)
    u, s, _ = torch.linalg.svd(matrix)
    assert torch.allclose(values, s[:count], rtol=1e-11)
    exact = u[:, :count] @ u[:, :count].T
    assert float((vectors @ vectors.T - exact).norm()) < 1e-9


@pytest.mark.parametrize("shape", [(7, 30), (30, 30), (30, 7)])
def test_where_most_are_wanted_all_are_computed(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count = min(shape)
    values, vectors = leading_left(matrix, count)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(values, s, rtol=1e-6)
    assert torch.allclose(vectors @ vectors.T, u @ u.T, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_matrix_of_lower_rank_has_values_of_zero(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the space is noise there, and must not bring the large values a second time."""
    monkeypatch.setattr(leading, "_DENSE_SHARE", share)
    matrix = with_spectrum(200, 220, torch.tensor([3.0, 2.0] + 198 * [0.0]).double())
    values, vectors = leading_left(matrix, 4)
    assert values[:2].tolist() == pytest.approx([3.0, 2.0]) and float(values[2:].max()) < 1e-6
    assert torch.allclose(vectors.T @ vectors, torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(vectors[:, :2] @ (vectors[:, :2].T @ matrix), matrix, atol=1e-10)
