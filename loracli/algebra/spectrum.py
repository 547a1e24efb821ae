"""Ranks from singular values: how many directions each module keeps, for an error, a share of the energy, or a size.

The squares s_li^2 of a module's singular values are what each rank keeps of |dW_l|_F^2 (Eckart and Young). Under one
limit for all modules the best ranks come from one sorted list: a direction counts s_li^2 for each byte it costs, and
directions of a module stand in their own order there anyway. (As a knapsack that is the greedy solution: exact for
modules of one shape, and at most one direction short of the optimum otherwise.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors

NEGLIGIBLE = 1e-12  # share of the largest singular value: below, a direction is rounding


def spectrum(factors: Factors) -> Tensor:
    """The squared singular values of dW, (min(r, in, out),) descending, float64; what is rounding is 0."""
    r_b = torch.linalg.qr(factors.lora_B.double(), mode="r").R
    r_a = torch.linalg.qr(factors.lora_A.double().T, mode="r").R
    singular = torch.linalg.svdvals(factors.scaling * (r_b @ r_a.T))
    return torch.where(singular > NEGLIGIBLE * singular.max(), singular, 0.0).square()


def rank_within(squares: Tensor, tolerance: float) -> int:
    """The smallest rank, at least 1, at which |dW - dW'|_F <= tolerance |dW|_F."""
    left_out = squares.flip(0).cumsum(0).flip(0)  # (m,) what is lost by keeping i directions, i = 0 ... m - 1
    return max(1, int((left_out > tolerance**2 * left_out[0]).sum()))


def rank_for_energy(spectra: Sequence[Tensor], share: float) -> int:
    """The smallest rank that keeps a share of sum_l |dW_l|_F^2 where every module has the same."""
    whole = torch.stack([torch.nn.functional.pad(s, (0, max(map(len, spectra)) - len(s))) for s in spectra]).sum(0)
    return rank_within(whole, max(1 - share, 0.0) ** 0.5)


def ranks_for_energy(spectra: Mapping[str, Tensor], costs: Mapping[str, int], share: float) -> dict[str, int]:
    """Ranks, at least 1 each, that keep a share of sum_l |dW_l|_F^2 in about the fewest bytes.

    Args:
        spectra: squared singular values of each module.
        costs: bytes of one rank of each module.
        share: between 0 and 1.
    """
    ranks = dict.fromkeys(spectra, 1)
    total = sum(float(s.sum()) for s in spectra.values())
    lost = sum(float(s[1:].sum()) for s in spectra.values())
    for name, square in _by_worth(spectra, costs):
        if lost <= (1 - share) * total:
            break
        ranks[name] += 1
        lost -= square
    return ranks


def ranks_for_bytes(spectra: Mapping[str, Tensor], costs: Mapping[str, int], room: int) -> dict[str, int]:
    """Ranks, at least 1 each, that keep about the most energy in `room` bytes.

    Raises:
        ValueError: if rank 1 everywhere takes more, with the bytes it takes.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = room - sum(costs[name] for name in spectra)
    if left < 0:
        raise ValueError(room - left)
    full: set[str] = set()
    for name, _ in _by_worth(spectra, costs):
        if name in full or costs[name] > left:
            full.add(name)  # its later directions would come before this one
            continue
        ranks[name] += 1
        left -= costs[name]
    return ranks


def _by_worth(spectra: Mapping[str, Tensor], costs: Mapping[str, int]) -> list[tuple[str, float]]:
    """Every direction but the first of each module that carries something, most energy for a byte first."""
    found = [(name, float(square)) for name, squares in spectra.items() for square in squares[1:] if square > 0]
    return sorted(found, key=lambda item: -item[1] / costs[item[0]])
