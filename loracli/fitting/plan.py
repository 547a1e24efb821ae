"""A fit up to the moment where the base model's weights would be loaded: what it would do, and what it would need."""

from __future__ import annotations

from dataclasses import dataclass

from loracli.fitting.inputs import FitInputs, render_inputs
from loracli.fitting.run import decision_on, divide_training, memory_estimate, usable_length
from loracli.fitting.solved import tokens_of
from loracli.model.base import BasePlan, check_shapes, load_tokenizer, plan_base
from loracli.model.experts import check_experts
from loracli.model.placement import Placement
from loracli.model.preflight import MemoryDecision, MemoryEstimate
from loracli.progress import SILENT, Progress


@dataclass(frozen=True)
class FitPlan:
    """What a fit would do.

    Args:
        inputs: that it was planned for.
        base: how the base model would be loaded.
        training_records: with something to score.
        validation_records: of them, that choose among starts, ridges and rungs; with folds those of the first one.
        held_out_records: with something to score.
        training_tokens: of the training records, prompts included.
        scored_tokens: of them, that count in the loss.
        longest_record: in tokens, of all records.
        cut: training records longer than what is used of one.
        dropped: records without anything to score in what is used.
        memory: of one process.
        decision: what follows from the memory that is free now.
    """

    inputs: FitInputs
    base: BasePlan
    training_records: int
    validation_records: int
    held_out_records: int
    training_tokens: int
    scored_tokens: int
    longest_record: int
    cut: int
    dropped: int
    memory: MemoryEstimate
    decision: MemoryDecision


def plan_fit(inputs: FitInputs, *, placement: Placement, world_size: int = 1, progress: Progress = SILENT) -> FitPlan:
    """Checks the adapters against the base model's shapes, tokenizes the data and estimates the memory.

    Args:
        inputs: from `prepare_fit`.
        placement: where and how the base model would run.
        world_size: how many processes would share the work.
        progress: told what is found.
    Raises:
        BaseModelMismatch: if a module of an adapter is not in the base, in another shape, or one of experts that
            compute in a way of their own.
        CalibrationError: as `render_inputs`.
        UsageError: if there are too few records to choose with, or too few processes for `shard`.
        OutOfResources: if the weights alone need more memory than there is.
    """
    placement.check_processes(world_size)
    base = plan_base(inputs.base, dtype=placement.dtype, device=placement.device)
    check_shapes(base.skeleton, inputs.adapters)
    check_experts(base.skeleton, inputs.adapters)
    length = usable_length(base, inputs.settings)
    examples = render_inputs(inputs, load_tokenizer(inputs.base), max_length=length, progress=progress)
    folds = divide_training(inputs, examples.training)
    memory = memory_estimate(inputs, base, placement, world_size)
    every = (*examples.training, *examples.held_out)
    return FitPlan(
        inputs=inputs,
        base=base,
        training_records=len(examples.training),
        validation_records=len(folds[0].validation),
        held_out_records=len(examples.held_out),
        training_tokens=tokens_of(examples.training),
        scored_tokens=sum(data.scored_tokens for data in examples.data),
        longest_record=max(len(example.input_ids) for example in every),
        cut=sum(data.cut for data in examples.data),
        dropped=sum(data.dropped for data in examples.data),
        memory=memory,
        decision=decision_on(memory, base, placement, world_size),
    )
