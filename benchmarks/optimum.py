"""How far above the optimum each way of fitting ends, against the passes over the data that it took.

    python benchmarks/optimum.py                              the embedded example
    python benchmarks/optimum.py --planted 4000               records that its model wrote at known weights
    python benchmarks/optimum.py --base BASE --adapters MATH CODE --data CALIB.jsonl --records 24

One objective for all: mean nats per scored token of all records, one weight for each module and adapter, no ridge. The
optimum is the lower end of two runs of L-BFGS (torch's, strong Wolfe line search) of at most `--iterations` iterations.
A pass is forward and backward over all records; forward alone counts half.

LoRAHub's search (arXiv 2307.13269; its code's settings: nevergrad's NGOpt, 40 evaluations, weights of each adapter
within 1.5, plus 0.05 times the mean of their sizes) needs `pip install .[lorahub]`; its rows are left out otherwise.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import BenchmarkParser
from loracli.adapters.adapter import read_adapter
from loracli.calibration.dataset import Batch, plan_batches, shuffled
from loracli.calibration.records import read_records
from loracli.calibration.render import Example, render_file
from loracli.demo.run import example_folder
from loracli.fitting.certificate import certificate_tokens, certified
from loracli.fitting.criterion import Fold, loss_criterion
from loracli.fitting.descent import AdamW, Descent, plan_steps
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.level import Task, tokens_of
from loracli.fitting.mixing import DiagonalMixing, Layout, make_diagonal, make_layout
from loracli.fitting.published import fit_as_published
from loracli.fitting.search import search
from loracli.fitting.settings import FitSettings
from loracli.model.attach import AttachedModel, attach
from loracli.model.base import load_base
from loracli.model.loss import make_objective
from loracli.model.reference import find_base
from loracli.progress import SILENT

BATCH_TOKENS = 1024
LORAHUB_EVALUATIONS, LORAHUB_BOUND, LORAHUB_L1 = 40, 1.5, 0.05


@dataclass(frozen=True)
class Problem:
    """The objective, and what a way of fitting may use."""

    attached: AttachedModel
    layout: Layout
    examples: tuple[Example, ...]
    batches: list[Batch]
    names: tuple[str, ...]
    truth: Tensor | None

    @property
    def mixing(self) -> DiagonalMixing:
        return make_diagonal(self.layout, "module")

    def engine(self) -> Engine:
        return Engine(make_objective(self.attached, self.batches[0]), Meter(SILENT))

    def passes(self, engine: Engine) -> float:
        return engine.meter.spent / (2 * tokens_of(self.examples))

    def loss(self, theta: Tensor, mixing: DiagonalMixing | None = None) -> float:
        engine = self.engine()
        return engine.score(mixing or self.mixing, theta, self.batches, self.examples).nats_per_token


@contextmanager
def problem(arguments: argparse.Namespace) -> Iterator[Problem]:
    adapters = [read_adapter(reference) for reference in arguments.adapters]
    base = load_base(find_base(adapters, arguments.base), dtype=arguments.dtype, device="cpu")
    layout = make_layout(adapters)
    names = tuple(Path(reference).name for reference in arguments.adapters)
    with attach(base.model, adapters, layout.modules) as attached:
        truth = None
        if arguments.planted:
            generator = torch.Generator().manual_seed(0)
            mixing = make_diagonal(layout, "module")
            truth = 0.8 + 0.5 * torch.randn(mixing.numbers, generator=generator, dtype=torch.float64)
            mixing.apply(attached, truth)
            examples = written(base.model, arguments.planted, generator)
        else:
            files = [render_file(read_records(path), base.tokenizer, max_length=1024) for path in arguments.data]
            examples = [example for file in files for example in file.examples][: arguments.records]
        batches = plan_batches(examples, batch_tokens=BATCH_TOKENS)
        yield Problem(attached, layout, tuple(examples), batches, names, truth)


def written(model: Any, count: int, generator: torch.Generator, length: int = 12) -> list[Example]:
    """Records that the model writes itself after a random first token."""
    ids = torch.randint(model.config.vocab_size, (count, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            p = torch.cat([torch.softmax(model(input_ids=part).logits[:, -1].double(), -1) for part in ids.split(256)])
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    flags = (False, *(True,) * (length - 1))
    return [Example(f"{line}", tuple(row), flags) for line, row in enumerate(ids.tolist())]


def reference(p: Problem, starts: dict[str, Tensor], iterations: int) -> float:
    """The lowest loss that L-BFGS reaches."""
    ends = []
    for name, start in starts.items():
        theta, engine, began = start.clone().requires_grad_(True), p.engine(), time.monotonic()
        optimiser = torch.optim.LBFGS(
            [theta], max_iter=iterations, max_eval=2 * iterations, history_size=30, tolerance_grad=1e-6,
            tolerance_change=1e-9, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(theta: Tensor = theta, engine: Engine = engine) -> float:
            value, gradient = engine.mean_and_gradient(p.mixing, theta.detach(), p.batches, p.examples)
            theta.grad = gradient
            return value

        optimiser.step(closure)  # type: ignore[arg-type]
        value, gradient = engine.mean_and_gradient(p.mixing, theta.detach(), p.batches, p.examples)
        ends.append(value)
        print(
            f"- L-BFGS from {name}: {value:.6f} after {p.passes(engine):.0f} passes, largest gradient "
            f"{float(gradient.abs().max()):.1e}, largest weight {float(theta.detach().abs().max()):.2f}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    return min(ends)


Row = tuple[str, float, float, float]  # name, passes, loss, seconds


def ours(p: Problem, settings: FitSettings, name: str) -> Row:
    """What `loracat fit` does with these records, a fifth of them set aside to choose with."""
    began, engine = time.monotonic(), p.engine()
    order = shuffled(p.examples, seed=1)
    held = min(len(order) // 5, 512)
    fold = Fold(tuple(order[held:]), tuple(order[:held]))
    task = Task(engine, (fold,), loss_criterion(engine, batch_tokens=BATCH_TOKENS), settings, p.names)
    reserved = certificate_tokens(p.mixing, p.examples, settings, task.budget)
    found = search(task, lambda kind: make_diagonal(p.layout, kind), p.examples, reserved)
    theta, mixing = found.theta, found.mixing
    assert isinstance(mixing, DiagonalMixing)
    if reserved:
        left = min(task.budget * 2 * tokens_of(p.examples) - engine.meter.spent, reserved)
        theta, _ = certified(engine, mixing, theta, found.anchor, found.ridge or 0.0, p.examples, settings, left)
    return name, p.passes(engine), p.loss(theta), time.monotonic() - began


def plain_adamw(p: Problem, rate: float, checkpoints: Sequence[float]) -> list[Row]:
    """AdamW at one rate from uniform, without warm-up to speak of: the loss at several passes of one schedule each."""
    rows = []
    plan = plan_steps(p.examples, batch_tokens=BATCH_TOKENS, seed=0)
    start = p.mixing.constant([1 / len(p.names)] * len(p.names))
    for passes in checkpoints:
        began, engine = time.monotonic(), p.engine()
        steps = max(1, round(passes * plan.steps_a_pass))
        adam = AdamW(start, steps=steps, rate=rate, warm_up=1)
        Descent(engine, p.mixing, p.examples, plan.step, adam, start).run(steps)
        spent = p.passes(engine)
        rows.append((f"AdamW from uniform, rate {rate:g}", spent, p.loss(adam.theta), time.monotonic() - began))
    return rows


def published(p: Problem, rate: float | None) -> Row:
    began, engine = time.monotonic(), p.engine()
    mixing = make_diagonal(p.layout, "module", softmax=True)
    found = fit_as_published(engine, mixing, p.examples, FitSettings(paper=True, learning_rate=rate))
    loss = p.loss(found.theta, mixing)
    return f"published recipe, rate {rate or 1e-4:g}", p.passes(engine), loss, time.monotonic() - began


def lorahub(p: Problem) -> list[Row]:
    """LoRAHub's own setting, one weight for each adapter, and its search over all module weights at equal cost."""
    try:
        import nevergrad
    except ImportError:
        print("- nevergrad is not installed: LoRAHub's search is left out (`pip install .[lorahub]`)")
        return []
    rows = []
    adapters = make_diagonal(p.layout, "adapter")
    cases: list[tuple[str, DiagonalMixing, int]] = [
        ("LoRAHub, a weight for each adapter", adapters, LORAHUB_EVALUATIONS),
        ("LoRAHub's search, a weight for each module and adapter", p.mixing, 16),
    ]
    for name, mixing, evaluations in cases:
        began, engine = time.monotonic(), p.engine()
        box = nevergrad.p.Array(init=[0.0] * mixing.numbers, lower=-LORAHUB_BOUND, upper=LORAHUB_BOUND)
        box.random_state.seed(0)
        optimiser = nevergrad.optimizers.NGOpt(parametrization=box, budget=evaluations)

        def cost(weights: Any, mixing: DiagonalMixing = mixing, engine: Engine = engine) -> float:
            theta = torch.tensor(weights, dtype=torch.float64)
            loss = engine.score(mixing, theta, p.batches, p.examples).nats_per_token
            return loss + LORAHUB_L1 * float(theta.abs().mean())

        best = torch.tensor(optimiser.minimize(cost).value, dtype=torch.float64)
        spent = p.passes(engine)
        rows.append((f"{name}, {evaluations} evaluations", spent, p.loss(best, mixing), time.monotonic() - began))
    return rows


