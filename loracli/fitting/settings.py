"""What can be set for a fit and changes its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

from loracli.adapters.saved_modules import REFUSE, check_policy
from loracli.arguments import check_declared
from loracli.calibration.fields import parse_fields
from loracli.errors import UsageError
from loracli.evaluation.metrics import MAX_NEW_TOKENS, TOLERANCE, TaskMetric, task_metric
from loracli.recipe.record import MIXING_KINDS
from loracli.system.near import did_you_mean

AUTO = "auto"
FRESH_LORA, NO_CONTROL = "fresh-lora", "none"
PASSES = 8.0
_CERTIFICATE = 1.5
_FIRST_PASSES, _FIRST_IN_FOLDS = 1.5, 2.0  # of `layer` and `module`, which go on from there for as long as it pays
_AUTO_PASSES = 22.0
_FULL_RECORDS = 40  # below, there are more passes


@dataclass(frozen=True)
class FitSettings:
    """The settings of a fit; the defaults are meant to be left alone.

    Args:
        mixing: the level of the ladder, or `auto` to climb as far as the data allow; `module` is CAT.
        paper: the published recipe instead: softmax weights from a random start, one pass at a rate of 1e-4, batches
            of 6 records, loss on the prompts too.
        holdout: share of the records that is held out for the final table, at least 20 records and at most half; None
            for a fifth, or with fewer than 100 records for every record in its turn (cross-fitting).
        max_length: tokens of a record that are used, from its start.
        batch_tokens: tokens of a micro-batch, padding included.
        passes: at most so many, forward and backward over the training records, times the number of folds; None for 8,
            or 22 with `auto`, more with few records or three adapters. `module` and `layer` end where more do not pay.
        cv: K folds to choose among starts, ridges and kinds of mixing; None for 4 where every record is held out in its
            turn or there are 6 to 39 training records, and for a fifth of them set aside with more.
        ridge: strength of lambda / 2 |w - w_start|^2 beside nats per token; None for none, and for `rank` and `core` a
            path down to none, of which the validation records choose.
        learning_rate: peak rate; None is clip(8 / steps, 0.01, 0.1), at most 0.02 for `core` and `factors` and 0.001
            for a new LoRA; 1e-4 with `paper`.
        seed: of the split, the order of batches and the paper's random start.
        format: the shape of all records; None to see it from each file.
        fields: other names of what is read of a record, as `prompt=question,completion=answer`; None for none.
        allow_truncation: go on although more than a tenth of a file's records have nothing scored within `max_length`.
        skip_bad: leave out lines that cannot be used.
        select_by: the task metric that chooses among starts, ridges and kinds of mixing in place of the loss; None for
            the loss.
        metric_command: the user's own metric, in its place.
        max_new_tokens: of an answer that is judged.
        tolerance: relative, of the metric `numeric`.
        modules_to_save: which of the modules that adapters saved whole replace the base's: `refuse`, `average` or
            `pick:NAME`.
        control: `fresh-lora` to hold the fit against a new LoRA on the same records, `none` not to; None where that
            costs less than the fit and can say something.
    """

    mixing: str = "module"
    paper: bool = False
    holdout: float | None = None
    max_length: int = 1024
    batch_tokens: int = 1024
    passes: float | None = None
    cv: int | None = None
    ridge: float | None = None
    learning_rate: float | None = None
    seed: int = 0
    format: str | None = None
    fields: str | None = None
    allow_truncation: bool = False
    skip_bad: bool = False
    select_by: str | None = None
    metric_command: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    tolerance: float = TOLERANCE
    modules_to_save: str = REFUSE
    control: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for the first setting that is of another type, or out of its range."""
        check_declared(self)
        if self.mixing not in (*MIXING_KINDS, AUTO):
            kinds = (*MIXING_KINDS, AUTO)
            raise UsageError(
                f"--mixing {self.mixing} is not one of {', '.join(kinds)}", hint=did_you_mean(self.mixing, kinds)
            )
        if self.paper and (self.mixing != "module" or any(x is not None for x in (self.ridge, self.passes, self.cv))):
            raise UsageError("--paper fits one weight per module in one pass without ridge; leave out the other option")
        if self.mixing == "adapter" and (self.ridge is not None or self.learning_rate is not None):
            raise UsageError("--mixing adapter has no ridge and no rate; leave out --ridge and --learning-rate")
        if self.control not in (None, FRESH_LORA, NO_CONTROL):
            words = (FRESH_LORA, NO_CONTROL)
            hint = "random adapters, whose every draw is a fit, are a control of loracat compare"
            raise UsageError(
                f"--control {self.control} is not one of {', '.join(words)}",
                hint=hint if self.control == "random" else did_you_mean(self.control, words),
            )
        check_policy(self.modules_to_save)
        parse_fields(self.fields)
        if self.metric is not None and self.paper:
            raise UsageError("--paper has nothing to choose; leave out --select-by and --metric-command")
        for name, low, high in (
            ("holdout", 0.0, 0.9),
            ("max_length", 2, 1 << 20),
            ("batch_tokens", 1, 1 << 24),
            ("passes", 2, 1000),
            ("cv", 2, 100),
            ("ridge", 0.0, 1e6),
            ("learning_rate", 1e-9, 10.0),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                share = "it is a share of the records: 0.25 for a quarter" if name == "holdout" else None
                said = str(value).removesuffix(".0")  # as it was typed
                raise UsageError(f"--{name.replace('_', '-')} {said} is not between {low} and {high}", hint=share)

    def budget(self, folds: int, records: int) -> float:
        """Passes that may be spent on a search with so many folds of so many records: where these are few, passes are
        short and a fit needs more of them."""
        if self.paper:
            return 1.0
        if self.passes is not None:
            return folds * self.passes
        few = _few(records)
        if self.mixing == AUTO:
            return folds * few * _AUTO_PASSES
        return folds * few * PASSES + _CERTIFICATE * (self.mixing in ("layer", "module"))

    def first_passes(self, folds: int, records: int) -> float:
        """Passes over the fitting records of a fold after which `layer` and `module` are first asked whether more pays,
        if the budget has so many."""
        return _few(records) * (_FIRST_IN_FOLDS if folds > 1 else _FIRST_PASSES)

    def shortest(self, folds: int, records: int) -> FitSettings:
        """The settings whose budget is what a fit takes where the first round gains nothing: in each fold these passes
        and the round, the last fit on all records, and the certificate."""
        if self.paper or self.passes is not None or self.mixing not in ("layer", "module"):
            return self
        first = self.first_passes(folds, records)
        return replace(self, passes=1.5 * first + (last_passes(first, folds) + _CERTIFICATE) / folds)

    @property
    def metric(self) -> TaskMetric | None:
        """The task metric that chooses; None where the loss does.

        Raises:
            UsageError: if two are set, or one is out of its range.
        """
        return task_metric(
            self.select_by, self.metric_command, max_new_tokens=self.max_new_tokens, tolerance=self.tolerance
        )

    def recorded(self) -> dict[str, int | float | str | bool | None]:
        """The settings for a recipe; of the user's command, which may name what is nobody's business, its sha256."""
        command = self.metric_command
        return {**asdict(self), "metric_command": command and sha256(command.encode()).hexdigest()}


def last_passes(found: float, folds: int) -> float:
    """Over all records, of the last fit of `layer` and `module`, which took so many to find: twice as many, for these
    steps bring the most; as many in folds, whose few records more steps would only fit."""
    return found if folds > 1 else 2 * found


def _few(records: int) -> float:
    """How many times the passes: few records make short ones, of which a fit needs more."""
    return math.sqrt(max(1.0, _FULL_RECORDS / records))
