"""What the README of an adapter says that its composition must respect: metadata and licence.

The metadata at the head of a README.md, as the Hub has it: YAML between two lines of three dashes.

The README of an adapter is as untrusted as its weights. Every scalar is read as text and no tag is honoured, so that no
date, number or merge key is built; size is limited before anything is parsed. Aliases share what they name, so what
they multiply is endless only where somebody writes it out. How deep brackets are nested is limited too: the parser
looks at every open one for each token.

Which licence a composition may state: the one that all of its ingredients state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from loracli.adapters.adapter import LoraAdapter
from loracli.errors import MalformedAdapter
from loracli.system.files import README_FILE
from loracli.system.tensor_file import open_regular

MAX_README_BYTES = 1 << 20
MAX_FRONT_MATTER = 32 << 10  # characters
MAX_OPEN = 100  # brackets at once, of any kind, those in text counted along
_BLOCK = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)


def read_front_matter(path: Path) -> dict[Any, Any]:
    """The metadata of a README.md, strings in mappings and lists; empty where there is none.

    Raises:
        MalformedAdapter: if it is too large, not UTF-8, or not the YAML of a mapping.
    """
    with open_regular(path) as file:
        data = file.read(MAX_README_BYTES + 1)
    if len(data) > MAX_README_BYTES:
        raise _malformed(path, f"is larger than {MAX_README_BYTES} bytes")
    try:
        block = _BLOCK.match(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise _malformed(path, "is not UTF-8") from None
    if block is None:
        return {}
    if len(block[1]) > MAX_FRONT_MATTER:
        raise _malformed(path, f"has more than {MAX_FRONT_MATTER} characters of metadata")
    if _most_open(block[1]) > MAX_OPEN:
        raise _malformed(path, f"has metadata with more than {MAX_OPEN} open brackets")
    try:
        found = yaml.load(block[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        raise _malformed(path, "has metadata that is not valid YAML") from None
    if found is not None and not isinstance(found, dict):
        raise _malformed(path, "has metadata that is not a mapping")
    return found or {}


def _most_open(block: str) -> int:
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", block))
    return max(accumulate(steps), default=0)


def _malformed(path: Path, what: str) -> MalformedAdapter:
    return MalformedAdapter(what, where=str(path), hint="put right what stands between the dashes at its head")


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
