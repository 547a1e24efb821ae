"""The ladder of mixings: how theta, the fitted numbers, becomes the mixing matrix of every module.

    dW_l = B_l M_l A_l          A_l (R, in) and B_l (out, R): all adapters of the module stacked along the rank

    adapter   M_l = blockdiag(w_i I)      one number for each adapter
    layer     M_l = blockdiag(w_ki I)     for each decoder layer k and adapter: LoRA Soups as printed (2410.13025)
    module    M_l = blockdiag(w_li I)     for each module and adapter: CAT, what the paper's code fits
    rank      M_l = diag(w_l)             for each singular direction of each adapter, as TARA (arXiv 2603.26299)
    core      M_l full                    one adapter's input directions with another's output directions
    factors   A_l and B_l themselves      LoRA training with a warm start; with `auto` also from nothing, a new LoRA,
                                          and half of each

Each contains the one above, costs the same forward and backward, and is one LoRA of rank R. From `rank` on the
directions matter, so A and B stand in the canonical basis (each adapter's thin SVD, sqrt(S) on both sides), and theta
has the scale of 1 everywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.kinds import kind_of
from loracli.errors import UsageError
from loracli.fitting.settings import FRESH_LORA
from loracli.model.attach import AttachedModel
from loracli.recipe.record import INLINE_KINDS, MixingKind, group_name


@dataclass(frozen=True)
class Layout:
    """What stands in which rank row of which module.

    Args:
        modules: L names, sorted: the union of what the adapters change; a parameter with experts is one of them.
        ranks: (L, N) rank of each adapter in each module, 0 where it changes nothing.
    """

    modules: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]

    @property
    def adapters(self) -> int:
        """N."""
        return len(self.ranks[0])

    @cached_property
    def sizes(self) -> list[int]:
        """(L,) R_l."""
        return [sum(row) for row in self.ranks]

    @cached_property
    def owner(self) -> Tensor:
        """(sum R_l,) which adapter each rank row belongs to, module after module."""
        return torch.tensor([i for row in self.ranks for i, rank in enumerate(row) for _ in range(rank)])


def make_layout(adapters: Sequence[LoraAdapter]) -> Layout:
    """The layout of these adapters."""
    every = [adapter.targets for adapter in adapters]
    modules = tuple(sorted(set[str]().union(*every)))
    ranks = tuple(
        tuple(max((m.factors.rank for m in targets.get(name, ())), default=0) for targets in every) for name in modules
    )
    return Layout(modules, ranks)


class Applied(Protocol):
    """What can be set on an attached model."""

    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        """Sets the attached model to theta (P,)."""


@dataclass(frozen=True, eq=False)
class FixedFactors:
    """L pairs of lora_A (r, in) and lora_B (out, r), scaling 1, with a bias (out,) of lora_B behind them or without, in
    place of the adapters' own; theta is not read."""

    factors: tuple[tuple[Tensor, ...], ...]

    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        attached.set_factors(self.factors)


class Mixing(ABC):
    """One kind of mixing: theta (P,) to the mixing matrices of a layout."""

    kind: MixingKind
    layout: Layout
    dtype = torch.float64  # of theta, its gradient and the sums of it
    rate = math.inf  # of a step, at most

    @property
    @abstractmethod
    def numbers(self) -> int:
        """P, how many numbers are fitted."""

    @property
    def told_apart_by(self) -> str:
        """What theta means here, among the mixings of one attached model."""
        return self.kind

    @abstractmethod
    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        """Sets the attached model to theta (P,), differentiably."""

    @abstractmethod
    def lift(self, lower: Mixing, theta: Tensor) -> Tensor:
        """The theta of this kind that is the same update as `theta` of a lower one."""

    @abstractmethod
    def matrices(self, theta: Tensor) -> list[Tensor]:
        """L matrices M_l (R, R) in the basis of the attached factors."""

    def constant(self, per_adapter: Sequence[float]) -> Tensor:
        """Theta (P,) that gives every module the same weight for an adapter."""
        lowest = make_diagonal(self.layout, "adapter")
        return self.lift(lowest, torch.tensor(list(per_adapter), dtype=torch.float64)[lowest.present])


