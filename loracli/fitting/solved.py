"""What solving one rung needs and what comes of it; the same for BFGS on a few numbers and for a descent on many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.calibration.batches import plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.criterion import LEAST_GAIN, Criterion, joined
from loracli.fitting.engine import Engine
from loracli.fitting.folds import Fold
from loracli.fitting.mixing import Mixing
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Scores
from loracli.recipe.record import StageRecord, StartRecord


@dataclass(frozen=True)
class Task:
    """Everything that is the same for all rungs.

    Args:
        engine: the attached model.
        folds: K >= 1 divisions of the training records; one alone may have no validation records.
        criterion: that chooses.
        settings: of the fit.
        references: of the adapters.
        chooses_by_loss: whether the criterion is the loss, so that batches scored before the step on them can be pooled
            with it.
        unit: of the criterion's costs.
        least_gain: in that unit, that `auto` climbs for.
    """

    engine: Engine
    folds: tuple[Fold, ...]
    criterion: Criterion
    settings: FitSettings
    references: tuple[str, ...]
    chooses_by_loss: bool = True
    unit: str = "nats per token"
    least_gain: float = LEAST_GAIN

    @property
    def validated(self) -> bool:
        return bool(self.folds[0].validation)

    def check(self, mixing: Mixing, thetas: Sequence[Tensor]) -> Scores | None:
        """Each fold's theta on its validation records; None without such records.

        Raises:
            NonFiniteLoss: if the loss there is not finite.
        """
        if not self.validated:
            return None
        return joined([self.criterion(mixing, t, fold.validation) for t, fold in zip(thetas, self.folds, strict=True)])


@dataclass(frozen=True)
class Solved:
    """A rung's solution on every fold.

    Args:
        mixing: the rung.
        thetas: by fold.
        anchors: by fold, the start that won.
        scores: by the criterion, on the validation records of all folds; None without such records.
        starts: what they were.
        chosen: the name of the start that won.
        ridge: of the stage that won; None if the start was never beaten, or there was no path.
        stopped: why the search ended early, None if it did not.
        stages: the descents, in order.
    """

    mixing: Mixing
    thetas: tuple[Tensor, ...]
    anchors: tuple[Tensor, ...]
    scores: Scores | None
    starts: tuple[StartRecord, ...]
    chosen: str
    ridge: float | None
    stopped: str | None = None
    stages: tuple[StageRecord, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether it is anything else than its start."""
        return any(not torch.equal(t, a) for t, a in zip(self.thetas, self.anchors, strict=True))


def mean_of(thetas: Sequence[Tensor]) -> Tensor:
    """One theta for all folds."""
    return torch.stack(list(thetas)).mean(dim=0) if len(thetas) > 1 else thetas[0]


def nats_per_token(scores: Scores | None) -> float | None:
    """None where nothing was scored."""
    return None if scores is None else scores.nats_per_token


def tokens_of(examples: Sequence[Example]) -> int:
    """Tokens of the examples, scored or not."""
    return sum(len(example.input_ids) for example in examples)


def padded_tokens(examples: Sequence[Example], batch_tokens: int) -> int:
    """Tokens of the micro-batches that hold the examples, padding included."""
    return sum(batch.tokens for batch in plan_batches(examples, batch_tokens=batch_tokens))


def left_out(name: str, before: float | None, error: NonFiniteLoss) -> StartRecord:
    """A start that the search did not go on from."""
    return StartRecord(name, before, None, None, str(error))
