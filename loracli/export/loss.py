"""What an export costs on records: the loss of the composition before it was cut and rounded, and of the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracli.adapters.adapter import open_adapter
from loracli.adapters.claims import check_language_models
from loracli.algebra.factors import Factors
from loracli.calibration.dataset import warn_of_copies
from loracli.calibration.records import CalibrationFile, DataPaths, parse_sources, read_records
from loracli.composition.attached import of_factors
from loracli.evaluation.statistics import paired_interval, units_of
from loracli.export.export import Exported
from loracli.export.method import base_to_run
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_layout
from loracli.fitting.reach import find_reach
from loracli.fitting.settings import FitSettings
from loracli.hub.references import Named
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.model.reference import locate_base
from loracli.model.session import Opening, open_session
from loracli.progress import SILENT, WORK, Progress, begun

_TASK = "loss"


@dataclass(frozen=True)
class ExportLoss:
    """Nats per scored token of the exact composition and of the written adapter, on the same records.

    Args:
        records: how many.
        scored_tokens: in them.
        before: of the composition.
        after: of the adapter that was written.
        interval: 95 % bootstrap interval of after minus before over records.
    """

    records: int
    scored_tokens: int
    before: float
    after: float
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        return self.after - self.before


def read_loss_data(
    data: DataPaths, *, base: Named | None = None, base_revision: str | None = None, progress: Progress = SILENT
) -> tuple[CalibrationFile, ...]:
    """The records, before the work whose result is scored on them, on the base that is named.

    Raises:
        CalibrationError: if they cannot be used.
        InputError, UsageError: as `locate_base`.
    """
    if base is not None:
        locate_base(base, revision=base_revision)
    files = tuple(read_records(source, progress=progress) for source in parse_sources(data))
    warn_of_copies([record for file in files for record in file.records], "scored", progress)
    return files


def loss_of_export(
    exported: Exported,
    files: Sequence[CalibrationFile],
    *,
    base: Named | None = None,
    base_revision: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress = SILENT,
) -> ExportLoss:
    """Scores what was exported and what it was exported from, attached to the base in turn.

    Args:
        exported: whose directory and ingredients are as they were.
        files: of the records, from `read_loss_data`.
        base: a Hub id or directory, None for the recipe's, or the one that all adapters name.
        base_revision: of a base on the Hub.
        placement: where and how the base runs.
        progress: told how far it is.
    Raises:
        InputError: of the kind that fits, if base or records are rejected.
        NonFiniteLoss: if one of the two has none.
    """
    source, settings = exported.composition, FitSettings()
    check_language_models(source.adapters, "scoring records")
    reference, placement = base_to_run(
        source.adapters, source.recorded, base=base, revision=base_revision, placement=placement, progress=progress
    )
    tokens, length = settings.batch_tokens, settings.max_length
    opening = Opening(reference, source.adapters, tokens, length, source.saved, placement)
    with open_session(opening, progress=progress) as session:
        examples = session.render(files)
        batches = session.batches(examples)
        session.check_causal(examples)
        names, written = source.names(), open_adapter(str(exported.path)).modules
        modules, work = make_layout(source.adapters).modules, 2 * sum(batch.tokens for batch in batches)
        with begun(progress, _TASK, work, WORK), session.attached(source.adapters, modules, examples) as objective:
            engine = Engine(objective, Meter(progress, task=_TASK), progress=progress)
            find_reach(engine, session, examples)

            def score(way: str, factors_of: Callable[[str], Factors]) -> Scores:
                engine.meter.stage(way)
                point = of_factors({name: factors_of(name) for name in names})
                return engine.score(point.mixing, point.theta, batches, examples).pooled(units_of(examples))

            before = score("scoring the composition", lambda name: source.compose(name).factors)
            after = score("scoring what was written", lambda name: written[name].factors)
    return ExportLoss(
        records=len(examples),
        scored_tokens=sum(example.scored_tokens for example in examples),
        before=before.nats_per_token,
        after=after.nats_per_token,
        interval=paired_interval(after.nats - before.nats, before.tokens, seed=settings.seed),
    )
