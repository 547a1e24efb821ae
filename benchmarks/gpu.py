"""A fit on a GPU: is it right, is it the same twice, what does a step cost, and how much memory does it take?

    python benchmarks/gpu.py                        on the CUDA device, without network, within minutes
    python benchmarks/gpu.py --device mps           or cuda:1, or cpu
    python benchmarks/gpu.py --shape 1B --tokens 4096

Prints Markdown with the device's name and all versions, to be sent as it is. The first table has what can be wrong:

    right      weights and held-out loss of a fit of the embedded example, beside the same fit on the CPU in float32,
               and a gradient beside the CPU's in float64
    twice      the files of two fits with the same command, which have to be the same bytes
    halving    a fit for which memory is too small beside one for which it is not. On CUDA the process is fenced in;
               elsewhere micro-batches above a size are refused in torch's own words.
    4-bit      a fit on a base in bitsandbytes' NF4 beside one on the same weights in full
    algebra    a cut and the methods that merge factors, beside the CPU's; left out where there is no float64

The second is about a Llama of random weights, the largest of 8B, 3B and 1B whose fit is estimated to take 80 % of the
free memory or less, else a tiny one, and adapters of random factors on all of its linear layers. A step is the gradient
of a micro-batch of records of at most 1024 tokens, half of them scored, and AdamW's step:

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
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.gpu_steps import LENGTH, SHAPES, Device, kept, print_steps
from benchmarks.made_inputs import LlamaShape, copy_tokenizer, part_of_example, write_llama, write_llama_adapters
from benchmarks.measuring import BenchmarkParser, left_out
from loracli.adapters.adapter import read_adapter
from loracli.algebra.factors import Factors, concatenate, relative_error
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.algebra.truncate import truncate
from loracli.calibration.dataset import Batch
from loracli.calibration.records import read_records
from loracli.errors import BaseModelMismatch
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Objective
from loracli.model.placement import Placement, has_float64
from loracli.model.reference import find_base
from loracli.model.session import Opening, open_session
from loracli.progress import SILENT
from loracli.recipe.recipe import Recipe

# Of the base that `twice` and `halving` fit on, whose tokenizer is the example's.
SMALL: LlamaShape = (512, 1408, 8, 8, 4, 827)
SMALLEST: LlamaShape = (32, 48, 2, 4, 2, 827)
DTYPES = ("float32", "bfloat16")
WEIGHTS = {"float32": 1e-3, "bfloat16": 0.1}  # how far those of two fits may be apart
LOSS = {"float32": 1e-4, "bfloat16": 0.02}  # likewise, in nats per token
GRADIENT = {"float32": 1e-4, "bfloat16": 0.1}  # relative to the one in float64
ALGEBRA = 1e-6  # a share of the largest; what an approximation's own stopping rule leaves open
SHORT = {"ridge": 0.01, "passes": 2, "control": "none"}  # with a ridge, weights are settled that records say little of


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
class Case:
    """A base, two adapters, calibration.jsonl and test.jsonl in a folder."""

    folder: Path
    adapters: tuple[str, ...]
    base: Path


def fit(
    device: Device, case: Case, output: Path | None = None, *, dtype: str, on: str | None = None, **settings: Any
) -> Recipe:
    """The recipe of a fit on the device, or `on` another; saved, if there is an `output`."""
    recipe = fit_mixing(
        case.adapters,
        str(case.folder / "calibration.jsonl"),
        eval_data=str(case.folder / "test.jsonl"),
        base=str(case.base),
        settings=FitSettings(**settings),
        placement=Placement(dtype, on or str(device.place)),
        progress=device.heard,
    )
    if output is not None:
        output.parent.mkdir(parents=True)
        recipe.save(output)
    return recipe


def weights_apart(left: Recipe, right: Recipe) -> float:
    """The largest difference between two mixing weights."""
    pairs = zip(left.mixing.weights.values(), right.mixing.weights.values(), strict=True)
    return max(abs((a or 0) - (b or 0)) for row, other in pairs for a, b in zip(row, other, strict=True))


def loss_of(recipe: Recipe) -> float:
    """Nats per token of the fit on the held-out records."""
    return next(row.nats_per_token for row in recipe.held_out.rows if row.name == "fit")


def right(device: Device, example: Case) -> Iterator[Check]:
    on_cpu = fit(device, example, dtype="float32", on="cpu", **SHORT)
    exact = gradient_of_example(example, "cpu", "float64")
    for dtype in DTYPES:
        fitted = fit(device, example, dtype=dtype, **SHORT)
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
            fit(device, case, output, dtype=device.dtype, mixing=mixing, batch_tokens=batch_tokens, **SHORT)
        first, second = ({path.name: path.read_bytes() for path in output.parent.iterdir()} for output in outputs)
        differ = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
        yield Check("twice", f"files that differ of {len(first)}, --mixing {mixing}, {device.dtype}", len(differ), 0)


def halving(device: Device, case: Case, batch_tokens: int) -> Iterator[Check]:
    settings = {"mixing": "adapter", "batch_tokens": batch_tokens, "dtype": "float32", "control": "none"}
    whole = fit(device, case, **settings)
    with memory_for_half(device, case, batch_tokens):
        halved = fit(device, case, **settings)
    count, apart = halved.fit.halvings, weights_apart(whole, halved)
    yield Check("halving", f"fits that halved no micro-batch of {batch_tokens} tokens", not count, 0)
    yield Check("halving", f"weights, with {count} halved, float32", apart, WEIGHTS["float32"])
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
    model.dequantize(dtype=torch.float32).save_pretrained(bases[1])
    config = json.loads((bases[1] / "config.json").read_text())
    (bases[1] / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    for base in bases:
        copy_tokenizer(case.base, base)
    try:
        narrow, full = (fit(device, replace(case, base=base), dtype="float32", **SHORT) for base in bases)
    except BaseModelMismatch as error:
        if "quantised" not in str(error):
            raise
        left_out(f"4-bit: {error}")
        return
    name = f"NF4 by bitsandbytes {bitsandbytes.__version__}"
    yield Check("4-bit", f"weights, {name}", weights_apart(narrow, full), 2e-2)
    yield Check("4-bit", f"held-out loss, {name}", abs(loss_of(narrow) - loss_of(full)), 1e-2)


def algebra(device: Device, width: int) -> Iterator[Check]:
    """On one module (width, width) and random adapters; a factor of an approximation is not unique, its error is."""
    if not has_float64(device.place):
        left_out("algebra: this device has no float64")
        return
    drawn = torch.Generator().manual_seed(0)
    updates = [
        Factors(torch.randn(16, width, generator=drawn), torch.randn(width, 16, generator=drawn)) for _ in range(4)
    ]
    there = [update.on(device.place) for update in updates]
    exact = concatenate(updates, [1.0] * len(updates))
    here, found = (truncate(one, 16).factors.on("cpu") for one in (exact, exact.on(device.place)))
    apart = abs(relative_error(found, exact) - relative_error(here, exact))
    yield Check("algebra", "what a cut to rank 16 leaves out, relative", apart, ALGEBRA)
    for name, method in METHODS.items():
        if method.merge is None:
            continue
        merged, expected = (method.merge_updates(those, MethodOptions()) for those in (there, updates))
        yield Check("algebra", f"energy kept, {name}", abs(merged.kept_energy - expected.kept_energy), ALGEBRA)
        if not method.full_rank:
            apart = relative_error(merged.factors.on("cpu"), expected.factors)
            yield Check("algebra", f"the update, {name}, relative", apart, ALGEBRA)


def write_small(folder: Path, example: Case, args: argparse.Namespace) -> Case:
    """A Llama of random weights, two adapters, and records of several of the example's questions and answers each."""
    shape = SMALLEST if args.quick else SMALL
    config = AutoConfig.from_pretrained(example.base)
    own = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    write_llama(folder / "base", shape, max_position_embeddings=LENGTH, **own)
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
        "algebra": algebra(device, args.width),
    }
    checks = [check for name, part in parts.items() for check in kept(device, name, part, failed)]
    print("| | | found | at most | right |\n|---|---|--:|--:|---|")
    print("".join(f"{check.row}\n" for check in checks), flush=True)
    for message in device.heard.said:
        if "may differ" in message:
            print(f"A fit warned: {message}\n")
    return all(check.right for check in checks)


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
    parser.add_argument("--test", type=int, default=1000, quick=13, help="likewise")
    parser.add_argument("--records", type=int, default=64, quick=6, help="that the small model is fitted on")
    parser.add_argument("--questions", type=int, default=16, quick=1, help="in each of them")
    parser.add_argument("--width", type=int, default=2048, quick=96, help="of the module in `algebra`")
    parser.add_argument("--batch-tokens", type=int, default=8192, quick=96)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
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
