"""The canonical basis leaves every update as it is, and a mixing found in it means the same in the files' basis."""

import pytest
import torch
from torch import Tensor

from loracli.algebra.basis import CanonicalStack, canonical_stack, mixing_in_file_basis
from loracli.algebra.factors import Factors
from tests.algebra.test_factors import random_factors


def deficient(rank: int, of: int, seed: int = 0) -> Factors:
    """Factors of rank `of` whose product has rank `rank`."""
    thin, spread = random_factors(rank, seed=seed), random_factors(of, in_features=rank, out_features=rank, seed=9)
    return Factors(spread.lora_A @ thin.lora_A, thin.lora_B @ spread.lora_B, 0.7)


def orthonormal(rank: int) -> Factors:
    """An update whose singular values are all 2."""
    generator = torch.Generator().manual_seed(3)
    right, _ = torch.linalg.qr(torch.randn(9, rank, generator=generator, dtype=torch.float64))
    left, _ = torch.linalg.qr(torch.randn(8, rank, generator=generator, dtype=torch.float64))
    return Factors(right.T, left, 2.0)


def with_dead_rows() -> Factors:
    """A zero column in B and a zero row in A, at different places."""
    update = random_factors(4, seed=5)
    update.lora_B[:, 1] = 0
    update.lora_A[3] = 0
    return update


STACKS: dict[str, list[Factors]] = {
    "one": [random_factors(3)],
    "mixed ranks and scalings": [random_factors(1, seed=1), random_factors(4, seed=2, scaling=-0.25)],
    "rank deficient": [deficient(2, 4), random_factors(2, seed=1)],
    "dead rows": [with_dead_rows(), random_factors(2, seed=1)],
    "B is zero": [random_factors(3), Factors(torch.ones(2, 7), torch.zeros(5, 2), 4.0)],
    "scaling is zero": [random_factors(2, scaling=0.0), random_factors(3, seed=1)],
    "all zero": [Factors(torch.zeros(2, 7), torch.zeros(5, 2))],
    "rank above both sides": [random_factors(9), random_factors(6, seed=1)],
    "duplicates": [random_factors(3), random_factors(3)],
    "equal singular values": [orthonormal(4), orthonormal(2)],
    "embedding": [random_factors(3, in_features=600, out_features=6), random_factors(8, 600, 6, seed=1)],
    "half precision": [Factors(random_factors(3).lora_A.half(), random_factors(3).lora_B.half(), 2.0)],
    "far from balanced": [
        Factors(1e6 * random_factors(3).lora_A, 1e-7 * random_factors(3).lora_B),
        Factors(1e-20 * random_factors(2).lora_A, random_factors(2).lora_B, 1e-20),
    ],
}
every_stack = pytest.mark.parametrize("updates", STACKS.values(), ids=list(STACKS))


def stacked(updates: list[Factors]) -> tuple[Tensor, Tensor]:
    """B = [s_1 B_1, ...] and A = [A_1; ...] as the files have them, float64."""
    lora_B = torch.cat([u.scaling * u.lora_B.double() for u in updates], dim=1)
    return lora_B, torch.cat([u.lora_A.double() for u in updates])


def random_mixing(rank: int) -> Tensor:
    return torch.randn(rank, rank, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def blocks(stack: CanonicalStack) -> list[slice]:
    ends = torch.tensor(stack.ranks).cumsum(0).tolist()
    return [slice(end - rank, end) for end, rank in zip(ends, stack.ranks, strict=True)]


@every_stack
def test_the_canonical_factors_of_each_adapter_are_its_singular_vectors_times_the_roots(updates: list[Factors]) -> None:
    stack = canonical_stack(updates)
    for update, block in zip(updates, blocks(stack), strict=True):
        lora_A, lora_B, dense = stack.lora_A[block], stack.lora_B[:, block], update.delta_weight()
        torch.testing.assert_close(lora_B @ lora_A, dense, rtol=0, atol=1e-13 * float(dense.norm()))
        singular = torch.zeros(update.rank, dtype=torch.float64)
        values = torch.linalg.svdvals(dense)[: update.rank]
        singular[: len(values)] = values
        tolerance = 1e-13 * float(singular[0])
        for gram in (lora_A @ lora_A.T, lora_B.T @ lora_B):
            torch.testing.assert_close(gram, torch.diag(singular), rtol=0, atol=tolerance)
        assert stack.present[block].sum() == torch.linalg.matrix_rank(dense)


@every_stack
def test_the_bases_lead_from_the_files_factors_to_the_canonical_ones(updates: list[Factors]) -> None:
    stack = canonical_stack(updates)
    lora_B, lora_A = stacked(updates)
    largest = float(stack.lora_A.abs().max())
    torch.testing.assert_close(stack.basis_A @ lora_A, stack.lora_A, rtol=0, atol=1e-9 * largest)
    torch.testing.assert_close(lora_B @ stack.basis_B, stack.lora_B, rtol=0, atol=1e-9 * largest)


@every_stack
def test_a_full_mixing_is_the_same_dense_update_in_the_files_basis(updates: list[Factors]) -> None:
    stack = canonical_stack(updates)
    lora_B, lora_A = stacked(updates)
    mixing = random_mixing(sum(stack.ranks))
    expected = stack.lora_B @ mixing @ stack.lora_A
    found = lora_B @ mixing_in_file_basis(stack, mixing) @ lora_A
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.norm()))


