"""Ways to compose that have to be fitted: the levels of the ladder, and methods that search for weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.calibration.dataset import Dataset, shuffled
from loracli.calibration.render import Example
from loracli.composition.attached import MixingPoint, weighted
from loracli.fitting.engine import Engine, Pace
from loracli.fitting.inputs import FitInputs
from loracli.fitting.journal import Meter
from loracli.fitting.level import recipe_mixing
from loracli.fitting.mixing import Layout, check_mixing, make_diagonal
from loracli.fitting.run import divide_training, find_mixing
from loracli.fitting.settings import FitSettings
from loracli.fitting.work import REACH, Cost, Work, cost_of
from loracli.model.session import Session
from loracli.recipe.record import INLINE_KINDS, RecipeMixing

PAPER = "paper"


TASK = "compare"
_SEARCH_RECORDS = 64  # that methods with a number or two are fitted on, as the first level of the ladder


@dataclass(frozen=True)
class Calibration:
    """What is fitted on.

    Args:
        session: of the base.
        data: the files; its training records are all of them.
        examples: of the training records.
        settings: of the fits.
        pace: of the base.
        task: of the progress.
    """

    session: Session
    data: Dataset
    examples: tuple[Example, ...]
    settings: FitSettings
    pace: Pace = Pace(0.0)  # noqa: RUF009  # frozen
    task: str = TASK

    @contextmanager
    def engine(
        self, adapters: Sequence[LoraAdapter], modules: tuple[str, ...], *, canonical: bool = False
    ) -> Iterator[Engine]:
        """Of the base with adapters attached; its meter begins at 0."""
        with self.session.attached(adapters, modules, self.examples, canonical=canonical) as objective:
            progress = self.session.progress
            meter = Meter(progress, task=self.task, overhead=self.pace.overhead)
            yield Engine(objective, meter, progress=progress)


def fit_level(
    name: str, calibration: Calibration, adapters: Sequence[LoraAdapter], references: Sequence[str], layout: Layout
) -> tuple[RecipeMixing, str]:
    """A level of the ladder, `auto` or `paper`, as `loracat fit` finds it, all calibration records being for training:
    what was found, as a recipe keeps it, and what there is to say of it.

    Args:
        name: of the level.
        calibration: what is fitted on.
        adapters: that are composed.
        references: of them.
        layout: of them.
    Raises:
        UsageError: if there are too few records to choose with, or the adapters do not have the level.
        NonFiniteLoss: if no start is finite.
    """
    session, training = calibration.session, calibration.examples
    inputs = _inputs_of(name, calibration, adapters, references, layout)
    check_mixing(adapters, inputs.settings.mixing)
    folds = divide_training(inputs, training)
    canonical = inputs.settings.mixing not in INLINE_KINDS
    with calibration.engine(adapters, layout.modules, canonical=canonical) as engine:
        found = find_mixing(engine, inputs, folds, training, session.tokenizer)
    note = f"{found.mixing.kind}, {found.mixing.numbers} numbers" if found.mixing.kind != name else ""
    if name == PAPER:
        note = "softmax weights from a random start, one epoch at a rate of 1e-4, as published"
    if found.stopped:
        note = f"stopped early: {found.stopped}"
    return recipe_mixing(adapters, layout.modules, found), note


def level_cost(
    name: str, calibration: Calibration, adapters: Sequence[LoraAdapter], references: Sequence[str], layout: Layout
) -> Cost:
    """The most that `fit_level` takes of the same arguments.

    Raises:
        UsageError: if there are too few records to choose with.
    """
    inputs = _inputs_of(name, calibration, adapters, references, layout)
    folds = divide_training(inputs, calibration.examples)
    return Work(folds, calibration.examples, inputs.settings, references).left(REACH)


def _inputs_of(
    name: str, calibration: Calibration, adapters: Sequence[LoraAdapter], references: Sequence[str], layout: Layout
) -> FitInputs:
    settings, base = _settings_of(name, calibration.settings), calibration.session.base.reference
    return FitInputs(tuple(adapters), tuple(references), base, calibration.data, layout, settings, Path())


def _settings_of(name: str, settings: FitSettings) -> FitSettings:
    """Those of the fit, without what does not go with a level."""
    changes: dict[str, Any] = {"mixing": name}
    if name in (PAPER, "adapter"):
        changes |= {"ridge": None, "learning_rate": None}
    if name == PAPER:
        changes |= {"mixing": "module", "paper": True, "passes": None, "cv": None}
    return replace(settings, **changes)


def search_cost(method: Method, calibration: Calibration) -> Cost:
    """The most that `search_weights` takes."""
    return cost_of(calibration.session.batches(_chosen(calibration))) * method.evaluations


def _chosen(calibration: Calibration) -> list[Example]:
    return shuffled(calibration.examples, seed=calibration.settings.seed)[:_SEARCH_RECORDS]


def search_weights(
    method: Method, options: MethodOptions, calibration: Calibration, adapters: Sequence[LoraAdapter], layout: Layout
) -> MixingPoint:
    """A method that searches for one weight an adapter by the loss on up to 64 calibration records."""
    assert method.search is not None
    chosen = _chosen(calibration)
    batches = calibration.session.batches(chosen)
    mixing = make_diagonal(layout, "adapter")
    with calibration.engine(adapters, layout.modules) as engine:
        engine.meter.stage(method.name)

        def loss(weights: Sequence[float]) -> float:
            return engine.score(mixing, mixing.constant(weights), batches, chosen).nats_per_token

        found = method.search(loss, len(adapters), options)
    return weighted(layout, found, note="weights " + ", ".join(f"{weight:.2f}" for weight in found))
