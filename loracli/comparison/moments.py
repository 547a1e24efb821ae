"""The second moments of a composition on calibration records, outside a fit: what an activation-aware export needs."""

from __future__ import annotations

from torch import Tensor

from loracli.calibration.batches import plan_batches
from loracli.calibration.records import DataPaths, parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.composition.attached import of_factors
from loracli.composition.composition import Source, recorded_base
from loracli.export.activations import check_weighable
from loracli.fitting.activations import second_moments
from loracli.fitting.engine import Engine
from loracli.fitting.meter import Meter
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach, replace_modules
from loracli.model.base import check_fits, find_base, load_base
from loracli.model.loss import check_causal, make_objective
from loracli.model.placement import memory_errors
from loracli.progress import SILENT, Progress

TASK = "activations"


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
    check_weighable(source)
    settings = FitSettings()
    files = tuple(read_records(path, progress=progress) for path in parse_sources(fit_data))
    base, base_revision = recorded_base(source, base, base_revision)
    with memory_errors():
        reference = find_base(source.adapters, base, revision=base_revision, progress=progress)
        model = load_base(reference, progress=progress)
        check_fits(model, source.adapters)
        replace_modules(model.model, source.saved)
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
        composed = of_factors(factors)
        lora_A = {name: update.lora_A for name, update in factors.items()}
        with attach(model.model, source.adapters, names) as attached:
            engine = Engine(make_objective(attached, batches[0]), Meter(progress, task=TASK), progress=progress)
            progress.begin(TASK, sum(batch.tokens for batch in batches), "tokens")
            try:
                return second_moments(engine, composed.mixing, composed.theta, lora_A, batches, examples)
            finally:
                progress.finish(TASK)