def main() -> None:
    example = example_folder()
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--base", default=str(example / "base"))
    parser.add_argument("--adapters", nargs="+", default=[str(example / "know"), str(example / "form")])
    files = [example / "calibration.jsonl", example / "test.jsonl"]
    parser.add_argument("--data", type=Path, nargs="+", default=files)
    parser.add_argument("--records", type=int, quick=6, help="the first so many")
    parser.add_argument("--planted", type=int, default=0, help="so many records that the model writes itself")
    parser.add_argument("--iterations", type=int, default=200, quick=2)
    parser.add_argument("--passes", type=float, nargs="+", default=[2, 3, 5, 8], quick=[2])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only-ours", action="store_true")
    arguments = parser.parse_args()
    with problem(arguments) as p:
        print(
            f"{len(p.examples)} records, {tokens_of(p.examples)} tokens, {p.mixing.numbers} weights; "
            f"{arguments.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}.\n"
        )
        ones = p.mixing.constant([1.0] * len(p.names))
        starts = {"uniform": ones / len(p.names), "sum": ones} if p.truth is None else {"sum": ones, "truth": p.truth}
        optimum = reference(p, starts, arguments.iterations)
        ways: list[Callable[[], list[Row]]] = [
            lambda n=n: [ours(p, FitSettings(ridge=0.0, passes=n), f"fit --ridge 0 --passes {n:g}")]  # type: ignore[misc]
            for n in arguments.passes
        ]
        ways.append(lambda: [ours(p, FitSettings(), "fit, as it is")])
        if not arguments.only_ours:
            ways += [lambda r=r: plain_adamw(p, r, arguments.passes) for r in (1e-3, 1e-2, 3e-2, 1e-1)]  # type: ignore[misc]
            ways += [lambda: [published(p, None)], lambda: [published(p, 1e-2)], lambda: lorahub(p)]
        print(
            f"\noptimum {optimum:.6f} nats per token\n\n| | passes | above the optimum | seconds |\n|---|--:|--:|--:|"
        )
        for way in ways:
            for name, passes, loss, seconds in way():
                print(f"| {name} | {passes:.2f} | {loss - optimum:+.5f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
