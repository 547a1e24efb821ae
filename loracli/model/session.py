"""A session: one opening of a base model, from its files to the loss of records with adapters attached.

    opening = Opening(reference, adapters, batch_tokens, max_length)
    with open_session(opening) as session:
        examples = session.render(files)
        session.check_causal(examples)
        with session.attached(adapters, modules, examples) as objective:
            ...

It holds what is loaded once and planned once: the base in its place, with the modules that adapters saved whole, its
tokenizer, and the micro-batches of every list of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.on_base import open_orders, read_otherwise
from loracli.adapters.saved_modules import SavedModules
from loracli.calibration.batches import Batch, plan_batches
from loracli.calibration.records import CalibrationFile
from loracli.calibration.render import Example, render_file
from loracli.model.attach import attach, replace_modules
from loracli.model.base import BaseModel, BasePlan, check_fits, load_base, plan_base
from loracli.model.loss import Objective, check_causal, make_objective
from loracli.model.placement import Placement, available_memory, checkpointed, memory_errors
from loracli.model.preflight import MemoryDecision, MemoryEstimate, decide_memory, estimate_memory
from loracli.model.reference import BaseReference
from loracli.progress import SILENT, Progress

_RECORDS_OF_AN_ORDER = 64  # enough to tell an adapter from its scrambled experts


@dataclass(frozen=True)
class Opening:
    """Which base model is opened, for which adapters and records, and where it runs.

    Args:
        reference: of the base.
        adapters: that will be attached, held against the base when it is loaded.
        batch_tokens: tokens of a micro-batch, padding included; a longer record stands alone.
        max_length: tokens of a record that are used, as far as the base takes so many.
        saved: modules that replace the base's, None without any.
        placement: where and how the base runs.
        processes: how many share the work, each with an opening of its own.
        trains_factors: whether lora_A and lora_B themselves will be trained, which takes more memory.
    """

    reference: BaseReference
    adapters: tuple[LoraAdapter, ...]
    batch_tokens: int
    max_length: int
    saved: SavedModules | None = None
    placement: Placement = Placement()  # noqa: RUF009  # frozen
    processes: int = 1
    trains_factors: bool = False

    def plan(self) -> BasePlan:
        """How the base would be loaded, from its config alone.

        Raises:
            BaseModelMismatch, UsageError: as `plan_base`.
        """
        return plan_base(self.reference, dtype=self.placement.dtype, device=self.placement.device)

    def memory(self, plan: BasePlan) -> tuple[MemoryEstimate, MemoryDecision]:
        """What a gradient on records takes in each process, and what follows from the memory that is free now.

        Args:
            plan: of this opening.
        Raises:
            OutOfResources: if the weights alone need more than there is.
        """
        estimate = estimate_memory(
            plan,
            self.adapters,
            batch_tokens=self.batch_tokens,
            max_length=self.max_length,
            shards=self.processes if self.placement.shard else 1,
            factors=self.trains_factors,
        )
        decision = decide_memory(
            estimate,
            available_memory(plan.device, every=self.placement.device_map is not None),
            plan,
            processes=self.processes if plan.device == "cpu" else 1,
            sharded=self.placement.shard,
        )
        return estimate, decision


def settle_memory(
    opening: Opening,
    *,
    agree: Callable[[Callable[[], MemoryDecision]], MemoryDecision] = lambda decide: decide(),
    progress: Progress = SILENT,
) -> Opening:
    """The opening with checkpointing where the estimate asks for it; what it says is told.

    Args:
        opening: whose gradients are wanted.
        agree: has one of several processes decide for all.
        progress: told of the memory.
    Raises:
        OutOfResources: if the weights alone need more than there is.
    """
    decision = agree(lambda: opening.memory(opening.plan())[1])
    (progress.warn if decision.tight else progress.note)(decision.note)
    placement = opening.placement
    checkpointing = placement.checkpointing or decision.checkpointing
    return replace(opening, placement=replace(placement, checkpointing=checkpointing))


@contextmanager
def open_session(opening: Opening, *, progress: Progress = SILENT) -> Iterator[Session]:
    """Loads the base, holds the adapters against it, and replaces the modules that they saved whole.

    Args:
        opening: what is opened.
        progress: told what happens, then and as long as the session lasts.
    Raises:
        BaseModelMismatch: if the base cannot be loaded, or an adapter does not fit it.
        OutOfResources: whenever memory runs out until the end.
        UsageError: if the placement cannot be had.
    """
    placement = opening.placement
    with memory_errors():
        base = load_base(
            opening.reference,
            dtype=placement.dtype,
            device=placement.device,
            device_map=placement.device_map,
            shard=opening.processes if placement.shard else None,
            progress=progress,
        )
        with checkpointed(base.model) if placement.checkpointing else nullcontext():
            check_fits(base, opening.adapters)
            replace_modules(base.model, opening.saved)
            yield Session(opening, base, progress)


class Session:
    """An opened base model. Made by `open_session`.

    Args:
        opening: that it was made from.
        base: loaded, with saved modules in the place of its own.
        progress: told what happens.
    """

    def __init__(self, opening: Opening, base: BaseModel, progress: Progress) -> None:
        self.opening, self.base, self.progress = opening, base, progress
        self._plans: dict[tuple[int, ...], tuple[Sequence[Example], list[Batch]]] = {}

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens of a record that are used."""
        return usable_length(self.base, self.opening.max_length)

    def render(
        self, files: Sequence[CalibrationFile], *, allow_truncation: bool = False, skip_bad: bool = False
    ) -> tuple[Example, ...]:
        """The records of some files as the model sees them, each used from its start.

        Raises:
            CalibrationError: as `render_file`.
        """
        return tuple(
            example
            for file in files
            for example in render_file(
                file,
                self.tokenizer,
                max_length=self.max_length,
                allow_truncation=allow_truncation,
                skip_bad=skip_bad,
                whole=True,
                progress=self.progress,
            ).examples
        )

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """The micro-batches of some examples, planned once."""
        key = tuple(map(id, examples))
        if key not in self._plans:  # with the examples, so that their ids stay theirs
            self._plans[key] = examples, plan_batches(examples, batch_tokens=self.opening.batch_tokens)
        return self._plans[key][1]

    def check_causal(self, examples: Sequence[Example]) -> None:
        """Tries on the first micro-batch whether what comes later changes an earlier prediction.

        Raises:
            BaseModelMismatch: if it does.
        """
        check_causal(self.base.model, self.base.reference.id, self.batches(examples)[0])

    @contextmanager
    def attached(
        self,
        adapters: Sequence[LoraAdapter],
        modules: tuple[str, ...],
        examples: Sequence[Example],
        *,
        canonical: bool = False,
    ) -> Iterator[Objective]:
        """The loss of the base with adapters attached, at weight 0 to begin with; detached at the end.

        Args:
            adapters: N adapters that fit the base.
            modules: L names, the union of what they change.
            examples: on whose first micro-batch the model's head is tried.
            canonical: factors in the canonical basis (`algebra.basis`) instead of the files' own.
        Raises:
            ValueError: in the canonical basis, if an adapter has biases or experts.
        """
        with attach(self.base.model, adapters, modules, canonical=canonical) as attached:
            yield make_objective(attached, self.batches(examples)[0])

    def say_likelier_orders(self, adapters: Sequence[LoraAdapter], examples: Sequence[Example]) -> None:
        """Warns, of each adapter that leaves the order of its experts' factors open, which of its readings the first of
        the records like better."""
        examples = examples[:_RECORDS_OF_AN_ORDER]
        for adapter in adapters:
            for order in open_orders(adapter):
                taken = self._nats_per_token(adapter, examples)
                other = self._nats_per_token(read_otherwise(adapter, order), examples)
                value = order.taken if taken <= other else order.other
                self.progress.warn(
                    f'{adapter.reference} alone costs {taken:.4f} nats per token read with "{order.field}": '
                    f'"{order.taken}", as it is, and {other:.4f} with "{order.other}": "{value}" is likelier; write it '
                    "into its adapter_config.json"
                )

    def _nats_per_token(self, adapter: LoraAdapter, examples: Sequence[Example]) -> float:
        """Of the adapter alone at full strength."""
        batches = self.batches(examples)
        with torch.no_grad(), self.attached([adapter], tuple(sorted(adapter.targets)), examples) as objective:
            attached = objective.attached
            attached.set_weights(torch.ones(len(attached.modules), 1, dtype=attached.precision))
            nats = sum(float(objective.nats(batch).double().sum()) for batch in batches)
        return nats / sum(batch.scored_tokens for batch in batches)


def usable_length(base: BaseModel | BasePlan, max_length: int) -> int:
    """Tokens of a record that are used: as many as were asked for, and no more than the model takes."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return min(limit, max_length) if isinstance(limit, int) else max_length
