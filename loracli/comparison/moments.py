"""The second moments of a composition on calibration records, outside a fit: what an activation-aware export needs."""

from __future__ import annotations

from torch import Tensor

from loracli.adapters.names import is_expert
from loracli.calibration.batches import plan_batches
from loracli.calibration.records import read_records
from loracli.calibration.render import render_file
from loracli.calibration.sources import DataPaths, parse_sources
from loracli.comparison.composition import of_factors
from loracli.errors import UsageError
from loracli.export.source import RecipeSource, Source
from loracli.fitting.activations import second_moments
from loracli.fitting.attach import attach
from loracli.fitting.base import check_fits, find_base, load_base
from loracli.fitting.loss import check_causal, make_objective
from loracli.fitting.memory import memory_errors
from loracli.fitting.settings import FitSettings
from loracli.progress import SILENT, Progress


def moments_of(
    source: Source,
    fit_data: DataPaths,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """E[z z^T] (R, R) of every module, z = A x with the composition attached.

    Args:
        source: the composition; G is in the gauge of its `compose`.
        fit_data: calibration JSONL.
        base: a Hub id or directory, None for the recipe's, or the one that all adapters name.
        base_revision: of a base on the Hub.
        progress: told of a download.
    Raises:
        InputError: of the kind that fits, if base or records are rejected.
        UsageError: if an expert is changed.
    """
    experts = next((name for name in source.names() if is_expert(name)), None)
    if experts is not None:
        raise UsageError(
            f"the activations of the expert {experts} cannot be weighed", hint="leave --activation-aware out"
        )
    settings = FitSettings()
    files = tuple(read_records(path, progress=progress) for path in parse_sources(fit_data))
    if base is None and isinstance(source, RecipeSource) and source.recipe.base.commit is not None:
        base, base_revision = source.recipe.base.id, base_revision or source.recipe.base.commit
    with memory_errors():
        reference = find_base(source.adapters, base, revision=base_revision, progress=progress)
        model = load_base(reference, progress=progress)
        check_fits(model, source.adapters)
        examples = [
            example
            for file in files
            for example in render_file(
                file, model.tokenizer, max_length=settings.max_length, progress=progress
            ).examples
        ]
        batches = plan_batches(examples, batch_tokens=1)  # a record each, so that there is no padding
        check_causal(model.model, reference.id, batches[0])
        names = source.names()
        factors = {name: source.compose(name).factors for name in names}
        with attach(model.model, source.adapters, names) as attached:
            composition = of_factors(factors)
            composition.mixing.apply(attached, composition.theta)
            return second_moments(make_objective(attached, batches[0]), factors, batches)
