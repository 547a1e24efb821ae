"""How far long work is, drawn: a line that keeps its places on a terminal of any width, and one to be read in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from loracli.progress import WORK, amount_text, duration_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task

_WIDE = 80  # columns of a terminal from which on a bar has its full width
_BAR, _NARROW_BAR = 20, 10
_TIME = len("0:00:00")
_SIZE = len("999.9 MB")
_ECHO = len("^C")  # that a terminal writes behind the line, which must not begin another one
_MOST_OF_TITLE = 4  # a title takes at most a quarter of the line


def progress_bars(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Bars that vanish when they are done; every task has the fields `unit` and `status`.

    A line has the title, the bar, the share or the amount, the time left and the status, in this order. The status
    alone gives way to a narrow terminal: its parts are left out from the end.

    Args:
        console: of the terminal.
        clock: seconds, from any start.
    """
    from rich.cells import cell_len
    from rich.progress import Progress
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    class Bars(Progress):
        def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
            shown = [task for task in tasks if task.visible]
            room, bar = console.width - _ECHO, _BAR if console.width >= _WIDE else _NARROW_BAR
            title = min(max((cell_len(task.description) for task in shown), default=0), room // _MOST_OF_TITLE)
            amount = max((_amount_width(task) for task in shown), default=0)
            rest = max(room - title - bar - amount - _TIME - 4, 0)
            table = Table.grid(padding=(0, 1), pad_edge=False)
            for width in (title, bar, amount, _TIME, rest):
                table.add_column(width=width, no_wrap=True, overflow="ellipsis")
            for task in shown:
                done = min(task.completed, task.total) if task.total is not None else task.completed
                speed = "" if task.fields["unit"] == WORK or not task.speed else _rate(task.speed, task.fields["unit"])
                status = ", ".join(part for part in (task.fields["status"], speed) if part)
                table.add_row(
                    Text(task.description),
                    ProgressBar(task.total, done, width=bar, pulse=task.total is None, animation_time=clock()),
                    Text(f"{_amount(done, task.total, task.fields['unit']):>{amount}}"),
                    Text(_time_left(task), style="progress.remaining"),
                    Text(fitting(status, rest), style="cyan"),
                )
            return table

    return Bars(console=console, transient=True, get_time=clock)


def fitting(status: str, width: int) -> str:
    """As many parts of a status, which stand between commas, as have room in so many columns."""
    from rich.cells import cell_len, set_cell_size

    parts = status.split(", ")
    while len(parts) > 1 and cell_len(", ".join(parts)) > width:
        parts.pop()
    shown = ", ".join(parts)
    return shown if cell_len(shown) <= width else set_cell_size(shown, max(width - 1, 0)) + "…" * (width > 0)


def _rate(speed: float, unit: str) -> str:
    return f"{amount_text(speed, unit)}/s"


def _amount(done: float, total: float | None, unit: str) -> str:
    """The share of work, which has no unit; of anything else what is done and what there is to do."""
    if unit == WORK:
        return f"{_percent(done, total)} %"
    return amount_text(done, unit) + ("" if total is None else f" / {amount_text(total, unit)}")


def _percent(done: float, total: float | None) -> int:
    return min(int(100 * done // total), 100) if total else 0


def _amount_width(task: Task) -> int:
    """What the longest amount of a task takes, so that nothing moves while it grows."""
    unit, total = task.fields["unit"], task.total
    if unit == WORK:
        return len("100 %")
    whole = len(amount_text(task.completed if total is None else total, unit))
    longest = max(whole, _SIZE) if unit == "B" else whole
    return longest if total is None else longest + len(" / ") + whole


def _time_left(task: Task) -> str:
    if task.total is None:
        return ""
    left = task.time_remaining  # 0 at the end
    if left is None:
        return "-:--:--"
    minutes, seconds = divmod(max(int(left), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours < 100 else f"{hours // 24} d"


class Line:
    """How far one task is, in words.

    Args:
        total: units, None if it is not known.
        unit: of them.
        bar: that draws it, None if none does.
        clock: seconds, from any start.
    """

    def __init__(
        self, total: int | None, unit: str, bar: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self.bar, self._clock = total, unit, bar, clock
        self.done = 0
        self.status = ""
        self.started = self.said = clock()

    def describe(self) -> str:
        """The share or the amount, the status and the time left."""
        seconds = max(self._clock() - self.started, 1e-9)
        parts = [f"{_percent(self.done, self.total)} %"] if self.total else []
        if self.unit != WORK:
            parts.append(f"{amount_text(self.done, self.unit)}, {_rate(self.done / seconds, self.unit)}")
        if self.status:
            parts.append(self.status)
        if self.total and self.done:
            left = max(self.total - self.done, 0)
            parts.append(f"{duration_text(seconds * left / self.done)} left")
        return ", ".join(parts)

    def result(self) -> str:
        """What came of it, once it is done."""
        seconds = self._clock() - self.started
        amount = "" if self.unit == WORK or not self.done else f"{amount_text(self.done, self.unit)} in "
        return f"{amount}{seconds:.2f} s" + (f", {self.status}" if self.status else "")
