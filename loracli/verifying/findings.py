"""What a verification found: what it checked, what it could not, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loracli.composition.card import EXPORT_FORMAT, RECORD_DIGEST, record_digest
from loracli.errors import VerificationError
from loracli.system.files import README_FILE

EDITED_CARD = "--edited-card"


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
        tensors: how many were compared with the composition.
        checked: what was.
        not_checked: what was not, for want of ingredients.
    """

    path: Path
    kind: Literal["adapter", "model"]
    tensors: int
    checked: tuple[str, ...]
    not_checked: tuple[Unchecked, ...]


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

    def check_record(self, document: Mapping[str, Any], name: str) -> None:
        """Holds a record against its own digest; records of older versions have none."""
        if RECORD_DIGEST not in document:
            if EXPORT_FORMAT in document:
                self.differs(f"{name} has no {RECORD_DIGEST}, which a record of its format has")
                return
            self.skip(f"whether {name} is as it was written", "an older version wrote no digest of it: make it again")
            return
        if document[RECORD_DIGEST] != record_digest(document):
            self.differs(f"{name} was changed: its fields are not those that its own {RECORD_DIGEST} is of")
        self.checked.append(f"{name} against its own digest")

    def check_card(self, found: str | None, recorded: str, *, edited: bool) -> bool:
        """Holds the sha256 of the card, None where there is none, against the recorded one; a card whose words were
        `edited` on purpose is not checked. Returns whether it is as recorded, which says little: whoever changes the
        card can write its hash anew."""
        if found is None:
            self.differs(f"{README_FILE} is missing")
        elif found == recorded:
            return True
        elif edited:
            self.skip(README_FILE, f"it was changed after it was written, and {EDITED_CARD} allows that")
        else:
            self.differs(
                f"{README_FILE} was changed after it was written; if its new words are yours, say so with {EDITED_CARD}"
            )
        return False

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
        return Verification(path, kind, self.tensors, tuple(self.checked), tuple(self.not_checked))
