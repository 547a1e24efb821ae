"""What somebody may have meant who typed a name that there is not: one near to it, of a list or on the disk.

Nothing is put right by itself: what was typed is refused, and these are words for the way out.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from loracli.errors import UsageError

# What other programs call it, for the lists that have the second.
_OTHER_WORDS = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "4bit": "nf4",
    "8bit": "int8",
    "cat": "module",
    "vllm": "portable",
    "sglang": "portable",
    "accuracy": "exact",
    "em": "exact",
    "chat": "messages",
    "openai": "messages",
    "chatml": "messages",
}
_Thing = TypeVar("_Thing")

_SAID = 12  # names that there are, where none is near
_QUOTED = 60  # characters of one that there is not
_MANY = 1000  # names of a folder that are looked at: a mistake must not take long to be told


def did_you_mean(word: str, names: Collection[str]) -> str | None:
    """`did you mean module?`, None where nothing is near.

    Args:
        word: that was typed.
        names: that there are.
    """
    found = _nearest(word, names)
    return f"did you mean {found}?" if found else None


def _nearest(word: str, names: Collection[str]) -> str | None:
    """The name that other programs call so, else the first that ends in the word, else the nearest, whatever its
    capitals, and however its accents are written."""
    plain = {_plain(name): name for name in reversed(list(names))}
    other = _OTHER_WORDS.get(_plain(word).replace("-", ""))
    if other in plain:
        return plain[other]
    if ending := [name for name in plain if name.endswith(f".{_plain(word)}")]:  # the last name of a module
        return plain[ending[-1]]
    found = get_close_matches(_plain(word), plain, n=1)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def named(name: str, things: Mapping[str, _Thing], what: str) -> _Thing:
    """The thing of a name.

    Args:
        what: such a thing is, for the error.
    Raises:
        UsageError: if there is none, with a name that is near.
    """
    if name not in things:
        some = ", ".join(list(things)[:_SAID]) + (", ..." if len(things) > _SAID else "")
        raise UsageError(
            f"there is no {what} {repr(name)[:_QUOTED]}", hint=did_you_mean(str(name), things) or f"there is {some}"
        )
    return things[name]


def near_path(path: str | Path, fits: Callable[[Path], bool]) -> str | None:
    """`did you mean runs/know?`: what lies in the same folder and is called alike, None where nothing does.

    Args:
        path: that was typed, and is not there.
        fits: whether something on the disk could have been meant.
    """
    path = Path(path)
    try:
        with os.scandir(path.parent.expanduser()) as entries:
            names = sorted(entry.name for entry, _ in zip(entries, range(_MANY), strict=False))
    except (OSError, RuntimeError, ValueError):  # no such folder, or no such home
        return None
    fitting = [name for name in names if name != path.name and fits(path.parent.expanduser() / name)]
    stems = {Path(name).stem: name for name in reversed(fitting)}  # endings would make any two files alike
    stem = _nearest(path.stem, stems)
    if stem is None:
        return None
    near = path.parent / stems[stem]
    if unicodedata.normalize("NFC", near.name) == unicodedata.normalize("NFC", path.name):
        return f"{near} is there, which looks the same in other Unicode characters: let the shell complete it."
    return f"did you mean {near}?"


def holding(name: str) -> Callable[[Path], bool]:
    """Whether a directory has a file of that name, as `near_path` asks."""
    return lambda folder: (folder / name).is_file()


def hints(*several: str | None) -> str | None:
    """Ways out as one text, with a semicolon between two of which the first does not end as a sentence does.

    Args:
        several: the likeliest first, None for one that there is not.
    Returns:
        None where there is none at all.
    """
    return " ".join(one if one.endswith(("?", ".")) else f"{one};" for one in several if one).rstrip(";") or None
