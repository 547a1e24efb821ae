"""Progress bars on a terminal. Loaded when the first one is drawn."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from loracli.progress import WORK, amount_text


def progress_bars(console: Console) -> Progress:
    """Bars that vanish when they are done; every task has the fields `unit` and `status`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        _Amount(),
        TextColumn("{task.fields[status]}", style="cyan", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
    )


class _Amount(ProgressColumn):
    """Done of total with the rate, `12.1 MB / 48.0 MB  3.1 MB/s`; of work, which has no unit of its own, the share."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if unit == WORK:
            return Text(f"{task.percentage:.0f} %")
        total = "" if task.total is None else f" / {amount_text(task.total, unit)}"
        speed = f"  {amount_text(task.speed, unit)}/s" if task.speed else ""
        return Text(f"{amount_text(task.completed, unit)}{total}{speed}")
