"""A fit on a GPU: is it right, is it the same twice, what does a step cost, and how much memory does it take?

    python benchmarks/gpu.py                        on the CUDA device, in less than five minutes, without network
    python benchmarks/gpu.py --device mps           or cuda:1, or cpu
    python benchmarks/gpu.py --shape 1B --tokens 4096

Prints Markdown with the device's name and all versions, to be sent as it is. The first table has what can be wrong:

    right      weights and held-out loss of a fit of the embedded example, beside the same fit on the CPU in float32,
               and a gradient beside the CPU's in float64
    twice      the files of two fits with the same command, which have to be the same bytes
    halving    a fit for which memory is too small beside one for which it is not. On CUDA the process is fenced in;
               elsewhere micro-batches above a size are refused in torch's own words.
    4-bit      a fit on a base in bitsandbytes' NF4 beside one on the same weights in full

The second is about a Llama of random weights, the largest of those below whose fit is estimated to take 80 % of the
free memory or less, and adapters of random factors on all of its linear layers. A step is the gradient of a micro-batch
of records of at most 1024 tokens, half of them scored, and AdamW's step:

    bare       the model alone: forward, the same head on the scored half, and the gradient of the input
    exact      the same by kernels that add in one order, which a fit asks for on a GPU
    module     a step of `--mixing module`
    factors    a step of `--mixing factors`, with fewer tokens, as it takes more memory
    PEFT       PEFT's layers with the same adapters, all active, and a learnable scaling for each module and adapter

A part that fails is said, with a traceback on stderr, and the others go on. The exit code is 1 where a part failed or
found something wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.fit_speed import bare_step, make_peft, peft_step
from benchmarks.made_inputs import (
    LlamaShape,
    copy_tokenizer,
    llama_config,
    part_of_example,
    write_llama,
    write_llama_adapters,
)
from benchmarks.measuring import BenchmarkParser, in_turns, left_out, median, spent_by
from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.records import read_records
from loracli.calibration.render import Example
from loracli.errors import BaseModelMismatch
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.descent import AdamW
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach
from loracli.model.base import BasePlan
from loracli.model.loss import Objective, make_objective
from loracli.model.placement import Placement, exact_kernels, ran_out_of_memory
from loracli.model.preflight import estimate_memory
from loracli.model.reference import BaseReference, find_base
from loracli.model.session import Opening, open_session
from loracli.progress import SILENT, Silent
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import MixingKind

# Hidden, intermediate, layers, heads, heads of keys and values, vocabulary.
SHAPES: dict[str, LlamaShape] = {
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "3B": (3072, 8192, 28, 24, 8, 128256),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
# Of the base that `twice` and `halving` fit on, whose tokenizer is the example's.
SMALL: LlamaShape = (512, 1408, 8, 8, 4, 827)
SMALLEST: LlamaShape = (32, 48, 2, 4, 2, 827)
LENGTH = 1024  # tokens of a record, at most
DTYPES = ("float32", "bfloat16")
WEIGHTS = {"float32": 1e-3, "bfloat16": 0.1}  # how far those of two fits may be apart
LOSS = {"float32": 1e-4, "bfloat16": 0.02}  # likewise, in nats per token
GRADIENT = {"float32": 1e-4, "bfloat16": 0.1}  # relative to the one in float64
SHORT = {"ridge": 0.01, "passes": 2, "control": "none"}  # with a ridge, weights are settled that records say little of
FEWER = 4  # times fewer tokens where a step takes more memory
Found = TypeVar("Found", "Check", "Measured")


@dataclass(frozen=True)
class Check:
    """A row of the first table; a figure is right up to `most`."""

    part: str
    what: str
    found: float
    most: float

    @property
    def row(self) -> str:
        verdict = "yes" if self.right else "**no**"
        return f"| {self.part} | {self.what} | {self.found:.1e} | {self.most:.0e} | {verdict} |"

    @property
    def right(self) -> bool:
        return self.found <= self.most


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

    def fit(
        self, case: Case, output: Path | None = None, *, dtype: str, on: str | None = None, **settings: Any
    ) -> Recipe:
        """The recipe of a fit on this device, or `on` another; saved, if there is an `output`."""
        recipe = fit_mixing(
            case.adapters,
            str(case.folder / "calibration.jsonl"),
            eval_data=str(case.folder / "test.jsonl"),
            base=str(case.base),
            settings=FitSettings(**settings),
            placement=Placement(dtype, on or str(self.place)),
            progress=self.heard,
        )
        if output is not None:
            output.parent.mkdir(parents=True)
            recipe.save(output)
        return recipe


@dataclass(frozen=True)
class Case:
    """A base, two adapters, calibration.jsonl and test.jsonl in a folder."""

    folder: Path
    adapters: tuple[str, ...]
    base: Path


def weights_apart(left: Recipe, right: Recipe) -> float:
    """The largest difference between two mixing weights."""
    pairs = zip(left.mixing.weights.values(), right.mixing.weights.values(), strict=True)
    return max(abs((a or 0) - (b or 0)) for row, other in pairs for a, b in zip(row, other, strict=True))


def loss_of(recipe: Recipe) -> float:
    """Nats per token of the fit on the held-out records."""
    return next(row.nats_per_token for row in recipe.held_out.rows if row.name == "fit")


def right(device: Device, example: Case) -> Iterator[Check]:
    on_cpu = device.fit(example, dtype="float32", on="cpu", **SHORT)
    exact = gradient_of_example(example, "cpu", "float64")
    for dtype in DTYPES:
        fitted = device.fit(example, dtype=dtype, **SHORT)
        yield Check("right", f"weights, {dtype}", weights_apart(fitted, on_cpu), WEIGHTS[dtype])
        yield Check("right", f"held-out loss, {dtype}", abs(loss_of(fitted) - loss_of(on_cpu)), LOSS[dtype])
        gradient = gradient_of_example(example, str(device.place), dtype)
        error = float((gradient - exact).norm() / exact.norm())
        yield Check("right", f"gradient, {dtype}, beside float64", error, GRADIENT[dtype])


def gradient_of_example(example: Case, place: str, dtype: str) -> Tensor:
    """(P,) in float64: the gradient of the calibration records' nats where all weights are one half."""
    adapters = tuple(read_adapter(path) for path in example.adapters)
    layout = make_layout(adapters)
    base = find_base(adapters, str(example.base))
    opening = Opening(base, adapters, LENGTH, LENGTH, placement=Placement(dtype, place))
    with open_session(opening) as session:
        examples = session.render([read_records(example.folder / "calibration.jsonl")])
        with session.attached(adapters, layout.modules, examples) as objective:
            mixing = make_mixing(objective.attached, layout, "module")
            theta = mixing.constant([0.5] * len(adapters))
            return Engine(objective, Meter(SILENT)).total(mixing, theta, session.batches(examples), examples)[1]