@dataclass(frozen=True, eq=False)
class DiagonalMixing(Mixing):
    """`adapter`, `layer`, `module` and `rank`: every rank row takes one entry of theta.

    Args:
        kind: which rows share an entry.
        layout: of the adapters.
        index: (sum R_l,) the entry that each rank row takes.
        groups: names of the G groups of modules that share weights; of `rank`, the modules.
        present: (G * N,) whether the adapter changes any module of the group; theta has an entry for each that does.
        softmax: weights are softmax(theta) over the adapters of a group, as in the paper's code, so they sum to 1.
        kept: (P,) which entries count; the weights of the others are 0 whatever theta. None for all.
    """

    kind: MixingKind
    layout: Layout
    index: Tensor
    groups: tuple[str, ...]
    present: Tensor
    softmax: bool = False
    kept: Tensor | None = None

    @property
    def numbers(self) -> int:
        return int(self.index.max()) + 1

    @property
    def told_apart_by(self) -> str:
        kept = None if self.kept is None else self.kept.tolist()
        return f"{self.kind}, softmax {self.softmax}, kept {kept}"

    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        attached.set_diagonal(self.weights(theta)[..., self.index])

    def weights(self, theta: Tensor) -> Tensor:
        """(..., P): theta, or its softmax over the adapters of each group."""
        if not self.softmax:
            return theta if self.kept is None else torch.where(self.kept, theta, 0.0)
        return torch.softmax(self.table(theta, fill=-torch.inf), dim=1).flatten()[self.present]

    def table(self, theta: Tensor, *, fill: float = 0.0) -> Tensor:
        """(G, N) from theta (P,), with `fill` where the adapter changes nothing in the group. Not for `rank`."""
        full = torch.full(self.present.shape, fill, dtype=theta.dtype)
        return full.masked_scatter(self.present, theta).view(-1, self.layout.adapters)

    @property
    def adapter_of(self) -> Tensor:
        """(P,) the place of the adapter that each entry weighs. Not for `rank`."""
        return self.present.nonzero().flatten() % self.layout.adapters

    def by_group(self, theta: Tensor) -> dict[str, tuple[float | None, ...]]:
        """By group: the entry of theta for each adapter, None where the adapter changes nothing in the group."""
        present = self.present.view(-1, self.layout.adapters).tolist()
        return {
            group: tuple(w if here else None for w, here in zip(row, mask, strict=True))
            for group, row, mask in zip(self.groups, self.table(theta).tolist(), present, strict=True)
        }

    def lift(self, lower: Mixing, theta: Tensor) -> Tensor:
        assert isinstance(lower, DiagonalMixing), f"{self.kind} does not contain {lower.kind}"
        return torch.zeros(self.numbers, dtype=self.dtype).index_copy(0, self.index, lower.weights(theta)[lower.index])

    def matrices(self, theta: Tensor) -> list[Tensor]:
        return [torch.diag(part) for part in torch.split(self.weights(theta)[self.index], self.layout.sizes)]


@dataclass(frozen=True, eq=False)
class CoreMixing(Mixing):
    """`core`: theta holds M_l row by row, module after module."""

    layout: Layout
    kind: MixingKind = "core"
    rate = 0.02

    @property
    def numbers(self) -> int:
        return sum(size * size for size in self.layout.sizes)

    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        attached.set_matrices(self.matrices(theta))

    def lift(self, lower: Mixing, theta: Tensor) -> Tensor:
        return torch.cat([matrix.flatten() for matrix in lower.matrices(theta)])

    def matrices(self, theta: Tensor) -> list[Tensor]:
        sizes = self.layout.sizes
        parts = torch.split(theta, [size * size for size in sizes])
        return [part.view(size, size) for part, size in zip(parts, sizes, strict=True)]


