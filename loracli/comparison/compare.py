"""A comparison: what has to be fitted is fitted, then every way to compose is set on one attached model in turn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter
from loracli.calibration.dataset import render_dataset, tokens_sha256
from loracli.calibration.records import CalibrationFile, DataPaths
from loracli.calibration.render import Example
from loracli.comparison.candidates import Candidate, candidates, datamix_candidate
from loracli.comparison.inputs import CompareInputs, prepare_comparison
from loracli.comparison.settings import CompareSettings
from loracli.comparison.state import KeptRows, kept_rows
from loracli.comparison.table import Evaluated, comparison_of, mean_of, record_lines
from loracli.composition.attached import MixingPoint
from loracli.composition.fitted import TASK, Calibration
from loracli.errors import NonFiniteLoss, OutputExists
from loracli.evaluation.comparison import Comparison, ComparisonSettings, FitFile, RowKind, Skipped
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.scorer import Scorer, check_answerable, make_scorer
from loracli.fitting.descent import plan_steps
from loracli.fitting.engine import Engine, Pace
from loracli.fitting.inputs import say_tokenizer_differences
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import Layout, make_diagonal, make_layout
from loracli.fitting.reach import find_reach
from loracli.fitting.work import Cost, cost_of
from loracli.hub.references import Named
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.model.session import Opening, Session, open_session, settle_memory
from loracli.progress import SILENT, WORK, Bar, Progress, drawn, duration_text, takes_bar
from loracli.recipe.recipe import Recipe
from loracli.system.display import count_text
from loracli.system.document import dtype_name, encode
from loracli.system.files import ANOTHER_NAME, translate_disk_errors, write_atomically
from loracli.system.strict_json import StrictJsonError, parse_json

_LONG = 10.0  # seconds of answers that are worth a word
_MAX_LINE = 1 << 16  # bytes of a line for a row and a record


@takes_bar
def compare_adapters(
    data: DataPaths,
    *,
    recipe: Recipe | str | Path | Sequence[str | Path] | None = None,
    adapters: Sequence[Named] = (),
    fit_data: DataPaths | None = None,
    guard: DataPaths | None = None,
    base: Named | None = None,
    base_revision: str | None = None,
    settings: CompareSettings | None = None,
    metric: TaskMetric | None = None,
    per_record: str | Path | None = None,
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
        placement=placement,
        settings=settings,
        progress=progress,
    )
    lines = None if per_record is None else Path(per_record)
    return run_comparison(inputs, placement=placement, metric=metric, per_record=lines, progress=progress)


def run_comparison(
    inputs: CompareInputs,
    *,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    metric: TaskMetric | None = None,
    kept: KeptRows = KeptRows(),  # noqa: B008  # without a folder it keeps nothing
    per_record: Path | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Loads the base model and compares.

    Args:
        inputs: from `prepare_comparison`.
        placement: where and how the base model runs.
        metric: of the answers; None to compare losses alone.
        kept: takes the rows that are done, and gives back those that a stopped comparison did.
        per_record: a new JSONL file for what every row scores on each record; None to write none.
        progress: told what happens.
    Raises:
        OutputExists: if `per_record` is there.
        UsageError: if a method that was asked for by name cannot honour the adapters.
        NonFiniteLoss: if no ingredient has a finite loss.
        StateMismatch: if what was kept of a row is damaged.
    """
    check_new(per_record, resumed=kept.resumed)
    with _opened(inputs, placement, metric, kept, progress) as comparison:
        return comparison.run(per_record)


def check_new(per_record: Path | None, *, resumed: bool = False) -> None:
    """Raises OutputExists if the file for what every row scores on each record is there; a comparison that was stopped
    may have written it, and writes it again where it is `resumed`."""
    if per_record is None or not os.path.lexists(per_record) or (resumed and _holds_record_lines(per_record)):
        return
    raise OutputExists(f"{per_record} exists", hint=f"{ANOTHER_NAME} with --per-record")


