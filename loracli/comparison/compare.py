"""A comparison: what has to be fitted is fitted, then every way to compose is set on one attached model in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter
from loracli.calibration.dataset import render_dataset
from loracli.calibration.records import CalibrationFile, DataPaths
from loracli.calibration.render import Example
from loracli.comparison.candidates import Candidate, candidates, datamix_candidate
from loracli.comparison.inputs import CompareInputs, prepare_comparison
from loracli.comparison.settings import CompareSettings
from loracli.comparison.state import KeptRows, kept_rows
from loracli.comparison.table import Evaluated, comparison_of, mean_of
from loracli.composition.attached import MixingPoint
from loracli.composition.fitted import TASK, Calibration
from loracli.errors import NonFiniteLoss
from loracli.evaluation.comparison import Comparison, Skipped
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.scorer import Scorer, make_scorer
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import say_tokenizer_differences
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import Layout, make_diagonal, make_layout
from loracli.fitting.reach import find_reach
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.model.session import Opening, Session, open_session
from loracli.progress import SILENT, WORK, Bar, Progress, drawn, duration_text, takes_bar
from loracli.system.document import dtype_name, encode


@takes_bar
def compare_adapters(
    data: DataPaths,
    *,
    recipe: str | Path | Sequence[str | Path] | None = None,
    adapters: Sequence[str] = (),
    fit_data: DataPaths | None = None,
    guard: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    settings: CompareSettings | None = None,
    metric: TaskMetric | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress | Bar = SILENT,
) -> Comparison:
    """Compares every way to compose on some records: `prepare_comparison` and `run_comparison` in one.

    Raises:
        LoracatError: of the kind that fits, when an input is rejected or a method cannot be had.
    """
    progress = drawn(progress)
    inputs = prepare_comparison(
        data,
        recipe=recipe,
        adapters=adapters,
        fit_data=fit_data,
        guard=guard,
        base=base,
        base_revision=base_revision,
        settings=settings,
        progress=progress,
    )
    return run_comparison(inputs, placement=placement, metric=metric, progress=progress)


def run_comparison(
    inputs: CompareInputs,
    *,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    metric: TaskMetric | None = None,
    kept: KeptRows = KeptRows(),  # noqa: B008  # without a folder it keeps nothing
    progress: Progress = SILENT,
) -> Comparison:
    """Loads the base model and compares.

    Args:
        inputs: from `prepare_comparison`.
        placement: where and how the base model runs.
        metric: of the answers; None to compare losses alone.
        kept: takes the rows that are done, and gives back those that a stopped comparison did.
        progress: told what happens.
    Raises:
        UsageError: if a method that was asked for by name cannot honour the adapters.
        NonFiniteLoss: if no ingredient has a finite loss.
        StateMismatch: if what was kept of a row is damaged.
    """
    fit = inputs.settings.fit
    adapters = (*inputs.adapters, *([] if inputs.datamix is None else [inputs.datamix]))
    opening = Opening(inputs.base, adapters, fit.batch_tokens, fit.max_length, inputs.saved, placement)
    rows = _Rows(progress)
    with open_session(opening, progress=rows) as session:
        say_tokenizer_differences(inputs.adapters, inputs.references, session.tokenizer, progress)
        return _Comparison(inputs, session, metric, kept, rows).run()


@contextmanager
def resumable_comparison(
    prepare: Callable[[], CompareInputs],
    folder: Path,
    *,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    metric: TaskMetric | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Iterator[Comparison]:
    """A comparison whose rows are kept in a folder until what is done with it in the context is done too.

    Args:
        prepare: reads and checks the inputs.
        folder: of the state, from `comparison_state`.
        placement: where and how the base model runs.
        metric: of the answers; None to compare losses alone.
        resume: go on where an interrupted comparison of the same inputs was; other rows may be asked for.
        force: drop what an interrupted comparison has done.
        progress: told what happens.
    Raises:
        LoracatError: as `run_comparison` and `kept_rows`.
    """
    inputs = prepare()
    with kept_rows(folder, inputs, placement, metric, resume=resume, force=force, progress=progress) as kept:
        yield run_comparison(inputs, placement=placement, metric=metric, kept=kept, progress=progress)


class _Rows:
    """Tells another `Progress` of a comparison row by row, each with about as much work as was expected of it.

    A row that takes more stays at its end, and one that takes less goes there when the next one begins; so the whole is
    reached and never passed.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._row, self._end, self._told = "", 0, 0

    def enter(self, row: str, work: int) -> None:
        """What follows is for this row."""
        self._progress.advance(TASK, self._end - self._told, row)
        self._row, self._told, self._end = row, self._end, self._end + work

    def begin(self, task: str, total: int | None, unit: str) -> None:
        self._progress.begin(task, total, unit)

    def advance(self, task: str, amount: int, status: str = "") -> None:
        if task == TASK:
            amount = min(amount, self._end - self._told)
            self._told += amount
            status = status if status.startswith(self._row) else f"{self._row}, {status}"
        self._progress.advance(task, amount, status)

    def finish(self, task: str) -> None:
        self._progress.finish(task)

    def note(self, message: str) -> None:
        self._progress.note(message)

    def warn(self, message: str) -> None:
        self._progress.warn(message)


