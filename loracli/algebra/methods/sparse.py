"""Methods that drop entries of the updates before they add them: TIES, DARE, and both.

TIES (arXiv 2306.01708, section 4), on each module's updates.

    trim      keep the `density` largest entries of each dW_i by magnitude, 0 elsewhere
    elect     gamma = sign(sum_i dW_i), entry by entry
    merge     the mean over the adapters whose entry has that sign and is not 0

The paper trims a whole model's update at once; here, as in PEFT and mergekit, each module's. PEFT trims A and B apart.

DARE (arXiv 2311.03099, section 3): drop entries at random and rescale, then add.

    dW = scale sum_i m_i * dW_i / density,    m_i ~ Bernoulli(density) entry by entry

so that the expectation is the scaled sum. An adapter's mask is drawn from a hash of its own factors and the seed: the
order of the adapters changes nothing.

DARE with TIES' merge (arXiv 2311.03099, section 3.2, with 2306.01708): drop at random and rescale, elect signs, and
take the mean over the entries that agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.truncate import best_approximation


def present_in_own_order(updates: Sequence[Factors | None]) -> list[Factors]:
    """The updates that are there, ordered by their content: sums over them are then the same to the bit however the
    adapters are ordered, and no elected sign hangs on it."""
    return sorted((update for update in updates if update is not None), key=_digest)


def _digest(update: Factors) -> bytes:
    """sha256 of the factors' bytes and the scaling."""
    result = hashlib.sha256(f"{update.scaling!r}:".encode())
    for factor in (update.lora_A, update.lora_B):
        result.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return result.digest()


TIES_DENSITY = 0.2  # the paper's top-20 %
_BLOCK = 1 << 17  # entries that are merged at a time, which a processor's cache holds
_DEVICE_BLOCK = 1 << 24  # the same on a device, which few large steps keep busy


def _ties(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """TIES of one module: its best approximation of the rank, as the result has full rank."""
    density = TIES_DENSITY if options.density is None else options.density
    present = present_in_own_order(updates)
    return _approximated(disjoint_mean([trim(update.delta_weight(), density) for update in present]), present, options)


def trim(matrix: Tensor, density: float) -> Tensor:
    """The `density` largest entries by magnitude, and 0 elsewhere; equal ones at the threshold stay together."""
    kept = max(1, round(density * matrix.numel()))
    if kept >= matrix.numel():
        return matrix
    sizes = matrix.abs()
    if matrix.device.type != "cpu":
        return torch.where(sizes >= sizes.flatten().kthvalue(matrix.numel() - kept + 1).values, matrix, 0.0)
    ordered = sizes.flatten().clone().numpy()
    ordered.partition(matrix.numel() - kept)  # in place: twice as fast as torch.kthvalue
    return torch.where(sizes >= float(ordered[matrix.numel() - kept]), matrix, 0.0)


def disjoint_mean(matrices: Sequence[Tensor]) -> Tensor:
    """Elects the sign of the sum of each entry, and takes the mean over the entries that have it."""
    result = torch.empty_like(matrices[0])
    rows = max(1, (_BLOCK if result.device.type == "cpu" else _DEVICE_BLOCK) // result.shape[1])
    for start in range(0, result.shape[0], rows):
        parts = [matrix[start : start + rows] for matrix in matrices]
        elected = torch.stack(parts).sum(dim=0).sign()
        agreeing = [(part * elected > 0).to(part.dtype) for part in parts]
        total = torch.stack([part * votes for part, votes in zip(parts, agreeing, strict=True)]).sum(dim=0)
        result[start : start + rows] = total / torch.stack(agreeing).sum(dim=0).clamp(min=1)
    return result


def _approximated(matrix: Tensor, present: Sequence[Factors], options: MethodOptions) -> Merged:
    """scale * matrix at the rank that is asked for, or the sum of the ranks."""
    rank = sum(update.rank for update in present) if options.rank is None else options.rank
    found = best_approximation(matrix, rank)
    factors = Factors(found.factors.lora_A, options.scale * found.factors.lora_B)
    return Merged(factors, found.kept_energy)


TIES = Method(
    "ties",
    "trimmed, signs elected, disjoint mean",
    merge=_ties,
    takes=frozenset({"density", "scale"}),
    full_rank=True,
)


_DARE_DENSITY = 0.5  # the paper tries drop rates from 0.1 to 0.99


def _dare(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """DARE of one module: its best approximation of the rank, as the result has full rank."""
    present = present_in_own_order(updates)
    total = _drop(present[0], options)
    for update in present[1:]:
        total = total + _drop(update, options)
    return _approximated(total, present, options)


def _drop(update: Factors, options: MethodOptions) -> Tensor:
    """m * dW / density (out, in), float64."""
    density = _DARE_DENSITY if options.density is None else options.density
    matrix = update.delta_weight()
    if density == 1.0:
        return matrix
    mask = torch.rand(matrix.shape, generator=_generator(update, options.seed)) < density  # whatever the device
    return torch.where(mask.to(matrix.device), matrix / density, 0.0)


def _generator(update: Factors, seed: int) -> torch.Generator:
    drawn = hashlib.sha256(f"{seed}:".encode() + _digest(update)).digest()
    return torch.Generator().manual_seed(int.from_bytes(drawn[:7], "big"))


DARE = Method(
    "dare",
    "entries dropped at random and rescaled, then the sum",
    merge=_dare,
    takes=frozenset({"density", "scale", "seed"}),
    full_rank=True,
)


def _dare_ties(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """DARE-TIES of one module: its best approximation of the rank, as the result has full rank."""
    present = present_in_own_order(updates)
    return _approximated(disjoint_mean([_drop(update, options) for update in present]), present, options)


DARE_TIES = Method(
    "dare-ties",
    "dropped at random and rescaled, signs elected, disjoint mean",
    merge=_dare_ties,
    takes=frozenset({"density", "scale", "seed"}),
    full_rank=True,
)
