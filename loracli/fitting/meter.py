"""What a fit has spent, and what it says while it runs: the progress line and the log of steps."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loracli.progress import Progress
from loracli.system.strict_json import StrictJsonError, parse_json

TASK = "fit"
_MAX_LINE = 1 << 16  # bytes of a log's line


class Meter:
    """Counts what was spent: a token forward is 1, forward and backward 2.

    Args:
        progress: told of every micro-batch.
        log: takes one JSON object for each step, None for none.
        tokens: of a pass over the training records, 0 if passes are not to be said.
        task: of the progress.
    """

    def __init__(self, progress: Progress, log: StepLog | None = None, *, tokens: int = 0, task: str = TASK) -> None:
        self.spent = 0
        self.validation: float | None = None  # nats per token, the last measured
        self._progress = progress
        self._task = task
        self._log = log
        self._a_pass = 2 * tokens
        self._stage = _Stage("", {})
        self._started = time.monotonic()
        self._tokens = 0

    def stage(self, text: str, **fields: str | float | None) -> None:
        """Names what the following batches are for; `fields` go into the log of each step."""
        self._stage = _Stage(text, fields)
        self._started, self._tokens = time.monotonic(), 0

    def count(self, tokens: int, *, cost: int, nats: float | None = None) -> None:
        """Some tokens are done, each at this cost, and at `nats` per scored token if that is known."""
        self.spent += cost * tokens
        self._tokens += tokens
        parts = [self._stage.text]
        if self._a_pass:
            parts.append(f"pass {self.spent / self._a_pass:.1f}")
        if nats is not None:
            parts.append(f"loss {nats:.3f}")
        if self.validation is not None:
            parts.append(f"validation {self.validation:.3f}")
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._progress.advance(self._task, cost * tokens, ", ".join([*parts, f"{rate:.0f} tok/s"]))

    def restore(self, spent: int, logged: int) -> None:
        """Goes to where an interrupted fit was: what it had spent, and how many lines its log had."""
        self._progress.advance(self._task, spent - self.spent)
        self.spent = spent
        if self._log is not None:
            self._log.lines = logged

    def step(self, **fields: float) -> None:
        """Writes one line of the log."""
        if self._log is not None:
            self._log.write({**self._stage.fields, **fields, "validation": self.validation, "spent_tokens": self.spent})

    @property
    def logged(self) -> int:
        """Lines in the log."""
        return self._log.lines if self._log is not None else 0


@dataclass(frozen=True)
class _Stage:
    text: str
    fields: dict[str, str | float | None]


class StepLog:
    """A JSONL file that grows by one line a step.

    Args:
        path: of the file.
        resume: keep what is in it, up to where the fit goes on.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "r+b" if resume and path.exists() else "w+b")
        self._ends = [0]
        for line in self._file:
            if line.endswith(b"\n"):
                self._ends.append(self._ends[-1] + len(line))
        self.lines = 0
        self._started = time.monotonic()

    def write(self, content: dict[str, str | float | None]) -> None:
        """Writes the line after the first `lines`, drops any that followed, and hands it to the system."""
        line = {**content, "seconds": round(time.monotonic() - self._started, 3)}
        self._cut()
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._ends.append(self._file.tell())
        self.lines += 1

    def close(self) -> None:
        """Closes the file; lines after the first `lines` go."""
        self._cut()
        self._file.close()

    def _cut(self) -> None:
        self.lines = min(self.lines, len(self._ends) - 1)
        del self._ends[self.lines + 1 :]
        self._file.seek(self._ends[-1])
        self._file.truncate()


def is_step_log(path: Path) -> bool:
    """Whether a file begins as a log of steps does, or is empty."""
    with open(path, "rb") as file:
        line = file.readline(_MAX_LINE)
    try:
        content = parse_json(line or b'{"seconds": 0}')
    except StrictJsonError:
        return False
    return isinstance(content, dict) and "seconds" in content
