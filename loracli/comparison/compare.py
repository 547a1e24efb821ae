"""A comparison: what has to be fitted is fitted, then every way to compose is set on one attached model in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter
from loracli.calibration.batches import Batch, plan_batches
from loracli.calibration.dataset import render_dataset, tokenizer_differences
from loracli.calibration.records import CalibrationFile, DataPaths
from loracli.calibration.render import Example, render_file
from loracli.comparison.candidates import Candidate, candidates, datamix_candidate
from loracli.comparison.inputs import CompareInputs, prepare_comparison
from loracli.comparison.settings import CompareSettings
from loracli.comparison.table import INGREDIENT, Evaluated, comparison_of
from loracli.composition.attached import Composition
from loracli.composition.fitted import TASK, Calibration
from loracli.errors import NonFiniteLoss
from loracli.evaluation.comparison import Comparison, Skipped
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.scorer import Scorer, make_scorer
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import Layout, make_diagonal, make_layout
from loracli.fitting.reach import find_reach, say_likelier_orders
from loracli.model.attach import attach, replace_modules
from loracli.model.base import BaseModel, check_fits, load_base
from loracli.model.loss import check_causal, make_objective
from loracli.model.placement import Placement, memory_errors
from loracli.progress import SILENT, WORK, Progress, duration_text
from loracli.system.document import dtype_name


def compare_adapters(
    data: DataPaths,
    *,
    recipe: str | Path | None = None,
    adapters: Sequence[str] = (),
    fit_data: DataPaths | None = None,
    guard: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    settings: CompareSettings | None = None,
    metric: TaskMetric | None = None,
    placement: Placement = Placement(),  # noqa: B008  # frozen
    progress: Progress = SILENT,
) -> Comparison:
    """Compares every way to compose on some records: `prepare_comparison` and `run_comparison` in one.

    Raises:
        LoracatError: of the kind that fits, when an input is rejected or a method cannot be had.
    """
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
    progress: Progress = SILENT,
) -> Comparison:
    """Loads the base model and compares.

    Args:
        inputs: from `prepare_comparison`.
        placement: where and how the base model runs.
        metric: of the answers; None to compare losses alone.
        progress: told what happens.
    Raises:
        UsageError: if a method that was asked for by name cannot honour the adapters.
        NonFiniteLoss: if no ingredient has a finite loss.
    """
    with memory_errors():
        base = load_base(
            inputs.base,
            dtype=placement.dtype,
            device=placement.device,
            device_map=placement.device_map,
            progress=progress,
        )
        check_fits(base, inputs.adapters)
        if inputs.datamix is not None:
            check_fits(base, [inputs.datamix])
        replace_modules(base.model, inputs.saved)
        for adapter, reference in zip(inputs.adapters, inputs.references, strict=True):
            for difference in tokenizer_differences(adapter.path, base.tokenizer):
                progress.warn(f"{reference}: {difference}")
        return _Comparison(inputs, base, metric, progress).run()


@dataclass(frozen=True)
class _Set:
    """Records as the model sees them."""

    examples: tuple[Example, ...]
    batches: list[Batch]

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)


class _Comparison:
    def __init__(self, inputs: CompareInputs, base: BaseModel, metric: TaskMetric | None, progress: Progress) -> None:
        self._inputs, self._base, self._progress = inputs, base, progress
        self._test = self._render(inputs.test)
        self._guard = self._render(inputs.guard) if inputs.guard else None
        self._metric = metric
        self._answers = None if metric is None else self._scorer(metric)
        self._skipped: list[Skipped] = []

    def run(self) -> Comparison:
        inputs = self._inputs
        check_causal(self._base.model, self._base.reference.id, self._test.batches[0])
        say_likelier_orders(
            self._base.model,
            inputs.adapters,
            self._test.examples,
            batch_tokens=inputs.settings.fit.batch_tokens,
            progress=self._progress,
        )
        rows = candidates(inputs, self._calibration(), self._skipped)
        others = [] if inputs.datamix is None else [datamix_candidate(inputs.datamix)]
        self._announce([*rows, *others])
        try:
            before = {row.name: row.composed(self._skipped) for row in rows if row.fitted}
            evaluated = self._evaluate(rows, before, inputs.adapters, inputs.layout)
            if inputs.datamix is not None:
                evaluated += self._evaluate(others, {}, [inputs.datamix], make_layout([inputs.datamix]))
        finally:
            self._progress.finish(TASK)
        metric = None if self._metric is None else self._metric.name
        return comparison_of(evaluated, self._skipped, inputs, examples=self._test.examples, metric=metric)

    def _render(self, files: Sequence[CalibrationFile]) -> _Set:
        settings = self._inputs.settings.fit
        examples = tuple(
            example
            for file in files
            for example in render_file(
                file,
                self._base.tokenizer,
                max_length=settings.max_length,
                allow_truncation=settings.allow_truncation,
                skip_bad=settings.skip_bad,
                whole=True,
                progress=self._progress,
            ).examples
        )
        return _Set(examples, plan_batches(examples, batch_tokens=settings.batch_tokens))

    def _scorer(self, metric: TaskMetric) -> Scorer:
        settings = self._inputs.settings.fit
        return make_scorer(
            metric,
            self._inputs.test,
            [example.place for example in self._test.examples],
            self._base.tokenizer,
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
            self._base.tokenizer,
            max_length=settings.max_length,
            allow_truncation=settings.allow_truncation,
            skip_bad=settings.skip_bad,
            progress=self._progress,
        )
        return Calibration(self._base, data, rendered.training, settings, self._progress)

    def _announce(self, rows: Sequence[Candidate]) -> None:
        """Says what will be done and, from one timed batch, about how long it takes."""
        inputs, adapters = self._inputs, self._inputs.layout.adapters
        forward = len(rows) * (self._test.tokens + (self._guard.tokens if self._guard else 0))
        work = forward + sum(row.cost for row in rows)
        with attach(self._base.model, inputs.adapters, inputs.layout.modules) as attached:
            batch = self._test.batches[len(self._test.batches) // 2]
            engine = Engine(make_objective(attached, batch), Meter(SILENT))
            self._find_reach(engine)
            mixing = make_diagonal(inputs.layout, "module")
            seconds = engine.seconds(mixing, mixing.constant([0.0] * adapters), batch)
        about = duration_text(work * seconds / (2 * batch.tokens))
        generated = "; the answers that are generated come on top" if self._metric is not None else ""
        self._progress.note(
            f"base {self._base.reference.id} in {dtype_name(self._base.dtype)} on {attached.device}; {len(rows)} ways "
            f"to compose on {len(self._test.examples)} records: about {about}{generated}"
        )
        self._progress.begin(TASK, work, WORK)

    def _find_reach(self, engine: Engine) -> None:
        find_reach(engine, self._test.batches, self._test.examples, self._base.reference, self._progress)

    def _evaluate(
        self,
        rows: Sequence[Candidate],
        before: dict[str, Composition | None],
        adapters: Sequence[LoraAdapter],
        layout: Layout,
    ) -> list[Evaluated]:
        inputs, evaluated = self._inputs, []
        with attach(self._base.model, adapters, layout.modules) as attached:
            engine = Engine(
                make_objective(attached, self._test.batches[0]),
                Meter(self._progress, task=TASK),
                progress=self._progress,
            )
            if adapters is not inputs.adapters:
                self._find_reach(engine)
            for row in rows:
                composition = before[row.name] if row.name in before else row.composed(self._skipped)
                if composition is None:
                    continue
                engine.meter.stage(row.name)
                try:
                    evaluated.append(self._measure(row, composition, engine))
                except NonFiniteLoss as error:
                    if row.kind == INGREDIENT and not any(
                        other.kind == INGREDIENT for other in rows if other is not row
                    ):
                        raise
                    self._skipped.append(Skipped(row.name, str(error)))
                    self._progress.warn(f"{row.name} is left out: {error}")
        return evaluated

    def _measure(self, row: Candidate, composition: Composition, engine: Engine) -> Evaluated:
        def score(records: _Set) -> Any:
            return engine.score(composition.mixing, composition.theta, records.batches, records.examples)

        guard = None if self._guard is None else score(self._guard)
        scores = score(self._test)
        values = None if self._answers is None else self._answers(engine.objective)
        return Evaluated(row.name, row.kind, composition, scores, guard, values)
