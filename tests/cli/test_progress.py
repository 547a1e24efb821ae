"""Progress as it is drawn: on a terminal of any width its places stay, and work that was underestimated looks whole."""

from __future__ import annotations

import io
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from loracli.cli import _bars, app
from loracli.cli._output import Output
from loracli.progress import WORK
from tests.cli.process import COMMAND, environment, own_terminal

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


_DATA = ["--data", "test.jsonl", "--base", "base"]
_FIT = ["fit", "-a", "know", "form", "-d", "calibration.jsonl", "--base", "base", "--passes", "2", "-o", "new.json"]
_COMPARE = ["compare", *_DATA, "--fit-data", "calibration.jsonl", "--methods", "adapter,ties,task-arithmetic"]
COMMANDS = {  # with the task that is looked at, and a status of it
    "fit": ([*_FIT, "--cv", "2"], "fit", "fitting 22 weights"),
    "compare": (_COMPARE, "compare", "6/8 ties"),
    "export": (["export", "-o", "out", "--merge", *_DATA], "loss", "scoring what was written"),
}
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def screened(words: list[str], width: int, patch: pytest.MonkeyPatch, stop_after: int | None = None) -> tuple[int, str]:
    """Exit code and what a terminal was sent where every advance is drawn; Ctrl-C comes after so many."""
    advance, count = Output.advance, 0

    def drawn_at_once(self: Output, task: str, amount: int, status: str = "") -> None:
        nonlocal count
        advance(self, task, amount, status)
        if self._bars is not None:
            self._bars.refresh()
            count += 1
            if count == stop_after:
                raise KeyboardInterrupt

    with patch.context() as patched, own_terminal(patch, width) as said:
        patched.setattr(Output, "advance", drawn_at_once)
        with pytest.raises(SystemExit) as ended:
            app(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code, said[0]


def lines_of(sent: str) -> list[str]:
    """Every line that stood on the screen at some time, without colours."""
    plain = _SEQUENCE.sub(lambda found: "" if found[0].endswith("m") else "\n", sent)
    return [line for line in re.split(r"[\r\n]+", plain) if line]


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_on_a_terminal_no_line_is_too_long_no_share_above_100_and_nothing_stays(
    command: str, width: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, task, stage = COMMANDS[command]
    code, sent = screened(words, width, monkeypatch)
    assert code == 0, sent
    bars = [line for line in lines_of(sent) if "━" in line]
    assert max(map(cell_len, bars)) <= width
    shares = [int(found[1]) for line in bars if line.startswith(task) and (found := re.search(r" (\d+) % ", line))]
    assert shares == sorted(shares) and shares[0] < 50 and shares[-1] == 100
    amounts = [found for line in bars if (found := re.search(r" (\d+) modules / (\d+) modules ", line))]
    assert all(int(found[1]) <= int(found[2]) for found in amounts) and bool(amounts) == (command == "export")
    assert not re.search(r"-\d+:\d\d", " ".join(bars))
    assert any(stage in line for line in bars) or width == 60
    last = sent.rindex("━")
    assert "\x1b[2K" in sent[last:] and "━" not in lines_of(sent[sent.index("\x1b[2K", last) :])


@pytest.mark.parametrize("command", COMMANDS)
def test_after_ctrl_c_the_line_is_gone_and_one_word_is_left(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after = 10 if command == "export" else 30  # it has but 14 modules to write
    code, sent = screened(COMMANDS[command][0], 80, monkeypatch, stop_after)
    assert code == 130
    last = sent.rindex("━")
    left = lines_of(sent[sent.index("\x1b[2K", last) :])
    assert left[-1] == "interrupted" and not any("━" in line or "%" in line for line in left)


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