def _holds_record_lines(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with translate_disk_errors(path), open(path, "rb") as file:
        line = file.readline(_MAX_LINE)
    try:
        content = parse_json(line)
    except StrictJsonError:
        return False
    return isinstance(content, dict) and content.keys() >= {"row", "record", "nats", "tokens"}


def plan_comparison(
    inputs: CompareInputs,
    *,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    metric: TaskMetric | None = None,
    progress: Progress = SILENT,
) -> ComparisonPlan:
    """Loads the base model, times it, and says what `run_comparison` would do of the same arguments.

    Raises:
        UsageError: if a method that was asked for by name has to be fitted and there are no records for it.
    """
    with _opened(inputs, placement, metric, KeptRows(), progress) as comparison:
        return comparison.plan()


@contextmanager
def _opened(
    inputs: CompareInputs, placement: Placement, metric: TaskMetric | None, kept: KeptRows, progress: Progress
) -> Iterator[_Comparison]:
    if metric is not None:
        check_answerable(metric, (record for file in inputs.test for record in file.records))
    fit = inputs.settings.fit
    adapters = (*inputs.adapters, *([] if inputs.datamix is None else [inputs.datamix]))
    placement = inputs.as_fitted(placement, progress=progress)
    opening = Opening(inputs.base, adapters, fit.batch_tokens, fit.max_length, inputs.saved, placement)
    if inputs.calibration is not None:  # something is fitted, so gradients are taken
        opening = settle_memory(opening, progress=progress)
    rows = _Rows(progress)
    with open_session(opening, progress=rows) as session:
        say_tokenizer_differences(inputs.adapters, inputs.references, session.tokenizer, progress)
        yield _Comparison(inputs, session, metric, kept, rows, placement.algebra_device())


@contextmanager
def resumable_comparison(
    prepare: Callable[[], CompareInputs],
    folder: Path,
    *,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    metric: TaskMetric | None = None,
    resume: bool = False,
    force: bool = False,
    per_record: Path | None = None,
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
        per_record: as of `run_comparison`.
        progress: told what happens.
    Raises:
        LoracatError: as `run_comparison` and `kept_rows`.
    """
    inputs = prepare()
    with kept_rows(folder, inputs, placement, metric, resume=resume, force=force, progress=progress) as kept:
        yield run_comparison(
            inputs, placement=placement, metric=metric, kept=kept, per_record=per_record, progress=progress
        )


class _Rows:
    """Tells another `Progress` of a comparison row by row: `15/23 ties`.

    A row that takes less than the most that it may leaves less to be done, which is said when the next one begins.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._row, self._done, self._total, self._ahead = "", 0, 0, list[int]()

    def plan(self, efforts: Sequence[int]) -> None:
        """What follows is so many parts of work, each entered in turn."""
        self._ahead, self._total = list(efforts), sum(efforts)
        self._progress.begin(TASK, self._total, WORK)

    def enter(self, row: str) -> None:
        """The next part begins, for this row."""
        self._row, total = row, self._done + sum(self._ahead)
        del self._ahead[0]
        if total != self._total:
            self._total = total
            self._progress.expect(TASK, total)
        self._progress.advance(TASK, 0, row)

    def leave_out(self, parts: int) -> None:
        """The next parts are not done."""
        del self._ahead[:parts]

    def begin(self, task: str, total: int | None, unit: str) -> None:
        self._progress.begin(task, total, unit)

    def advance(self, task: str, amount: int, status: str = "") -> None:
        if task == TASK:
            self._done += amount
            status = status if status.startswith(self._row) else f"{self._row}, {status}"
        self._progress.advance(task, amount, status)

    def expect(self, task: str, total: int) -> None:
        self._progress.expect(task, total)

    def finish(self, task: str) -> None:
        self._progress.finish(task)

    def note(self, message: str) -> None:
        self._progress.note(message)

    def warn(self, message: str) -> None:
        self._progress.warn(message)


@dataclass(frozen=True)
class PlannedRow:
    """A row that would be compared.

    Args:
        name: of it.
        kind: of it.
        seconds: that it takes to fit and to score, about.
    """

    name: str
    kind: RowKind
    seconds: float


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison would do.

    Args:
        base: its name.
        device: that it would run on.
        dtype: of it.
        records: that every row would be scored on.
        rows: in the order of the comparison.
        skipped: what would be left out, and why.
        seconds: about, without answers that are generated.
    """

    base: str
    device: str
    dtype: str
    records: int
    rows: tuple[PlannedRow, ...]
    skipped: tuple[Skipped, ...]
    seconds: float


class _Comparison:
    def __init__(
        self,
        inputs: CompareInputs,
        session: Session,
        metric: TaskMetric | None,
        kept: KeptRows,
        progress: _Rows,
        methods_on: torch.device,
    ) -> None:
        self._inputs, self._session, self._kept, self._progress = inputs, session, kept, progress
        self._methods_on = methods_on
        self._test = self._render(inputs.test)
        self._guard = self._render(inputs.guard)
        self._calibrated: Sequence[Example] = ()  # on these, once they are rendered
        self._metric = metric
        self._answers = None if metric is None else self._scorer(metric)
        self._skipped: list[Skipped] = []
        self._names: list[str] = []  # of all rows, in their order
        self._done: dict[str, Evaluated] = {}  # by these
        self._pace, self._device = Pace(0.0), ""  # until they are measured
        self._told = False  # how long answers take

    def plan(self) -> ComparisonPlan:
        """What `run` would do, and in what time."""
        rows, others, about = self._planned()
        plan = self._inputs.base.id, self._device, dtype_name(self._session.base.dtype), len(self._test)
        times = tuple(PlannedRow(row.name, row.kind, about[row.name]) for row in (*rows, *others))
        return ComparisonPlan(*plan, times, tuple(self._skipped), sum(about.values()))

    def run(self, per_record: Path | None) -> Comparison:
        inputs = self._inputs
        rows, others, about = self._planned()
        every = [*rows, *others]
        self._names = [row.name for row in every]
        self._recall(every)
        left = [row for row in every if row.name not in self._done]
        fitted = [row for row in left if row.fitted]
        self._announce({row.name: about[row.name] for row in left}, fitted)
        parts = [part for row in fitted for draw in row.draws for part in (draw.cost, self._scored)]
        parts += [self._scored] * (len(left) - len(fitted))
        self._progress.plan([part.effort(self._pace) for part in parts])
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
        if per_record is not None:
            lines = [json.dumps(line) + "\n" for line in record_lines(evaluated, self._test)]
            write_atomically(per_record, "".join(lines).encode())
        metric = None if self._metric is None else self._metric.name
        found = comparison_of(evaluated, self._skipped, inputs, examples=self._test, guarded=self._guard, metric=metric)
        return replace(found, settings=self._made_with())

    def _made_with(self) -> ComparisonSettings:
        settings, data, base = self._inputs.settings, self._inputs.calibration, self._session.base
        metric, quantisation = self._metric, base.quantisation
        files = () if data is None else tuple(zip(data.files, self._inputs.owners, strict=True))
        answers = {} if metric is None else {"max_new_tokens": metric.max_new_tokens, "tolerance": metric.tolerance}
        return ComparisonSettings(
            methods=settings.methods,
            controls=settings.controls.names,
            options={**settings.recorded(), **answers},
            dtype=dtype_name(base.dtype),
            quantisation=None if quantisation is None else quantisation.form,
            fit_data=tuple(
                FitFile(one.source.name, one.sha256, one.source.weight, None if owner is None else owner + 1)
                for one, owner in files
            ),
            versions={
                "loracat": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                **({} if quantisation is None else quantisation.versions),
            },
        )

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
        """Of what is kept: `uniform` has other options where it was not named, and a chat template that writes the date
        other tokens on another day."""
        seen = tokens_sha256((*self._test, *self._guard, *(self._calibrated if row.fitted else ())))
        return json.dumps([row.name, encode(self._inputs.settings.options_of(row.name)), seen])

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
            max_length=self._session.max_length,
            window=self._session.window,
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
        self._calibrated = rendered.training
        self._session.check_tokens(rendered.training)
        return Calibration(self._session, data, rendered.training, settings, self._pace)

    def _planned(self) -> tuple[list[Candidate], list[Candidate], dict[str, float]]:
        """The rows, those that need other adapters attached, and about how many seconds each takes."""
        inputs = self._inputs
        self._session.check_causal(self._test)
        self._session.say_likelier_orders(inputs.adapters, self._test)
        calibration = self._calibration()
        with self._engine(inputs.adapters, inputs.layout) as engine:
            find_reach(engine, self._session, self._test)
            self._device = str(engine.objective.attached.device)
            self._pace = self._measured(engine, () if calibration is None else calibration.examples)
        if calibration is not None:
            calibration = replace(calibration, pace=self._pace)
        rows = candidates(inputs, calibration, self._skipped, self._methods_on)
        others = [] if inputs.datamix is None else [datamix_candidate(inputs.datamix)]
        every = (*rows, *others)
        about = {row.name: (row.cost + self._scored * len(row.draws)).seconds(self._pace) for row in every}
        return rows, others, about

    def _measured(self, engine: Engine, calibrating: Sequence[Example]) -> Pace:
        """By a step of a fit, if there is one, and the largest micro-batch."""
        settings, mixing = self._inputs.settings.fit, make_diagonal(self._inputs.layout, "module")
        every = [*self._session.batches(self._test), *self._session.batches(self._guard)]
        largest = max(every, key=lambda batch: batch.tokens)
        if calibrating:
            every = [*plan_steps(calibrating, batch_tokens=settings.batch_tokens, seed=settings.seed).batches]
        return engine.pace(mixing, mixing.constant([0.0] * self._inputs.layout.adapters), every, largest)

    @property
    def _scored(self) -> Cost:
        """Of a row once it is attached."""
        return cost_of((*self._session.batches(self._test), *self._session.batches(self._guard)))

    def _announce(self, about: Mapping[str, float], fitted: Sequence[Candidate]) -> None:
        """Says what will be done and about how long it takes, with what has to be fitted by name."""
        base, several = self._session.base, [f"{row.name} {duration_text(about[row.name])}" for row in fitted]
        which = f", of which {', '.join(several)}" if several else ""
        generated = "; the answers that are generated come on top" if self._metric is not None else ""
        self._progress.note(
            f"base {base.reference.id} in {base.runs_in} on {self._device}; "
            f"{count_text(len(about), 'row')} to score on {count_text(len(self._test), 'record')}: "
            f"about {duration_text(sum(about.values()))}{which}{generated}"
        )

    @contextmanager
    def _engine(self, adapters: Sequence[LoraAdapter], layout: Layout) -> Iterator[Engine]:
        with self._session.attached(adapters, layout.modules, self._test) as objective:
            meter = Meter(self._progress, task=TASK, overhead=self._pace.overhead)
            yield Engine(objective, meter, progress=self._progress)

    def _fit(self, row: Candidate) -> None:
        """A row that attaches the adapters itself: its fit, or one for each draw, and what that scores."""
        found = []
        for number, draw in enumerate(row.draws, 1):
            self._progress.enter(self._counted(row))
            point, scored = self._composed(draw), None
            if point is None:
                self._progress.leave_out(1)
            else:
                with self._engine(self._inputs.adapters, self._inputs.layout) as engine:
                    self._progress.enter(self._counted(row))
                    scored = self._score(draw, point, engine)
            if scored is None:
                self._progress.leave_out(2 * (len(row.draws) - number))
                return
            found.append(scored)
        self._keep(row, mean_of(found))

    def _composed(self, row: Candidate) -> MixingPoint | None:
        """What a row that is fitted sets; None of one that is left out."""
        try:
            return row.composed(self._skipped)
        except NonFiniteLoss as error:
            self._leave_out(row, error)
            return None

    def _evaluate(self, rows: Sequence[Candidate], adapters: Sequence[LoraAdapter], layout: Layout) -> None:
        """The other rows, which are set on one attached model in turn."""
        with self._engine(adapters, layout) as engine:
            if adapters is not self._inputs.adapters:
                find_reach(engine, self._session, self._test)
            for row in rows:
                self._progress.enter(self._counted(row))
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
            self._leave_out(row, error)
            return None

    def _leave_out(self, row: Candidate, error: NonFiniteLoss) -> None:
        self._skipped.append(Skipped(row.name, str(error)))
        self._progress.warn(f"{row.name} is left out: {error}")

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
        values = self._judged(engine)
        return Evaluated(
            row.name, row.kind, scores, point.rank, point.kept_energy, point.weights, point.note, guard, values
        )

    def _judged(self, engine: Engine) -> torch.Tensor | None:
        """What the metric says of the answers; the first time how long those of the other rows take is told."""
        if self._answers is None:
            return None
        begun = time.monotonic()
        values = self._answers(engine.objective)
        took = time.monotonic() - begun
        left = len(self._names) - len(self._done) - 1
        if not self._told and left * took > _LONG:
            others = f"those of the other {left} about {duration_text(left * took)}"
            self._progress.note(f"the answers of a row take {duration_text(took)}, {others}")
        self._told = True
        return values
