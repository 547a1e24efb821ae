"""Everything a person or a script sees: results on stdout, talk on stderr. The only user of Rich."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from loracli.errors import CalibrationError, LoracatError, RecipeError, VerificationError
from loracli.progress import WORK, amount_text, duration_text

SCHEMA = 1  # the version of every JSON document, under the key "loracat"; only ever added to
SHOWN_PROBLEMS = 20
PIPE_WIDTH = 200  # columns where stdout is no terminal, so that nothing a script reads is folded
MIDDLE, ABOVE, BELOW = (238, 238, 238), (179, 89, 0), (11, 92, 173)  # of a map, in red, green and blue
SECONDS_BETWEEN_LINES = 15.0  # where stderr is no terminal, a line now and then takes the bar's place


def safe(text: str) -> str:
    """`text` with every control, bidirectional or otherwise unprintable character escaped, so that names stay
    harmless."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plain(text: str, style: str = "") -> Text:
    """`text` for Rich without markup, emoji or control characters."""
    return Text(safe(text), style=style)


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
        far = ABOVE if self.share >= 0 else BELOW
        size = min(1.0, abs(self.share))
        red, green, blue = (round(m + size * (f - m)) for m, f in zip(MIDDLE, far, strict=True))
        ink = "white" if size > 0.6 else "black"
        return Text(f"{safe(self.text):>{width}}", style=f"{ink} on rgb({red},{green},{blue})")


