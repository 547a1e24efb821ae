"""What a verification found: what it checked, what it could not, and what differs; the card, made again, among it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.claims import head_size
from loracli.composition.card import EXPORT_FORMAT, RECORD_DIGEST, Certificate, ModuleCertificate, record_digest
from loracli.composition.composition import Composition
from loracli.errors import UsageError, VerificationError
from loracli.export.card import model_card
from loracli.export.layout import Layout, ranks_of_targets
from loracli.export.plan import layout_of
from loracli.system.display import count_text, path_text, repr_line
from loracli.system.files import README_FILE, open_regular


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

    def __repr__(self) -> str:
        missing = f"{len(self.not_checked)} not" if self.not_checked else ""
        same = f"{count_text(self.tensors, 'tensor')} the same" if self.tensors else ""
        done = f"{count_text(len(self.checked), 'thing')} checked"
        return repr_line(self, path_text(self.path), self.kind, done, missing, same)


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
            self.skip(README_FILE, "it was changed after it was written, and --edited-card allows that")
        else:
            self.differs(
                f"{README_FILE} was changed after it was written; if its new words are yours, say so with --edited-card"
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


UNPROVEN = "its hash stands in the record alone, which whoever changed the card can write anew"
# Those that an export writes into its card; a record's word for them is no way to put other text there.
_OPTIONS = re.compile(
    r"(?: --(?:merge|activation-aware|refit|gguf|fit-data FILE|data (?:FILE|HELD_OUT)"
    r"|(?:rank|dtype|profile|tolerance|energy|budget) [0-9a-z][0-9a-z.+-]{0,31}))*"
)


def readable_options(options: str | None) -> bool:
    """Whether a record's options are words that an export writes; None of a record without."""
    return options is None or _OPTIONS.fullmatch(options) is not None


def compare_card(
    path: Path,
    possible: Sequence[str],
    written_by: Any,
    composition: Composition,
    findings: Findings,
    *,
    base_told: bool = True,
) -> None:
    """Holds the card in `path` against those that can have been written, of which there are none without their options.

    Args:
        path: the directory.
        possible: cards that an export or a fusion of this record writes.
        written_by: the version that the record names, which is not believed to have other words but may have.
        composition: whose ingredients state licences in their own cards.
        findings: told what is found.
        base_told: whether the base's modules are known that nothing changes, which can be why a layout is what it is.
    """
    with open_regular(path / README_FILE) as file:
        found = file.read()
    if any(found == card.encode() for card in possible):
        findings.checked.append(f"{README_FILE} against the card made again of record and ingredients")
    elif not base_told:
        findings.skip(README_FILE, "why only PEFT reads it may lie in other modules of the base: name that with --base")
    elif not possible or written_by != __version__:
        by = f"version {written_by}" if isinstance(written_by, str) else "an older version"
        findings.skip(README_FILE, f"{by} may have written other words, and {UNPROVEN}")
    elif bare := _without_card(composition.adapters):
        findings.skip(README_FILE, f"the licence in it cannot be told, for {bare} has no card here, and {UNPROVEN}")
    else:
        findings.differs(f"{README_FILE} is not the card that record and ingredients make")


def _without_card(adapters: Sequence[LoraAdapter]) -> str | None:
    """An ingredient without README.md, None if all have one."""
    return next((adapter.reference for adapter in adapters if not (adapter.path / README_FILE).is_file()), None)


def export_cards(
    composition: Composition,
    modules: Mapping[str, ModuleCertificate],
    *,
    profile: str,
    rank: int,
    merged: bool,
    options: str | None,
    task_type: str | None,
) -> tuple[str, ...]:
    """The cards that exports of this record have: it does not tell whether its one rank, or a method's task, was asked
    for.

    Args:
        composition: with the ingredients.
        modules: the certificate's.
        profile, rank, merged: of the record's export.
        options: of its command, None of an older record: then there is no card.
        task_type: of the config.
    """
    if options is None:
        return ()
    ways = (False,) if composition.fitted else (False, True)
    possible = [replace(composition, task_type=task_type, task_asked=asked) for asked in ways]
    labels = None if composition.saved is None else head_size(composition.saved.shapes)
    certificate = Certificate(tuple(modules.values()), "")
    return tuple(
        model_card(one.card(), layout, certificate, merged=merged, options=options, labels=labels)
        for one in possible
        for layout in _layouts(one, modules, profile, rank, asked=" --profile " in options)
    )


def _layouts(
    composition: Composition,
    modules: Mapping[str, ModuleCertificate],
    profile: str,
    rank: int,
    *,
    asked: bool,
) -> list[Layout]:
    found: list[Layout] = []
    ranks = {name: module.rank for name, module in modules.items()}
    if not ranks_of_targets(ranks).keys() <= {module.name for module in composition.base.modules}:
        return found  # the certificate is of other modules, which is a difference of its own
    for uniform in (None, rank):
        try:
            layout = layout_of(composition, ranks, profile if asked else None, uniform)
        except UsageError:
            continue
        if (layout.profile, layout.rank) == (profile, rank):
            found.append(layout)
    return found