def twice(device: Device, case: Case, batch_tokens: int) -> Iterator[Check]:
    for mixing in ("module", "factors"):
        outputs = [case.folder / mixing / f"{number}" / "recipe.json" for number in range(2)]
        for output in outputs:
            device.fit(case, output, dtype=device.dtype, mixing=mixing, batch_tokens=batch_tokens, **SHORT)
        first, second = ({path.name: path.read_bytes() for path in output.parent.iterdir()} for output in outputs)
        differ = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
        yield Check("twice", f"files that differ of {len(first)}, --mixing {mixing}, {device.dtype}", len(differ), 0)


def halving(device: Device, case: Case, batch_tokens: int) -> Iterator[Check]:
    settings = {"mixing": "adapter", "batch_tokens": batch_tokens, "dtype": "float32", "control": "none"}
    whole = device.fit(case, **settings)
    with memory_for_half(device, case, batch_tokens):
        halved = device.fit(case, **settings)
    count, apart = halved.fit.halvings, weights_apart(whole, halved)
    yield Check("halving", f"fits that halved no micro-batch of {batch_tokens} tokens", not count, 0)
    yield Check("halving", f"weights, with {count} halved, float32", apart, 1e-2)
    yield Check("halving", "held-out loss, likewise", abs(loss_of(whole) - loss_of(halved)), LOSS["float32"])


@contextmanager
def memory_for_half(device: Device, case: Case, batch_tokens: int) -> Iterator[None]:
    """After a fit with all of the memory: too little for a micro-batch of so many tokens, and enough for half of it."""
    if device.cuda:
        weights = sum(path.stat().st_size for path in case.base.glob("*.safetensors"))
        fence = weights + 0.7 * (torch.cuda.max_memory_allocated(device.place) - weights)
        device.tidy()
        whole = torch.cuda.get_device_properties(device.place).total_memory
        torch.cuda.set_per_process_memory_fraction(fence / whole, device.place)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device.place)
        return
    nats = Objective.nats

    def refused(objective: Objective, batch: Batch) -> Tensor:
        if batch.tokens > batch_tokens // 2:
            raise torch.OutOfMemoryError("out of memory")
        return nats(objective, batch)

    Objective.nats = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        Objective.nats = nats  # type: ignore[method-assign]


