"""The mixing weights: which modules share a weight, and how the fitted numbers become one weight per module and
adapter.

    dW_l = sum_i w_li s_i B_i A_i

`adapter`: one weight for each adapter. `layer`: one for each decoder layer and adapter, the equation of LoRA Soups
(arXiv 2410.13025) read literally. `module`: one for each adapted module and adapter, what the paper's code fits. The
weights are free; with `softmax`, as in the paper's code, they are softmax(theta) over the adapters that a module has,
so they sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.recipe import INLINE_KINDS, MixingKind, group_name

MIXING_KINDS: tuple[MixingKind, ...] = INLINE_KINDS


@dataclass(frozen=True)
class Mixing:
    """A parametrisation of the mixing weights by theta (G, N).

    Args:
        kind: which modules share a weight.
        softmax: weights are softmax(theta) over the adapters present instead of theta.
        modules: L module names, sorted.
        groups: G group names, sorted as first met.
        group_of: (L,) the group of each module.
        present: (G, N) whether the adapter changes any module of the group; the other entries of theta have no meaning.
    """

    kind: MixingKind
    softmax: bool
    modules: tuple[str, ...]
    groups: tuple[str, ...]
    group_of: Tensor
    present: Tensor

    @property
    def numbers(self) -> int:
        """How many numbers are fitted."""
        return int(self.present.sum())

    def expand(self, theta: Tensor) -> Tensor:
        """(L, N): the weight of each module and adapter, differentiable in theta (G, N)."""
        return self._by_group(theta)[self.group_of]

    def weights(self, theta: Tensor) -> dict[str, tuple[float | None, ...]]:
        """By group: one weight for each adapter, None where the adapter changes nothing in the group."""
        values = self._by_group(theta)
        return {
            group: tuple(w if here else None for w, here in zip(row, mask, strict=True))
            for group, row, mask in zip(self.groups, values.tolist(), self.present.tolist(), strict=True)
        }

    def _by_group(self, theta: Tensor) -> Tensor:
        return torch.softmax(theta.masked_fill(~self.present, -torch.inf), dim=1) if self.softmax else theta

    def constant(self, per_adapter: Sequence[float]) -> Tensor:
        """theta (G, N) that gives every module the same weights."""
        return torch.tensor([list(per_adapter)] * len(self.groups), dtype=torch.float64)


def make_mixing(adapters: Sequence[LoraAdapter], kind: MixingKind, *, softmax: bool = False) -> Mixing:
    """The parametrisation for these adapters."""
    modules = tuple(sorted({name for adapter in adapters for name in adapter.modules}))
    names = [group_name(module, kind) for module in modules]
    groups = tuple(dict.fromkeys(names))
    index = {group: i for i, group in enumerate(groups)}
    group_of = torch.tensor([index[name] for name in names])
    present = torch.zeros(len(groups), len(adapters), dtype=torch.bool)
    for column, adapter in enumerate(adapters):
        for module in adapter.modules:
            present[index[group_name(module, kind)], column] = True
    return Mixing(kind, softmax, modules, groups, group_of, present)
