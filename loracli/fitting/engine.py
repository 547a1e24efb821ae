"""What a search asks the attached model: scores of records, and gradients of sums over micro-batches.

Sums are taken micro-batch by micro-batch in the order of the plan, each result whole before the next is added, so they
are the same bits for any number of processes; process k of K takes every K-th micro-batch. What took long is
remembered, under a key that says what it is, so a resumed fit does not do it again, and where several fits share an
engine, neither does one what another has done. Where memory runs out, a micro-batch is halved.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss, OutOfResources
from loracli.evaluation.scorer import Scorer
from loracli.fitting.journal import Entry, Journal, Meter
from loracli.fitting.mixing import Applied, Mixing
from loracli.fitting.processes import ALONE, Processes
from loracli.model.loss import Objective, Scores, gradient_of
from loracli.model.placement import (
    exact_kernels,
    free_cached_memory,
    has_float64,
    lacks_exact_kernel,
    ran_out_of_memory,
)
from loracli.progress import SILENT, Progress

_UNDER_WAY = "a sum that is not at its end"  # the key of the one that a fit is in

_LEAST_SLOPE = 0.02  # of a line, against one from 0: a device that is not full takes any batch in the same time
_SCORE_COST, GRADIENT_COST = 1, 2  # of a token: a forward pass is 1, a backward pass another

Work = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class _Pass:
    """What is made of every micro-batch, and how the results come together.

    Args:
        work: a batch to a tensor, with a row for each of its records if they are `by_record`.
        join: of two results.
        cost: of a token; 0 is not counted in the budget.
        nats: whether a result begins with the total nats, to be shown.
        finite: whether a result that is not finite ends it.
        until: whether nothing more can come.
    """

    work: Work
    join: Callable[..., Tensor] = torch.add
    by_record: bool = False
    cost: int = _SCORE_COST
    nats: bool = False
    finite: bool = False
    until: Callable[[Tensor], bool] = lambda _: False


@dataclass(frozen=True)
class Pace:
    """How fast a model runs here, as a straight line: seconds = token_seconds (tokens + overhead), forward or backward.

    Args:
        token_seconds: of a token.
        overhead: tokens that take as long as what a micro-batch costs whatever its size.
    """

    token_seconds: float
    overhead: int = 0


class Engine:
    """The attached model with everything around it that a search should not have to think of.

    What is asked for with a `key` is remembered under it, and taken from there by a resumed fit. A key names what it is
    of (the kind of mixing, the start, the stage, the fold, the step), so that no other order of the same work can take
    it for something else; each is used once. Without a key nothing is remembered.

    Where several fits share it, work that one of them asks for is known by what goes into it, to the bit (`same`): done
    once, it counts in the budget of each, and only once in the progress.

    Args:
        objective: the attached model's loss.
        meter: of the cost.
        processes: that share the work; all call the same methods in the same order.
        journal: of the first process; forgetful in the others.
        progress: told of micro-batches that had to be halved.
        shared: whether fits with it have work in common.
    Attributes:
        steps: how many steps of descents were taken.
        halvings: how many micro-batches all processes have halved because memory ran out.
    """

    def __init__(
        self,
        objective: Objective,
        meter: Meter,
        *,
        processes: Processes = ALONE,
        journal: Journal | None = None,
        progress: Progress = SILENT,
        shared: bool = False,
    ) -> None:
        self.objective = objective
        self.meter = meter
        self.steps = 0
        self.halvings = 0
        self._processes = processes
        self._journal = journal or Journal()
        self._progress = progress
        self._halved_here = 0
        self._most_tokens: int | None = None  # of a micro-batch, once memory has run out
        self._one_order = True  # of sums, until an operation turns out to have no kernel for it
        self._prefix = ""  # of keys
        self._shared = shared
        self._asked: dict[bytes, int] = {}  # what was spent when work began
        self._done: dict[bytes, tuple[str, int]] = {}  # its key, and what it cost
        self._sum_under_way = self._from_journal(_UNDER_WAY)

    # What a search asks.

    def score(
        self,
        mixing: Applied,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        *,
        key: str | None = None,
    ) -> Scores:
        """Nats of each example at theta; the batches hold them all.

        Raises:
            NonFiniteLoss: naming the first records by their places.
        """

        def work(batch: Batch) -> Tensor:
            return torch.stack(self.objective.record_sums(batch), dim=1)  # (b, 2) nats and counted tokens

        def rows() -> Tensor:
            self._apply(mixing, theta)
            zeros = torch.zeros(len(examples), 2, dtype=torch.float64)
            return self._over(batches, examples, _Pass(work, by_record=True), zeros, key)

        same = self.same("score", mixing, {"theta": theta}, examples)
        nats, tokens = self._kept("rows", key, rows, same).T.contiguous()
        bad = (~torch.isfinite(nats)).nonzero().flatten().tolist()
        if bad:
            raise _non_finite([examples[i] for i in bad])
        return Scores(nats, tokens)

    def answer(
        self, mixing: Applied, theta: Tensor, scorer: Scorer, examples: Sequence[Example], *, key: str | None = None
    ) -> Tensor:
        """What a task metric gives each of the examples, which the scorer is of, at theta, (n,) in float64. The first
        process answers for all; it is not counted in the budget.

        Raises:
            MetricError: if the user's command fails.
        """

        def work() -> Tensor:
            self._apply(mixing, theta)
            return scorer(self.objective)

        same = self.same("answer", mixing, {"theta": theta}, examples)
        return self._kept("values", key, lambda: self._processes.from_first(work), same)

    def total(
        self,
        mixing: Mixing,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        *,
        key: str | None = None,
    ) -> tuple[float, Tensor]:
        """Total nats of some batches at theta and their gradient (P,), where theta is, both in float64 and added in
        order. With a key the sum is remembered while it is under way, and not its result.

        Raises:
            NonFiniteLoss: naming the records of the first batch where either is not finite.
        """
        work = partial(self._nats_and_gradient, mixing, theta)
        zeros = torch.zeros(1 + theta.numel(), dtype=torch.float64, device=theta.device)
        total = self._over(batches, examples, _Pass(work, cost=GRADIENT_COST, nats=True, finite=True), zeros, key)
        return float(total[0]), total[1:]

    def mean_and_gradient(
        self,
        mixing: Mixing,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        *,
        key: str | None = None,
    ) -> tuple[float, Tensor]:
        """Nats per scored token over all batches, and the gradient; sums first, one division.

        Raises:
            NonFiniteLoss: naming the records of a batch.
        """

        def sums() -> Entry:
            nats, gradient = self.total(mixing, theta, batches, examples, key=key)
            return Entry({"gradient": gradient}, {"nats": nats})

        entry = self._remembered(key, sums, self.same("mean", mixing, {"theta": theta}, examples))
        tokens = sum(batch.scored_tokens for batch in batches)
        return float(entry.values["nats"]) / tokens, entry.tensors["gradient"] / tokens  # type: ignore[arg-type]

    def of_records(
        self,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        work: Work,
        width: int,
        *,
        cost: int,
        key: str | None = None,
    ) -> Tensor:
        """(n, width) in float64: what `work` makes of each record; the batches hold them all.

        Args:
            batches: of the examples.
            examples: the n records.
            work: a batch to a tensor (b, width).
            width: of it.
            cost: of a token.
            key: of what is remembered.
        Raises:
            NonFiniteLoss: naming the records of a batch.
        """

        zeros = torch.zeros(len(examples), width, dtype=torch.float64)
        what = _Pass(work, by_record=True, cost=cost, finite=True)
        return self._kept("rows", key, lambda: self._over(batches, examples, what, zeros, key))

    def summed(
        self,
        mixing: Applied,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        work: Work,
        width: int,
        *,
        key: str | None = None,
    ) -> Tensor:
        """The sum (width,) over the batches of what `work` makes of each at theta, in float64 and added in their order.

        Args:
            mixing, theta: what is attached.
            batches: whose results may be added up from their halves.
            examples: that the batches are made of.
            work: a batch to a tensor (width,); it takes no gradient.
            width: of it.
            key: of what is remembered.
        """

        def total() -> Tensor:
            self._apply(mixing, theta)
            return self._over(batches, examples, _Pass(work), torch.zeros(width, dtype=torch.float64), key)

        return self._kept("sum", key, total)

    def unreached(
        self, batches: Sequence[Batch], examples: Sequence[Example], *, key: str | None = None
    ) -> tuple[str, ...]:
        """The modules that the model calls for no record, at what is attached; batch by batch until all are called. Not
        counted in the budget."""
        attached = self.objective.attached

        def work(batch: Batch) -> Tensor:
            attached.reached.clear()
            self.objective.record_sums(batch)
            called = torch.zeros(len(attached.modules), dtype=torch.float64)
            called[list(attached.reached)] = 1
            return called

        seen = _Pass(work, torch.maximum, cost=0, until=lambda called: bool(called.all()))
        zeros = torch.zeros(len(attached.modules), dtype=torch.float64)
        called = self._kept("reached", key, lambda: self._over(batches, examples, seen, zeros, key))
        return tuple(module for module, is_called in zip(attached.modules, called, strict=True) if not is_called)

    def seconds(self, mixing: Mixing, theta: Tensor, batch: Batch) -> float:
        """How long a batch takes forward and backward, not counted; judged by its first half if it is too big for the
        memory."""
        try:
            work = partial(self._nats_and_gradient, mixing, theta)
            self._exactly(work, batch)  # the first run pays for what is set up once
            started = time.monotonic()
            self._exactly(work, batch)
            return max(time.monotonic() - started, 1e-9)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error) or len(batch.indices) == 1:
                raise
        free_cached_memory(self.objective.attached.device)
        half = batch.first_records(len(batch.indices) // 2)
        return self.seconds(mixing, theta, half) * batch.tokens / half.tokens

    def pace(self, mixing: Mixing, theta: Tensor, batches: Sequence[Batch], largest: Batch) -> Pace:
        """The line through a batch of the middle size and the largest one, each of them run forward and backward; of
        all processes together.

        Args:
            mixing, theta: what is attached meanwhile.
            batches: of which there are most.
            largest: that there is at all.
        """
        middle = sorted(batches, key=lambda batch: batch.tokens)[len(batches) // 2]
        few = self.seconds(mixing, theta, middle) / GRADIENT_COST
        token_seconds, overhead = few / middle.tokens, 0
        if largest.tokens > middle.tokens:
            many = self.seconds(mixing, theta, largest) / GRADIENT_COST
            slope = (many - few) / (largest.tokens - middle.tokens)
            token_seconds = min(max(slope, _LEAST_SLOPE * token_seconds), token_seconds)
            overhead = round(few / token_seconds) - middle.tokens
        return Pace(token_seconds / self._processes.world_size, overhead)

    def home_of(self, mixing: Mixing) -> torch.device:
        """Where a descent keeps theta and all of its size: trained factors are as many numbers as the adapters have,
        and stay on the device, unless processes exchange them or it has no float64 to add them in."""
        large, device = mixing.kind == "factors", self.objective.attached.device
        return device if large and self._processes.world_size == 1 and has_float64(device) else torch.device("cpu")

    def stepped(self, **fields: float) -> None:
        """A descent took a step."""
        self.steps += 1
        self.meter.step(number=self.steps, **fields)

    # What is remembered.

    @contextmanager
    def within(self, name: str, left: Callable[[str, int], int] | None = None) -> Iterator[None]:
        """One of several fits with this engine: what is remembered in it goes by its name too.

        Args:
            name: of the fit.
            left: the effort that is left of it, at most, when a stage begins: its name, and what it spent by then; None
                where no other fit has done any of it.
        """
        self._prefix = f"{name}: "
        try:
            with self.meter.within_fit(name, left):
                yield
        finally:
            self._prefix = ""

    def same(
        self, what: str, mixing: Applied, tensors: Mapping[str, Tensor], examples: Sequence[Example], **more: float
    ) -> bytes | None:
        """What a piece of work is known by, a sha256 of all that its result depends on; None where no other fit could
        ask for it.

        Args:
            what: it is: a score, a mean and its gradient, answers, a descent.
            mixing: what theta means.
            tensors: theta, and what else a descent begins with, of any shape.
            examples: that it is done on, told apart by their places.
            more: numbers, such as steps and ridge.
        """
        if not self._shared or not isinstance(mixing, Mixing):
            return None
        digest = hashlib.sha256()
        for part in (
            what,
            mixing.told_apart_by,
            *(example.place for example in examples),
            json.dumps(more, sort_keys=True),
        ):
            digest.update(part.encode() + b"\0")
        for name, tensor in tensors.items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def recall(self, key: str | None, same: bytes | None = None) -> Entry | None:
        """What was done already, None if nothing was: by another fit with this engine, which counts in the budget as if
        it were done here, or by an interrupted fit under this key; the meter goes to where that one was."""
        if key is None:
            return None
        if same in self._done:
            known, cost = self._done[same]
            entry = self._processes.from_first(lambda: self._journal.again(known))
            if entry is not None:
                self.meter.spent += cost
                return entry
        if same is not None:
            self._asked[same] = self.meter.spent
            self.meter.not_done_yet()
        entry = self._from_journal(self._prefix + key)
        if entry is not None:
            self._restore(entry)
        return entry

    def remember(self, key: str | None, entry: Entry, same: bytes | None = None) -> Entry:
        """Leaves something under a key for a resumed fit."""
        if key is not None:
            self._to_journal(self._prefix + key, entry, again=same is not None)
        return entry

    def finished(self, key: str | None, same: bytes | None) -> None:
        """What is under the key now is whole, for the other fits with this engine too."""
        if key is not None and same in self._asked:
            self._done[same] = (self._prefix + key, self.meter.spent - self._asked.pop(same))

    def due(self, key: str | None) -> bool:
        """Whether an operation that goes on should leave under the key where it is; decides nothing else."""
        return key is not None and self._journal.due(self._prefix + key)

    def _remembered(self, key: str | None, make: Callable[[], Entry], same: bytes | None = None) -> Entry:
        entry = self.recall(key, same)
        if entry is None:
            entry = self.remember(key, make(), same)
        self.finished(key, same)
        return entry

    def _kept(self, name: str, key: str | None, make: Callable[[], Tensor], same: bytes | None = None) -> Tensor:
        """An operation's only tensor, which goes by a name in what is remembered."""
        return self._remembered(key, lambda: Entry({name: make()}), same).tensors[name]

    def _from_journal(self, key: str) -> Entry | None:
        return self._processes.from_first(lambda: self._journal.recall(key))

    def _to_journal(self, key: str, entry: Entry, *, again: bool = False) -> None:
        position = {
            "spent": self.meter.spent,
            "logged": self.meter.logged,
            "steps": self.steps,
            "halvings": self.halvings,
        }
        self._journal.write(key, replace(entry, values={**entry.values, **position}), again=again)

    def _restore(self, entry: Entry) -> None:
        spent, logged, self.steps, self.halvings = (
            int(entry.values[name])  # type: ignore[arg-type]
            for name in ("spent", "logged", "steps", "halvings")
        )
        self.meter.restore(spent, logged)

    # A pass over micro-batches.

    def _over(
        self, batches: Sequence[Batch], examples: Sequence[Example], what: _Pass, total: Tensor, key: str | None
    ) -> Tensor:
        """The results of all batches put into `total` in their order, from where an interrupted fit was in it."""
        total, start = self._begun(total, key)

        def counted(batch: Batch) -> Tensor:
            before = self._halved_here
            result = self._fitting_in(batch, examples, what).flatten()
            return torch.cat([result, result.new_full((1,), self._halved_here - before, dtype=torch.float64)])

        left = batches[start:]
        # What is on a device is of one process alone, and stays there.
        here = total.device.type != "cpu"
        results = ((batch, counted(batch)) for batch in left) if here else self._processes.in_order(left, counted)
        for done, (batch, found) in enumerate(results, start + 1):
            part = found[:-1]
            finite = torch.isfinite(part).all() if what.finite else found.new_ones(())
            nats, halved, is_finite = torch.stack([found[0], found[-1], finite.to(found.dtype)]).tolist()
            self.halvings += int(halved)
            if not is_finite:
                raise _non_finite([examples[i] for i in batch.indices])
            if what.by_record:
                total[list(batch.indices)] = part.view(len(batch.indices), -1)
            else:
                what.join(total, part, out=total)
            if what.cost:
                loss = nats / batch.scored_tokens if what.nats else None
                self.meter.count(batch.tokens, cost=what.cost, nats=loss)
            if what.until(total):
                break
            if done < len(batches) and key is not None and self._journal.due(_UNDER_WAY):
                self._to_journal(_UNDER_WAY, Entry({"sum": total.cpu()}, {"of": self._prefix + key, "done": done}))
        return total

    def _begun(self, zeros: Tensor, key: str | None) -> tuple[Tensor, int]:
        """The sum that an interrupted fit was in, and how many batches are in it; the zeros if it was in none here."""
        entry = self._sum_under_way
        if entry is None or key is None or entry.values["of"] != self._prefix + key:
            return zeros, 0
        self._sum_under_way = None
        self._restore(entry)
        return entry.tensors["sum"].to(zeros.device), int(entry.values["done"])  # type: ignore[arg-type]

    def _apply(self, mixing: Applied, theta: Tensor) -> None:
        with torch.no_grad():
            mixing.apply(self.objective.attached, theta)

    def _nats_and_gradient(self, mixing: Mixing, theta: Tensor, batch: Batch) -> Tensor:
        """(1 + P,) in float64, where theta is."""
        leaf = theta.clone().requires_grad_(True)
        mixing.apply(self.objective.attached, leaf)
        nats = self.objective.nats(batch)
        # First, as whatever reads a number of the device waits for all that it was asked for.
        gradient = gradient_of(nats, leaf)
        return torch.cat([nats.detach().to(leaf.device).double().sum()[None], gradient.double()])

    def _exactly(self, work: Work, batch: Batch) -> Tensor:
        """What is made of a batch by kernels that always add in one order; by others, and that is said once, where the
        device has none."""
        device = self.objective.attached.device
        try:
            with exact_kernels(device, one_order=self._one_order):
                return work(batch)
        except RuntimeError as error:
            if not (self._one_order and lacks_exact_kernel(error)):
                raise
            reason = str(error).partition(", but")[0]
        self._one_order = False
        self._progress.warn(f"the same command may differ in the last bits when it is run again: {reason}")
        with exact_kernels(device, one_order=False):
            return work(batch)

    def _fitting_in(self, batch: Batch, examples: Sequence[Example], what: _Pass) -> Tensor:
        """What is made of a batch; of its halves, joined, if it is too big for the memory.

        Raises:
            OutOfResources: if a single record is too big.
        """
        if self._most_tokens is None or batch.tokens <= self._most_tokens or len(batch.indices) == 1:
            try:
                return self._exactly(what.work, batch)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
            # Out of the except clause, so that nothing of the attempt is held.
            free_cached_memory(self.objective.attached.device)
            if len(batch.indices) == 1:
                raise OutOfResources(
                    f"memory ran out on {examples[batch.indices[0]].place}, a record of {batch.tokens} tokens",
                    hint="try --checkpointing, a smaller --max-length, or --dtype bfloat16",
                )
            self._halved_here += 1
            self._most_tokens = batch.tokens // 2
            self._progress.warn(
                f"memory ran out on a micro-batch of {batch.tokens} tokens: it is halved and done again; the recipe "
                "says so, as another run may differ in the last bits"
            )
        half = len(batch.indices) // 2
        left, right = (
            self._fitting_in(make_batch(examples, rows), examples, what)
            for rows in (batch.indices[:half], batch.indices[half:])
        )
        return torch.cat([left, right]) if what.by_record else what.join(left, right)


def _non_finite(examples: Sequence[Example]) -> NonFiniteLoss:
    """Names the records without their folders: a recipe keeps the sentence, and may be published."""
    names = [os.path.basename(example.place) for example in examples[:20]]
    places = ", ".join(names) + (", ..." if len(examples) > 20 else "")
    return NonFiniteLoss(
        f"the loss is not finite on the records at {places}",
        hint="try --dtype float32, or leave these records out",
    )