@every_stack
def test_a_diagonal_mixing_pairs_no_two_adapters(updates: list[Factors]) -> None:
    stack = canonical_stack(updates)
    mixing = mixing_in_file_basis(stack, torch.diag(random_mixing(sum(stack.ranks))[0]))
    for block in blocks(stack):
        mixing[block, block] = 0
    assert not mixing.any()


@pytest.mark.parametrize(
    "name", ["one", "mixed ranks and scalings", "rank deficient", "rank above both sides", "dead rows", "embedding"]
)
def test_a_diagonal_mixing_weighs_the_singular_directions(name: str) -> None:
    """sum_ik w_ik S_ik u_ik v_ik^T, from the SVD of each dense update."""
    updates = STACKS[name]
    stack = canonical_stack(updates)
    weights = random_mixing(sum(stack.ranks))[0]
    expected = torch.zeros(updates[0].out_features, updates[0].in_features, dtype=torch.float64)
    for update, block in zip(updates, blocks(stack), strict=True):
        u, s, vh = torch.linalg.svd(update.delta_weight(), full_matrices=False)
        m = min(update.rank, len(s))
        expected += (u[:, :m] * (weights[block][:m] * s[:m])) @ vh[:m]
    lora_B, lora_A = stacked(updates)
    found = lora_B @ mixing_in_file_basis(stack, torch.diag(weights)) @ lora_A
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.norm()))


@pytest.mark.parametrize("name", ["one", "mixed ranks and scalings", "duplicates", "equal singular values"])
def test_one_weight_for_all_is_the_same_multiple_of_the_identity_in_both_bases(name: str) -> None:
    stack = canonical_stack(STACKS[name])
    identity = torch.eye(sum(stack.ranks), dtype=torch.float64)
    torch.testing.assert_close(mixing_in_file_basis(stack, -1.7 * identity), -1.7 * identity, rtol=0, atol=1e-10)


def test_one_weight_per_adapter_stays_one_weight_per_adapter() -> None:
    stack = canonical_stack([random_factors(2, seed=1), random_factors(4, seed=2, scaling=0.1)])
    mixing = torch.diag(torch.tensor([0.5] * 2 + [-3.0] * 4, dtype=torch.float64))
    torch.testing.assert_close(mixing_in_file_basis(stack, mixing), mixing, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["B is zero", "scaling is zero", "all zero"])
def test_an_update_that_is_zero_has_zero_rows_and_columns(name: str) -> None:
    updates = STACKS[name]
    stack = canonical_stack(updates)
    mixing = mixing_in_file_basis(stack, random_mixing(sum(stack.ranks)))
    for update, block in zip(updates, blocks(stack), strict=True):
        zero = not update.delta_weight().any()
        assert stack.present[block].any() == (not zero)
        assert bool(mixing[block].any()) == bool(mixing[:, block].any()) == (not zero)


def test_what_absent_directions_are_given_has_no_effect() -> None:
    stack = canonical_stack([deficient(2, 4), random_factors(9, seed=1)])
    mixing = random_mixing(13)
    other = mixing.clone()
    other[~stack.present] = 1e6
    other[:, ~stack.present] = -1e6
    assert stack.present.tolist() == [True] * 2 + [False] * 2 + [True] * 5 + [False] * 4
    assert torch.equal(mixing_in_file_basis(stack, other), mixing_in_file_basis(stack, mixing))


def test_the_canonical_factors_do_not_depend_on_the_files_basis() -> None:
    factors = random_factors(3)
    basis = random_mixing(3) + 3 * torch.eye(3)
    other = Factors(torch.linalg.inv(basis) @ factors.lora_A.double(), factors.lora_B.double() @ basis, factors.scaling)
    one, two = canonical_stack([factors]), canonical_stack([other])
    torch.testing.assert_close(one.lora_A, two.lora_A)
    torch.testing.assert_close(one.lora_B, two.lora_B)


def test_the_same_update_twice_gives_the_same_block_twice() -> None:
    stack = canonical_stack(STACKS["duplicates"])
    first, second = blocks(stack)
    assert torch.equal(stack.lora_A[first], stack.lora_A[second])
    assert torch.equal(stack.basis_B[first, first], stack.basis_B[second, second])
