"""A user's own scorer: a command that reads answers as JSONL and writes a number for each.

loracat never runs what a model wrote. A command that does, to test generated programs, has to bring its own sandbox.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from loracli.errors import MetricError, UsageError
from loracli.system.strict_json import StrictJsonError, parse_json

TIMEOUT = 3600.0  # seconds
SHOWN = 2000  # characters of its stderr


def split_command(command: str) -> list[str]:
    """The words of a command, as a shell would split them; no shell runs it.

    Raises:
        UsageError: if there is none, or a quotation has no end.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--metric-command {command}: {error}") from None
    if not words:
        raise UsageError("--metric-command is empty")
    return words


def run_metric(command: str, answers: Sequence[Mapping[str, object]], *, timeout: float = TIMEOUT) -> list[float]:
    """What the command makes of the answers: one number each, higher is better.

    Args:
        command: gets one JSON object a line on its standard input, and writes one line for each, in the same order: a
            JSON number, or an object with the key `score`.
        answers: objects of `line`, `prompt`, `reference`, `output` and `task`.
        timeout: seconds that it may take.
    Raises:
        MetricError: if it cannot be run, fails, takes too long, or writes anything else; with the end of its stderr.
    """
    lines = "".join(json.dumps(dict(answer), ensure_ascii=False) + "\n" for answer in answers)
    try:
        done = subprocess.run(split_command(command), input=lines.encode(), capture_output=True, timeout=timeout)
    except OSError as error:
        raise MetricError(f"the metric command cannot be run: {error.strerror}: {command}") from None
    except subprocess.TimeoutExpired:
        raise MetricError(f"the metric command takes longer than {timeout:g} seconds: {command}") from None
    said = done.stderr.decode(errors="replace").strip()[-SHOWN:]
    if done.returncode != 0:
        raise MetricError(f"the metric command ended with the code {done.returncode}", hint=said or None)
    written = done.stdout.splitlines()
    if len(written) != len(answers):
        raise MetricError(
            f"the metric command wrote {len(written)} lines for {len(answers)} answers", hint=said or None
        )
    return [_score(line, number) for number, line in enumerate(written, start=1)]


def _score(line: bytes, number: int) -> float:
    try:
        value = parse_json(line)
    except StrictJsonError as error:
        raise MetricError(f"line {number} of the metric command's output is {error}") from None
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise MetricError(f"line {number} of the metric command's output is no finite number and has no `score`")
    return float(value)