class TrainedFactors(Mixing):
    """Factors in the place of the adapters' own."""

    kind: MixingKind = "factors"
    dtype = torch.float32

    @abstractmethod
    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """L pairs of lora_A (r, in) and lora_B (out, r), scaling 1."""

    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        attached.set_factors(self.factors(theta.to(attached.device)))

    def lift(self, lower: Mixing, theta: Tensor) -> Tensor:
        raise TypeError("a new LoRA contains no mixing of other adapters")

    def matrices(self, theta: Tensor) -> list[Tensor]:
        raise TypeError("trained factors are not a mixing of the adapters")


class FactorMixing(TrainedFactors):
    """`factors`: theta holds A_l and then B_l of each module, divided by their root mean square at the start of the
    ladder, so that it has the scale of 1 and one rate suits all.

    Args:
        layout: of the adapters.
        factors: L pairs of lora_A (R, in) and lora_B (out, R) in the canonical basis, scaling within.
    """

    rate = 0.02

    def __init__(self, layout: Layout, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layout = layout
        self._start = [(a.to(self.dtype), b.to(self.dtype)) for a, b in factors]
        self._shapes = [tensor.shape for pair in self._start for tensor in pair]
        self._scales = [_root_mean_square(tensor) for pair in self._start for tensor in pair]

    @property
    def numbers(self) -> int:
        return sum(shape.numel() for shape in self._shapes)

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = torch.split(theta, [shape.numel() for shape in self._shapes])
        both = [p.view(shape) * scale for p, shape, scale in zip(parts, self._shapes, self._scales, strict=True)]
        return list(zip(both[0::2], both[1::2], strict=True))

    def lift(self, lower: Mixing, theta: Tensor) -> Tensor:
        parts = []
        for (lora_A, lora_B), matrix in zip(self._start, lower.matrices(theta), strict=True):
            parts += [lora_A, (lora_B.double() @ matrix).to(self.dtype)]  # M goes into B alone, as in the export
        return torch.cat([part.flatten() / scale for part, scale in zip(parts, self._scales, strict=True)])

    def from_nothing(self, *, seed: int) -> FreshLora:
        """A new LoRA of the same rank on the same modules."""
        widths = [(a[1], b[0]) for a, b in zip(self._shapes[0::2], self._shapes[1::2], strict=True)]
        return FreshLora(self.layout, widths, max(self.layout.sizes), seed=seed)


_FRESH_SCALING = 2.0  # a usual one for a LoRA on few records: lora_alpha twice the rank


class FreshLora(TrainedFactors):
    """A new LoRA on the modules of a layout: theta holds A of each module and then B of each.

    A is drawn as PEFT draws it, uniform within 1 / sqrt(in) (Kaiming, a = sqrt 5), and B is 0, so it starts at the base
    model.

    Args:
        layout: of the adapters that it stands beside.
        shapes: (in, out) of each module.
        rank: r.
        seed: of the draw.
    """

    rate = 1e-3

    def __init__(self, layout: Layout, shapes: Sequence[tuple[int, int]], rank: int, *, seed: int) -> None:
        self.layout = layout
        self._shapes = [(rank, width) for width, _ in shapes] + [(out, rank) for _, out in shapes]
        generator = torch.Generator().manual_seed(seed)
        drawn = [(2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width) for width, _ in shapes]
        zeros = torch.zeros(self.numbers - sum(a.numel() for a in drawn))
        self.start = torch.cat([*(a.flatten() for a in drawn), zeros])

    @property
    def numbers(self) -> int:
        return sum(rows * columns for rows, columns in self._shapes)

    @property
    def told_apart_by(self) -> str:
        return FRESH_LORA

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """L pairs of lora_A (r, in) and lora_B (out, r), the scaling in B."""
        parts = torch.split(theta, [rows * columns for rows, columns in self._shapes])
        both = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        half = len(both) // 2
        return [(lora_A, _FRESH_SCALING * lora_B) for lora_A, lora_B in zip(both[:half], both[half:], strict=True)]


class HalfOfEach(TrainedFactors):
    """The mean of trained factors and a new LoRA, of the sum of their ranks: theta holds that of the one, then that of
    the other.

        dW_l = (B_l A_l + B'_l A'_l) / 2

    Args:
        trained: that started from the adapters', rank R.
        new: of rank r.
    """

    def __init__(self, trained: TrainedFactors, new: TrainedFactors) -> None:
        self.layout, self._halves = trained.layout, (trained, new)

    @property
    def numbers(self) -> int:
        return sum(half.numbers for half in self._halves)

    @property
    def told_apart_by(self) -> str:
        return " and ".join(half.told_apart_by for half in self._halves)

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = torch.split(theta, [half.numbers for half in self._halves])
        trained, new = (half.factors(part) for half, part in zip(self._halves, parts, strict=True))
        return [
            (torch.cat([lora_A, new_A]), torch.cat([lora_B, new_B], dim=1) / 2)
            for (lora_A, lora_B), (new_A, new_B) in zip(trained, new, strict=True)
        ]


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) or 1.0


