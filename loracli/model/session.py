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

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.on_base import open_orders, read_otherwise
from loracli.adapters.saved_modules import SavedModules
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.records import CalibrationFile
from loracli.calibration.render import Example, render_file
from loracli.errors import BaseModelMismatch, OutOfResources, UsageError
from loracli.model.attach import attach, replace_modules
from loracli.model.base import BaseModel, BasePlan, check_fits, load_base, plan_base
from loracli.model.loss import Objective, check_causal, make_objective
from loracli.model.placement import Placement, decoder_layers, ran_out_of_memory
from loracli.model.preflight import MemoryDecision, MemoryEstimate, decide_memory, estimate_memory
from loracli.model.quantisation import has_bitsandbytes
from loracli.model.reference import BaseReference, check_config, stored_quantisation
from loracli.progress import SILENT, Progress
from loracli.recipe.record import ON_LOADING, RecipeBase
from loracli.system.machine import read_launch

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
        return plan_base(
            self.reference,
            dtype=self.placement.dtype,
            device=self.placement.device,
            quantise=self.placement.quantise,
        )

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
            _available_memory(plan.device, every=self.placement.device_map is not None),
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


def runs_here(
    placement: Placement, adapters: Sequence[LoraAdapter], fits: Mapping[str, RecipeBase] | None = None
) -> Callable[[BaseReference], None]:
    """What `find_base` has checked of a base that will run, by its config.

    Args:
        placement: that was asked for.
        adapters: that will be attached.
        fits: as for `as_fitted`.
    Returns:
        which raises
        BaseModelMismatch, UsageError: as `stored_quantisation`, `as_fitted` and `plan_base`.
        OutOfResources: if its weights and the adapters, without a single record, need more memory than there is.
    """

    def check(reference: BaseReference) -> None:
        stored_quantisation(reference.id, reference.path, placement.quantise)
        place = as_fitted(placement, reference, fits or {})
        processes = read_launch().world_size
        opening = Opening(reference, tuple(adapters), 1, 1, placement=place, processes=processes)
        opening.memory(opening.plan())

    return check


