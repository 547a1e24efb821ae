"""The second moments that an activation-aware cut goes by: those that the fit left beside its recipe, or those of
calibration records that are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loracli.calibration.records import DataPaths, parse_sources, read_records
from loracli.composition.attached import of_factors
from loracli.composition.composition import Composition
from loracli.errors import RecipeError, UsageError
from loracli.export.method import base_to_run
from loracli.fitting.activations import check_weighable, second_moments
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.reach import find_reach
from loracli.fitting.settings import FitSettings
from loracli.hub.references import Named
from loracli.model.placement import Placement
from loracli.model.session import Opening, open_session
from loracli.progress import SILENT, Progress, begun
from loracli.recipe.tensors import MOMENT, read_moments


@dataclass(frozen=True)
class Moments:
    """G = E[z z^T] (R, R) by module, z = A x with the composition's A, and what it was taken from."""

    by_module: Mapping[str, Tensor]
    origin: Literal["recipe", "records"]


_WAY_OUT = "leave out --activation-aware"


def recorded_moments(source: Composition, path: Path | None = None) -> Moments:
    """Those that the fit left beside the recipe.

    Args:
        source: of the recipe.
        path: of the recipe's file, where the composition was not made of the recipe that was read from it.
    Raises:
        UsageError: if the recipe has none, or an expert is changed.
        RecipeError: if the file beside it is missing, damaged, or does not fit the adapters.
        IntegrityError: if it is not the file that the recipe was written with.
    """
    check_weighable(source.adapters, hint=_WAY_OUT)
    activations = source.activations
    if activations is not None:
        path = path or activations.recipe
    if activations is None or (path is None and not activations.moments):
        raise UsageError(
            "the recipe holds no second moments of activations for --activation-aware",
            hint="give calibration records with --fit-data FILE, or fit again",
        )
    moments = activations.moments or read_moments(path or Path(), activations)
    return Moments({name: _of_composition(source, name, moments) for name in source.names()}, "recipe")


def _of_composition(source: Composition, name: str, moments: Mapping[str, Tensor]) -> Tensor:
    """The part of a module's G that belongs to the rows of its composition, in float64: an adapter of weight 0 has no
    row there."""
    found = moments.get(f"{name}.{MOMENT}")
    if source.weights_of is None:
        kept = torch.ones(source.known_rank(name) or 0, dtype=torch.bool)
    else:
        weights = source.weights_of(name)
        pairs = [(a.modules[name], w) for a, w in zip(source.adapters, weights, strict=True) if name in a.modules]
        kept = torch.cat([torch.full((module.factors.rank,), weight != 0) for module, weight in pairs])
    if found is None or len(found) != len(kept):
        raise RecipeError(f"the recipe's second moments do not fit {name}", hint="give --fit-data FILE, or fit again")
    if not kept.any():
        return found.new_zeros(1, 1).double()  # the composition is one row of zeros
    return found[kept][:, kept].double()


_TASK = "activations"


def moments_of(
    source: Composition,
    fit_data: DataPaths,
    *,
    base: Named | None = None,
    base_revision: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """E[z z^T] (R, R) of every module, z = A x with the composition attached.

    Args:
        source: the composition; G is in the basis of its `compose`.
        fit_data: calibration JSONL.
        base: a Hub id or directory, None for the recipe's, or the one that all adapters name.
        base_revision: of a base on the Hub.
        placement: where and how the base runs.
        progress: told of a download.
    Raises:
        InputError: of the kind that fits, if base or records are rejected.
        UsageError: if an expert is changed.
    """
    check_weighable(source.adapters, hint=_WAY_OUT)
    files = tuple(read_records(path, progress=progress) for path in parse_sources(fit_data))
    reference, placement = base_to_run(
        source.adapters, source.recorded, base=base, revision=base_revision, placement=placement, progress=progress
    )
    # A batch for each record, so that there is no padding.
    opening = Opening(reference, source.adapters, 1, FitSettings().max_length, source.saved, placement)
    with open_session(opening, progress=progress) as session:
        examples = session.render(files)
        batches = session.batches(examples)
        session.check_causal(examples)
        names = source.names()
        factors = {name: source.compose(name).factors for name in names}
        composed = of_factors(factors)
        lora_A = {name: update.lora_A for name, update in factors.items()}
        with session.attached(source.adapters, names, examples) as objective:
            engine = Engine(objective, Meter(progress, task=_TASK), progress=progress)
            find_reach(engine, session, examples)
            with begun(progress, _TASK, sum(batch.tokens for batch in batches), "tokens"):
                return second_moments(engine, composed.mixing, composed.theta, lora_A, batches, examples)
