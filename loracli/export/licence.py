"""Which licence a composition may state: the one that all of its ingredients state."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.front_matter import read_front_matter
from loracli.errors import MalformedAdapter
from loracli.system.files import README_FILE

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAMES_NONE = ("other", "unknown")  # two adapters that both say so need not mean the same


def stated_licences(adapters: Sequence[LoraAdapter]) -> tuple[str | None, ...]:
    """The Hub's identifier of the licence that each adapter's README.md states, None where it states none that can be
    read as one."""
    return tuple(_stated(adapter) for adapter in adapters)


def agreed_licence(licences: Sequence[str | None]) -> str | None:
    """The licence that all of them are, None if any differs or is not stated."""
    return licences[0] if len(set(licences)) == 1 else None


def _stated(adapter: LoraAdapter) -> str | None:
    path = adapter.path / README_FILE
    if not os.path.lexists(path):
        return None
    try:
        found = read_front_matter(path).get("license")
    except MalformedAdapter:
        return None
    stated = found.strip().lower() if isinstance(found, str) else ""
    return stated if _IDENTIFIER.fullmatch(stated) and stated not in _NAMES_NONE else None
