"""Sizes as people type them."""

from __future__ import annotations

import re

from loracli.errors import UsageError

UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """`20MB`, `1.5 GiB`, `800000`; units are powers of 1000, with an i of 1024. `option` is what errors name.

    Raises:
        UsageError: if it is no size.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", text.strip())
    if found is None or found[2] not in UNITS:
        raise UsageError(f"{option} {text} is no size", hint=f"for example 20MB; units: {', '.join(list(UNITS)[1:])}")
    return int(float(found[1]) * UNITS[found[2]])
