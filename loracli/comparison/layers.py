"""Which layers carry what a recipe does: the loss on records with the composition left out of one layer at a time.

    change_l = loss(composition without layer l) - loss(composition)        nats per scored token

Above zero where the layer helps. Each loss is measured, by a forward pass over the records. The changes do not add up
to what all layers do together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loracli.adapters.names import layer
from loracli.calibration.records import DataPaths
from loracli.comparison.inputs import CompareInputs, prepare_comparison
from loracli.comparison.settings import CompareSettings
from loracli.evaluation.statistics import standard_error, units_of
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import say_tokenizer_differences
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import Applied
from loracli.fitting.reach import find_reach
from loracli.fitting.settings import FitSettings
from loracli.hub.references import Named
from loracli.model.attach import AttachedModel
from loracli.model.placement import Placement
from loracli.model.session import Opening, Session, open_session
from loracli.progress import SILENT, WORK, Progress, begun
from loracli.recipe.recipe import Recipe, load_recipe

_TASK = "layers"


@dataclass(frozen=True)
class LayerEffect:
    """One layer.

    Args:
        layer: its path, or a module that belongs to none.
        modules: of it that the composition changes.
        nats_per_token: of the composition without them.
        change: of the loss when they are left out, above zero where they help.
        standard_error: of the change over records, paired; None of one record.
    """

    layer: str
    modules: int
    nats_per_token: float
    change: float
    standard_error: float | None


@dataclass(frozen=True)
class LayerEffects:
    """What each layer of a composition does to the loss on some records.

    Args:
        data: names of the files.
        base: of the base model.
        records: how many.
        scored_tokens: in them.
        repeated_records: how many of them were calibrated on.
        weights_edited: whether the weights are others than the fit found.
        nats_per_token: of the whole composition.
        layers: in order, what belongs to no layer last.
    """

    data: str
    base: str
    records: int
    scored_tokens: int
    repeated_records: int
    weights_edited: bool
    nats_per_token: float
    layers: tuple[LayerEffect, ...]


def layer_effects(
    recipe: Path,
    data: DataPaths,
    *,
    adapters: Sequence[Named] = (),
    base: Named | None = None,
    base_revision: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress = SILENT,
) -> LayerEffects:
    """Scores the records with a recipe's composition, and again without each layer.

    Args:
        recipe: its path; records are read and cut as its fit did.
        data: JSONL that nothing was fitted on, one path or several.
        adapters: where its ingredients are now, in its order.
        base: a Hub id or directory, None for the recipe's.
        base_revision: of a base on the Hub.
        placement: where and how the base runs.
        progress: told how far it is.
    Raises:
        LoracatError: of the kind that fits, if an input is rejected.
        NonFiniteLoss: if the composition, or what is left of it, has none.
    """
    inputs = prepare_comparison(
        data,
        recipe=recipe,
        adapters=adapters,
        base=base,
        base_revision=base_revision,
        placement=placement,
        settings=CompareSettings(fit=_reading(load_recipe(recipe))),
        progress=progress,
    )
    fit = inputs.settings.fit
    placement = inputs.as_fitted(placement, progress=progress)
    opening = Opening(inputs.base, inputs.adapters, fit.batch_tokens, fit.max_length, inputs.saved, placement)
    with open_session(opening, progress=progress) as session:
        say_tokenizer_differences(inputs.adapters, inputs.references, session.tokenizer, progress)
        return _measured(inputs, session, progress)


def _reading(recipe: Recipe) -> FitSettings:
    """How the fit read its records; what a damaged recipe says otherwise is left out."""
    kinds = {"format": str, "fields": str, "max_length": int, "batch_tokens": int}
    known: dict[str, Any] = {n: v for n, v in recipe.fit.settings.items() if n in kinds and type(v) is kinds[n]}
    return FitSettings(**known)


@dataclass(frozen=True, eq=False)
class _Without:
    """What is set on the attached model, but for some of its modules, which stay the base's."""

    mixing: Applied
    places: frozenset[int]

    def apply(self, attached: AttachedModel, theta: torch.Tensor) -> None:
        self.mixing.apply(attached, theta)
        attached.cores = tuple(
            core if place not in self.places else _nothing(core) for place, core in enumerate(attached.cores)
        )


def _nothing(core: Any) -> Any:
    """As the mixing matrix or the factors of a module, of an update that is 0."""
    return (core[0], torch.zeros_like(core[1])) if isinstance(core, tuple) else torch.zeros_like(core)


def _measured(inputs: CompareInputs, session: Session, progress: Progress) -> LayerEffects:
    files, settings, recipe = inputs.test, inputs.settings.fit, inputs.recipes[0]
    examples = session.render(files, allow_truncation=settings.allow_truncation, skip_bad=settings.skip_bad)
    session.check_causal(examples)
    batches, modules = session.batches(examples), inputs.layout.modules
    places: dict[str, set[int]] = {}
    for place in sorted(range(len(modules)), key=lambda place: _order(modules[place])):
        places.setdefault(layer(modules[place]), set()).add(place)
    work = (1 + len(places)) * sum(batch.tokens for batch in batches)
    with begun(progress, _TASK, work, WORK), session.attached(inputs.adapters, modules, examples) as objective:
        engine = Engine(objective, Meter(progress, task=_TASK), progress=progress)
        find_reach(engine, session, examples)
        point = recipe.point(inputs.adapters, inputs.layout)
        engine.meter.stage("all layers")
        units = units_of(examples)
        whole = engine.score(point.mixing, point.theta, batches, examples).pooled(units)
        effects = []
        for number, (name, out) in enumerate(places.items(), 1):
            engine.meter.stage(f"{number}/{len(places)} without {name}")
            without = _Without(point.mixing, frozenset(out))
            left = engine.score(without, point.theta, batches, examples).pooled(units)
            more = left.nats - whole.nats
            error = standard_error(more, whole.tokens) if len(more) > 1 else None
            change = float(more.sum() / whole.tokens.sum())
            effects.append(LayerEffect(name, len(out), left.nats_per_token, change, error))
    return LayerEffects(
        data=", ".join(file.source.name for file in files),
        base=inputs.base.id,
        records=len(examples),
        scored_tokens=sum(example.scored_tokens for example in examples),
        repeated_records=inputs.repeated,
        weights_edited=recipe.recipe.mixing.edited,
        nats_per_token=whole.nats_per_token,
        layers=tuple(effects),
    )


def _order(module: str) -> tuple[bool, list[tuple[int, str]]]:
    """Layers by their numbers, what belongs to none last."""
    path = layer(module)
    parts = path.split(".")
    return path == module, [(int(part) if part.isdecimal() else -1, part) for part in parts]
