"""The seam between long work and whoever shows how far it is.

The library calls it and draws nothing; `loracli.cli` draws with Rich; the default is silence. A public function takes
the word "bar" too, for what the command line draws. The package, which stands above all rooms, says what that is
(`drawn_by`), so that no room has to know one upstairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

from loracli.arguments import call_declared
from loracli.errors import UsageError

_Asked = ParamSpec("_Asked")
_Result = TypeVar("_Result")

Bar = Literal["bar"]

WORK = "work"  # the unit of effort that counts steps of different cost; only its share of the total means something


@runtime_checkable
class Progress(Protocol):
    """What long work needs to say. A task is named once by `begin` and by the same name after.

    Downloads call it from several threads at a time.
    """

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """A piece of work starts: `total` units of `unit` ("B" for bytes, "modules", WORK), None when unknown."""

    def advance(self, task: str, amount: int, status: str = "") -> None:
        """`amount` more units are done; `status` is a short text beside the bar, such as the loss."""

    def expect(self, task: str, total: int) -> None:
        """The work of a task that goes on comes to `total` units, and not to what was said before."""

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

    def expect(self, task: str, total: int) -> None:
        pass

    def finish(self, task: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


SILENT = Silent()

_bars: Callable[[], AbstractContextManager[Progress]]


def drawn_by(bars: Callable[[], AbstractContextManager[Progress]]) -> None:
    """Says what draws a bar, and takes it off the screen at the end of its context."""
    global _bars
    _bars = bars


@contextmanager
def begun(progress: Progress, task: str, total: int | None, unit: str) -> Iterator[None]:
    """A task that is over at the end of the context, whatever ends it."""
    progress.begin(task, total, unit)
    try:
        yield
    finally:
        progress.finish(task)


def takes_bar(function: Callable[_Asked, _Result]) -> Callable[_Asked, _Result]:
    """Lets a public function be called with `progress="bar"`; it is told a `Progress`, whatever was given, and finds
    every argument to be of the type that it declares.

    Raises:
        UsageError: if what was given is neither that word nor a `Progress`, or an argument is of another type.
    """

    @wraps(function)
    def telling(*args: _Asked.args, **options: _Asked.kwargs) -> _Result:
        asked = options.get("progress", SILENT)
        if isinstance(asked, Progress):
            return call_declared(function, args, options)
        if asked != "bar":
            raise UsageError(
                f"progress is {repr(asked)[:60]}",
                hint='give "bar", or an object with the methods of loracli.progress.Progress',
            )
        with _bars() as bar:
            options["progress"] = bar
            return call_declared(function, args, options)

    return telling


def drawn(progress: Progress | Bar) -> Progress:
    """What a function that `takes_bar` was told, for the type checker: it is not the word any more."""
    assert not isinstance(progress, str)
    return progress


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
