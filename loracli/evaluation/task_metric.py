"""What a task asks for, where the loss does not say it: answers that are generated and judged, or options weighed.

exact, contains, numeric   greedy answers, each right or wrong (`evaluation.answers`)
choice                     the option with the highest log-likelihood as the completion, right or wrong
command                    greedy answers, scored by the user's own command (`evaluation.metric_command`)
"""

from __future__ import annotations

from dataclasses import dataclass

from loracli.errors import UsageError
from loracli.evaluation.answers import TOLERANCE
from loracli.evaluation.metric_command import split_command

GENERATED = ("exact", "contains", "numeric")
CHOICE, COMMAND = "choice", "command"
METRICS = (*GENERATED, CHOICE)
MAX_NEW_TOKENS = 256


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
        """Raises UsageError for a setting that is out of its range."""
        if self.name not in (*METRICS, COMMAND):
            raise UsageError(f"the metric {self.name} is not one of {', '.join(METRICS)}")
        if self.name == COMMAND:
            split_command(self.command or "")
        if not 1 <= self.max_new_tokens <= 1 << 16:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens} is not between 1 and {1 << 16}")
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