def make_diagonal(layout: Layout, kind: MixingKind, *, softmax: bool = False) -> DiagonalMixing:
    """One of the kinds `adapter`, `layer`, `module`, `rank`."""
    if kind == "rank":
        rows = len(layout.owner)
        return DiagonalMixing(kind, layout, torch.arange(rows), layout.modules, torch.ones(0, dtype=torch.bool))
    names = [group_name(module, kind) for module in layout.modules]
    groups = tuple(dict.fromkeys(names))
    row_of = {group: i for i, group in enumerate(groups)}
    present = torch.zeros(len(groups), layout.adapters, dtype=torch.bool)
    for name, ranks in zip(names, layout.ranks, strict=True):
        present[row_of[name]] |= torch.tensor(ranks) > 0
    entry = present.flatten().cumsum(0) - 1  # (G * N,) place in theta
    group = torch.repeat_interleave(torch.tensor([row_of[name] for name in names]), torch.tensor(layout.sizes))
    index = entry[group * layout.adapters + layout.owner]
    return DiagonalMixing(kind, layout, index, groups, present.flatten(), softmax)


def check_mixing(adapters: Sequence[LoraAdapter], kind: str) -> None:
    """Refuses a kind of mixing that the adapters do not have: a bias of lora_B belongs to an adapter as a whole, and
    the experts of a parameter share their weights, so only a weight for each adapter says what becomes of them.

    Raises:
        UsageError: naming the adapter and the kinds that it has.
    """
    if kind in INLINE_KINDS:
        return
    for adapter in adapters:
        experts = any(kind_of(module).of_experts for module in adapter.modules.values())
        if adapter.config.lora_bias or experts:
            feature = "lora_bias" if adapter.config.lora_bias else "updates of experts"
            raise UsageError(
                f"{adapter.reference} has {feature}, which --mixing {kind} cannot weigh",
                hint=f"use --mixing {', '.join(INLINE_KINDS[:-1])} or {INLINE_KINDS[-1]}",
            )


def make_mixing(attached: AttachedModel, layout: Layout, kind: MixingKind) -> Mixing:
    """The kind of this name for an attached model."""
    if kind == "core":
        return CoreMixing(layout)
    if kind == "factors":
        return FactorMixing(layout, attached.factors())
    return make_diagonal(layout, kind)


def count_numbers(adapters: Sequence[LoraAdapter], layout: Layout, kind: MixingKind) -> int:
    """How many numbers a kind of mixing has, without attaching anything."""
    if kind == "core":
        return CoreMixing(layout).numbers
    if kind == "factors":
        every = [module.factors for adapter in adapters for module in adapter.modules.values()]
        return sum(f.lora_A.numel() + f.lora_B.numel() for f in every)
    return make_diagonal(layout, kind).numbers


def parameter_of_experts(adapters: Sequence[LoraAdapter]) -> str | None:
    """The first parameter with experts that one of them changes; None without any."""
    return next((name for a in adapters for name, m in a.targets.items() if kind_of(m[0]).of_experts), None)
