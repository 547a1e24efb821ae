"""Sums over micro-batches: the float64 formula, whatever the batches, and also where memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss, OutOfResources
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Journal, Meter
from loracli.fitting.mixing import Mixing, make_layout, make_mixing
from loracli.fitting.processes import _WAIT, Processes
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from loracli.progress import SILENT, Silent
from loracli.recipe.record import MixingKind
from tests.tiny import make_adapter, make_base

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    MemoryError(),
]


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-NeoX, which normalises in float64 where the model is float64."""
    return make_base(tmp_path_factory.mktemp("engine") / "base", "neox")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[LoraAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    targets = (("query_key_value", "dense"), ("query_key_value", "dense_4h_to_h"))
    made = [make_adapter(folder / str(i), base, targets=names, rank=2, seed=i) for i, names in enumerate(targets)]
    return [read_adapter(str(path)) for path in made]


@dataclass
class Rig:
    """An engine in float64 and what it is asked."""

    engine: Engine
    mixing: Mixing
    theta: Tensor
    examples: list[Example]
    heard: list[str] = field(default_factory=list)

    def batches(self, size: int) -> list[Batch]:
        return plan_batches(self.examples, batch_tokens=size)

    def total(self, size: int) -> tuple[float, Tensor]:
        return self.engine.total(self.mixing, self.theta, self.batches(size), self.examples)

    def score(self, size: int) -> tuple[Tensor, Tensor]:
        scores = self.engine.score(self.mixing, self.theta, self.batches(size), self.examples)
        return scores.nats, scores.tokens


def some_examples(lengths: list[int], *, weighted: bool = False) -> list[Example]:
    """Random tokens, every third unscored; with weights, some records count more than others."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [
        Example(
            f"val.jsonl:{line}",
            tuple(row),
            tuple(t > 0 and (t + line) % 3 > 0 for t in range(len(row))),
            1.0 + (line % 3) / 2 if weighted else 1.0,
        )
        for line, row in enumerate(rows, 1)
    ]


@contextmanager
def rig(
    base: Path,
    adapters: list[LoraAdapter],
    examples: list[Example],
    *,
    kind: MixingKind = "module",
) -> Iterator[Rig]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval().requires_grad_(False)
    layout, listener = make_layout(adapters), Listener()
    with attach(model, adapters, layout.modules, canonical=kind == "core") as attached:
        mixing = make_mixing(attached, layout, kind)
        objective = make_objective(attached, plan_batches(examples, batch_tokens=64)[0])
        engine = Engine(objective, Meter(SILENT), progress=listener)
        generator = torch.Generator().manual_seed(3)
        theta = mixing.constant([0.9, 0.6])
        theta = theta + 0.2 * torch.randn(mixing.numbers, generator=generator, dtype=torch.float64)
        yield Rig(engine, mixing, theta, examples, listener.warnings)


def memory_for(tokens: int, error: Exception, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the memory run out above so many tokens of a micro-batch; the sizes that were tried."""
    tried: list[int] = []

    def limited(work: Any) -> Any:
        def limited_work(batch: Batch) -> Any:
            tried.append(batch.tokens)
            if batch.tokens > tokens:
                raise error
            return work(batch)

        return limited_work

    monkeypatch.setattr(rig.engine.objective, "nats", limited(rig.engine.objective.nats))
    return tried


@pytest.mark.parametrize("kind", ["adapter", "module", "core"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_and_scores_are_the_float64_formula_whatever_the_batches(
    base: Path, adapters: list[LoraAdapter], kind: MixingKind, weighted: bool
) -> None:
    """-v log p of every scored token, from the model's own logits on each record alone, and autograd's gradient."""
    examples = some_examples([5, 21, 9, 14, 30, 6, 9], weighted=weighted)
    with rig(base, adapters, examples, kind=kind) as r:
        leaf = r.theta.clone().requires_grad_(True)
        r.mixing.apply(r.engine.objective.attached, leaf)
        nats = []
        for example in examples:
            ids = torch.tensor(example.input_ids)
            log_p = torch.log_softmax(r.engine.objective.attached.model(input_ids=ids[None]).logits[0], dim=-1)
            places = torch.tensor([t for t, flag in enumerate(example.scored) if flag])
            nats.append(-example.weight * log_p[places - 1, ids[places]].sum())
        expected = torch.stack(nats)
        (gradient,) = torch.autograd.grad(expected.sum(), leaf)
        expected = expected.detach()
        tokens = torch.tensor([e.weight * sum(e.scored) for e in examples], dtype=torch.float64)
        for size in (1, 40, 1000):
            total, ours = r.total(size)
            assert total == pytest.approx(float(expected.sum()), rel=1e-12)
            torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-9)
            scores = r.score(size)
            torch.testing.assert_close(scores[0], expected, rtol=1e-11, atol=1e-11)
            assert torch.equal(scores[1], tokens)
            mean, slope = r.engine.mean_and_gradient(r.mixing, r.theta, r.batches(size), examples)
            assert mean == pytest.approx(float(expected.sum() / tokens.sum()), rel=1e-12)
            torch.testing.assert_close(slope, gradient / tokens.sum(), rtol=1e-9, atol=1e-9)


def test_the_meter_counts_a_token_forward_once_and_backward_once_more(base: Path, adapters: list[LoraAdapter]) -> None:
    with rig(base, adapters, some_examples([8] * 6)) as r:
        r.total(16)
        assert r.engine.meter.spent == 2 * 48
        r.score(16)
        assert r.engine.meter.spent == 3 * 48


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "windows", "python"])
def test_a_micro_batch_that_memory_cannot_hold_is_halved(
    base: Path, adapters: list[LoraAdapter], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 records of 20 tokens in one micro-batch, with memory for 5 of them: 240 and 120 tokens fail, 60 fit."""
    with rig(base, adapters, some_examples([20] * 12, weighted=True)) as r:
        expected, gradient = r.total(240)
        tried = memory_for(100, error, r, monkeypatch)
        total, ours = r.total(240)
        assert tried == [240, 120, 60, 60, 60, 60]  # what is known to be too much is not tried again
        assert total == pytest.approx(expected, rel=1e-13)
        torch.testing.assert_close(ours, gradient, rtol=1e-11, atol=1e-11)
        assert r.engine.halvings == 2
        assert [int(said.split(" tokens")[0].split()[-1]) for said in r.heard] == [240, 120]  # once for each size
        assert all("halved and done again; the recipe says so" in said for said in r.heard)
        again, _ = r.total(240)
        assert again == total and tried[6:] == [60, 60, 60, 60]
        assert r.engine.halvings == len(r.heard) == 2


def test_scores_stay_with_their_records_where_memory_runs_out(
    base: Path, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(base, adapters, some_examples([31, 5, 22, 9, 14, 30, 6], weighted=True)) as r:
        nats, tokens = r.score(300)
        memory_for(65, OUT_OF_MEMORY[1], r, monkeypatch)
        halved = r.score(300)
        assert r.engine.halvings > 0
        torch.testing.assert_close(halved[0], nats, rtol=1e-12, atol=1e-12)
        assert torch.equal(halved[1], tokens)


def test_a_record_that_is_too_big_by_itself_is_named(
    base: Path, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(base, adapters, some_examples([9, 33, 12])) as r:
        memory_for(30, OUT_OF_MEMORY[0], r, monkeypatch)
        for ask in (r.total, r.score):
            with pytest.raises(OutOfResources, match=r"ran out on val\.jsonl:2, a record of 33 tokens") as caught:
                ask(99)
            assert caught.value.hint is not None and "--checkpointing" in caught.value.hint


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("memory"), ValueError("no memory")]
)
def test_another_error_passes_unharmed(
    base: Path, adapters: list[LoraAdapter], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(base, adapters, some_examples([20] * 4)) as r:
        tried = memory_for(0, error, r, monkeypatch)
        for ask in (r.total, r.score):
            with pytest.raises(type(error)) as caught:
                ask(80)
            assert caught.value is error
        assert tried == [80, 80] and r.engine.halvings == 0 and not r.heard


def test_a_batch_is_timed_although_memory_cannot_hold_it(
    base: Path, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate before a fit must not end it, where the fit itself would halve the batch."""
    with rig(base, adapters, some_examples([20] * 12, weighted=True)) as r:
        tried = memory_for(100, OUT_OF_MEMORY[2], r, monkeypatch)
        (batch,) = r.batches(240)
        assert 0 < r.engine.seconds(r.mixing, r.theta, batch) < 60
        assert tried == [240, 120, 60, 60]
        assert r.engine.meter.spent == 0 and not r.heard
        memory_for(19, OUT_OF_MEMORY[2], r, monkeypatch)
        with pytest.raises(RuntimeError, match="not enough memory"):  # which the boundary of the fit translates
            r.engine.seconds(r.mixing, r.theta, batch)


@pytest.mark.parametrize("where", ["total", "mean_and_gradient", "score"])
def test_a_loss_that_is_not_finite_names_the_records(
    base: Path, adapters: list[LoraAdapter], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score knows the record, a sum the micro-batch; either comes again in a resumed fit."""
    examples = some_examples([9] * 6)
    with rig(base, adapters, examples) as r:
        nats = r.engine.objective.nats

        def broken(batch: Batch) -> Tensor:
            found = nats(batch)
            for row, index in enumerate(batch.indices):
                if index == 3:
                    found = torch.where(batch.owners == row, found * torch.inf, found)
            return found

        monkeypatch.setattr(r.engine.objective, "nats", broken)
        named = r"at val\.jsonl:4$" if where == "score" else r"at val\.jsonl:3, val\.jsonl:4$"
        with pytest.raises(NonFiniteLoss, match=named):
            getattr(r.engine, where)(r.mixing, r.theta, r.batches(18), examples)


@dataclass(frozen=True)
class Threads(Processes):
    """Processes that are threads of this one, each with an engine of its own."""

    board: list[Any] = field(default_factory=list)
    barrier_of_all: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))

    def exchange(self, mine: Any) -> list[Any]:
        self.board[self.rank] = mine
        self.barrier_of_all.wait(30)
        every = list(self.board)
        self.barrier_of_all.wait(30)
        return every

    def _gather(self, mine: Tensor, patience: timedelta = _WAIT) -> list[Tensor]:
        return self.exchange(mine.clone())

    def from_first(self, work: Any) -> Any:
        return self.exchange(work() if self.first else None)[0]


def test_halvings_of_all_processes_are_counted_once_also_in_a_resumed_fit(
    tmp_path: Path, base: Path, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second of two processes alone. The first keeps the state."""
    examples = some_examples([20] * 8)

    def count(rig: Rig, processes: Threads) -> int:
        journal = Journal(tmp_path, seconds=0) if processes.first else None
        rig.engine = Engine(rig.engine.objective, Meter(SILENT), processes=processes, journal=journal)
        rig.engine.score(rig.mixing, rig.theta, rig.batches(80), examples, key="scores")
        return rig.engine.halvings

    with rig(base, adapters, examples) as one, rig(base, adapters, examples) as two:
        tried = memory_for(50, OUT_OF_MEMORY[0], two, monkeypatch)
        for _ in ("a fit", "the same, resumed"):
            board: list[Any] = [None, None]
            barrier = threading.Barrier(2)
            both = [Threads(rank, 2, board=board, barrier_of_all=barrier) for rank in range(2)]
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(count, (one, two), both)) == [1, 1]
        assert tried == [80, 40, 40]  # the resumed fit has taken the scores from the state


def test_an_entry_belongs_to_its_key_in_whatever_order_a_resumed_fit_asks(
    tmp_path: Path, base: Path, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked under one key is never answered with what another left, nor with an entry that was renamed."""
    examples = some_examples([20, 9, 14])
    with rig(base, adapters, examples) as r:
        thetas = {"module, fold 0": r.theta, "module, fold 1": r.theta / 2}
        objective = r.engine.objective

        def asked(keys: list[str]) -> dict[str, Tensor]:
            engine = Engine(objective, Meter(SILENT), journal=Journal(tmp_path))
            batches = r.batches(20)
            return {key: engine.score(r.mixing, thetas[key], batches, examples, key=key).nats for key in keys}

        first = asked(list(thetas))
        tried = memory_for(99, OUT_OF_MEMORY[0], r, monkeypatch)
        turned = asked(list(thetas)[::-1])
        assert not tried  # all of it was there
        assert all(torch.equal(turned[key], first[key]) for key in thetas)
        ours = {key: tmp_path / f"{sha256(key.encode()).hexdigest()}.safetensors" for key in thetas}
        ours["module, fold 0"].replace(ours["module, fold 1"])
        again = asked(list(thetas))
        assert len(tried) == 2 * len(r.batches(20))
        assert all(torch.equal(again[key], first[key]) for key in thetas)


def test_two_operations_of_one_key_are_a_mistake(tmp_path: Path, base: Path, adapters: list[LoraAdapter]) -> None:
    with rig(base, adapters, some_examples([9])) as r:
        engine = Engine(r.engine.objective, Meter(SILENT), journal=Journal(tmp_path))
        engine.score(r.mixing, r.theta, r.batches(9), r.examples, key="held out")
        with pytest.raises(AssertionError, match="two steps are called held out"):
            engine.score(r.mixing, r.theta, r.batches(9), r.examples, key="held out")