def as_fitted(
    placement: Placement,
    reference: BaseReference,
    fits: Mapping[str, RecipeBase],
    *,
    progress: Progress = SILENT,
) -> Placement:
    """The placement in which a base has the numbers that weights were fitted on.

    Where no quantisation is asked for, a base in full precision is quantised as all fits had it. What differs is said,
    another config too, unless it is that of a copy in another form.

    Args:
        placement: that was asked for.
        reference: of the base.
        fits: the base of each, by what it is called; none without a recipe.
        progress: told of it.
    Raises:
        UsageError: if that needs a package which is not installed.
        IntegrityError: as `check_config`.
    """
    if not fits:
        return placement
    stored = stored_quantisation(reference.id, reference.path)
    for name, base in fits.items():
        if base.quantisation == (None if stored is None else stored.form) or (
            stored is None and base.quantisation in ON_LOADING
        ):
            check_config(reference, base, name, progress)
    forms = [base.quantisation for base in fits.values()]
    form = forms[0]
    if stored is None and placement.quantise is None and form in ON_LOADING and set(forms) == {form}:
        names = f"{' and '.join(fits)} {'was' if len(fits) == 1 else 'were'} fitted"
        if not has_bitsandbytes():
            raise UsageError(
                f"{names} with linear layers of the base kept in {form}, and the package bitsandbytes that "
                "does so is not installed",
                hint="pip install 'loracat[bitsandbytes]', or --quantise none for the base in full precision",
            )
        progress.note(
            f"linear layers of the base are kept in {form}, as when {names}; --quantise none leaves them in full "
            "precision"
        )
        return replace(placement, quantise=form)
    here = placement.form if stored is None else stored.form
    for name, there in zip(fits, forms, strict=True):
        if there != here:
            progress.warn(
                f"{name} was fitted with linear layers of the base in {there or 'full precision'}, and here they are "
                f"in {here or 'full precision'}: its loss is another"
            )
    return placement


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
    with _memory_errors():
        base = load_base(
            opening.reference,
            dtype=placement.dtype,
            device=placement.device,
            device_map=placement.device_map,
            shard=opening.processes if placement.shard else None,
            quantise=placement.quantise,
            progress=progress,
        )
        with _checkpointed(base.model) if placement.checkpointing else nullcontext():
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

    @property
    def window(self) -> int:
        """Tokens that the base takes at most, a prompt and its answer together."""
        return usable_length(self.base, sys.maxsize)

    def render(
        self, files: Sequence[CalibrationFile], *, allow_truncation: bool = False, skip_bad: bool = False
    ) -> tuple[Example, ...]:
        """The records of some files as the model sees them, each used from its start.

        Raises:
            CalibrationError: as `render_file`.
            BaseModelMismatch: as `check_tokens`.
        """
        examples = tuple(
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
        self.check_tokens(examples)
        return examples

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """The micro-batches of some examples, planned once."""
        key = tuple(map(id, examples))
        if key not in self._plans:  # with the examples, so that their ids stay theirs
            self._plans[key] = examples, plan_batches(examples, batch_tokens=self.opening.batch_tokens)
        return self._plans[key][1]

    def check_tokens(self, examples: Sequence[Example]) -> None:
        """Whether the base knows every token, which its tokenizer may have been given alone.

        Raises:
            BaseModelMismatch: naming the first record with one that it does not.
        """
        known = self.base.model.get_input_embeddings().num_embeddings
        for example in examples:
            if (token := max(example.input_ids)) >= known:
                raise BaseModelMismatch(
                    f"{example.place}: the tokenizer's token {token}, {self.tokenizer.convert_ids_to_tokens(token)!r}, "
                    f"is beyond the {known} that the base has embeddings of",
                    hint="give with --base one whose embeddings were resized with its tokenizer, or leave such "
                    "records out",
                )

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


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into OutOfResources; any other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            raise _ours() from error
        raise


def _ours() -> OutOfResources:
    return OutOfResources(
        "memory ran out",
        hint="try --dtype bfloat16; for a fit also --checkpointing, a smaller --batch-tokens or a smaller --max-length",
    )


def _available_memory(device: str, *, every: bool = False, root: Path = Path("/")) -> int | None:
    """Bytes that a new tensor could take on the device now; None if nothing tells.

    Of a CUDA device what its driver calls free; of MPS what Metal recommends at most, less what is taken. Of the CPU
    what Linux calls available, or less where a control group (a container, a batch job) allows less; elsewhere the free
    pages, or all pages where those are not told.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...
        every: all CUDA devices together, as a device map uses them.
        root: of the file system with `proc` and `sys`.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if every else [device]
        return sum(int(torch.cuda.mem_get_info(one)[0]) for one in devices)
    if kind == "mps":
        return max(int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory()), 0)
    if kind != "cpu":
        return None
    meminfo = _numbers(root / "proc/meminfo")
    free = meminfo["MemAvailable"] * 1024 if "MemAvailable" in meminfo else _free_pages()  # kB
    rooms = [room for room in (free, *_group_rooms(root)) if room is not None]
    return max(min(rooms), 0) if rooms else None


def _free_pages() -> int | None:
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not of this system
            continue
    return None


def _group_rooms(root: Path) -> list[int]:
    """What each control group above this process leaves: limit - used + file cache that can be dropped."""
    rooms = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path may be the host's; what the container sees of it then stands at the top.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            folder = root.joinpath(top, *parts[:depth])
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal():  # "max" is no limit
                rooms.append(int(most) - int(now) + _numbers(folder / "memory.stat").get(cache, 0))
    return rooms


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name value`, as the kernel writes them."""
    words = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Makes every decoder layer recompute itself in the backward pass, and undoes it at the end.

    Each layer keeps its input only, T x hidden numbers, and one more forward is computed: 3 units a token instead of 2.
    transformers has a switch for the same, but it works in training mode alone, where dropout is on too.

    The gradients are the same to the bit. Layers that take part in no gradient, those below the lowest adapted one,
    keep nothing, as without. Between a forward and its backward pass nothing may change: neither the mixing weights nor
    the hooks, for the second run would see the change.

    Args:
        model: frozen, in evaluation mode, and with whatever acts inside its layers attached before or after.
    Raises:
        UsageError: if the model has no such layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UsageError(
            f"activation checkpointing is not possible with {type(model).__name__}: transformers does not mark its "
            "layers",
            hint="leave it out, and give a smaller --batch-tokens or --max-length",
        )
    # Not `__call__`: what hooks do around a layer, such as gathering a sharded layer's weights, is done once a pass.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _recomputed(layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


def _recomputed(forward: Any) -> Any:
    # There is no dropout whose random numbers would have to be drawn again.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
