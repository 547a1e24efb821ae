"""What held-out records say of a fit: each point that needs no fit, and what was fitted, scored on records that it has
not seen. With few records all are held out in their turn, and what was fitted on the others scores each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loracli.calibration.dataset import Examples
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.evaluation.statistics import static_points
from loracli.fitting.control import control_stage, fresh_training
from loracli.fitting.criterion import Fold
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import FitInputs
from loracli.fitting.mixing import Mixing, make_diagonal
from loracli.fitting.settings import FRESH_LORA
from loracli.model.loss import Scores
from loracli.model.session import Session


def static_scores(
    engine: Engine, session: Session, inputs: FitInputs, examples: Sequence[Example]
) -> dict[str, Scores]:
    """Every point that needs no fit, on the held-out records; one whose loss is not finite is left out, and said.

    Raises:
        NonFiniteLoss: if it is every adapter alone.
    """
    engine.meter.stage("scoring the held-out records")
    batches = session.batches(examples)
    adapters: Mixing = make_diagonal(inputs.layout, "adapter")
    scores: dict[str, Scores] = {}
    for name, point in static_points(inputs.references).items():
        try:
            scores[name] = engine.score(
                adapters, adapters.constant(point), batches, examples, key=f"held out, point {name!r}"
            )
        except NonFiniteLoss as error:
            session.progress.warn(f"{name} is left out of the held-out table: {error}")
            if name == inputs.references[-1] and not any(reference in scores for reference in inputs.references):
                raise
    return scores


def fresh_scores(
    engine: Engine, inputs: FitInputs, session: Session, examples: Examples, parts: Sequence[Fold]
) -> Scores | None:
    """What held-out records cost with a new LoRA that was trained on the records that the fit of them saw; None where
    its loss is not finite."""

    def solve(_place: int, part: Fold) -> tuple[Mixing, Tensor]:
        fresh, theta, _ = fresh_training(inputs, part.fitting).run(engine, inputs.adapters, key=FRESH_LORA)
        return fresh, theta

    folds, first = (parts, 1) if parts else ((Fold(examples.training, examples.held_out),), 0)
    try:
        return cross_fitted(engine, session, folds, examples.held_out, lambda n: control_stage(n - 1 + first), solve)
    except NonFiniteLoss as error:
        session.progress.warn(f"the fit is held against no fresh LoRA: {error}")
        return None


def cross_fitted(
    engine: Engine,
    session: Session,
    parts: Sequence[Fold],
    examples: Sequence[Example],
    stage: Callable[[int], str],
    solve: Callable[[int, Fold], tuple[Mixing, Tensor]],
    left: Callable[[str, int], int] | None = None,
) -> Scores:
    """Each record's score by what was fitted on the other parts.

    Args:
        engine: of the attached model.
        session: of the base.
        parts: what each may see, and what is held out of it.
        examples: all that are held out, in the order of the scores.
        stage: what the fit of a part is called, by its number from 1.
        solve: the fit of a part, by its place.
        left: the effort that is left of it where others may have done it.
    Raises:
        NonFiniteLoss: naming the records.
    """
    nats, tokens = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(2))
    place_of = {example.place: index for index, example in enumerate(examples)}
    for number, part in enumerate(parts):
        engine.meter.enter(stage(number + 1))
        with engine.within(stage(number + 1), left):
            mixing, theta = solve(number, part)
            engine.meter.stage("scoring the records that it has not seen")
            batches = session.batches(part.validation)
            scores = engine.score(mixing, theta, batches, part.validation, key="held out, the fit")
        rows = [place_of[example.place] for example in part.validation]
        nats[rows], tokens[rows] = scores.nats, scores.tokens
    return Scores(nats, tokens)
