"""A whole fit: adapters, base model and data in, a recipe out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import loracli
from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.hub import Fetched
from loracli.calibration.batches import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.calibration.sources import DataPaths
from loracli.calibration.split import split_records
from loracli.evaluation.held_out import FIT, held_out_table, static_points
from loracli.fitting.attach import attach
from loracli.fitting.base import BaseModel, base_modules, check_fits, load_base, plan_base
from loracli.fitting.checkpointing import checkpointed
from loracli.fitting.inputs import FitInputs, prepare_fit, render_inputs
from loracli.fitting.loss import check_causal, make_objective
from loracli.fitting.memory import available_memory, memory_errors
from loracli.fitting.paper import fit_as_published
from loracli.fitting.preflight import MemoryDecision, decide_memory, estimate_memory
from loracli.fitting.problem import TASK, Meter, Problem
from loracli.fitting.search import Found, search, step_batches
from loracli.fitting.settings import FitSettings
from loracli.progress import SILENT, WORK, Progress, duration_text
from loracli.recipe import (
    FitRecord,
    HeldOut,
    Recipe,
    RecipeAdapter,
    RecipeBase,
    RecipeData,
    RecipeMixing,
)

VALIDATION_SHARE = 0.2
FEWEST_TO_VALIDATE = 8  # below, every record is fitted on and the ridge stays strong
MOST_TO_VALIDATE = 512


def fit_mixing(
    adapters: Sequence[str | Fetched],
    data: DataPaths,
    *,
    eval_data: DataPaths | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    settings: FitSettings | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    checkpointing: bool = False,
    folder: str | Path = ".",
    progress: Progress = SILENT,
) -> Recipe:
    """Fits the mixing weights of some adapters on calibration data.

    Args:
        adapters: N >= 1 references or fetched adapters; their order is kept.
        data: calibration JSONL, one path or several, each `FILE`, `FILE:WEIGHT` (every scored token counts WEIGHT
            times), or `-` for standard input.
        eval_data: held-out records likewise; without it a share of each file of `data` is held out.
        base: the base model, a Hub id or a directory; None for the one that all adapters name.
        base_revision: its branch, tag or commit on the Hub.
        settings: what changes the result.
        dtype: of the base model, `auto` or float32, bfloat16, float16, float64.
        device: `auto`, or a torch device.
        device_map: `auto` to spread the base over all devices of this machine, in place of `device`.
        checkpointing: run layers again in the backward pass, for less memory; without it the estimate decides.
        folder: of the recipe to be; local adapters are named relative to it.
        progress: told what happens.
    Returns:
        the recipe, with a table on the held-out records.
    Raises:
        LoracatError: of the kind that fits, when an input is rejected or the loss is not finite.
    """
    inputs = prepare_fit(
        adapters,
        data,
        eval_data=eval_data,
        base=base,
        base_revision=base_revision,
        settings=settings,
        folder=folder,
        progress=progress,
    )
    return run_fit(
        inputs, dtype=dtype, device=device, device_map=device_map, checkpointing=checkpointing, progress=progress
    )


def run_fit(
    inputs: FitInputs,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    checkpointing: bool = False,
    progress: Progress = SILENT,
) -> Recipe:
    """The second half of `fit_mixing`: loads the base model, searches, and scores the held-out records."""
    decision = _memory_decision(inputs, dtype, device, device_map)
    (progress.warn if decision.tight else progress.note)(decision.note)
    with memory_errors():
        base = load_base(inputs.base, dtype=dtype, device=device, device_map=device_map, progress=progress)
        with checkpointed(base.model) if checkpointing or decision.checkpointing else nullcontext():
            return _run(inputs, base, progress)


def _memory_decision(inputs: FitInputs, dtype: str, device: str, device_map: str | None) -> MemoryDecision:
    """What the estimate says, before any weight is loaded."""
    plan = plan_base(inputs.base, dtype=dtype, device=device)
    settings = inputs.settings
    estimate = estimate_memory(
        plan, inputs.adapters, batch_tokens=settings.batch_tokens, max_length=settings.max_length
    )
    return decide_memory(estimate, available_memory(plan.device, every=device_map is not None), plan)


def _run(inputs: FitInputs, base: BaseModel, progress: Progress) -> Recipe:
    settings = inputs.settings
    check_fits(base, inputs.adapters)
    examples = render_inputs(inputs, base.tokenizer, max_length=_max_length(base, settings), progress=progress)
    training, held_out = examples.training, examples.held_out
    held_batches = plan_batches(held_out, batch_tokens=settings.batch_tokens)
    check_causal(base.model, base.reference.id, held_batches[0])
    with attach(base.model, inputs.adapters, inputs.mixing.modules) as attached:
        meter = Meter(progress)
        objective = make_objective(attached, held_batches[0])
        fitting, validation = _choose_validation(inputs, training)
        problem = Problem(objective, inputs.mixing, tuple(fitting), tuple(validation), meter)
        points = static_points(inputs.references)
        work = _work(problem, settings, held_batches, len(points) + 1)
        _announce(replace(problem, meter=Meter(SILENT)), inputs, base, held_out, work, progress)
        progress.begin(TASK, work, WORK)
        try:
            found = (
                fit_as_published(problem, settings) if settings.paper else search(problem, inputs.references, settings)
            )
            spent = meter.spent
            training_loss = _loss_on(problem, found.theta, training, settings)
            meter.stage("held out")
            scores = {
                name: problem.score(
                    torch.tensor(point, dtype=torch.float64).expand(len(inputs.mixing.modules), -1),
                    held_batches,
                    held_out,
                )
                for name, point in points.items()
            }
            scores[FIT] = problem.score(inputs.mixing.expand(found.theta), held_batches, held_out)
        finally:
            progress.finish(TASK)
    name = inputs.data.held_out_name
    table = held_out_table(scores, inputs.references, examples=held_out, name=name, seed=settings.seed)
    passes = spent / (2 * sum(len(example.input_ids) for example in training))
    return _recipe(inputs, base, examples.data, found, training_loss, passes, table)


def _choose_validation(inputs: FitInputs, training: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to descend on, and examples to choose with; none of the latter below 8 records, or with `--paper`."""
    if inputs.settings.paper or len(training) < FEWEST_TO_VALIDATE:
        return list(training), []
    count = min(max(2, round(VALIDATION_SHARE * len(training))), MOST_TO_VALIDATE)
    _, chosen = split_records(inputs.data.training, count, seed=inputs.settings.seed + 1)
    places = {record.place for record in chosen}
    fitting = [example for example in training if example.place not in places]
    validation = [example for example in training if example.place in places]
    # Equal records stand together, so a few of them many times over can leave nothing on one side.
    return (fitting, validation) if len(fitting) >= len(validation) > 0 else (list(training), [])


