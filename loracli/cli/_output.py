"""Everything a person or a script sees: results on stdout, talk and progress on stderr.

The only user of Rich, which is loaded when something is printed.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from loracli.cli._bars import Line, progress_bars
from loracli.cli._options import Json, Quiet
from loracli.errors import (
    CalibrationError,
    LoracatError,
    RecipeError,
    SettingsError,
    UsageError,
    VerificationError,
)
from loracli.system.document import encode
from loracli.system.escaping import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text


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

# Of the Hub's client: their messages repeat what a server says, which can be anything, a token that was sent to it too.
_REPEAT_A_SERVER = ("huggingface_hub", "httpx", "httpx2", "httpcore", "h11", "h2", "requests", "urllib3", "hf_xet")


def told_traceback(error: BaseException) -> list[str]:
    """The lines of an error's traceback for -vv, its causes first, without words of a server."""
    lines: list[str] = []
    for one in _chain(error):
        frames: TracebackType | None = one.__traceback__
        lines += ["Traceback (most recent call last):", *"".join(traceback.format_tb(frames)).splitlines()]
        kind = f"{type(one).__module__}.{type(one).__qualname__}"
        silent = kind.partition(".")[0] in _REPEAT_A_SERVER
        shown = [f"{kind}: its message is left out"] if silent else traceback.format_exception_only(one)
        lines += [*"".join(shown).splitlines(), ""]
    return lines[:-1]


def _chain(error: BaseException) -> list[BaseException]:
    """An error after what it came from."""
    found: list[BaseException] = []
    rest: BaseException | None = error
    while rest is not None and rest not in found:
        found.append(rest)
        rest = rest.__cause__ or (None if rest.__suppress_context__ else rest.__context__)
    return found[::-1]


SCHEMA = 1  # the version of every JSON document, under the key "loracat"; only ever added to
SHOWN_PROBLEMS = 20
PIPE_WIDTH = 10_000  # columns where stdout is no terminal, so that nothing a script reads is folded
GAP = 2  # columns between those of a table
MIDDLE, ABOVE, BELOW = (238, 238, 238), (179, 89, 0), (11, 92, 173)  # of a map, in red, green and blue
SECONDS_BETWEEN_LINES = 15.0  # where stderr is no terminal, a line now and then takes the bar's place
ASCII = {"·": "|", "…": "..."}  # of our own signs, where the terminal's encoding lacks them


