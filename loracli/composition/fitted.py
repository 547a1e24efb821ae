"""Ways to compose that go by calibration records: the levels of the ladder, methods that search for weights, and those
that go by what each adapter's own records show of its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.calibration.dataset import Dataset, plan_batches, shuffled
from loracli.calibration.records import DataSource
from loracli.calibration.render import Example
from loracli.composition.attached import MixingPoint, of_factors, one_draw, weighted
from loracli.composition.composition import CPU, OwnMoments, updates_of
from loracli.composition.weights import goes_by
from loracli.errors import NonFiniteLoss, UsageError
from loracli.fitting.activations import check_weighable, chosen_records, second_moments
from loracli.fitting.engine import Engine, Pace
from loracli.fitting.inputs import FitInputs
from loracli.fitting.journal import Meter
from loracli.fitting.level import recipe_mixing
from loracli.fitting.mixing import Layout, check_mixing, make_diagonal
from loracli.fitting.plan import divide_training
from loracli.fitting.run import find_mixing
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
        found = find_mixing(engine, inputs, folds, training, session)
    note = f"{found.mixing.kind}, {found.mixing.numbers} numbers" if found.mixing.kind != name else ""
    if name == PAPER:
        note = (
            "softmax weights from a random start, one pass at a rate of 1e-4, as published; "
            f"{one_draw(inputs.settings.seed)}"
        )
    if torch.equal(found.theta, found.anchor):
        note = f"no step from its start, {found.chosen}: the passes allowed none, or none was better"
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


def moments_cost(calibration: Calibration, adapters: int) -> Cost:
    """The most that `own_moments` takes: every record goes through each adapter."""
    return cost_of(plan_batches(calibration.examples, batch_tokens=1)) * adapters


def _chosen(calibration: Calibration) -> list[Example]:
    return shuffled(calibration.examples, seed=calibration.settings.seed)[:_SEARCH_RECORDS]


def search_weights(
    method: Method, options: MethodOptions, calibration: Calibration, adapters: Sequence[LoraAdapter], layout: Layout
) -> MixingPoint:
    """A method that searches for one weight an adapter by the loss on up to 64 calibration records, infinite where
    there is none.

    Raises:
        NonFiniteLoss: if no weights that were tried have a finite loss.
    """
    assert method.search is not None
    chosen = _chosen(calibration)
    batches = calibration.session.batches(chosen)
    mixing = make_diagonal(layout, "adapter")
    with calibration.engine(adapters, layout.modules) as engine:
        engine.meter.stage(method.name)

        failures: list[NonFiniteLoss] = []
        tried = 0

        def loss(weights: Sequence[float]) -> float:
            nonlocal tried
            tried += 1
            try:
                return engine.score(mixing, mixing.constant(weights), batches, chosen).nats_per_token
            except NonFiniteLoss as error:
                failures.append(error)
                return math.inf

        found = method.search(loss, len(adapters), options)
    if failures and len(failures) == tried:
        raise failures[-1]
    drawn = [one_draw(options.seed)] if "seed" in method.takes else []
    shown = "weights " + ", ".join(f"{weight:.2f}" for weight in found)
    return weighted(layout, found, note="; ".join([shown, *drawn]))


def owners_of(
    sources: Sequence[DataSource], adapters: Sequence[LoraAdapter], names: Sequence[str]
) -> tuple[int | None, ...]:
    """Of each file whose own records it holds: the place of an adapter from 0, None for records of all.

    Args:
        sources: of calibration records.
        adapters: N adapters.
        names: what each is called in tables.
    Raises:
        UsageError: for a name that is no adapter's, or several ones'.
    """
    owners: list[int | None] = []
    for source in sources:
        name = source.adapter
        found = [
            place
            for place, (adapter, called) in enumerate(zip(adapters, names, strict=True))
            if name is not None and (name == called or goes_by(name, place, adapter))
        ]
        if name is not None and len(found) != 1:
            problem = "is none of the adapters" if not found else "names several of the adapters"
            known = ", ".join(f"{called} (#{place + 1})" for place, called in enumerate(names))
            raise UsageError(f"{source}@{name}: {name} {problem}", hint=f"they are {known}")
        owners.append(found[0] if found else None)
    return tuple(owners)


def check_own_records(method: str, owners: Sequence[int | None], names: Sequence[str]) -> None:
    """Raises UsageError unless each of several adapters has records, and one of them its own.

    Args:
        method: that goes by them.
        owners: of the files, from `owners_of`.
        names: of the adapters.
    """
    example = " ".join(f"FILE@{name}" for name in names)
    if len(names) > 1 and all(owner is None for owner in owners):
        raise UsageError(
            f"{method} goes by each adapter's own records, and with the same for all it is the average, uniform",
            hint=f"say whose each file is: --fit-data {example}",
        )
    lacking = [name for place, name in enumerate(names) if place not in owners and None not in owners]
    if lacking:
        raise UsageError(f"{method} has no records of {lacking[0]}", hint=f"give them with --fit-data {example}")


def own_moments(
    calibration: Calibration, owners: Sequence[int | None], adapters: Sequence[LoraAdapter], layout: Layout
) -> OwnMoments:
    """What each adapter's own records show of its inputs: Z_i = E[z z^T] of z = A x, with that adapter alone attached
    at full strength, over the tokens of up to 64 of its records. A file's weight does not count.

    Args:
        calibration: the records, those of held-out files not among them.
        owners: of its files, from `owners_of`; files of nobody count for every adapter.
        adapters: N that are composed.
        layout: of them.
    Raises:
        UsageError: if an expert or a convolution is changed, no record of an adapter is left, or what it shows is not
            finite.
    """
    check_weighable(adapters, hint="leave out the method")
    owner_of = {str(file.source): owner for file, owner in zip(calibration.data.files, owners, strict=True)}
    lora_A = {
        name: torch.cat([update.lora_A.float() for update in updates_of(adapters, name) if update is not None])
        for name in layout.modules
    }
    mixing, parts = make_diagonal(layout, "adapter"), []
    with calibration.engine(adapters, layout.modules) as engine:
        engine.meter.stage("activations")
        for place, adapter in enumerate(adapters):
            own = [e for e in calibration.examples if owner_of[e.place.rpartition(":")[0]] in (None, place)]
            own = chosen_records(own, seed=calibration.settings.seed)
            if not own:
                raise UsageError(f"no record of {adapter.reference} is left", hint="give more, or raise --max-length")
            alone = mixing.constant([float(place == other) for other in range(len(adapters))])
            found = second_moments(engine, mixing, alone, lora_A, plan_batches(own, batch_tokens=1), own)
            if not all(bool(torch.isfinite(moment).all()) for moment in found.values()):
                raise UsageError(f"the activations of {adapter.reference} are not finite on its records")
            parts.append(found)
    stacked = {name: torch.stack([found[name] for found in parts]) for name in layout.modules}
    files = zip(calibration.data.files, owners, strict=True)
    records = [(file.source.name, file.sha256, None if owner is None else owner + 1) for file, owner in files]
    return OwnMoments(stacked, tuple(records))


def regressed(
    method: Method, moments: OwnMoments, adapters: Sequence[LoraAdapter], device: torch.device = CPU
) -> MixingPoint:
    """A method that goes by what each adapter's own records show, computed on a device.

    Raises:
        ValueError: if it cannot honour these adapters, with the reason.
    """
    return of_factors(
        {
            name: method.regress_updates(
                [update and update.on(device) for update in updates_of(adapters, name)], moment
            ).factors.on(CPU)
            for name, moment in moments.by_module.items()
        }
    )
