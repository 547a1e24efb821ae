"""Every method against a dense float64 implementation of its formula, and against what any method must do."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loracli.algebra.factors import Factors, norm, relative_error
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.algebra.methods.sparse import _drop, present_in_own_order
from loracli.algebra.truncate import best_approximation

OUT, IN = 20, 28
EVERYTHING = MethodOptions(density=1.0)
MERGES = [method for method in METHODS.values() if method.merge is not None]
DATA_FREE = [method for method in METHODS.values() if not method.needs_records]
FROM_DENSE = [method for method in MERGES if method.full_rank]


def factors(rank: int, seed: int, scaling: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, IN, generator=generator)
    return Factors(lora_A, torch.randn(OUT, rank, generator=generator), scaling)


def pair() -> list[Factors]:
    """Different ranks, one scaling as of rsLoRA."""
    return [factors(4, 1, 2.0), factors(3, 2, 16 / math.sqrt(3))]


def equal_ranks() -> list[Factors]:
    return [factors(4, 1, 2.0), factors(4, 2, 0.5), factors(4, 3, 1.5)]


def merged(method: Method, updates: list[Factors | None], options: MethodOptions = EVERYTHING) -> Tensor:
    """dW (OUT, IN) of the method, dense."""
    if method.weights is not None:
        weights = method.weights(len(updates))
        parts = [w * u.delta_weight() for w, u in zip(weights, updates, strict=True) if u is not None]
        return torch.stack(parts).sum(dim=0)
    assert method.merge is not None
    return method.merge(updates, options).factors.delta_weight()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# What every method must do.


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda m: m.name)
@pytest.mark.parametrize("update", [factors(4, 1, 2.0), factors(3, 5, 16 / math.sqrt(3))], ids=["alpha/r", "rsLoRA"])
def test_one_adapter_comes_back_as_itself(method: Method, update: Factors) -> None:
    assert error(merged(method, [update]), update.delta_weight()) < 1e-10


@pytest.mark.parametrize("method", MERGES, ids=lambda m: m.name)
def test_what_nobody_changes_stays_so_at_rank_1_and_more(method: Method) -> None:
    zero = replace(factors(4, 1), lora_B=torch.zeros(OUT, 4))
    merged_zero = method.merge_updates([zero, zero], EVERYTHING).factors
    assert merged_zero.rank >= 1 and not merged_zero.delta_weight().any()
    one = method.merge_updates([factors(4, 2), zero], EVERYTHING).factors.delta_weight()
    assert one.isfinite().all() and one.any()


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda m: m.name)
def test_the_order_of_the_adapters_changes_nothing(method: Method) -> None:
    updates = equal_ranks()
    options = MethodOptions(density=0.4)
    first = merged(method, list(updates), options)
    for order in ([2, 0, 1], [1, 0, 2]):
        assert error(merged(method, [updates[i] for i in order], options), first) < 1e-10


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda m: m.name)
def test_a_module_that_one_adapter_lacks_takes_the_others(method: Method) -> None:
    """Of the averages the missing one counts as 0; the others see the adapters that are there."""
    update = factors(4, 1, 2.0)
    share = 0.5 if method.name in ("uniform", "linear-peft") else 1.0
    assert error(merged(method, [None, update]), share * update.delta_weight()) < 1e-10


@pytest.mark.parametrize("method", MERGES, ids=lambda m: m.name)
def test_updates_that_are_zero_merge_to_zero(method: Method) -> None:
    zero = Factors(torch.randn(4, IN), torch.zeros(OUT, 4), 2.0)
    assert method.merge is not None
    found = method.merge([zero, replace(zero, lora_A=zero.lora_A + 1)], MethodOptions())
    assert norm(found.factors) == 0.0
    assert found.kept_energy == 1.0


@pytest.mark.parametrize("method", MERGES, ids=lambda m: m.name)
def test_factors_are_in_float64_with_the_scaling_within(method: Method) -> None:
    assert method.merge is not None
    found = method.merge(equal_ranks(), MethodOptions()).factors
    assert (found.lora_A.dtype, found.lora_B.dtype, found.scaling) == (torch.float64, torch.float64, 1.0)


def test_the_scale_multiplies_fixed_weights() -> None:
    for name, weight in (("sum", 1.0), ("uniform", 0.25)):
        assert METHODS[name].fixed_weights(4, MethodOptions(scale=-0.7)) == (-0.7 * weight,) * 4
    assert METHODS["ties"].fixed_weights(4, MethodOptions()) is None


@pytest.mark.parametrize("method", [m for m in MERGES if "scale" in m.takes], ids=lambda m: m.name)
def test_the_scale_multiplies_the_result(method: Method) -> None:
    options = MethodOptions(density=0.5)
    once = merged(method, list(pair()), options)
    assert error(merged(method, list(pair()), replace(options, scale=0.7)), 0.7 * once) < 1e-9


def test_names_are_unique_and_each_method_does_one_thing() -> None:
    for name, method in METHODS.items():
        assert name == method.name
        assert sum(way is not None for way in (method.weights, method.merge, method.search, method.regress)) == 1


# Each formula.


def dense_ties(updates: list[Factors], density: float) -> Tensor:
    """Written out entry by entry, from the paper."""
    matrices = []
    for update in updates:
        dense = update.delta_weight().clone()
        sizes = sorted(dense.abs().flatten().tolist(), reverse=True)
        threshold = sizes[max(1, round(density * dense.numel())) - 1]
        dense[dense.abs() < threshold] = 0.0
        matrices.append(dense)
    result = torch.zeros(OUT, IN, dtype=torch.float64)
    for row in range(OUT):
        for column in range(IN):
            entries = [float(matrix[row, column]) for matrix in matrices]
            elected = math.copysign(1, sum(entries)) if sum(entries) != 0 else 0
            agreeing = [entry for entry in entries if entry != 0 and math.copysign(1, entry) == elected]
            result[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_formula_of_the_paper(density: float) -> None:
    """At a rank as high as the matrix nothing is cut; below, it is what the dense SVD cuts, and so is the energy."""
    updates = pair()
    exact = dense_ties(updates, density)
    assert error(merged(METHODS["ties"], list(updates), MethodOptions(density, rank=OUT)), exact) < 1e-10
    merge = METHODS["ties"].merge
    assert merge is not None
    found = merge(updates, MethodOptions(density))
    assert found.factors.rank == 7
    best = truncated(exact, 7)
    assert abs(found.kept_energy - float(best.square().sum() / exact.square().sum())) < 1e-4
    assert error(found.factors.delta_weight(), exact) < (1 + 1e-4) * error(best, exact)


@pytest.mark.parametrize("name", ["dare", "dare-ties"])
def test_dare_keeps_a_share_of_the_entries_and_rescales_them(name: str) -> None:
    updates, options = pair(), MethodOptions(density=0.3, seed=5, rank=OUT)
    dropped = [_drop(update, options) for update in updates]
    for part, update in zip(dropped, updates, strict=True):
        dense, kept = update.delta_weight(), part != 0
        assert 0.2 < float(kept.double().mean()) < 0.4
        assert torch.allclose(part[kept], dense[kept] / 0.3, rtol=1e-12)
    if name == "dare":
        exact = dropped[0] + dropped[1]
    else:
        agree = [part * (part.sign() == (dropped[0] + dropped[1]).sign()) for part in dropped]
        exact = (agree[0] + agree[1]) / ((agree[0] != 0).double() + (agree[1] != 0).double()).clamp(min=1)
    assert error(merged(METHODS[name], list(updates), options), exact) < 1e-10
    assert error(merged(METHODS[name], list(updates), replace(options, seed=6)), exact) > 0.1


def test_what_dare_drops_averages_out() -> None:
    update = factors(4, 1, 2.0)
    mean = torch.stack([_drop(update, MethodOptions(density=0.5, seed=seed)) for seed in range(400)]).mean(dim=0)
    assert error(mean, update.delta_weight()) < 0.1


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_is_ties_in_the_left_singular_basis_of_all_updates(density: float) -> None:
    """Against the SVD of the dense matrices side by side. Its basis is unique up to signs, which TIES does not see."""
    updates = pair()
    u, s, vh = torch.linalg.svd(torch.cat([update.delta_weight() for update in updates], dim=1), full_matrices=False)
    kept = s > 1e-10 * s[0]
    parts = [(s[:, None] * part)[kept] for part in vh.split(IN, dim=1)]
    trimmed = []
    for part in parts:
        threshold = part.abs().flatten().sort(descending=True).values[max(1, round(density * part.numel())) - 1]
        trimmed.append(torch.where(part.abs() >= threshold, part, 0.0))
    elected = (trimmed[0] + trimmed[1]).sign()
    agree = [part * (part.sign() == elected) for part in trimmed]
    count = sum((part != 0).double() for part in agree)
    exact = u[:, kept] @ ((agree[0] + agree[1]) / torch.as_tensor(count).clamp(min=1))
    found = METHODS["knots"].merge(updates, MethodOptions(density))  # type: ignore[misc]
    assert found.factors.rank == 7
    assert error(found.factors.delta_weight(), exact) < 1e-9


def test_tsv_makes_the_singular_vectors_of_all_adapters_orthogonal() -> None:
    updates = pair()
    u, s, v = [], [], []
    for update in updates:
        left, singular, right = torch.linalg.svd(update.delta_weight(), full_matrices=False)
        u.append(left[:, : update.rank])
        s.append(singular[: update.rank])
        v.append(right[: update.rank].T)

    def polar(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)  # matrix (matrix^T matrix)^-1/2
        return matrix @ vectors @ torch.diag(values.rsqrt()) @ vectors.T

    exact = polar(torch.cat(u, dim=1)) @ torch.diag(torch.cat(s)) @ polar(torch.cat(v, dim=1)).T
    assert error(merged(METHODS["tsv"], list(updates)), exact) < 1e-9


def test_tsv_leaves_orthogonal_updates_as_their_sum() -> None:
    basis_out, basis_in = torch.linalg.qr(torch.randn(OUT, OUT)).Q, torch.linalg.qr(torch.randn(IN, IN)).Q
    updates = [Factors(basis_in[:3], basis_out[:, :3], 2.0), Factors(basis_in[3:7], basis_out[:, 3:7], 0.5)]
    assert error(merged(METHODS["tsv"], list(updates)), sum(u.delta_weight() for u in updates)) < 1e-5  # type: ignore[arg-type]


def test_svd_is_the_closest_matrix_of_the_largest_rank_to_the_sum() -> None:
    updates = pair()
    exact = updates[0].delta_weight() + updates[1].delta_weight()
    found = METHODS["svd"].merge(updates, MethodOptions())  # type: ignore[misc]
    assert found.factors.rank == 4
    assert error(found.factors.delta_weight(), truncated(exact, 4)) < 1e-10
    assert abs(found.kept_energy - float(truncated(exact, 4).square().sum() / exact.square().sum())) < 1e-12


def test_linear_peft_has_the_cross_terms_and_refuses_other_ranks() -> None:
    updates = equal_ranks()
    exact = torch.zeros(OUT, IN, dtype=torch.float64)
    for left in updates:
        for right in updates:
            exact += math.sqrt(left.scaling * right.scaling) / 3 * left.lora_B.double() @ right.lora_A.double()
    assert error(merged(METHODS["linear-peft"], list(updates)), exact) < 1e-10
    with pytest.raises(ValueError, match="ranks 3, 4"):
        METHODS["linear-peft"].merge_updates(pair(), EVERYTHING)


def test_elected_signs_do_not_hang_on_the_order_of_rounding() -> None:
    """Three updates whose exact sum is zero in every entry, so that rounding would elect the sign."""
    a, b = factors(4, 1), factors(4, 2)
    third = Factors(torch.cat([a.lora_A, b.lora_A]), -torch.cat([a.lora_B, b.lora_B], dim=1))
    ways = [merged(METHODS["ties"], order) for order in ([a, b, third], [third, a, b], [b, third, a])]
    assert torch.equal(ways[0], ways[1]) and torch.equal(ways[0], ways[2])
    assert present_in_own_order([third, None, a, b]) == present_in_own_order([b, a, third])


# The searches.


def test_task_arithmetic_finds_the_scale_of_a_smooth_loss_in_eight_evaluations() -> None:
    search, calls = METHODS["task-arithmetic"].search, []

    def loss(weights: object) -> float:
        calls.append(weights)
        (scale, other) = weights  # type: ignore[misc]
        assert scale == other
        return math.cosh(scale - 0.77)

    assert search is not None
    assert abs(search(loss, 2, MethodOptions())[0] - 0.77) < 0.01
    assert len(calls) <= 8


def test_task_arithmetic_stays_at_the_end_where_the_loss_falls_on_and_steps_over_infinities() -> None:
    search = METHODS["task-arithmetic"].search
    assert search is not None
    assert search(lambda w: -w[0], 3, MethodOptions()) == (1.5, 1.5, 1.5)
    assert 0.3 <= search(lambda w: math.inf if w[0] > 1 else (w[0] - 0.5) ** 2, 1, MethodOptions())[0] < 0.7


def test_lorahub_comes_near_the_best_weights_within_its_box() -> None:
    """Of a separable loss with one optimum inside the box and one beyond it; the same seed gives the same weights."""
    search = METHODS["lorahub"].search
    assert search is not None

    def loss(weights: object) -> float:
        first, second = weights  # type: ignore[misc]
        return (first - 0.8) ** 2 + (second - 4.0) ** 2

    found = search(loss, 2, MethodOptions(seed=1))
    assert abs(found[0] - 0.8) < 0.3 and 1.2 < found[1] <= 1.5
    assert found == search(loss, 2, MethodOptions(seed=1))


# The approximation of dense matrices.


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (60, 60), (90, 200), (300, 150)])
def test_the_best_approximation_is_that_of_the_dense_svd(shape: tuple[int, int]) -> None:
    """On a flat spectrum, the hardest one: energy within the tolerance; on a matrix of the rank itself: to rounding."""
    matrix = 1e-30 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    found = best_approximation(matrix, 8)
    best = float(singular[:8].square().sum() / singular.square().sum())
    assert best - 1e-3 < found.kept_energy < best + 1e-12
    assert abs(error(found.factors.delta_weight(), matrix) - math.sqrt(1 - found.kept_energy)) < 1e-9
    low = torch.randn(shape[0], 8).double() @ torch.randn(8, shape[1]).double()
    assert relative_error(best_approximation(low, 8).factors, Factors(torch.eye(shape[1]).double(), low)) < 1e-12
