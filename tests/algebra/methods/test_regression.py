"""RegMean in the span of the adapters, against numpy's least squares and the dense formula of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loracli.algebra.factors import Factors, concatenate
from loracli.algebra.methods import METHODS, regression
from loracli.algebra.methods.method import Method

OUT, IN, TOKENS = 9, 14, 60
BOTH = [METHODS["regmean"], METHODS["regmean-module"]]


def factors(rank: int, seed: int, scaling: float) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
    return Factors(lora_A, torch.randn(OUT, rank, generator=generator, dtype=torch.float64), scaling)


def three() -> list[Factors]:
    """Different ranks, lora_alpha / r and lora_alpha / sqrt(r)."""
    return [factors(3, 1, 2.0), factors(2, 2, 16 / math.sqrt(2)), factors(1, 3, 0.5)]


def inputs(count: int = 3) -> list[Tensor]:
    """Of each adapter (TOKENS, IN), in directions of their own, not of mean 0."""
    generator = torch.Generator().manual_seed(7)
    turns = torch.randn(count, IN, IN, generator=generator, dtype=torch.float64)
    return [0.3 + torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) @ turn for turn in turns]


def moments(updates: list[Factors | None], xs: list[Tensor]) -> Tensor:
    """E[z z^T] (N, R, R) of z = A x."""
    A = torch.cat([update.lora_A.double() for update in updates if update is not None])
    return torch.stack([(x @ A.T).T @ (x @ A.T) / len(x) for x in xs])


def composed(method: Method, updates: list[Factors | None], xs: list[Tensor]) -> Tensor:
    found = method.regress_updates(updates, moments(updates, xs)).factors
    assert (found.lora_A.dtype, found.lora_B.dtype, found.scaling) == (torch.float64, torch.float64, 1.0)
    return found.delta_weight()


def dense(updates: list[Factors | None]) -> list[Tensor]:
    return [torch.zeros(OUT, IN, dtype=torch.float64) if u is None else u.delta_weight() for u in updates]


def objective(update: Tensor, targets: list[Tensor], xs: list[Tensor]) -> float:
    """sum_i E_i |(dW - dW_i) x|^2."""
    return sum(float(((update - target) @ x.T).square().sum() / len(x)) for target, x in zip(targets, xs, strict=True))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


LACKING: list[Factors | None] = [*three()[:2], None]


@pytest.mark.parametrize("updates", [three(), LACKING], ids=["all have the module", "one lacks it"])
def test_without_its_ridge_it_is_the_least_squares_optimum_among_b_m_a(
    monkeypatch: pytest.MonkeyPatch, updates: list[Factors | None]
) -> None:
    """numpy solves for M itself, an entry of it a column; whatever M is moved by, the objective rises."""
    monkeypatch.setattr(regression, "_RIDGE", 1e-14)
    xs, stacked = (
        inputs(),
        concatenate([u for u in updates if u is not None], [1.0, 1.0, 1.0][: 3 - updates.count(None)]),
    )
    rank, targets = stacked.rank, dense(updates)
    columns = [torch.kron(stacked.lora_B, x @ stacked.lora_A.T).numpy() / math.sqrt(TOKENS) for x in xs]
    wanted = [(target @ x.T).flatten().numpy() / math.sqrt(TOKENS) for target, x in zip(targets, xs, strict=True)]
    solved = np.linalg.lstsq(np.concatenate(columns), np.concatenate(wanted), rcond=None)[0].reshape(rank, rank)
    found = composed(METHODS["regmean"], updates, xs)
    assert off(found, stacked.lora_B @ torch.tensor(solved) @ stacked.lora_A) < 1e-9
    least = objective(found, targets, xs)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = torch.randn(rank, rank, generator=generator, dtype=torch.float64) * 1e-3
        assert objective(found + stacked.lora_B @ moved @ stacked.lora_A, targets, xs) > least
    assert least < objective(sum(targets) / 3, targets, xs)  # type: ignore[arg-type]


def test_it_is_the_regression_of_the_papers_dense_solution_on_what_the_adapters_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """dW G A^T is the same for both, G = sum_i G_i; and dW itself where the rows of A span the inputs."""
    monkeypatch.setattr(regression, "_RIDGE", 1e-14)
    for updates in (three(), [factors(5, 4, 1.0), factors(5, 5, 2.0), factors(4, 6, 0.5)]):
        xs = inputs()
        G = [x.T @ x / len(x) for x in xs]
        paper = sum(d @ g for d, g in zip(dense(list(updates)), G, strict=True)) @ torch.linalg.inv(sum(G))  # type: ignore[arg-type, operator]
        found = composed(METHODS["regmean"], list(updates), xs)
        A = torch.cat([update.lora_A for update in updates])
        assert off(found @ sum(G) @ A.T, paper @ sum(G) @ A.T) < 1e-8  # type: ignore[operator]
        assert (off(found, paper) < 1e-6) is (len(A) == IN)


def test_its_ridge_stands_for_inputs_that_all_adapters_share() -> None:
    """One more input for each row of A, of the size of the ridge, that this row alone sees."""
    updates, xs = three(), inputs()
    Z = moments(list(updates), xs)
    ridge = 0.01 * float(sum(z.trace() for z in Z)) / (3 * Z.shape[1])
    shown = Z + ridge * torch.eye(Z.shape[1], dtype=torch.float64)
    own = torch.cat([shown[0, :3], shown[1, 3:5], shown[2, 5:]])
    stacked = concatenate(updates, [1.0] * 3)
    expected = stacked.lora_B @ own @ torch.linalg.inv(shown.sum(dim=0)) @ stacked.lora_A
    assert off(composed(METHODS["regmean"], list(updates), xs), expected) < 1e-10


@pytest.mark.parametrize("updates", [three(), LACKING], ids=["all have the module", "one lacks it"])
def test_the_weights_are_the_least_squares_optimum_among_weighted_sums(updates: list[Factors | None]) -> None:
    xs, targets = inputs(), dense(updates)
    there = [target for target, update in zip(targets, updates, strict=True) if update is not None]
    columns = np.concatenate([np.stack([(d @ x.T).flatten().numpy() for d in there], axis=1) for x in xs])
    wanted = np.concatenate([(target @ x.T).flatten().numpy() for target, x in zip(targets, xs, strict=True)])
    weights = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    expected = sum(w * d for w, d in zip(weights.tolist(), there, strict=True))
    assert off(composed(METHODS["regmean-module"], updates, xs), expected) < 1e-9  # type: ignore[arg-type]


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
def test_the_order_of_the_adapters_changes_nothing(method: Method) -> None:
    updates, xs = three(), inputs()
    first = composed(method, list(updates), xs)
    for order in ([2, 0, 1], [1, 0, 2]):
        assert off(composed(method, [updates[i] for i in order], [xs[i] for i in order]), first) < 1e-10


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
def test_one_adapter_comes_back_as_itself_and_equal_inputs_give_the_average(method: Method) -> None:
    updates, (x, *_) = three(), inputs()
    assert off(composed(method, [updates[0]], [x]), updates[0].delta_weight()) < 1e-10
    assert off(composed(method, list(updates), [x] * 3), sum(dense(list(updates))) / 3) < 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
def test_a_module_that_no_record_reaches_gets_the_average(method: Method) -> None:
    nothing = [torch.zeros(1, IN, dtype=torch.float64)] * 3
    assert off(composed(method, LACKING, nothing), sum(dense(LACKING)) / 3) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
def test_adapters_that_records_cannot_tell_apart_share_what_they_do(method: Method) -> None:
    """Two copies, whose own moments are singular together."""
    one, xs = factors(3, 1, 2.0), inputs(2)
    assert off(composed(method, [one, one], xs), one.delta_weight()) < 0.02


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
def test_a_bias_and_an_update_of_zero_are_told_apart(method: Method) -> None:
    zero = Factors(torch.randn(2, IN), torch.zeros(OUT, 2))
    assert not composed(method, [zero, zero], inputs(2)).any()
    with pytest.raises(ValueError, match="an adapter has lora_bias"):
        composed(method, [Factors(zero.lora_A, zero.lora_B, bias=torch.ones(OUT)), zero], inputs(2))
