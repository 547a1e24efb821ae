"""Cuts and methods on a device give what they give on the CPU, compute there, and let no two devices meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch

from loracli.algebra.factors import Factors, concatenate
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.algebra.rounding import error_by_grams
from loracli.algebra.truncate import Grams, best_approximation, spectrum, truncate, truncate_for
from tests.algebra.test_factors import random_factors
from tests.simulated_device import Seen, simulated


@pytest.fixture
def seen() -> Iterator[Seen]:
    with simulated() as seen:
        yield seen


def some_updates() -> list[Factors]:
    return [random_factors(rank, in_features=90, out_features=70, seed=rank, scaling=0.5) for rank in (3, 3, 3)]


def second_moments(count: int, rank: int) -> torch.Tensor:
    drawn = torch.randn(count, rank, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn @ drawn.transpose(1, 2)


_Work = Callable[[Sequence[Factors]], Factors]


def merged(name: str, updates: Sequence[Factors]) -> Factors:
    return METHODS[name].merge_updates(updates, MethodOptions()).factors


def regressed(name: str, updates: Sequence[Factors]) -> Factors:
    return METHODS[name].regress_updates(updates, second_moments(3, 9)).factors


def summed(updates: Sequence[Factors]) -> Factors:
    return concatenate(updates, [0.7, -0.4, 0.2])


def cut(updates: Sequence[Factors]) -> Factors:
    return truncate(summed(updates), 2).factors


def cut_by_moments(updates: Sequence[Factors]) -> Factors:
    exact = summed(updates)
    return truncate_for(exact, 2, second_moments(1, 9)[0].to(exact.device)).factors


def cut_dense(updates: Sequence[Factors]) -> Factors:
    return best_approximation(summed(updates).delta_weight(), 2).factors


def written_spectrum(updates: Sequence[Factors]) -> Factors:
    squares = spectrum(summed(updates))
    return Factors(squares[None], squares[:, None])


WORK: dict[str, _Work] = {
    **{name: partial(merged, name) for name, method in METHODS.items() if method.merge},
    **{name: partial(regressed, name) for name, method in METHODS.items() if method.regress},
    **{work.__name__: work for work in (summed, cut, cut_by_moments, cut_dense, written_spectrum)},
}


@pytest.mark.parametrize("name", WORK)
def test_what_is_computed_on_a_device_is_there_and_is_that_of_the_cpu(seen: Seen, name: str) -> None:
    updates = some_updates()
    expected = WORK[name](updates)
    assert not seen.launches
    found = WORK[name]([update.on("gpu") for update in updates])
    assert found.device == torch.device("gpu:0")
    assert any(launch in ("mm", "mul") for launch in seen.launches)
    dense = expected.delta_weight()
    size = float(dense.abs().max())
    torch.testing.assert_close(found.on("cpu").delta_weight(), dense, rtol=0.0, atol=1e-13 * size)


def test_the_error_of_a_cut_is_that_of_the_cpu(seen: Seen) -> None:
    exact = summed(some_updates())
    there = exact.on("gpu")
    written = truncate(there, 2).factors.to(torch.bfloat16)
    found = error_by_grams(written, there, Grams.of(there))
    assert found == pytest.approx(error_by_grams(written.on("cpu"), exact, Grams.of(exact)), rel=1e-12)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.merge])
def test_updates_of_two_devices_are_refused(seen: Seen, name: str) -> None:
    first, second, third = some_updates()
    with pytest.raises(RuntimeError, match="same device"):
        WORK[name]([first.on("gpu:0"), second.on("gpu:1"), third.on("gpu:0")])