class _Comparison:
    def __init__(
        self, inputs: CompareInputs, session: Session, metric: TaskMetric | None, kept: KeptRows, progress: _Rows
    ) -> None:
        self._inputs, self._session, self._kept, self._progress = inputs, session, kept, progress
        self._forward = 0  # tokens of a row
        self._test = self._render(inputs.test)
        self._guard = self._render(inputs.guard)
        self._metric = metric
        self._answers = None if metric is None else self._scorer(metric)
        self._skipped: list[Skipped] = []
        self._names: list[str] = []  # of all rows, in their order
        self._done: dict[str, Evaluated] = {}  # by these

    def run(self) -> Comparison:
        inputs = self._inputs
        self._session.check_causal(self._test)
        self._session.say_likelier_orders(inputs.adapters, self._test)
        rows = candidates(inputs, self._calibration(), self._skipped)
        others = [] if inputs.datamix is None else [datamix_candidate(inputs.datamix)]
        every = [*rows, *others]
        self._names = [row.name for row in every]
        self._recall(every)
        left = [row for row in every if row.name not in self._done]
        self._announce(left)
        try:
            for row in left:
                if row.fitted:
                    self._fit(row)
            self._evaluate([row for row in left if not row.fitted and row in rows], inputs.adapters, inputs.layout)
            if inputs.datamix is not None:
                mixed = [inputs.datamix]
                self._evaluate([row for row in left if row in others], mixed, make_layout(mixed))
        finally:
            self._progress.finish(TASK)
        evaluated = [self._done[name] for name in self._names if name in self._done]
        metric = None if self._metric is None else self._metric.name
        return comparison_of(evaluated, self._skipped, inputs, examples=self._test, metric=metric)

    def _recall(self, rows: Sequence[Candidate]) -> None:
        """Takes over what a stopped comparison did."""
        for row in rows:
            found = self._kept.recall(
                self._key(row),
                row,
                records=len(self._test),
                guard=len(self._guard),
                answers=self._metric is not None,
            )
            if found is not None:
                self._done[row.name] = found
        if self._done:
            self._progress.note(f"taken over, {len(self._done)} of {len(rows)} rows: {', '.join(self._done)}")

    def _key(self, row: Candidate) -> str:
        """Of what is kept: `uniform` has other options where it was not named."""
        return json.dumps([row.name, encode(self._inputs.settings.options_of(row.name))])

    def _render(self, files: Sequence[CalibrationFile]) -> tuple[Example, ...]:
        settings = self._inputs.settings.fit
        return self._session.render(files, allow_truncation=settings.allow_truncation, skip_bad=settings.skip_bad)

    def _scorer(self, metric: TaskMetric) -> Scorer:
        settings = self._inputs.settings.fit
        return make_scorer(
            metric,
            self._inputs.test,
            [example.place for example in self._test],
            self._session.tokenizer,
            max_length=settings.max_length,
            batch_tokens=settings.batch_tokens,
            progress=self._progress,
        )

    def _calibration(self) -> Calibration | None:
        data, settings = self._inputs.calibration, self._inputs.settings.fit
        if data is None:
            return None
        rendered = render_dataset(
            data,
            self._session.tokenizer,
            max_length=self._session.max_length,
            allow_truncation=settings.allow_truncation,
            skip_bad=settings.skip_bad,
            progress=self._progress,
        )
        return Calibration(self._session, data, rendered.training, settings)

    def _announce(self, rows: Sequence[Candidate]) -> None:
        """Says what will be done and, from one timed batch, about how long it takes."""
        inputs, base = self._inputs, self._session.base
        batches = self._session.batches(self._test)
        batch = batches[len(batches) // 2]
        self._forward = sum(one.tokens for one in (*batches, *self._session.batches(self._guard)))
        work = sum(len(row.draws) * self._forward + row.cost for row in rows)
        with self._engine(inputs.adapters, inputs.layout) as engine:
            find_reach(engine, self._session, self._test)
            device = engine.objective.attached.device
            mixing = make_diagonal(inputs.layout, "module")
            seconds = engine.seconds(mixing, mixing.constant([0.0] * inputs.layout.adapters), batch)
        about = duration_text(work * seconds / (2 * batch.tokens))
        generated = "; the answers that are generated come on top" if self._metric is not None else ""
        self._progress.note(
            f"base {base.reference.id} in {dtype_name(base.dtype)} on {device}; {len(rows)} rows "
            f"to score on {len(self._test)} records: about {about}{generated}"
        )
        self._progress.begin(TASK, work, WORK)

    @contextmanager
    def _engine(self, adapters: Sequence[LoraAdapter], layout: Layout) -> Iterator[Engine]:
        with self._session.attached(adapters, layout.modules, self._test) as objective:
            yield Engine(objective, Meter(self._progress, task=TASK), progress=self._progress)

    def _fit(self, row: Candidate) -> None:
        """A row that attaches the adapters itself: its fit, or one for each draw, and what that scores."""
        found = []
        for draw in row.draws:
            self._progress.enter(self._counted(row), draw.cost)
            point = draw.composed(self._skipped)
            if point is None:
                return
            with self._engine(self._inputs.adapters, self._inputs.layout) as engine:
                self._progress.enter(self._counted(row), self._forward)
                scored = self._score(draw, point, engine)
            if scored is None:
                return
            found.append(scored)
        self._keep(row, mean_of(found))

    def _evaluate(self, rows: Sequence[Candidate], adapters: Sequence[LoraAdapter], layout: Layout) -> None:
        """The other rows, which are set on one attached model in turn."""
        with self._engine(adapters, layout) as engine:
            if adapters is not self._inputs.adapters:
                find_reach(engine, self._session, self._test)
            for row in rows:
                self._progress.enter(self._counted(row), self._forward)
                point = row.composed(self._skipped)
                scored = None if point is None else self._score(row, point, engine)
                if scored is not None:
                    self._keep(row, scored)

    def _score(self, row: Candidate, point: MixingPoint, engine: Engine) -> Evaluated | None:
        """What a row scores; None of one whose loss is not finite, which is left out.

        Raises:
            NonFiniteLoss: if it is the last adapter, and no other has a finite loss.
        """
        engine.meter.stage(self._counted(row))
        try:
            return self._measure(row, point, engine)
        except NonFiniteLoss as error:
            references = self._inputs.references
            if row.name == references[-1] and not any(name in self._done for name in references):
                raise
            self._skipped.append(Skipped(row.name, str(error)))
            self._progress.warn(f"{row.name} is left out: {error}")
            return None

    def _keep(self, row: Candidate, found: Evaluated) -> None:
        self._done[row.name] = found
        self._kept.write(self._key(row), found, fitted=row.fitted)

    def _counted(self, row: Candidate) -> str:
        """`15/23 ties`."""
        return f"{self._names.index(row.name) + 1}/{len(self._names)} {row.name}"

    def _measure(self, row: Candidate, point: MixingPoint, engine: Engine) -> Evaluated:
        def score(examples: tuple[Example, ...]) -> Scores:
            return engine.score(point.mixing, point.theta, self._session.batches(examples), examples)

        guard = score(self._guard) if self._guard else None
        scores = score(self._test)
        values = None if self._answers is None else self._answers(engine.objective)
        return Evaluated(
            row.name, row.kind, scores, point.rank, point.kept_energy, point.weights, point.note, guard, values
        )
