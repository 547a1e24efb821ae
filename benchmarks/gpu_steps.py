"""What a step of a fit costs on a device, for `benchmarks/gpu.py`, whose second table this is."""

from __future__ import annotations

import argparse
import gc
import platform
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from benchmarks.fit_speed import bare_step, make_peft, peft_step
from benchmarks.made_inputs import LlamaShape, llama_config, write_llama_adapters
from benchmarks.measuring import in_turns, left_out, median, spent_by
from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.render import Example
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.descent import AdamW
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.model.attach import attach
from loracli.model.base import BasePlan
from loracli.model.loss import make_objective
from loracli.model.placement import exact_kernels, ran_out_of_memory
from loracli.model.preflight import estimate_memory
from loracli.model.reference import BaseReference
from loracli.progress import SILENT, Silent
from loracli.recipe.record import MixingKind

# Hidden, intermediate, layers, heads, heads of keys and values, vocabulary.
SHAPES: dict[str, LlamaShape] = {
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "3B": (3072, 8192, 28, 24, 8, 128256),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
LENGTH = 1024  # tokens of a record, at most
FEWER = 4  # times fewer tokens where a step takes more memory
Found = TypeVar("Found")


class Warned(Silent):
    """Keeps what fits warn of."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def warn(self, message: str) -> None:
        self.said.add(message)


class Device:
    """Where fits run, and what torch tells of it."""

    def __init__(self, name: str) -> None:
        self.place = torch.device(name)
        self.cuda = self.place.type == "cuda"
        if self.cuda:
            torch.cuda.init()  # which the memory's statistics want
            torch.cuda.set_device(self.place)
        self.heard = Warned()

    @property
    def dtype(self) -> str:
        """What a base in bfloat16 is computed in."""
        wide = self.place.type == "cpu" or (self.cuda and not torch.cuda.is_bf16_supported(including_emulation=False))
        return "float32" if wide else "bfloat16"

    @property
    def about(self) -> str:
        packages = ("loracat", "torch", "transformers", "peft")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        if not self.cuda:
            return f"{self.place}, {platform.machine()}, {torch.get_num_threads()} threads; {versions}"
        of, natively = torch.cuda.get_device_properties(self.place), "" if self.dtype == "bfloat16" else "no bfloat16, "
        size = f"{of.total_memory / 1e9:.0f} GB, capability {of.major}.{of.minor}"
        return f"{of.name}, {size}, {natively}CUDA {torch.version.cuda}; {versions}"

    def free(self) -> float:
        """Bytes for a model, where something tells."""
        if self.cuda:
            return torch.cuda.mem_get_info(self.place)[0]
        return torch.mps.recommended_max_memory() if self.place.type == "mps" else float("inf")

    def tidy(self) -> None:
        """Gives all memory back that nothing holds, and forgets the peak."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.place)

    def measure(self, step: Callable[[], object], rounds: int) -> tuple[float, int | None]:
        """Seconds, the median after a first run, and the most bytes that were in use."""

        def waited() -> None:
            step()
            if self.place.type in ("cuda", "mps"):
                torch.get_device_module(self.place).synchronize()

        waited()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.place)
        seconds = median(in_turns({"": waited}, rounds)[""]).seconds
        return seconds, torch.cuda.max_memory_allocated(self.place) if self.cuda else None


def kept(device: Device, name: str, found: Iterable[Found], failed: list[str]) -> list[Found]:
    """What a part found, up to where it failed."""
    device.tidy()
    rows: list[Found] = []
    try:
        for row in found:
            rows.append(row)
    except Exception as error:  # whatever a device raises: the other parts are worth having
        traceback.print_exc()
        failed.append(name)
        reason = "memory ran out" if ran_out_of_memory(error) else str(error).partition("\n")[0]
        left_out(f"the rest of {name}: {type(error).__name__}: {reason}")
    return rows


@dataclass(frozen=True)
class Measured:
    """A row of the second table: of a step, its tokens, seconds, and bytes at most, measured and estimated."""

    name: str
    tokens: int
    seconds: float
    peak: int | None
    estimate: int | None = None

    def row(self, seconds: Mapping[tuple[str, int], float]) -> str:
        """The row, beside the seconds of all steps by name and tokens."""
        beside = [seconds.get((other, self.tokens)) for other in ("bare", "module")]
        times = [f"{self.seconds / other:.2f}" if other else "" for other in beside]
        amounts = [f"{amount / 1e9:.3f}" if amount else "" for amount in (self.peak, self.estimate)]
        ratio = f"{self.peak / self.estimate:.2f}" if self.peak and self.estimate else ""
        cells = [self.name, f"{self.tokens}", f"{1e3 * self.seconds:.1f}", f"{self.tokens / self.seconds:.0f}"]
        return f"| {' | '.join([*cells, *times, *amounts, ratio])} |"