class Output:
    """One command's output.

    Args:
        as_json: print one JSON document and nothing else on stdout.
        quiet: print bare values; notes and progress are left out, warnings and errors are not.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._stdout = _console(sys.stdout)
        self._stderr = _console(sys.stderr)
        self._bars: RichProgress | None = None
        self._tasks: dict[str, _Line] = {}
        self._lock = threading.RLock()  # downloads tell of themselves from threads of their own

    # Results: stdout.

    def document(self, content: dict[str, Any]) -> None:
        """The JSON document, if one was asked for. Every command calls this exactly once."""
        if self.as_json:
            sys.stdout.write(json.dumps({"loracat": SCHEMA, **content}, indent=2, allow_nan=False) + "\n")

    def value(self, text: str) -> None:
        """The line that `--quiet` keeps."""
        if self.quiet and not self.as_json:
            self._stdout.print(plain(text))

    def line(self, text: str = "", style: str = "") -> None:
        """A line for people."""
        if not (self.quiet or self.as_json):
            self._stdout.print(plain(text, style))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, strong: int | None = None) -> None:
        """A table for people: the first column is text, the others are aligned to the right; row `strong` stands
        out."""
        if self.quiet or self.as_json:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
        for index, row in enumerate(rows):
            style = "bold green" if index == strong else ""
            table.add_row(*(plain(cell, style) for cell in row))
        self._stdout.print(table, soft_wrap=False)

    def blocks(self, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Block | None]]]) -> None:
        """A map for people: coloured blocks with their numbers on a terminal that has colours, numbers elsewhere."""
        if self.quiet or self.as_json:
            return
        if not self._stdout.is_terminal or self._stdout.color_system is None:
            cells = [[name, *("-" if b is None else b.text for b in blocks)] for name, blocks in rows]
            self.table(["", *columns], cells)
            return
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
        self._stderr.print(Text.assemble(("warning: ", "yellow"), plain(message)))

    def hint(self, command: str) -> None:
        """Names the next command to type."""
        if not (self.quiet or self.as_json):
            self._stderr.print(Text.assemble(("next: ", "dim"), plain(command, "cyan")))

    def error(self, error: LoracatError) -> None:
        """One error: what and where, then the single problems if there are many, then what to do."""
        self.close()
        if self.as_json:
            self.document({"error": describe(error)})
            return
        self._stderr.print(Text.assemble(("error: ", "bold red"), plain(str(error))))
        problems = getattr(error, "problems", ())
        for problem in problems[:SHOWN_PROBLEMS]:
            self._stderr.print(plain(f"  {problem}"))
        if len(problems) > SHOWN_PROBLEMS:
            self._stderr.print(plain(f"  ... and {len(problems) - SHOWN_PROBLEMS} more"))
        if error.hint:
            self._stderr.print(Text.assemble(("hint: ", "cyan"), plain(error.hint)))

    def interrupted(self, code: int) -> None:
        """The last word after Ctrl-C or SIGTERM."""
        message = "interrupted" if code == 130 else "terminated"
        if self.as_json:
            self.document({"error": {"code": code, "kind": "Interrupted", "message": message, "hint": None}})
        else:
            self._stderr.print(plain(message))

    # Progress: stderr, a bar on a terminal, a line now and then elsewhere.

    def begin(self, task: str, total: int | None, unit: str) -> None:
        with self._lock:
            self._begin(task, total, unit)

    def _begin(self, task: str, total: int | None, unit: str) -> None:
        self.finish(task)
        if self._stderr.is_terminal and not (self.quiet or self.as_json):
            if self._bars is None:
                self._bars = RichProgress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=20),
                    _Amount(),
                    TextColumn("{task.fields[status]}", style="cyan", markup=False),
                    TimeRemainingColumn(elapsed_when_finished=True),
                    console=self._stderr,
                    transient=True,
                )
                self._bars.start()
            bar = self._bars.add_task(safe(task), total=total, status="", unit=unit)
            self._tasks[task] = _Line(total, unit, bar)
        else:
            self._tasks[task] = _Line(total, unit, None)

    def advance(self, task: str, amount: int, status: str = "") -> None:
        with self._lock:
            line = self._tasks.get(task)
            if line is None:
                return
            line.done += amount
            line.status = status or line.status
            if self._bars is not None and line.bar is not None:
                self._bars.update(line.bar, advance=amount, status=safe(line.status))  # type: ignore[arg-type]
            elif time.monotonic() - line.said > SECONDS_BETWEEN_LINES:
                line.said = time.monotonic()
                self.note(f"{task}: {line.describe()}")

    def finish(self, task: str) -> None:
        with self._lock:
            line = self._tasks.pop(task, None)
            if line is None or self._bars is None or line.bar is None:
                return
            self._bars.remove_task(line.bar)  # type: ignore[arg-type]
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Takes any bar off the screen."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
            self._tasks.clear()


def _console(stream: TextIO) -> Console:
    """A terminal gets lines broken between words; a pipe gets every line whole."""
    terminal = stream.isatty()
    width = None if terminal else PIPE_WIDTH
    return Console(file=stream, width=width, soft_wrap=not terminal, highlight=False, emoji=False, markup=False)


class _Line:
    """How far one task is."""

    def __init__(self, total: int | None, unit: str, bar: int | None) -> None:
        self.total, self.unit, self.bar = total, unit, bar
        self.done = 0
        self.status = ""
        self.started = self.said = time.monotonic()

    def describe(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{100 * self.done // self.total} %"] if self.total else []
        if self.unit != WORK:
            parts.append(amount_text(self.done, self.unit) + f", {amount_text(self.done / seconds, self.unit)}/s")
        if self.status:
            parts.append(self.status)
        if self.total and self.done:
            parts.append(f"{duration_text(seconds * (self.total - self.done) / self.done)} left")
        return ", ".join(parts)


class _Amount(ProgressColumn):
    """Done of total with the rate, `12.1 MB / 48.0 MB  3.1 MB/s`; of work, which has no unit of its own, the share."""

    def render(self, task: RichTask) -> Text:
        unit = task.fields["unit"]
        if unit == WORK:
            return Text(f"{task.percentage:.0f} %")
        total = "" if task.total is None else f" / {amount_text(task.total, unit)}"
        speed = f"  {amount_text(task.speed, unit)}/s" if task.speed else ""
        return Text(f"{amount_text(task.completed, unit)}{total}{speed}")


def describe(error: LoracatError) -> dict[str, Any]:
    """An error for a JSON document."""
    content: dict[str, Any] = {
        "code": error.exit_code,
        "kind": type(error).__name__,
        "message": str(error),
        "hint": error.hint,
    }
    if isinstance(error, (CalibrationError, RecipeError, VerificationError)):
        content["problems"] = list(error.problems)
    return content
