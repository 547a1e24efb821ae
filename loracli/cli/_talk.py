"""How a command talks, set once by the options that every command has."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

COLORS = ("auto", "always", "never")
DETAILS, TRACEBACKS = 1, 2  # -v and -vv


@dataclass(frozen=True)
class Talk:
    """What `--color` and `--verbose` say.

    Args:
        color: `auto` for colours on a terminal, `always`, or `never`.
        verbosity: how many times `-v` was given: 1 tells what was done and how long it took, 2 adds the traceback of an
            error.
    """

    color: str = "auto"
    verbosity: int = 0


TALK: ContextVar[Talk] = ContextVar("talk", default=Talk())  # noqa: B039  # frozen
