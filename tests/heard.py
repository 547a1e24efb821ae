"""A Progress that keeps what it is told."""

from __future__ import annotations

from loracli.progress import Silent


class Heard(Silent):
    """Notes, warnings, and both in the order in which they came."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.said.append(f"warning: {message}")


class Watched(Heard):
    """How far one task is, which must at no time be further than it was said to go.

    Args:
        task: that is watched.
    Attributes:
        totals: as it was begun, and what was said of it later.
        done: units.
        begun, finished: how often.
        stages: the first part of every status, each once in a row.
        places: the share that was done where each of them began.
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        self._task = task
        self.totals: list[int] = []
        self.begun = self.finished = self.done = 0
        self.stages: list[str] = []
        self.places: list[float] = []

    def begin(self, task: str, total: int | None, unit: str) -> None:
        if task == self._task:
            assert total is not None
            self.begun, self.totals, self.done = self.begun + 1, [total], 0

    def expect(self, task: str, total: int) -> None:
        if task == self._task:
            assert self.done <= total <= self.totals[-1]
            self.totals.append(total)

    def advance(self, task: str, amount: int, status: str = "") -> None:
        if task != self._task:
            return
        assert amount >= 0
        self.done += amount
        assert self.done <= self.totals[-1], (self.done, self.totals, status)
        stage = status.split(", ")[0]
        if status and self.stages[-1:] != [stage]:
            self.stages.append(stage)
            self.places.append(self.done / self.totals[-1])

    def finish(self, task: str) -> None:
        self.finished += task == self._task
