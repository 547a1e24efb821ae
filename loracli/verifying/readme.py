"""The card of what was written, made again of record and ingredients.

Its hash stands in the record alone, which whoever changed the card can write anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter, kernels_of
from loracli.adapters.tasks import head_size
from loracli.composition.card import Certificate, ModuleCertificate
from loracli.composition.composition import MethodSource, Source
from loracli.errors import UsageError
from loracli.export.card import model_card
from loracli.export.layout import PROFILES, Layout, choose_layout, ranks_of_targets
from loracli.system.files import README_FILE, open_regular
from loracli.verifying.findings import Findings

UNPROVEN = "its hash stands in the record alone, which whoever changed the card can write anew"
# Those that an export writes into its card; a record's word for them is no way to put other text there.
_OPTIONS = re.compile(
    r"(?: --(?:merge|activation-aware|refit|gguf|fit-data FILE|data (?:FILE|HELD_OUT)"
    r"|(?:rank|dtype|profile|tolerance|energy|budget) [0-9a-z][0-9a-z.+-]{0,31}))*"
)


def readable_options(options: str | None) -> bool:
    """Whether a record's options are words that an export writes; None of a record without."""
    return options is None or _OPTIONS.fullmatch(options) is not None


def compare_card(path: Path, possible: Sequence[str], written_by: Any, source: Source, findings: Findings) -> None:
    """Holds the card in `path` against those that can have been written, of which there are none without their options.

    Args:
        path: the directory.
        possible: cards that an export or a fusion of this record writes.
        written_by: the version that the record names, which is not believed to have other words but may have.
        source: whose ingredients state licences in their own cards.
        findings: told what is found.
    """
    with open_regular(path / README_FILE) as file:
        found = file.read()
    if any(found == card.encode() for card in possible):
        findings.checked.append(f"{README_FILE} against the card made again of record and ingredients")
    elif not possible or written_by != __version__:
        by = f"version {written_by}" if isinstance(written_by, str) else "an older version"
        findings.skip(README_FILE, f"{by} may have written other words, and {UNPROVEN}")
    elif bare := _without_card(source.adapters):
        findings.skip(README_FILE, f"the licence in it cannot be told, for {bare} has no card here, and {UNPROVEN}")
    else:
        findings.differs(f"{README_FILE} is not the card that record and ingredients make")


def _without_card(adapters: Sequence[LoraAdapter]) -> str | None:
    """An ingredient without README.md, None if all have one."""
    return next((adapter.reference for adapter in adapters if not (adapter.path / README_FILE).is_file()), None)


def export_cards(
    source: Source,
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
        source: with the ingredients.
        modules: the certificate's.
        profile, rank, merged: of the record's export.
        options: of its command, None of an older record: then there is no card.
        task_type: of the config.
    """
    if options is None:
        return ()
    sources: list[Source] = [source]
    if isinstance(source, MethodSource):
        sources = [replace(source, task_type=task_type, task_asked=asked) for asked in (False, True)]
    labels = None if source.saved is None else head_size(source.saved.shapes)
    certificate = Certificate(tuple(modules.values()), "")
    return tuple(
        model_card(one.card(), layout, certificate, merged=merged, options=options, labels=labels)
        for one in sources
        for layout in _layouts(one, modules, profile, rank, asked=" --profile " in options, task_type=task_type)
    )


def _layouts(
    source: Source,
    modules: Mapping[str, ModuleCertificate],
    profile: str,
    rank: int,
    *,
    asked: bool,
    task_type: str | None,
) -> list[Layout]:
    found: list[Layout] = []
    ranks = {name: module.rank for name, module in modules.items()}
    if not ranks_of_targets(ranks).keys() <= {module.name for module in source.table}:
        return found  # the certificate is of other modules, which is a difference of its own
    bias = next((adapter.reference for adapter in source.adapters if adapter.config.lora_bias), None)
    for uniform in (None, rank):
        try:
            layout = choose_layout(
                source.table,
                ranks,
                next(name for name in PROFILES if name == profile) if asked else None,
                rank=uniform,
                lora_bias=bias,
                saved=() if source.saved is None else source.saved.modules,
                kernels=kernels_of(source.adapters),
                task_type=task_type,
            )
        except UsageError:
            continue
        if (layout.profile, layout.rank) == (profile, rank):
            found.append(layout)
    return found