def _max_length(base: BaseModel, settings: FitSettings) -> int:
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit, settings.max_length) if isinstance(limit, int) else settings.max_length


def _work(problem: Problem, settings: FitSettings, held_batches: Sequence[Batch], methods: int) -> int:
    """Tokens forward plus tokens backward of the whole fit, for the bar and the estimate."""
    tokens = sum(len(example.input_ids) for example in (*problem.fitting, *problem.validation))
    passes = 1.0 if settings.paper else settings.passes
    return round(2 * passes * tokens) + tokens + methods * sum(batch.tokens for batch in held_batches)


def _announce(
    problem: Problem, inputs: FitInputs, base: BaseModel, held_out: Sequence[Example], work: int, progress: Progress
) -> None:
    """Says what will be done and, from one timed batch, about how long it takes."""
    batches = step_batches(problem.fitting, inputs.settings)
    batch = batches[len(batches) // 2]
    theta = problem.mixing.constant([0.0] * len(inputs.adapters))
    problem.gradient(theta, batch, problem.fitting)  # the first run pays for what is set up once
    started = time.monotonic()
    problem.gradient(theta, batch, problem.fitting)
    rate = 2 * batch.tokens / max(time.monotonic() - started, 1e-9)
    records = len(problem.fitting) + len(problem.validation)
    numbers, kind = problem.mixing.numbers, inputs.settings.mixing
    progress.note(
        f"base {base.reference.id} in {dtype_name(base.dtype)} on {problem.objective.attached.device}; "
        f"{numbers} mixing weights ({kind}) over {len(problem.mixing.modules)} modules"
    )
    passes = "one pass" if inputs.settings.paper else f"up to {inputs.settings.passes:g} passes"
    progress.note(
        f"{records} training records, {len(held_out)} held out; {passes} at {rate / 2:.0f} tok/s: "
        f"about {duration_text(work / rate)}"
    )


def _loss_on(problem: Problem, theta: torch.Tensor, examples: Sequence[Example], settings: FitSettings) -> float:
    problem.meter.stage("training loss")
    batches = plan_batches(examples, batch_tokens=settings.batch_tokens)
    return problem.score(problem.mixing.expand(theta), batches, examples).nats_per_token


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _recipe(
    inputs: FitInputs,
    base: BaseModel,
    data: tuple[RecipeData, ...],
    found: Found,
    training_loss: float,
    passes: float,
    table: HeldOut,
) -> Recipe:
    mixing = inputs.mixing
    moved = (mixing.expand(found.theta) - mixing.expand(found.start)).abs()[mixing.present[mixing.group_of]]
    return Recipe(
        base=RecipeBase(base.reference.id, base.reference.commit, base.config_sha256),
        adapters=tuple(
            _recipe_adapter(adapter, reference)
            for adapter, reference in zip(inputs.adapters, inputs.references, strict=True)
        ),
        data=data,
        fit=FitRecord(
            recipe="paper" if inputs.settings.paper else "cat",
            settings=inputs.settings.recorded(),
            starts=found.starts,
            chosen=found.chosen,
            ridge=found.ridge,
            passes=round(passes, 2),
            largest_move=float(moved.max()),
            training_nats_per_token=training_loss,
        ),
        mixing=RecipeMixing(mixing.kind, mixing.weights(found.theta), mixing.numbers),
        modules=base_modules(base.model, inputs.adapters),
        dtype=dtype_name(base.dtype),
        held_out=table,
        versions={"loracat": loracli.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        folder=inputs.folder,
    )


def _recipe_adapter(adapter: LoraAdapter, reference: str) -> RecipeAdapter:
    return RecipeAdapter(
        reference=reference,
        repo_id=adapter.source.repo_id,
        subfolder=adapter.source.subfolder,
        commit=adapter.commit,
        sha256=dict(adapter.sha256),
        rank=max(adapter.ranks),
        lora_alpha=adapter.config.lora_alpha,
        use_rslora=adapter.config.use_rslora,
        dtype=dtype_name(adapter.dtype),
        base_model=adapter.config.base_model,
    )
