"""What a verification found: what it checked, what it could not, and what differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loracli.errors import VerificationError


@dataclass(frozen=True)
class Unchecked:
    """Something that was not checked, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Verification:
    """The result of a verification that found no difference.

    Args:
        path: the directory.
        kind: an adapter, or a fused model.
        checked: what was.
        not_checked: what was not, for want of ingredients.
        tensors: how many were compared with the composition.
    """

    path: Path
    kind: Literal["adapter", "model"]
    checked: tuple[str, ...]
    not_checked: tuple[Unchecked, ...]
    tensors: int


@dataclass
class Findings:
    """Collects what is found, so that one run names every difference."""

    checked: list[str] = field(default_factory=list)
    not_checked: list[Unchecked] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    tensors: int = 0

    def differs(self, what: str) -> None:
        self.differences.append(what)

    def skip(self, what: str, why: str) -> None:
        self.not_checked.append(Unchecked(what, why))

    def result(self, path: Path, kind: Literal["adapter", "model"]) -> Verification:
        """The verification.

        Raises:
            VerificationError: if anything differs, with every difference.
        """
        if self.differences:
            count = len(self.differences)
            raise VerificationError(
                f"{path} is not what its record says: {count} difference{'s' if count > 1 else ''}",
                problems=tuple(self.differences),
                hint="make it again from its ingredients, or restore a copy that was not changed",
            )
        return Verification(path, kind, tuple(self.checked), tuple(self.not_checked), self.tensors)
