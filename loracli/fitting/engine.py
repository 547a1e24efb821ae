"""What a search asks the attached model: scores of records, and gradients of sums over micro-batches.

Sums are taken micro-batch by micro-batch in the order of the plan, each result whole before the next is added, so they
are the same bits for any number of processes; process k of K takes every K-th micro-batch. What took long is
remembered, so a resumed fit does not do it again. Where memory runs out, a micro-batch is halved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from loracli.calibration.batches import Batch, make_batch
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss, OutOfResources
from loracli.evaluation.scorer import Scorer
from loracli.fitting.journal import Entry, Journal
from loracli.fitting.meter import Meter
from loracli.fitting.mixing import Applied, DiagonalMixing, Mixing
from loracli.fitting.processes import ALONE, Processes
from loracli.fitting.record_gradients import RecordGradients, from_rows, record_gradients
from loracli.model.loss import Objective, Scores, gradient_of
from loracli.model.placement import ran_out_of_memory
from loracli.progress import SILENT, Progress

UNDER_WAY = "sum"  # the key of a sum that is not at its end

# Of a token: a forward pass is 1, a backward pass another.
SCORE_COST, GRADIENT_COST, CERTIFICATE_COST = 1, 2, 3

Work = Callable[[Batch], tuple[Tensor, Tensor]]
Join = Callable[[Tensor, Tensor], Tensor]


class Engine:
    """The attached model with everything around it that a search should not have to think of.

    Args:
        objective: the attached model's loss.
        meter: of the cost.
        processes: that share the work; all call the same methods in the same order.
        journal: of the first process; forgetful in the others.
        progress: told of micro-batches that had to be halved.
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
    ) -> None:
        self.objective = objective
        self.meter = meter
        self.steps = 0
        self.halvings = 0
        self._processes = processes
        self._journal = journal or Journal()
        self._progress = progress
        self._keys = 0
        self._halved_here = 0
        self._most_tokens: int | None = None  # of a micro-batch, once memory has run out
        self._sum_under_way = self._from_journal(UNDER_WAY)

    # Whole operations, remembered.

    def score(self, mixing: Applied, theta: Tensor, batches: Sequence[Batch], examples: Sequence[Example]) -> Scores:
        """Nats of each example at theta; the batches hold them all.

        Raises:
            NonFiniteLoss: naming the first records by their places.
        """
        key = self.next_key()
        entry = self.recall(key)
        if entry is None:
            with torch.no_grad():
                mixing.apply(self.objective.attached, theta)
            nats, tokens = self._record_sums(batches, examples)
            entry = self.remember(key, Entry({"nats": nats, "tokens": tokens}))
        scores = Scores(entry.tensors["nats"], entry.tensors["tokens"])
        bad = (~torch.isfinite(scores.nats)).nonzero().flatten().tolist()
        if bad:
            raise _non_finite([examples[i] for i in bad])
        return scores

    def answer(self, mixing: Applied, theta: Tensor, scorer: Scorer) -> Tensor:
        """What a task metric gives each record at theta, (n,) in float64. The first process answers for all; it is not
        counted in the budget.

        Raises:
            MetricError: if the user's command fails.
        """
        key = self.next_key()
        entry = self.recall(key)
        if entry is None:

            def work() -> Tensor:
                with torch.no_grad():
                    mixing.apply(self.objective.attached, theta)
                return scorer(self.objective)

            entry = self.remember(key, Entry({"values": self._processes.from_first(work)}))
        return entry.tensors["values"]

    def mean_and_gradient(
        self, mixing: Mixing, theta: Tensor, batches: Sequence[Batch], examples: Sequence[Example]
    ) -> tuple[float, Tensor]:
        """Nats per scored token over all batches, and the gradient; sums first, one division.

        Raises:
            NonFiniteLoss: naming the records of a batch.
        """
        key = self.next_key()
        entry = self.recall(key)
        if entry is None:
            nats, gradient = self.total(mixing, theta, batches, examples)
            entry = self.remember(key, Entry({"gradient": gradient}, {"nats": nats}))
        tokens = sum(batch.scored_tokens for batch in batches)
        return float(entry.values["nats"]) / tokens, entry.tensors["gradient"] / tokens  # type: ignore[arg-type]

    def record_gradients(
        self,
        mixing: DiagonalMixing,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        *,
        seed: int,
    ) -> RecordGradients:
        """The gradients of each record at theta, for its labels and for sampled ones; the batches hold all records.

        Raises:
            NonFiniteLoss: naming the records of a batch.
        """
        key = self.next_key()
        entry = self.recall(key)
        if entry is None:
            entry = self.remember(key, Entry({"rows": self._record_rows(mixing, theta, batches, examples, seed)}))
        return from_rows(entry.tensors["rows"])

    def summed(
        self,
        mixing: Applied,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        work: Work,
        width: int,
    ) -> Tensor:
        """The sum (width,) over the batches of what `work` makes of each at theta, end to end, in float64 and added in
        their order.

        Args:
            mixing, theta: what is attached.
            batches: whose results may be added up from their halves.
            examples: that the batches are made of.
            work: a batch to two tensors; it takes no gradient.
            width: of both together.
        """
        key = self.next_key()
        entry = self.recall(key)
        if entry is None:
            with torch.no_grad():
                mixing.apply(self.objective.attached, theta)
            total, start = self._begun(torch.zeros(width, dtype=torch.float64))
            fitting = partial(self._fitting_in, examples=examples, work=work, join=torch.add)
            for done, (batch, part) in enumerate(self._parts(batches[start:], fitting), start + 1):
                total += part
                self.meter.count(batch.tokens, cost=SCORE_COST)
                self._go_on(done, len(batches), total)
            entry = self.remember(key, Entry({"sum": total}))
        return entry.tensors["sum"]

    def unreached(self, batches: Sequence[Batch], examples: Sequence[Example]) -> tuple[str, ...]:
        """The modules that the model calls for no record, at what is attached; batch by batch until all are called. Not
        counted in the budget."""
        key, attached = self.next_key(), self.objective.attached
        entry = self.recall(key)
        if entry is None:

            def work(batch: Batch) -> tuple[Tensor, Tensor]:
                attached.reached.clear()
                self.objective.record_sums(batch)
                called = torch.zeros(len(attached.modules), dtype=torch.float64)
                called[list(attached.reached)] = 1
                return called, torch.zeros(0, dtype=torch.float64)

            reached = torch.zeros(len(attached.modules), dtype=torch.float64)
            fitting = partial(self._fitting_in, examples=examples, work=work, join=torch.maximum)
            for _, called in self._parts(batches, fitting):
                reached = torch.maximum(reached, called)
                if bool(reached.all()):
                    break
            entry = self.remember(key, Entry({"reached": reached}))
        return tuple(m for m, called in zip(attached.modules, entry.tensors["reached"], strict=True) if not called)

    def next_key(self) -> str:
        """The key of the next operation: the same operation has the same key in a resumed fit."""
        self._keys += 1
        return f"{self._keys:05d}"

    def recall(self, key: str, *, of: str | None = None) -> Entry | None:
        """What an interrupted fit left under a key; the meter goes to where it was then.

        Args:
            key: of the entry.
            of: the operation that the entry must belong to, where the key says nothing of it.
        """
        entry = self._from_journal(key)
        if entry is None or (of is not None and entry.values["of"] != of):
            return None
        self._restore(entry)
        return entry

    def remember(self, key: str, entry: Entry, *, of: str | None = None) -> Entry:
        """Leaves something under a key for a resumed fit."""
        self._journal.write(key, replace(entry, values={**entry.values, **self._position(), "of": of}))
        return entry

    def due(self, key: str) -> bool:
        """Whether an operation that goes on should leave under the key where it is; decides nothing else."""
        return self._journal.due(key)

    def stepped(self, **fields: float) -> None:
        """A descent took a step."""
        self.steps += 1
        self.meter.step(number=self.steps, **fields)

    # Sums over micro-batches.

    def total(
        self, mixing: Mixing, theta: Tensor, batches: Sequence[Batch], examples: Sequence[Example]
    ) -> tuple[float, Tensor]:
        """Total nats of some batches at theta and their gradient (P,), both in float64 and added in order.

        Raises:
            NonFiniteLoss: naming the records of the first batch where either is not finite.
        """

        def work(batch: Batch) -> tuple[Tensor, Tensor]:
            return self._fitting_in(batch, examples, partial(self._nats_and_gradient, mixing, theta), torch.add)

        total, start = self._begun(torch.zeros(1 + theta.numel(), dtype=torch.float64))
        for done, (batch, part) in enumerate(self._parts(batches[start:], work), start + 1):
            if not torch.isfinite(part).all():
                raise _non_finite([examples[i] for i in batch.indices])
            total += part
            self.meter.count(batch.tokens, cost=GRADIENT_COST, nats=float(part[0]) / batch.scored_tokens)
            self._go_on(done, len(batches), total)
        return float(total[0]), total[1:]

    def seconds(self, mixing: Mixing, theta: Tensor, batch: Batch) -> float:
        """How long a batch takes forward and backward, not counted; judged by its first half if it is too big for the
        memory."""
        try:
            self._nats_and_gradient(mixing, theta, batch)  # the first run pays for what is set up once
            started = time.monotonic()
            self._nats_and_gradient(mixing, theta, batch)
            return max(time.monotonic() - started, 1e-9)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error) or len(batch.indices) == 1:
                raise
        half = batch.first_records(len(batch.indices) // 2)
        return self.seconds(mixing, theta, half) * batch.tokens / half.tokens

    def _record_sums(self, batches: Sequence[Batch], examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Nats (n,) and counted tokens (n,) of each record."""

        def work(batch: Batch) -> tuple[Tensor, Tensor]:
            return self._fitting_in(batch, examples, self.objective.record_sums, _side_by_side)

        records = len(examples)
        sums, start = self._begun(torch.zeros(2 * records, dtype=torch.float64))
        for done, (batch, part) in enumerate(self._parts(batches[start:], work), start + 1):
            places = torch.tensor(batch.indices)
            sums[torch.cat([places, records + places])] = part
            self.meter.count(batch.tokens, cost=SCORE_COST)
            self._go_on(done, len(batches), sums)
        return sums[:records], sums[records:]

    def _record_rows(
        self,
        mixing: DiagonalMixing,
        theta: Tensor,
        batches: Sequence[Batch],
        examples: Sequence[Example],
        seed: int,
    ) -> Tensor:
        """(n, 2 + 2P): a row for each record."""
        width = 2 + 2 * theta.numel()

        def rows_of(batch: Batch) -> tuple[Tensor, Tensor]:
            found = record_gradients(self.objective, mixing, theta, batch, examples, seed=seed)
            return found.rows().flatten(), torch.zeros(0, dtype=torch.float64)

        def work(batch: Batch) -> tuple[Tensor, Tensor]:
            return self._fitting_in(batch, examples, rows_of, _side_by_side)

        rows, start = self._begun(torch.zeros(len(examples), width, dtype=torch.float64))
        for done, (batch, part) in enumerate(self._parts(batches[start:], work), start + 1):
            if not torch.isfinite(part).all():
                raise _non_finite([examples[i] for i in batch.indices])
            rows[list(batch.indices)] = part.view(-1, width)
            self.meter.count(batch.tokens, cost=CERTIFICATE_COST)
            self._go_on(done, len(batches), rows)
        return rows

    def _parts(self, batches: Sequence[Batch], work: Work) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch with what `work` makes of it, end to end, in order; counts the halvings of all processes."""

        def counted(batch: Batch) -> Tensor:
            before = self._halved_here
            result = torch.cat(work(batch))
            return torch.cat([result, torch.tensor([self._halved_here - before], dtype=torch.float64)])

        for batch, part in self._processes.in_order(batches, counted):
            self.halvings += int(part[-1])
            yield batch, part[:-1]

    def _begun(self, zeros: Tensor) -> tuple[Tensor, int]:
        """The sum that an interrupted fit was in, and how many batches are in it; the zeros if it was in none here."""
        entry = self._sum_under_way
        if entry is None or entry.values["of"] != self._place:
            return zeros, 0
        self._sum_under_way = None
        self._restore(entry)
        return entry.tensors["sum"], int(entry.values["done"])  # type: ignore[arg-type]

    def _go_on(self, done: int, of: int, total: Tensor) -> None:
        if done < of and self.due(UNDER_WAY):
            self.remember(UNDER_WAY, Entry({"sum": total}, {"done": done}), of=self._place)

    @property
    def _place(self) -> str:
        """Where in the search the next sum stands."""
        return f"{self._keys}/{self.steps}"

    def _nats_and_gradient(self, mixing: Mixing, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(1,) and (P,), in float64."""
        leaf = theta.clone().requires_grad_(True)
        mixing.apply(self.objective.attached, leaf)
        total = self.objective.nats(batch).cpu().double().sum()
        return total.detach()[None], gradient_of(total, leaf).double()

    def _fitting_in(self, batch: Batch, examples: Sequence[Example], work: Work, join: Join) -> tuple[Tensor, Tensor]:
        """What `work` makes of a batch; of its halves, joined, if it is too big for the memory.

        Raises:
            OutOfResources: if a single record is too big.
        """
        if self._most_tokens is None or batch.tokens <= self._most_tokens or len(batch.indices) == 1:
            try:
                return work(batch)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
            # Out of the except clause, so that nothing of the attempt is held.
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
            self._fitting_in(make_batch(examples, rows), examples, work, join)
            for rows in (batch.indices[:half], batch.indices[half:])
        )
        return join(left[0], right[0]), join(left[1], right[1])

    def _from_journal(self, key: str) -> Entry | None:
        return self._processes.from_first(lambda: self._journal.recall(key))

    def _position(self) -> dict[str, int]:
        return {
            "spent": self.meter.spent,
            "logged": self.meter.logged,
            "keys": self._keys,
            "steps": self.steps,
            "halvings": self.halvings,
        }

    def _restore(self, entry: Entry) -> None:
        spent, logged, self._keys, self.steps, self.halvings = (
            int(entry.values[name])  # type: ignore[arg-type]
            for name in ("spent", "logged", "keys", "steps", "halvings")
        )
        self.meter.restore(spent, logged)


def _side_by_side(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right])


def _non_finite(examples: Sequence[Example]) -> NonFiniteLoss:
    places = ", ".join(example.place for example in examples[:20]) + (", ..." if len(examples) > 20 else "")
    return NonFiniteLoss(
        f"the loss is not finite on the records at {places}",
        hint="try --dtype float32, or leave these records out",
    )
