"""The seam between long work and whoever shows how far it is.

The library calls it and draws nothing; `loracli.cli` draws with Rich; the default is silence.
"""

from __future__ import annotations

from typing import Protocol

WORK = "work"  # the unit of effort that counts steps of different cost; only its share of the total means something


class Progress(Protocol):
    """What long work needs to say. A task is named once by `begin` and by the same name after.

    Downloads call it from several threads at a time.
    """

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """A piece of work starts: `total` units of `unit` ("B" for bytes, "modules", WORK), None when unknown."""

    def advance(self, task: str, amount: int, status: str = "") -> None:
        """`amount` more units are done; `status` is a short text beside the bar, such as the loss."""

    def finish(self, task: str) -> None:
        """The work is over."""

    def note(self, message: str) -> None:
        """One line that the user should know of and that is no error."""

    def warn(self, message: str) -> None:
        """One line about something that may not be what the user wanted."""


class Silent:
    """The `Progress` of library use: says nothing."""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, task: str, amount: int, status: str = "") -> None:
        pass

    def finish(self, task: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


SILENT = Silent()


def amount_text(amount: float, unit: str) -> str:
    """`12.3 MB`, `1.2k tok`, `17 tok`."""
    if unit == "B":
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if amount >= size:
                return f"{amount / size:.1f} {name}"
        return f"{amount:.0f} B"
    return f"{amount / 1e3:.1f}k {unit}" if amount >= 1e4 else f"{amount:.0f} {unit}"


def duration_text(seconds: float) -> str:
    """`45 s`, `3 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
