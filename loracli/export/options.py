"""What can be chosen for an export, and what contradicts itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loracli.errors import UsageError
from loracli.export.llama_cpp import LlamaCppBase
from loracli.export.profile import PROFILES
from loracli.export.ranks import RankRule

OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """How a composition is written.

    Args:
        merge: compress to `rank` instead of concatenating.
        rank: of the result with `merge`, or of a method that cuts its result; None is the largest ingredient rank with
            `merge` unless one of the next three is set, and what the method says otherwise.
        tolerance: with `merge`, the smallest rank with which no module has a larger relative error.
        energy: with `merge`, the smallest ranks that keep this share of |dW|_F^2 over all modules.
        budget: with `merge`, the ranks that keep most in a tensor file of at most so many bytes.
        activation_aware: with `merge` and a rank, cut what calibration records show least of.
        dtype: float32, float16 or bfloat16; None is the widest of the ingredients' dtypes, and float32 for trained
            factors.
        profile: `portable`, `peft` or `mlx`; None is portable where that is possible.
        gguf: how llama.cpp has the base, to write a GGUF file as well; None for none.
    """

    merge: bool = False
    rank: int | None = None
    dtype: str | None = None
    profile: str | None = None
    gguf: LlamaCppBase | None = None
    tolerance: float | None = None
    energy: float | None = None
    budget: int | None = None
    activation_aware: bool = False

    @property
    def rule(self) -> RankRule | None:
        """What ranks are chosen by, None where the rank is given."""
        rule = RankRule(self.tolerance, self.energy, self.budget)
        return None if rule == RankRule() else rule

    def check(self, *, cuts: bool = False) -> None:
        """Raises UsageError for options that contradict each other or are out of their range."""
        if self.rank is not None and not (self.merge or cuts):
            raise UsageError("--rank is for --merge; a concatenation has the sum of the ranks", hint="add --merge")
        rules = {"rank": self.rank, "tolerance": self.tolerance, "energy": self.energy, "budget": self.budget}
        given = [f"--{name}" for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} cannot both decide on the rank", hint="give one of them")
        if self.rule is not None and not self.merge:
            raise UsageError(f"{given[0]} is for --merge; a concatenation has the sum of the ranks", hint="add --merge")
        if self.activation_aware and (not self.merge or self.rule is not None):
            raise UsageError("--activation-aware is for --merge to a rank", hint="add --merge, and --rank K if need be")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance} is not at least 0 and below 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy} is not above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank} is below 1")
        if self.dtype is not None and self.dtype not in OUTPUT_DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of {', '.join(OUTPUT_DTYPES)}")
        if self.profile is not None and self.profile not in PROFILES:
            raise UsageError(f"--profile {self.profile} is not one of {', '.join(PROFILES)}")
