"""Every error that loracat raises on purpose, and the exit code each one ends the command with.

    LoracatError                     1   a failure that is nobody's input
    ├── UsageError                   2   the command cannot be carried out as typed
    │   ├── OutputExists             2   an output is in the way and --force was not given
    │   └── SettingsError            2   a configuration file holds what no option is
    ├── InputError                   3   something that was handed in is rejected
    │   ├── AdapterNotFound          3   the reference names no adapter
    │   ├── MalformedAdapter         3   a file of the adapter is damaged or contradicts another
    │   ├── UnsupportedAdapter       3   the adapter uses a feature that cannot be honoured exactly
    │   ├── IncompatibleAdapters     3   the adapters do not fit each other
    │   ├── BaseModelMismatch        3   the adapters do not fit the base model
    │   ├── CalibrationError         3   a line of the calibration file is rejected
    │   ├── RecipeError              3   a recipe is damaged or was written by a newer version
    │   └── StateMismatch            3   the state of an interrupted run belongs to other inputs
    ├── AccessDenied                 4   the Hub wants a login, or the repository is gated
    ├── HubUnreachable               5   the Hub does not answer, or offline and not cached
    ├── OutOfResources               6   disk, memory or device memory ran out
    ├── IntegrityError               7   bytes are not the bytes that were recorded
    │   └── VerificationError        7   an export or a fused model is not what its record says
    ├── MetricError                  1   the user's own scorer fails
    └── FitError                     1   the optimisation cannot go on
        ├── NonFiniteLoss            1   the loss became infinite or not a number
        └── ProcessLost              1   another process of the same fit has ended or does not answer

One boundary, in `loracli.cli`, turns them into a message and an exit code. Anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

from typing import ClassVar


class LoracatError(Exception):
    """Base of the tree: what went wrong, where, and what to do about it.

    Args:
        what: one sentence that names the thing at fault.
        where: file, line, module or tensor, when `what` does not already say it.
        hint: what the user can do next.
        problems: every reason, where there may be several, in a sentence that begins with its place; the text of the
            error has the first.

    Among several processes `told` says that all of them raise it; False, that this one could not tell the others. None
    elsewhere.
    """

    exit_code: ClassVar[int] = 1
    told: bool | None = None

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint
        self.problems = problems

    @property
    def summary(self) -> str:
        """What and where, without the reasons."""
        return f"{self.where}: {self.what}" if self.where else self.what

    def __str__(self) -> str:
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return f"{self.summary}: {self.problems[0]}{more}" if self.problems else self.summary


class UsageError(LoracatError):
    """Raised when options contradict each other or name something that does not exist in this version."""

    exit_code = 2


class OutputExists(UsageError):
    """Raised before any work when an output path is taken and `--force` was not given."""


class SettingsError(UsageError):
    """Raised when configuration files hold keys that cannot be honoured.

    Args:
        what: the summary.
        problems: one `file: key: reason` for each of them.
    """


class InputError(LoracatError):
    """Raised when an adapter, a data file, a recipe or a base model is rejected."""

    exit_code = 3


class AdapterNotFound(InputError):
    """Raised when a reference names neither a local adapter directory nor a Hub repository with the files of one."""


class MalformedAdapter(InputError):
    """Raised when `adapter_config.json` or `adapter_model.safetensors` is damaged, or the two contradict each other."""


class UnsupportedAdapter(InputError):
    """Raised when an adapter uses a feature that loracat cannot compose exactly; names the feature and the way out."""


class IncompatibleAdapters(InputError):
    """Raised when adapters disagree on the base model, or on the shape or kind of a module that they share."""


class BaseModelMismatch(InputError):
    """Raised when the base model lacks a module that an adapter targets, or has it in another shape or kind."""


class CalibrationError(InputError):
    """Raised when a calibration file has lines that cannot be used.

    Args:
        what: the summary, with the number of rejected lines.
        problems: one `file:line: path: reason` for each rejected line, in file order.
    """


class RecipeError(InputError):
    """Raised when a recipe cannot be read; carries every problem found, not only the first.

    Args:
        what: the summary, with the file's name.
        problems: one `field: reason` for each problem.
    """


class StateMismatch(InputError):
    """Raised when a run is resumed with other inputs or settings than it was begun with; names what has changed."""


class AccessDenied(LoracatError):
    """Raised when the Hub refuses: a gated or private repository, or a missing or wrong token."""

    exit_code = 4


class HubUnreachable(LoracatError):
    """Raised when the Hub does not answer, or when offline and the files are not in the cache."""

    exit_code = 5


class OutOfResources(LoracatError):
    """Raised when disk, memory or device memory ran out."""

    exit_code = 6


class IntegrityError(LoracatError):
    """Raised when a file's bytes differ from the ones that were recorded."""

    exit_code = 7


class VerificationError(IntegrityError):
    """Raised when what was written differs from what its record and its ingredients give.

    Args:
        what: the summary, with the number of differences.
        problems: one sentence for each difference.
    """


class MetricError(LoracatError):
    """Raised when the command of `--metric-command` fails or writes something else than a number for each answer."""


class FitError(LoracatError):
    """Raised when the optimisation cannot go on."""


class NonFiniteLoss(FitError):
    """Raised when the loss becomes infinite or not a number; names the records of the batch."""


class ProcessLost(FitError):
    """Raised when another process of the same fit has ended or does not answer; its own message says why."""
