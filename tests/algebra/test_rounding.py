"""The error of rounded and cut factors is that of the dense matrices, in every digit that the norm has."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from loracli.algebra.factors import Factors, Grams, concatenate, core, relative_error
from loracli.algebra.rounding import error_by_grams, rounded_concatenation, rounding_error
from loracli.algebra.truncate import truncate
from tests.algebra.test_factors import random_factors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dense_error(written: Factors, exact: torch.Tensor) -> float:
    return float((written.delta_weight() - exact).norm() / exact.norm())


def some_updates(dtype: torch.dtype, *, out: int = 2100, inner: int = 1100) -> list[Factors]:
    """Two updates that are longer than a block on both sides."""
    made = [random_factors(r, in_features=inner, out_features=out, seed=r, scaling=0.3 * r) for r in (3, 5)]
    return [update.to(dtype) for update in made]


@pytest.mark.parametrize(("stored", "dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_a_rounded_concatenation_has_the_bits_of_the_plain_one_and_the_dense_error(
    stored: torch.dtype, dtype: torch.dtype
) -> None:
    updates, weights = some_updates(stored), [0.7, -1.3]
    plain = concatenate(updates, weights)
    written, error = rounded_concatenation(updates, weights, dtype)
    assert torch.equal(written.lora_A, plain.lora_A.to(dtype)) and torch.equal(written.lora_B, plain.lora_B.to(dtype))
    expected = dense_error(written, sum(w * u.delta_weight() for w, u in zip(weights, updates, strict=True)))
    assert expected > 1e-9
    assert math.isclose(error, expected, rel_tol=1e-5)
    assert math.isclose(rounding_error(plain.to(dtype), plain), expected, rel_tol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e-9, 1.0, 1e9, 1e25])
@pytest.mark.parametrize("apart", [1.0, 0.5, 1e-3], ids="apart {}".format)
def test_an_error_from_float32_has_three_digits_for_values_of_any_size_and_columns_of_any_angle(
    size: float, apart: float
) -> None:
    """Entries of one sign, whose roundings in float32 add up, and two adapters that cancel more and more."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return 1 + torch.rand(*shape, generator=generator)

    rows, columns = drawn(4, 900), drawn(3000, 4)
    other = Factors(rows + apart * drawn(4, 900), (columns + apart * drawn(3000, 4)) * size, 0.3)
    updates, weights = [Factors(rows, columns * size, 0.3), other], [1.0, -1.0]
    written, error = rounded_concatenation(updates, weights, torch.bfloat16)
    exact = concatenate(updates, weights)
    assert math.isclose(error, relative_error(written, exact), rel_tol=1e-4)


def test_where_an_adapter_meets_its_negative_the_error_keeps_its_digits() -> None:
    first = random_factors(3, in_features=50, out_features=40, seed=1)
    nearly = Factors(first.lora_A.double() * (1 + 1e-9), first.lora_B.double(), first.scaling)
    updates = [Factors(first.lora_A.double(), first.lora_B.double(), first.scaling), nearly]
    written, error = rounded_concatenation(updates, [1.0, -1.0], torch.float32)
    exact = concatenate(updates, [1.0, -1.0])
    stacked = concatenate([written, exact], [1.0, -1.0])
    difference = float(torch.linalg.matrix_norm(core(stacked)[1]))
    assert math.isclose(error, difference / float(exact.delta_weight().norm()), rel_tol=1e-3)


def test_exact_factors_have_no_error_and_a_zero_update_written_as_zero_neither() -> None:
    updates = some_updates(torch.float16)
    assert rounded_concatenation(updates, [0.0, 0.0], torch.float32)[1] == 0.0
    halves = [Factors(u.lora_A, u.lora_B, 0.5) for u in updates]
    assert rounded_concatenation(halves, [1.0, 2.0], torch.float32)[1] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("shape", [(40, 30), (6, 50), (50, 6)])
def test_the_error_of_a_cut_update_is_the_dense_one(dtype: torch.dtype, rank: int, shape: tuple[int, int]) -> None:
    factors = random_factors(8, in_features=shape[0], out_features=shape[1], scaling=0.7)
    written = truncate(factors, rank).factors.to(dtype)
    found = error_by_grams(written, factors, Grams.of(factors))
    assert math.isclose(found, dense_error(written, factors.delta_weight()), rel_tol=1e-8, abs_tol=1e-14)


def test_the_error_of_any_update_against_another_is_the_dense_one() -> None:
    """It does not take for granted that the written factors are a cut of the exact ones."""
    exact = random_factors(4, in_features=30, out_features=40, seed=1)
    other = random_factors(6, in_features=30, out_features=40, seed=2, scaling=1.0)
    found = error_by_grams(other, exact, Grams.of(exact))
    assert math.isclose(found, dense_error(other, exact.delta_weight()), rel_tol=1e-12)


def test_values_beyond_the_dtype_give_an_error_that_is_not_finite() -> None:
    huge = [Factors(u.lora_A, u.lora_B * 1e5, u.scaling) for u in some_updates(torch.float32)]
    assert not math.isfinite(rounded_concatenation(huge, [1.0, 1.0], torch.float16)[1])
