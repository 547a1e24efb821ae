"""How a public value shows itself: one line in Python, a table in a notebook.

    <Recipe know + form, module, better by 0.94 nats>

A line goes where nobody looks closely, a prompt, a log or a failed assertion. So it is short whatever the value holds,
it says names of strangers only as `escaping` lets them out, and it reads no file.

What a notebook shows is drawn by rooms that stand above those of the values. The package, which stands above all rooms,
says by whom (`drawn_by`), so that no room has to know one upstairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loracli.system.escaping import visible

MOST = 120  # characters of a line
_NAME = 32  # of one name in it
_NAMES = 3  # that are said

_draw: Callable[[Any], str]


def repr_line(value: object, *said: str) -> str:
    """`<Recipe know + form, module>`: the kind of a value and what a person wants to know of it, as its `repr`.

    Args:
        value: whose class is named.
        said: its parts, in the order of what matters, for a line that is too long loses its end; empty ones are left
            out.
    """
    text = visible(f"{type(value).__name__} {', '.join(filter(None, said))}")
    return f"<{text}>" if len(text) <= MOST - 2 else f"<{text[: MOST - 5]}...>"


def names_text(names: Iterable[str]) -> str:
    """`know + form`, or with many of them `know + form + 3 more`; a long name by its end."""
    every = list(names)
    shown = every if len(every) <= _NAMES else every[: _NAMES - 1]
    more = [f"{len(every) - len(shown)} more"] if len(every) > len(shown) else []
    return " + ".join([*map(_short, shown), *more])


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def path_text(path: Path) -> str:
    """The last name of a file or directory."""
    return _short(path.name or str(path))


def count_text(count: int, what: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def typed_text(value: object) -> str:
    """As it is typed: of a number the shortest text that is read back as the same."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def drawn_by(draw: Callable[[Any], str]) -> None:
    """Says what draws the values that a notebook shows as more than a line."""
    global _draw
    _draw = draw


def html_of(value: Any) -> str:
    """The value as HTML with every string escaped, as its `_repr_html_`."""
    return _draw(value)
