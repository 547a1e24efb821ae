"""What a task asks for, where the loss does not say it: answers that are generated and judged, or options weighed.

    exact      the answer is the reference itself, white space at the ends aside
    contains   the reference is somewhere in it, however written in capitals and spaced
    numeric    its last number is the reference's last number, within a relative tolerance
    choice     the option with the highest log-likelihood as the completion is the right one
    command    a command of the user's reads the answers as JSONL and writes a number for each

loracat never runs what a model wrote. A command that does, to test generated programs, has to bring its own sandbox.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loracli.arguments import check_declared
from loracli.errors import MetricError, UsageError
from loracli.system.near import did_you_mean
from loracli.system.strict_json import StrictJsonError, parse_json

# 1,234.5  -3  +2e-4  .5  1200. A comma counts between groups of three digits, a sign where no digit, letter or closing
# bracket stands before it: 5-3 holds 5 and 3.
_SIGN = r"(?:(?<![\w)\]])[-+])?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"{_SIGN}(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
TOLERANCE = 1e-4

Rule = Callable[[str, str], bool]  # of output and reference


def is_exact(output: str, reference: str) -> bool:
    """Whether they are the same text."""
    return output.strip() == reference.strip()


def contains(output: str, reference: str) -> bool:
    """Whether the reference is a part of the output."""
    return _plain(reference) in _plain(output)


def is_same_number(output: str, reference: str, *, tolerance: float = TOLERANCE) -> bool:
    """Whether both have a number, and the last ones differ by at most `tolerance` times the larger; a reference without
    one is answered by nothing."""
    found, wanted = last_number(output), last_number(reference)
    return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=tolerance)


def last_number(text: str) -> float | None:
    """The last number in decimal notation: an optional sign, also the minus of typesetters, thousands separators, an
    exponent. A fraction is read as its denominator, a percentage as what stands before the sign."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    value = float(numbers[-1].replace(",", "")) if numbers else math.nan
    return value if math.isfinite(value) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


_TIMEOUT = 3600.0  # seconds
_SHOWN = 2000  # characters of its stderr
_SHOWN_LINE = 60  # of a line that is no number


def _split_command(command: str) -> list[str]:
    """The words of a command, as a shell would split them; no shell runs it.

    Raises:
        UsageError: if there is none, a quotation has no end, or the first is no program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--metric-command {command}: {error}") from None
    if not words:
        raise UsageError("--metric-command is empty")
    if shutil.which(words[0]) is None:  # now, and not when the first answers are there
        hint = "a script needs its interpreter, --metric-command 'python grade.py', or to be executable, ./grade.py"
        raise UsageError(f"--metric-command {command}: there is no program {words[0]}", hint=hint)
    return words


def run_metric(command: str, answers: Sequence[Mapping[str, object]], *, timeout: float = _TIMEOUT) -> list[float]:
    """What the command makes of the answers: one number each, higher is better.

    Args:
        command: gets one JSON object a line on its standard input, and writes one line for each, in the same order: a
            JSON number, `True` or `False` as Python prints it or JSON has it, or an object with the key `score`.
        answers: objects of `line`, `prompt`, `reference`, `output` and `task`.
        timeout: seconds that it may take.
    Raises:
        MetricError: if it cannot be run, fails, takes too long, or writes anything else; with the end of its stderr.
    """
    lines = "".join(json.dumps(dict(answer), ensure_ascii=False) + "\n" for answer in answers)
    try:
        done = subprocess.run(_split_command(command), input=lines.encode(), capture_output=True, timeout=timeout)
    except OSError as error:
        raise MetricError(f"the metric command cannot be run: {error.strerror}: {command}") from None
    except subprocess.TimeoutExpired:
        raise MetricError(f"the metric command takes longer than {timeout:g} seconds: {command}") from None
    said = done.stderr.decode(errors="replace").strip()[-_SHOWN:]
    if done.returncode != 0:
        raise MetricError(f"the metric command ended with the code {done.returncode}", hint=said or None)
    written = done.stdout.splitlines()
    if len(written) != len(answers):
        raise MetricError(
            f"the metric command wrote {len(written)} lines for {len(answers)} answers", hint=said or None
        )
    return [_score(line, number) for number, line in enumerate(written, start=1)]


_PYTHON = {b"True": 1.0, b"False": 0.0}  # what print(a == b) writes


def _score(line: bytes, number: int) -> float:
    if (printed := _PYTHON.get(line.strip())) is not None:
        return printed
    refused = MetricError(
        f"line {number} of the metric command's output is not a finite number and has no `score`: {_cut(line)}",
        hint="write one line for each answer: print(float(...)), or print(int(...)) for right or wrong",
    )
    try:
        value = parse_json(line)
    except StrictJsonError:
        raise refused from None
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refused
    return float(value)


def _cut(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= _SHOWN_LINE else f"{text[:_SHOWN_LINE]}..."


NUMERIC, CHOICE, COMMAND = "numeric", "choice", "command"
_GENERATED = ("exact", "contains", NUMERIC)
_METRICS = (*_GENERATED, CHOICE)
MAX_NEW_TOKENS = 256


def check_max_new_tokens(count: int) -> None:
    """Raises UsageError unless an answer may have so many tokens."""
    if not 1 <= count <= 1 << 16:
        raise UsageError(f"--max-new-tokens {count} is not between 1 and {1 << 16}")


@dataclass(frozen=True)
class TaskMetric:
    """A way to judge answers.

    Args:
        name: `exact`, `contains`, `numeric`, `choice`, or `command`.
        command: the user's, with `command`.
        max_new_tokens: of an answer.
        tolerance: relative, of `numeric`.
    """

    name: str
    command: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        """Raises UsageError for a setting that is of another type, or out of its range."""
        check_declared(self)
        if self.name not in (*_METRICS, COMMAND):
            hint = did_you_mean(self.name, _METRICS)
            raise UsageError(f"the metric {self.name} is not one of {', '.join(_METRICS)}", hint=hint)
        if self.name == COMMAND:
            _split_command(self.command or "")
        check_max_new_tokens(self.max_new_tokens)
        if not 0 <= self.tolerance <= 1:
            raise UsageError(f"--tolerance {self.tolerance} is not between 0 and 1")


def task_metric(
    name: str | None, command: str | None, *, max_new_tokens: int = MAX_NEW_TOKENS, tolerance: float = TOLERANCE
) -> TaskMetric | None:
    """The metric of the options `--generate` (or `--select-by`) and `--metric-command`; None for neither.

    Raises:
        UsageError: if both are given, one is out of its range, or there is neither and a setting of answers.
    """
    if name is not None and command is not None:
        raise UsageError("a metric by name and --metric-command are two metrics; give one of them")
    if name is None and command is None:
        for option, changed in (
            ("--max-new-tokens", max_new_tokens != MAX_NEW_TOKENS),
            ("--tolerance", tolerance != TOLERANCE),
        ):
            if changed:
                raise UsageError(
                    f"{option} is for answers that are judged, and no metric is named",
                    hint=f"leave {option} out, or name a metric, such as a program with --metric-command",
                )
        return None
    return TaskMetric(name or COMMAND, command, max_new_tokens, tolerance)