@dataclass(frozen=True)
class Large:
    """A Llama of a shape that is not made yet, and the adapters on it.

    Args:
        shape: its name.
        plan: with a skeleton.
        paths: of the adapters.
        adapters: read.
    """

    shape: str
    plan: BasePlan
    paths: tuple[str, ...]
    adapters: tuple[LoraAdapter, ...]

    def estimate(self, tokens: int, kind: str = "module") -> int:
        """Bytes of a step, as a fit estimates them."""
        length, factors = min(tokens, LENGTH), kind == "factors"
        return estimate_memory(self.plan, self.adapters, batch_tokens=tokens, max_length=length, factors=factors).total

    def make(self) -> Any:
        """The model, made where it is used."""
        torch.manual_seed(0)
        with torch.device(self.plan.device):
            model = AutoModelForCausalLM.from_config(self.plan.config, dtype=self.plan.dtype)
        return model.eval().requires_grad_(False)

    def batch(self, tokens: int) -> tuple[Batch, list[Example]]:
        """Records whose second halves are scored, in one batch."""
        length = min(tokens, LENGTH)
        ids = torch.randint(self.plan.config.vocab_size, (tokens // length, length), generator=torch.Generator())
        scored = tuple(place >= length // 2 for place in range(length))
        examples = [Example(f"record {i}", tuple(row), scored) for i, row in enumerate(ids.tolist())]
        return make_batch(examples, range(len(examples))), examples


def plan_large(device: Device, shape: str, folder: Path, args: argparse.Namespace) -> Large:
    """What is known of a shape before it is made; its adapters are written to the folder."""
    config = llama_config(SHAPES[shape], max_position_embeddings=LENGTH)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    name, dtype = f"random/{shape}", getattr(torch, device.dtype)
    plan = BasePlan(BaseReference(name, folder, None), config, skeleton, dtype, str(device.place))
    paths = write_llama_adapters(
        folder / shape, SHAPES[shape], args.rank, count=args.adapters, base_id=name, dtype=dtype
    )
    return Large(shape, plan, paths, tuple(read_adapter(path) for path in paths))


def choose_large(device: Device, folder: Path, args: argparse.Namespace) -> Large:
    """The shape that was asked for, or the largest that fits."""
    device.tidy()
    shapes = [args.shape] if args.shape else list(SHAPES)
    large = (plan_large(device, shape, folder, args) for shape in shapes)
    return next(one for one in large if one.shape == shapes[-1] or one.estimate(args.tokens) <= 0.8 * device.free())


def bare(device: Device, large: Large, model: Any, tokens: int, rounds: int) -> Iterator[Measured]:
    batch = on_device(large.batch(tokens)[0], device)
    yield Measured("bare", tokens, *device.measure(lambda: bare_step(model, batch), rounds))
    with exact_kernels(device.place):
        yield Measured("exact", tokens, *device.measure(lambda: bare_step(model, batch), rounds))


def on_device(batch: Batch, device: Device) -> Batch:
    """The batch as `benchmarks.fit_speed` takes it; a fit brings its own there once."""
    moved = {name: getattr(batch, name).to(device.place) for name in ("input_ids", "positions", "labels")}
    return replace(batch, **moved)


def fitted(device: Device, large: Large, model: Any, kind: MixingKind, tokens: int, rounds: int) -> Iterator[Measured]:
    batch, examples = large.batch(tokens)
    layout = make_layout(large.adapters)
    with attach(model, large.adapters, layout.modules) as attached:
        engine = Engine(make_objective(attached, make_batch(examples, [0])), Meter(SILENT))
        mixing = make_mixing(attached, layout, kind)
        start = mixing.constant([0.5] * len(large.adapters)).to(engine.home_of(mixing))
        adam = AdamW(start, steps=100, rate=1e-3, warm_up=1)

        def step() -> None:
            _, gradient = engine.total(mixing, adam.theta, [batch], examples)
            adam.step(gradient.to(adam.theta.dtype) / batch.scored_tokens)

        seconds, peak = device.measure(step, rounds)
        yield Measured(kind, tokens, seconds, peak, large.estimate(tokens, kind))


def beside_peft(device: Device, large: Large, model: Any, tokens: int, rounds: int) -> Iterator[Measured]:
    """Leaves PEFT's layers in the model."""
    batch = on_device(large.batch(tokens)[0], device)
    peft, scalings = make_peft(model, list(large.adapters))
    yield Measured("PEFT", tokens, *device.measure(lambda: peft_step(scalings, peft, batch), rounds))


def merge_seconds(large: Large, folder: Path) -> float:
    request = ExportRequest(method="sum", adapters=large.paths, merge=True)
    return spent_by(lambda: export_adapter(request, folder / "merged")).seconds


def print_steps(device: Device, folder: Path, args: argparse.Namespace, failed: list[str]) -> None:
    """The second table."""
    large = choose_large(device, folder, args)
    model, few = large.make(), args.tokens // FEWER
    parts: list[tuple[str, Iterator[Measured]]] = []
    for tokens in (args.tokens, few):
        parts.append(("bare", bare(device, large, model, tokens, args.rounds)))
        parts.append(("module", fitted(device, large, model, "module", tokens, args.rounds)))
    parts.append(("factors", fitted(device, large, model, "factors", few, args.rounds)))
    parts.append(("PEFT", beside_peft(device, large, model, few, args.rounds)))
    found = [row for name, part in parts for row in kept(device, name, part, failed)]
    print(f"{large.shape}, {device.dtype}, {args.adapters} adapters of rank {args.rank}, {args.rounds} rounds:\n")
    columns = "step, tokens, ms, tokens/s, times bare, times module, peak GB, estimated GB, peak / estimate"
    print(f"| {' | '.join(columns.split(', '))} |\n|---{'|--:' * columns.count(',')}|")
    seconds = {(row.name, row.tokens): row.seconds for row in found}
    print("".join(f"{row.row(seconds)}\n" for row in found), flush=True)
    if not device.cuda:
        left_out(f"peak memory: torch does not tell it of {device.place}")
    seconds_of_merge = merge_seconds(large, folder)
    print(f"`export --merge` of the adapters: {seconds_of_merge:.1f} seconds, on the CPU, where exports compute.")
