"""RegMean, from what each adapter's own records show of the inputs: no labels, no gradients, one closed form.

RegMean (arXiv 2212.09849, section 3) takes the update that gives every adapter's own inputs the outputs that the
adapter gives them, in least squares:

    minimise over dW    sum_i E_i |(dW - dW_i) x|^2          dW_i = s_i B_i A_i, E_i the mean over adapter i's records

Over all matrices that is dW = (sum_i dW_i G_i)(sum_i G_i)^-1 with G_i = E_i[x x^T] (in, in). Here it is the minimum
over the updates that the adapters span, with z = A x, A = [A_1; ...; A_N] (R, in), B = [s_1 B_1, ..., s_N B_N]
(out, R), Z_i = E_i[z z^T] (R, R), and P_i the projector on the rows of adapter i:

    regmean           dW = B M A,               M = (sum_i P_i (Z_i + c I)) (sum_i (Z_i + c I))^-1
    regmean-module    dW = sum_j w_j dW_j,      H w = b,  H_jk = sum_i <dW_j, dW_k>_i,  b_j = sum_i <dW_j, dW_i>_i

with <D, E>_i = tr(D G_i E^T) = tr(B P_j Z_i P_k B^T). The first is the dense one's regression on z, and equals it where
the rows of A span the inputs. The ridge c = 0.01 tr(sum_i Z_i) / (N R), of which sum_i Z_i gets N c, stands for inputs
that no record showed, the same for all: without it M is as large as it likes in directions that records hardly tell
apart, as where adapters share the initialisation of A. The paper takes a tenth off the entries beside the diagonal.

An adapter that lacks the module has dW_i = 0 there, and its records still count. Where all Z_i are equal both are the
average, as with `uniform`: whose records are whose is what the method goes by. So they are where no record at all
reaches a module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, concatenate, mix
from loracli.algebra.methods.method import Merged, Method

_RIDGE = 0.01  # of the mean square of an entry of z
_NEGLIGIBLE = 1e-12  # share of the largest eigenvalue of H


def _regmean(updates: Sequence[Factors | None], moments: Tensor) -> Merged:
    """B M A of one module."""
    present, rows = _rows(updates)
    total, rank = moments.sum(dim=0), moments.shape[1]
    own = torch.cat([moments[i, these] for i, these in rows])  # sum_i P_i Z_i
    spread = float(total.trace()) / rank
    if spread <= 0.0:
        return Merged(mix(present, torch.eye(rank, dtype=torch.float64) / len(updates)))
    ridge = _RIDGE * spread * torch.eye(rank, dtype=torch.float64).to(moments.device)
    return Merged(mix(present, torch.linalg.solve(total + ridge, own + ridge / len(updates), left=False)))


REGMEAN = Method("regmean", "least squares on each adapter's own outputs, rank by rank", regress=_regmean)


def _regmean_weights(updates: Sequence[Factors | None], moments: Tensor) -> Merged:
    """The weighted sum of one module; the shortest w where H is singular."""
    present, rows = _rows(updates)
    stacked = concatenate(present, [1.0] * len(present)).lora_B
    products = (stacked.T @ stacked) * moments  # (N, R, R): tr(B P_j Z_i P_k B^T) is the sum of a block
    owner = torch.zeros(stacked.shape[1], len(rows), dtype=torch.float64, device=stacked.device)
    for column, (_, own) in enumerate(rows):
        owner[own, column] = 1.0
    blocks = owner.T @ products @ owner  # (N, n, n), of n adapters that have the module
    H, b = blocks.sum(dim=0), torch.stack([blocks[i, :, column] for column, (i, _) in enumerate(rows)]).sum(dim=0)
    if not bool(H.any()):
        return Merged(concatenate(present, [1.0 / len(updates)] * len(present)))
    weights = torch.linalg.pinv(H, rtol=_NEGLIGIBLE, hermitian=True) @ b
    return Merged(concatenate(present, weights.tolist()))


REGMEAN_MODULE = Method(
    "regmean-module", "least squares on each adapter's own outputs, one weight each", regress=_regmean_weights
)


def _rows(updates: Sequence[Factors | None]) -> tuple[list[Factors], list[tuple[int, slice]]]:
    """The updates that are there, and of each its adapter's place and its rows of A."""
    present, rows, start = [], [], 0
    for place, update in enumerate(updates):
        if update is not None:
            present.append(update)
            rows.append((place, slice(start, start := start + update.rank)))
    return present, rows
