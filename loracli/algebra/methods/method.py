"""What a way to compose is: a function of the updates of a module, or weights, or a search for weights.

Every method acts on the updates dW_i = s_i B_i A_i, never on A and B apart (but for the one that reproduces a peer
that does), so that one adapter alone comes back as itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from torch import Tensor

from loracli.algebra.factors import Factors, no_update
from loracli.errors import UsageError


@dataclass(frozen=True)
class MethodOptions:
    """What a user may set.

    Args:
        density: share of the entries that are kept, in (0, 1]; None is the method's own default.
        scale: the merged update is multiplied by it.
        seed: of what is drawn.
        rank: of the result of a method whose own has full rank; None is the sum of the ranks of the updates.
    """

    density: float | None = None
    scale: float = 1.0
    seed: int = 0
    rank: int | None = None

    def check(self) -> None:
        """Raises UsageError for an option out of its range."""
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density {self.density} is not above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank} is below 1")
        if self.scale == 0:
            raise UsageError(f"--scale {self.scale} is nothing: it leaves nothing of the adapters")
        if not abs(self.scale) <= 1e6:
            raise UsageError(f"--scale {self.scale} is not between -1e6 and 1e6")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed} is not between 0 and {(1 << 63) - 1}")


@dataclass(frozen=True)
class Merged:
    """One module's composition.

    Args:
        factors: scaling 1, float64.
        kept_energy: share of |dW|_F^2 of the method's own result that `factors` keep; 1 where they are exact.
    """

    factors: Factors
    kept_energy: float = 1.0


# Nats per token on calibration records at one weight for each adapter, the same in every module.
Loss = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Method:
    """One way to compose N adapters. Exactly one of `weights`, `merge`, `search` and `regress` is set.

    Args:
        name: as users type it.
        summary: a line for tables and help.
        weights: of N: one weight for each adapter, the same in every module.
        merge: of the updates of one module, None for an adapter that does not have it, and the options.
        search: of a loss, N and the options: weights as of `weights`, found with calibration records.
        regress: of the updates of one module, as of `merge`, and Z (N, R, R) in float64: Z_i is E[z z^T] of z = A x
            over the tokens of adapter i's own records, with the A of the updates that are there, stacked.
        check: of the updates of one module: raises ValueError where `merge` cannot honour them, before any work.
        evaluations: of the loss that a search makes, at most.
        takes: names of the options that it takes; `rank` goes without saying where `full_rank` is set.
        full_rank: whether its own result has full rank, so that `merge` gives the best approximation of a rank.
        package: that it needs, of the extra with its name.
    """

    name: str
    summary: str
    weights: Callable[[int], tuple[float, ...]] | None = None
    merge: Callable[[Sequence[Factors | None], MethodOptions], Merged] | None = None
    search: Callable[[Loss, int, MethodOptions], tuple[float, ...]] | None = None
    regress: Callable[[Sequence[Factors | None], Tensor], Merged] | None = None
    check: Callable[[Sequence[Factors | None]], None] | None = None
    evaluations: int = 0
    takes: frozenset[str] = frozenset()
    full_rank: bool = False
    package: str | None = None

    def check_installed(self) -> None:
        """Raises UsageError if the package that it needs is not installed."""
        if self.package is not None and find_spec(self.package) is None:
            raise UsageError(
                f"{self.name} needs the package {self.package}", hint=f"pip install 'loracat[{self.name}]'"
            )

    def check_updates(self, updates: Sequence[Factors | None]) -> None:
        """Raises ValueError for what can be told of the updates of one module before they are merged."""
        _check_biases(updates)
        if self.check is not None:
            self.check(updates)

    def merge_updates(self, updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
        """What `merge` makes of the updates of one module.

        Raises:
            ValueError: if it cannot honour them, with the reason.
        """
        assert self.merge is not None, f"{self.name} does not merge"
        self.check_updates(updates)
        merged = self.merge(updates, options)
        return merged if merged.factors.rank else replace(merged, factors=no_update(merged.factors))

    def regress_updates(self, updates: Sequence[Factors | None], moments: Tensor) -> Merged:
        """What `regress` makes of the updates of one module and their second moments.

        Raises:
            ValueError: if an update has a bias.
        """
        assert self.regress is not None, f"{self.name} takes no second moments"
        _check_biases(updates)
        device = next(update.device for update in updates if update is not None)
        return self.regress(updates, moments.to(device))

    @property
    def needs_records(self) -> bool:
        """Whether it goes by calibration records."""
        return self.search is not None or self.regress is not None

    def fixed_weights(self, adapters: int, options: MethodOptions) -> tuple[float, ...] | None:
        """One weight for each of N adapters, with the scale; None where it merges, or searches for them."""
        return None if self.weights is None else tuple(options.scale * one for one in self.weights(adapters))

    @property
    def cuts(self) -> bool:
        """Whether it takes the rank of its result, which `merge` cuts to."""
        return self.full_rank or "rank" in self.takes


def _check_biases(updates: Sequence[Factors | None]) -> None:
    if any(update is not None and update.bias is not None for update in updates):
        raise ValueError("an adapter has lora_bias, and the method composes updates of weights alone")