def print_anything() -> None:
    """From now on a character that a stream's encoding lacks is replaced or escaped, instead of ending the command."""

    def replacement(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lacking = error.object[error.start : error.end]
        shown = "".join(ASCII.get(c, c.encode("ascii", "backslashreplace").decode("ascii")) for c in lacking)
        return shown, error.end

    codecs.register_error("loracat", replacement)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not under a test's capture
            stream.reconfigure(errors="loracat")


def plain(text: str, style: str = "") -> Text:
    """`text` for Rich without markup, emoji, control or unseen characters."""
    from rich.text import Text

    return Text(visible(text), style=style)


@dataclass(frozen=True)
class Block:
    """A number of a map.

    Args:
        text: of it.
        share: from -1 to 1: how far below or above the middle it is.
    """

    text: str
    share: float

    def rendered(self, width: int) -> Text:
        """The number on its colour, aligned to the right."""
        from rich.text import Text

        far = ABOVE if self.share >= 0 else BELOW
        size = min(1.0, abs(self.share))
        red, green, blue = (round(m + size * (f - m)) for m, f in zip(MIDDLE, far, strict=True))
        ink = "white" if size > 0.6 else "black"
        return Text(f"{visible(self.text):>{width}}", style=f"{ink} on rgb({red},{green},{blue})")


class Output:
    """One command's output.

    Args:
        as_json: print one JSON document and nothing else on stdout.
        quiet: print bare values; notes and progress are left out, warnings and errors are not.
    """

    def __init__(self, *, as_json: Json = False, quiet: Quiet = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._stdout = _console(sys.stdout)
        self._stderr = _console(sys.stderr)
        self._draws = _is_terminal(sys.stderr) and not (quiet or as_json)
        self._bars: Progress | None = None
        self._tasks: dict[str, Line] = {}
        self._warned: set[str] = set()  # each is said once, however many parts of the work find it
        self._lock = threading.RLock()  # downloads tell of themselves from threads of their own

    # Results: stdout.

    def document(self, content: dict[str, Any]) -> None:
        """Takes any bar off the screen and prints the JSON document, if one was asked for. Every command calls this
        exactly once, before it shows anything else."""
        self.close()
        if self.as_json:
            sys.stdout.write(json.dumps({"loracat": SCHEMA, **content}, indent=2, allow_nan=False) + "\n")

    def value(self, *fields: str) -> None:
        """The line that `--quiet` keeps, its fields separated by tabs."""
        if self.quiet and not self.as_json:
            # Not by the console, which would make spaces of tabs.
            sys.stdout.write("\t".join(map(visible, fields)) + "\n")

    def text(self, text: str) -> None:
        """A whole text file of printable characters, with --quiet too."""
        if not self.as_json:
            sys.stdout.write(text)

    def line(self, text: str = "", style: str = "", *, whole: bool = False) -> None:
        """A line for people; `whole`, where a command in it may be copied: the terminal alone breaks it."""
        if not (self.quiet or self.as_json):
            self._stdout.print(plain(text, style), soft_wrap=whole or None)

    def piece(self, text: str, end: str = "") -> None:
        """A part of a line, for people and for `--quiet`."""
        if not self.as_json:
            self._stdout.print(plain(text), end=end, soft_wrap=True)

    @property
    def detailed(self) -> bool:
        """Whether `-v` asks for what a result rests on."""
        return TALK.get().verbosity >= DETAILS

    @property
    def width(self) -> int:
        """Columns of a line of results."""
        return self._stdout.width

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, strong: int | None = None) -> None:
        """A table for people: the first column is text, the others are aligned to the right; row `strong` stands
        out. One that is too wide for the terminal comes in parts, each with the first column."""
        if self.quiet or self.as_json:
            return
        from rich.cells import cell_len
        from rich.table import Table

        every = [[visible(cell) for cell in row] for row in (columns, *rows)]
        widths = [max(cell_len(row[index]) for row in every) for index in range(len(columns))]
        room = self._stdout.width
        whole = widths[0] <= room * 2 // 3 and widths[0] + GAP + max(widths[1:], default=0) <= room
        first = widths[0] if whole else min(widths[0], room // 2)
        for number, shown in enumerate(_parts(first, widths, room)):
            if number:
                self._stdout.print()
            table = Table(box=None, pad_edge=False, header_style="bold")
            for index in shown:
                table.add_column(
                    plain(every[0][index]),
                    justify="right" if index else "left",
                    max_width=None if index else first,
                    no_wrap=bool(index) and first + GAP + widths[index] <= room,
                    overflow="fold",
                )
            for place, row in enumerate(rows):
                style = "bold green" if place == strong else ""
                table.add_row(*(plain(row[index], style) for index in shown))
            self._stdout.print(table, soft_wrap=False)

    def blocks(self, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Block | None]]]) -> None:
        """A map for people: coloured blocks with their numbers on a terminal that has colours, numbers elsewhere."""
        if self.quiet or self.as_json:
            return
        if not self._stdout.is_terminal or self._stdout.color_system is None:
            cells = [[name, *("-" if b is None else b.text for b in blocks)] for name, blocks in rows]
            self.table(["", *columns], cells)
            return
        from rich.text import Text

        left = max(len(name) for name, _ in rows) + 1
        widths = [max(len(column), 6) for column in columns]
        heading = "".join(f" {column:>{width}}" for column, width in zip(columns, widths, strict=True))
        self._stdout.print(plain(" " * left + heading, "bold"))
        for name, blocks in rows:
            line = [plain(f"{name:>{left}}")]
            for block, width in zip(blocks, widths, strict=True):
                line += [Text(" "), Text(" " * width) if block is None else block.rendered(width)]
            self._stdout.print(Text.assemble(*line))

    # Talk: stderr.

    def note(self, message: str) -> None:
        if not self.quiet:
            self._stderr.print(plain(message, "dim"))

    def warn(self, message: str) -> None:
        with self._lock:
            known = message in self._warned
            self._warned.add(message)
        if not known:
            self._say("warning: ", "yellow", _typed(message))

    def ask(self, marker: str) -> str:
        """A line that is typed on the terminal, without its end; nothing at the end of the input."""
        self.close()
        try:
            if sys.stdout.isatty():
                with suppress(ImportError):
                    import readline  # noqa: F401  # what is typed can be edited
                return input(marker)
            self._stderr.print(plain(marker), end="")
            return sys.stdin.readline().removesuffix("\n")
        except EOFError:
            self._stderr.print()
            return ""
        except UnicodeDecodeError:
            raise UsageError("what was typed is not text in the encoding of the terminal") from None

    def hint(self, command: str, *, what: str = "next") -> None:
        """Names the next command to type, or `what` else it is for, in one piece that can be copied."""
        if not (self.quiet or self.as_json):
            self._say(f"{what}: ", "dim", command, "cyan", whole=True)

    def error(self, error: LoracatError) -> None:
        """One error: what and where, then the single problems if there are many, then what to do."""
        self.close()
        if TALK.get().verbosity >= TRACEBACKS:
            for line in told_traceback(error):
                self._stderr.print(plain(line, "dim"))
        if self.as_json:
            self.document({"error": describe(error)})
            return
        self.error_line(error)
        problems = _together(error.problems)
        for problem in problems[:SHOWN_PROBLEMS]:
            self._stderr.print(plain(f"  {problem}"))
        if len(problems) > SHOWN_PROBLEMS:
            self._stderr.print(plain(f"  ... and {len(problems) - SHOWN_PROBLEMS} more"))
        if error.hint:
            self._say("hint: ", "cyan", _typed(error.hint), whole=True)

    def error_line(self, error: LoracatError) -> None:
        """What and where alone, for whoever has the rest as a document."""
        self._say("error: ", "bold red", error.summary)

    def _say(self, label: str, label_style: str, message: str, style: str = "", *, whole: bool = False) -> None:
        """`whole`: without line ends of ours, as it may be copied."""
        from rich.text import Text

        self._stderr.print(Text.assemble((label, label_style), plain(message, style)), soft_wrap=whole or None)

    def interrupted(self, code: int, hint: str | None = None) -> None:
        """The last word after Ctrl-C, SIGTERM or SIGHUP, on stderr with a document too, as of an error; `hint`, where
        something is kept, was said there already."""
        self.close()
        message = "interrupted" if code == 130 else "terminated"
        if self.as_json:
            self.document({"error": {"code": code, "kind": "Interrupted", "message": message, "hint": hint}})
        self._stderr.print(plain(message))

    # Progress: stderr, a bar on a terminal, a line now and then elsewhere.

    def begin(self, task: str, total: int | None, unit: str) -> None:
        with self._lock:
            self._begin(task, total, unit)

    def _begin(self, task: str, total: int | None, unit: str) -> None:
        self.finish(task)
        bar = None
        if self._draws:
            if self._bars is None:
                self._bars = progress_bars(self._stderr)
                self._bars.start()
            bar = self._bars.add_task(visible(task), total=total, status="", unit=unit)
        self._tasks[task] = Line(total, unit, bar)

    def advance(self, task: str, amount: int, status: str = "") -> None:
        with self._lock:
            line = self._tasks.get(task)
            if line is None:
                return
            line.done += amount
            line.status = status or line.status
            if self._bars is not None and line.bar is not None:
                self._bars.update(line.bar, advance=amount, status=visible(line.status))  # type: ignore[arg-type]
            elif time.monotonic() - line.said > SECONDS_BETWEEN_LINES:
                line.said = time.monotonic()
                self.note(f"{task}: {line.describe()}")

    def expect(self, task: str, total: int) -> None:
        with self._lock:
            line = self._tasks.get(task)
            if line is None:
                return
            line.total = total
            if self._bars is not None and line.bar is not None:
                self._bars.update(line.bar, total=total)  # type: ignore[arg-type]

    def finish(self, task: str) -> None:
        with self._lock:
            line = self._tasks.pop(task, None)
            if line is None:
                return
            if self._bars is not None and line.bar is not None:
                self._bars.remove_task(line.bar)  # type: ignore[arg-type]
                if not self._tasks:
                    self.close()
            if TALK.get().verbosity >= DETAILS:
                self.note(f"{task}: {line.result()}")

    def close(self) -> None:
        """Takes any bar off the screen."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
            self._tasks.clear()


@contextmanager
def bars() -> Iterator[Output]:
    """What `progress="bar"` of a public function is: the talk of a command, without its results."""
    out = Output()
    try:
        yield out
    finally:
        out.close()


def _console(stream: TextIO) -> Console:
    """A terminal gets lines broken between words; a pipe gets every line whole, and colours only if asked for."""
    from rich.console import Console

    terminal, color = stream.isatty(), TALK.get().color
    return Console(
        file=stream,
        width=None if terminal else PIPE_WIDTH,
        soft_wrap=not terminal,
        highlight=False,
        emoji=False,
        markup=False,
        no_color=True if color == "never" else False if color == "always" else None,
        force_terminal=True if color == "always" else None,
        color_system="standard" if color == "always" and not _is_terminal(stream) else "auto",
    )


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn over; FORCE_COLOR and `--color always` do not make a terminal of a pipe."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _parts(first: int, widths: Sequence[int], room: int) -> list[list[int]]:
    """Which columns stand side by side, the first one in every part."""
    parts, used = [[0]], first
    for index in range(1, len(widths)):
        if used + GAP + widths[index] > room and len(parts[-1]) > 1:
            parts.append([0])
            used = first
        parts[-1].append(index)
        used += GAP + widths[index]
    return parts


def encode_as(result: Any, **names: str) -> dict[str, Any]:
    """The fields of a dataclass for a JSON document, some by the names that they have there."""
    return {names.get(name, name): value for name, value in encode(result).items()}


_PROBLEM = re.compile(r"(.+?):(\d+): (.*)", re.DOTALL)


def _together(problems: Sequence[str]) -> Sequence[str]:
    """One line for all lines of a file that are bad in the same way, `data.jsonl:2 to 26, 25 lines: reason`."""
    found = [_PROBLEM.fullmatch(problem) for problem in problems]
    if len(found) < 2 or not all(found) or len({(one[1], one[3]) for one in found if one}) > 1:
        return problems
    first, last = found[0], found[-1]
    assert first is not None and last is not None
    return [f"{first[1]}:{first[2]} to {last[2]}, {len(found)} lines: {first[3]}"]


_IN_PYTHON = re.compile(r", in Python \w+=\w+")


def _typed(hint: str) -> str:
    """A hint for whoever types a command, without the way in Python beside it."""
    return _IN_PYTHON.sub("", hint)


def describe(error: LoracatError) -> dict[str, Any]:
    """An error for a JSON document."""
    content: dict[str, Any] = {
        "code": error.exit_code,
        "kind": type(error).__name__,
        "message": error.summary,
        "hint": error.hint and _typed(error.hint),
    }
    if isinstance(error, (CalibrationError, RecipeError, SettingsError, VerificationError)):
        content["problems"] = list(error.problems)
    return content
