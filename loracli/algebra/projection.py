"""The weights that come closest to a composition: what a finer mixing amounts to for each adapter.

    argmin_w |dW - sum_i w_i dW_i|_F        C w = c,  C_ij = <dW_i, dW_j> (N, N),  c_i = <dW_i, dW>

From factors alone, by inner products. Where adapters are dependent, the shortest w over updates of norm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loracli.algebra.factors import Factors, inner_product, norm

DEPENDENT = 1e-10  # share of C's largest eigenvalue, updates at norm 1, below which a direction counts as none


def projection(composed: Factors, updates: Sequence[Factors | None]) -> tuple[float | None, ...]:
    """The least-squares weights of an update on N others of the same module.

    Args:
        composed: dW.
        updates: dW_i of each adapter; None for one that does not have the module.
    Returns:
        w_i for each adapter; None where it changes nothing, because it lacks the module or dW_i = 0.
    """
    sizes = [0.0 if update is None else norm(update) for update in updates]
    present = [(update, size) for update, size in zip(updates, sizes, strict=True) if update is not None and size > 0]
    if not present:
        return (None,) * len(updates)
    directions = [Factors(update.lora_A, update.lora_B, update.scaling / size) for update, size in present]
    gram = torch.tensor([[inner_product(a, b) for b in directions] for a in directions], dtype=torch.float64)
    target = torch.tensor([inner_product(direction, composed) for direction in directions], dtype=torch.float64)
    solution = torch.linalg.pinv(gram, rtol=DEPENDENT, hermitian=True) @ target
    weights = iter((solution / torch.tensor([size for _, size in present], dtype=torch.float64)).tolist())
    return tuple(next(weights) if size > 0 else None for size in sizes)
