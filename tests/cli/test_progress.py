"""Progress as it is drawn: on a terminal of any width its places stay, and work that was underestimated looks whole."""

from __future__ import annotations

import io
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from loracli.cli import _bars
from loracli.cli._output import Output
from loracli.progress import WORK
from tests.cli.process import COMMAND, environment

STATUS = "15/23 task-arithmetic, from the sum, loss 1.234, validation 1.250, 12345 tok/s"
TOTAL = 1000


def drawn(width: int, status: str, total: int | None = TOTAL, unit: str = WORK) -> Iterator[str]:
    """A line for each step of work that takes two and a half times what was expected, at a step a second."""
    now = 0.0
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bars = _bars.progress_bars(console, lambda: now)
    task = bars.add_task("compare", total=total, unit=unit, status="")
    for _ in range(26):
        with console.capture() as shown:
            console.print(bars.get_renderable())
        lines = shown.get().splitlines()
        assert len(lines) == 1
        yield lines[0]
        now += 1.0
        bars.update(task, advance=100, status=status)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_bar_share_and_time_stay_in_their_places_and_the_status_alone_is_shortened(width: int) -> None:
    places, shares, times = set(), [], []
    for line in drawn(width, STATUS):
        found = re.search(r"^compare +([━╸╺ ]+) ( *\d+) % (\d+:\d\d:\d\d|-:--:--)", line)
        assert found is not None and len(line) <= width
        places.add((found.end(2), found.start(3), found.end(3)))
        shares.append(int(found[2]))
        times.append(found[3])
        status = line[found.end(3) :].strip()
        assert STATUS.startswith(status)
        assert not status or status == STATUS or STATUS.removeprefix(status).startswith(", ")
    assert len(places) == 1
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 100
    assert times[5] == "0:00:05" and times[-1] == "0:00:00"
    assert status.startswith("15/23 task-arithmetic")  # is there room for, whatever goes


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize(("total", "unit"), [(1000, "B"), (None, "B"), (1000, "records")])
def test_amounts_and_long_titles_stay_within_the_line(width: int, total: int | None, unit: str) -> None:
    lines = list(drawn(width, "a status without any comma that is far too long for any terminal " * 2, total, unit))
    assert max(map(len, lines)) <= width and len({line.index("━") for line in lines[1:]}) == 1
    assert all("…" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("width", "shown"),
    [(40, "3/7 fit, loss 1.2, 900 tok/s"), (20, "3/7 fit, loss 1.2"), (12, "3/7 fit"), (5, "3/7 …"), (0, "")],
)
def test_the_rate_goes_first_and_then_the_loss(width: int, shown: str) -> None:
    assert _bars.fitting("3/7 fit, loss 1.2, 900 tok/s", width) == shown


def test_a_line_of_a_log_never_passes_the_whole_and_has_no_negative_time() -> None:
    now = 0.0
    line = _bars.Line(TOTAL, WORK, None, lambda: now)
    for _ in range(25):
        now, line.done = now + 1.0, line.done + 100
        share, left = re.fullmatch(r"(\d+) %, (\S+) s left", line.describe()).groups()  # type: ignore[union-attr]
        assert int(share) == min(line.done // 10, 100) and int(left) == max(10 - int(now), 0)


def test_after_an_interruption_the_bar_is_gone_and_the_message_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Output()
    out.begin("fit", 10, WORK)
    out.advance("fit", 3, "1/2 fitting")
    out.interrupted(130)
    sent = screen.getvalue()
    assert "━" in sent and sent.rindex("\x1b[2K") > sent.rindex("━") and sent.endswith("\x1b[2Kinterrupted\n")


def test_ctrl_c_on_a_terminal_leaves_the_message_and_no_bar(here: Path) -> None:
    process, screen = pty.fork()
    words = ["fit", "--adapters", "know", "form", "--data", "calibration.jsonl", "--base", "base", "-o", "new.json"]
    if process == 0:  # pragma: no cover  # the child
        os.chdir(here)
        os.execvpe(COMMAND[0], [*COMMAND, *words], environment(TERM="xterm-256color", NO_COLOR="1", COLUMNS="80"))
    sent, stopped = b"", False
    while True:
        try:
            part = os.read(screen, 1 << 16)
        except OSError:
            break
        sent += part
        if not stopped and re.search(b"[1-9] %", sent):
            os.write(screen, b"\x03")
            stopped = True
    _, status = os.waitpid(process, 0)
    text = sent.decode()
    assert os.waitstatus_to_exitcode(status) == 130 and stopped
    assert "\x1b[2K" in text[text.rindex(" %") :]  # the last line that was drawn is erased
    assert text.rstrip().splitlines()[-1].endswith("interrupted")