def four_bit(device: Device, case: Case) -> Iterator[Check]:
    try:
        import bitsandbytes
        from transformers import BitsAndBytesConfig
    except ImportError:
        left_out("4-bit: bitsandbytes is not installed")
        return
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    place = {"": str(device.place)}
    model = AutoModelForCausalLM.from_pretrained(case.base, quantization_config=how, device_map=place, dtype="float32")
    bases = [case.folder / "4-bit", case.folder / "in-full"]
    model.save_pretrained(bases[0])
    model.dequantize().float().save_pretrained(bases[1])
    config = json.loads((bases[1] / "config.json").read_text())
    (bases[1] / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    for base in bases:
        copy_tokenizer(case.base, base)
    try:
        narrow, full = (device.fit(replace(case, base=base), dtype="float32", **SHORT) for base in bases)
    except BaseModelMismatch as error:
        left_out(f"4-bit: {error}")
        return
    name = f"NF4 by bitsandbytes {bitsandbytes.__version__}"
    yield Check("4-bit", f"weights, {name}", weights_apart(narrow, full), 2e-2)
    yield Check("4-bit", f"held-out loss, {name}", abs(loss_of(narrow) - loss_of(full)), 1e-2)


def write_small(folder: Path, example: Case, args: argparse.Namespace) -> Case:
    """A Llama of random weights, two adapters, and records of several of the example's questions and answers each."""
    shape = SMALLEST if args.quick else SMALL
    own = {
        name: getattr(AutoConfig.from_pretrained(example.base), f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    write_llama(folder / "base", shape, max_position_embeddings=LENGTH, **{f"{n}_token_id": i for n, i in own.items()})
    copy_tokenizer(example.base, folder / "base")
    lines = [json.loads(line) for line in (example.folder / "test.jsonl").read_text().splitlines()]
    texts = []
    for number in range(args.records + 4):
        some = [lines[(args.questions * number + place + number) % len(lines)] for place in range(args.questions)]
        record = {key: "".join(f"{line[key]}\n" for line in some) for key in ("prompt", "completion")}
        texts.append(f"{json.dumps(record)}\n")
    (folder / "calibration.jsonl").write_text("".join(texts[:-4]))
    (folder / "test.jsonl").write_text("".join(texts[-4:]))
    return Case(folder, write_llama_adapters(folder, shape, 8, count=2, base_id="random/llama"), folder / "base")


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


def print_checks(device: Device, folder: Path, args: argparse.Namespace, failed: list[str]) -> bool:
    """The first table; whether all of it is right."""
    example = part_of_example(folder / "example", calibration=args.calibration, test=args.test)
    demo = Case(example, (str(example / "know"), str(example / "form")), example / "base")
    small = write_small(folder / "small", demo, args)
    parts: dict[str, Iterator[Check]] = {
        "right": right(device, demo),
        "twice": twice(device, small, args.batch_tokens),
        "halving": halving(device, small, args.batch_tokens),
        "4-bit": four_bit(device, small),
    }
    checks = [check for name, part in parts.items() for check in kept(device, name, part, failed)]
    print("| | | found | at most | right |\n|---|---|--:|--:|---|")
    print("".join(f"{check.row}\n" for check in checks), flush=True)
    for message in device.heard.said:
        if "may differ" in message:
            print(f"A fit warned: {message}\n")
    return all(check.right for check in checks)


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
    print(
        f"`export --merge` of the adapters: {merge_seconds(large, folder):.1f} seconds, on the CPU, where exports are."
    )


def main() -> int:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a fit sets it, before CUDA starts
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--device", default="cuda", quick="cpu", help="cuda, cuda:1, mps or cpu")
    parser.add_argument("--shape", choices=SHAPES, quick="tiny", help="of the second table; the largest that fits")
    parser.add_argument("--tokens", type=int, default=8192, quick=64, help="of its micro-batches")
    parser.add_argument("--adapters", type=int, default=4, quick=2)
    parser.add_argument("--rank", type=int, default=16, quick=4)
    parser.add_argument("--rounds", type=int, default=5, quick=1)
    parser.add_argument("--calibration", type=int, default=1000, quick=8, help="of the example's records, the first")
    parser.add_argument("--test", type=int, default=1000, quick=4, help="likewise")
    parser.add_argument("--records", type=int, default=64, quick=6, help="that the small model is fitted on")
    parser.add_argument("--questions", type=int, default=16, quick=1, help="in each of them")
    parser.add_argument("--batch-tokens", type=int, default=8192, quick=96)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        left_out("everything: there is no CUDA device here; see --device")
        return 0
    device, failed = Device(args.device), list[str]()
    print(f"{device.about}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fine = print_checks(device, Path(folder), args, failed)
        print_steps(device, Path(folder), args, failed)
    return 0 if fine and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
