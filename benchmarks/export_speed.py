"""What an export costs on the shapes of a real 8B model, beside reading and writing its bytes, and beside PEFT.

    python benchmarks/export_speed.py
    python benchmarks/export_speed.py --layers 4 --widths 1024 2048 --threads 1
    python benchmarks/export_speed.py --adapters 8 --rank 64 --rounds 1 --widths

Four adapters of rank 16, or others, with random bfloat16 factors on all seven linear modules of Llama-3.1-8B (32
layers, hidden 4096, intermediate 14336, k and v 1024) are written to disk once, and a recipe with random weights is
made by hand. Then, in turns and in several rounds: reading the adapters and writing as many bytes as the concatenation
has, flushed to the disk; the concatenation; a merge to the rank of one adapter. The files are in the page cache. Peak
memory is that of a process of its own, above what it held after the same export of one small module (on Linux).

Below that, one module of each width: `add_weighted_adapter(combination_type="svd")` of the installed PEFT on a model of
one nn.Linear, with `svd_full_matrices` as it is by default and off, and what the export does for that module (read,
compose, truncate, round, certify), all on the same factors in float32, and the relative error of each result. One
thread and processor time, so that other work on the machine does not count.

mergekit is not here: it bakes each adapter into a full copy of the base, which random factors do not have. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.made_inputs import llama_layer, of_layers, write_adapter
from benchmarks.measuring import BenchmarkParser, in_turns, median
from loracli.adapters.adapter import LoraAdapter, open_adapter
from loracli.adapters.kinds import BaseModule
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import FitRecord, HeldOut, HeldOutRow, RecipeAdapter, RecipeBase, RecipeData, RecipeMixing
from loracli.system.files import TENSOR_FILE

if TYPE_CHECKING:
    from peft import PeftModel

SHAPES = llama_layer(4096, 14336, 1024)
ADAPTERS, RANK = 4, 16  # of the comparison with PEFT, and of the exports unless told otherwise
BASE = "random/llama-8b"
BLOCK = 1 << 20


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--layers", type=int, default=32, quick=1, help="of 32")
    parser.add_argument("--rounds", type=int, default=5, quick=1)
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--rank", type=int, default=RANK, help="of each adapter, and of the merge")
    parser.add_argument(
        "--widths", nargs="*", type=int, default=[1024, 2048, 4096], quick=[128], help="of modules beside PEFT"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--memory-of", nargs=2, metavar=("RECIPE_FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_of(Path(arguments.memory_of[0]), arguments.memory_of[1], arguments.rank))
        return
    print(f"torch {torch.__version__}, PEFT {version('peft')}, {arguments.threads} threads, {platform.machine()}.")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        adapters, rank = arguments.adapters, arguments.rank
        make(folder / "model", of_layers(SHAPES, arguments.layers), adapters, rank)
        make(folder / "small", {"model.layers.0.self_attn.q_proj": (64, 64)}, adapters, rank)
        print_export(folder, arguments.layers, rank, arguments.rounds)
        print_memory(folder, arguments.threads, adapters, rank, WAYS[-1:] if arguments.quick else WAYS)
    if arguments.widths:
        torch.set_num_threads(1)
        print_modules(arguments.widths)


WAYS = ("concatenated", "merged")


def request_of(recipe: Recipe, way: str, rank: int) -> ExportRequest:
    return ExportRequest(recipe, merge=True, rank=rank) if way == "merged" else ExportRequest(recipe)


def print_export(folder: Path, layers: int, rank: int, rounds: int) -> None:
    model = folder / "model"
    recipe = recipe_of(model)
    files = sorted(model.glob("a*/" + TENSOR_FILE))
    size = sum(file.stat().st_size for file in files)
    work: dict[str, Callable[[], object]] = {"read and write as many bytes": lambda: copy(files, folder / "copy", size)}
    for way in WAYS:
        request = request_of(recipe, way, rank)
        work[way] = lambda request=request: export_adapter(request, folder / "out", force=True)  # type: ignore[misc]
    spent = in_turns(work, rounds)
    plain = median(spent["read and write as many bytes"]).seconds
    print(
        f"\n{len(files)} adapters of rank {rank}, {layers} layers, {size / 1e6:.0f} MB; medians of {rounds} rounds:\n"
    )
    print("| | seconds | least | most | of the processor | times reading and writing |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, found in spent.items():
        middle, seconds = median(found), [one.seconds for one in found]
        print(
            f"| {name} | {middle.seconds:.2f} | {min(seconds):.2f} | {max(seconds):.2f} | {middle.processor:.2f} | "
            f"{middle.seconds / plain:.2f} |",
            flush=True,
        )


def copy(files: list[Path], target: Path, size: int) -> None:
    """Reads every file in blocks and writes as many bytes, flushed."""
    block = bytearray(BLOCK)
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(block):
                pass
    with open(target, "wb", buffering=0) as out:
        for start in range(0, size, BLOCK):
            out.write(memoryview(block)[: min(BLOCK, size - start)])
        os.fsync(out.fileno())


def print_memory(folder: Path, threads: int, adapters: int, rank: int, ways: Sequence[str]) -> None:
    largest = max(out + inner for out, inner in SHAPES.values()) * adapters * rank
    print("\nPeak memory above the interpreter; the largest module's factors, concatenated, are ", end="")
    print(f"{2 * largest / 1e6:.1f} MB in bfloat16 and {8 * largest / 1e6:.1f} MB in float64:\n")
    print("| | MB | times the factors in bfloat16 | in float64 |\n|---|--:|--:|--:|")
    for way in ways:
        command = [sys.executable, __file__, "--threads", str(threads), "--rank", str(rank)]
        command += ["--memory-of", str(folder), way]
        found = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {way} | {found / 1e6:.1f} | {found / (2 * largest):.1f} | {found / (8 * largest):.1f} |", flush=True)


def memory_of(folder: Path, way: str, rank: int) -> int:
    """Bytes by which the peak of an export lies above what the process held, after a small one has loaded all code."""
    small, model = recipe_of(folder / "small"), recipe_of(folder / "model")
    export_adapter(request_of(small, way, rank), folder / "out", force=True)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here; that of importing torch lies above it
    export_adapter(request_of(model, way, rank), folder / "out", force=True)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes, as Linux counts them; `VmHWM` is the peak, what getrusage calls ru_maxrss."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def print_modules(widths: list[int]) -> None:
    print("\nOne module (width, width); processor seconds of one thread, and relative error of the result:\n")
    print("| width | PEFT svd | PEFT svd, reduced | export --merge | times faster | than reduced ", end="")
    print("| PEFT's error | ours |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for width in widths:
        print(one_module(width), flush=True)


def one_module(width: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, {"model.layers.0.self_attn.q_proj": (width, width)}, ADAPTERS, RANK, dtype=torch.float32)
        opened = [open_adapter(str(path)) for path in sorted(folder.glob("a*"))]
        ours, our_error = export_of(recipe_of(folder), opened)
        adapters = [adapter.loaded() for adapter in opened]
    exact = sum(a.modules["model.layers.0.self_attn.q_proj"].factors.delta_weight() for a in adapters)
    assert isinstance(exact, torch.Tensor)
    times, error = [], 0.0
    for full in (True, False):
        model = peft_model(adapters, width)
        started = time.process_time()
        model.add_weighted_adapter(
            [f"a{i}" for i in range(ADAPTERS)],
            [1.0] * ADAPTERS,
            "merged",
            combination_type="svd",
            svd_rank=RANK,
            svd_full_matrices=full,
        )
        times.append(time.process_time() - started)
        delta = model.base_model.model.layer.get_delta_weight("merged").detach().double()
        error = float((delta - exact).norm() / exact.norm())
    return (
        f"| {width} | {times[0]:.2f} | {times[1]:.2f} | {ours:.4f} | {times[0] / ours:.0f} | {times[1] / ours:.0f} | "
        f"{error:.7f} | {our_error:.7f} |"
    )


def export_of(recipe: Recipe, adapters: list[LoraAdapter]) -> tuple[float, float]:
    """Seconds that an export spends on one module at weights of 1, median of several, and its relative error."""
    from loracli.composition.composition import from_recipe
    from loracli.export.module import module_export

    name = next(iter(adapters[0].modules))
    ones = {name: (1.0,) * ADAPTERS}
    recipe = Recipe(**{**vars(recipe), "mixing": RecipeMixing("module", ones, ADAPTERS)})
    times, error = [], 0.0
    for _ in range(11):
        started = time.process_time()
        made = module_export(from_recipe(recipe, tuple(adapters)), name, torch.float32, rank=RANK)
        times.append(time.process_time() - started)
        error = made.certificate.relative_error
    return statistics.median(times[1:]), error


def peft_model(adapters: list[LoraAdapter], width: int) -> PeftModel:
    """The adapters attached to a model of one nn.Linear by PEFT."""
    import peft

    base = nn.Module()
    base.layer = nn.Linear(width, width, bias=False)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config, adapter_name="a0")  # type: ignore[arg-type]
        for i in range(1, ADAPTERS):
            model.add_adapter(f"a{i}", config)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for i, adapter in enumerate(adapters):
            factors = next(iter(adapter.modules.values())).factors
            layer.lora_A[f"a{i}"].weight.copy_(factors.lora_A)
            layer.lora_B[f"a{i}"].weight.copy_(factors.lora_B)
    return model  # type: ignore[return-value]


def make(
    folder: Path, shapes: dict[str, tuple[int, int]], adapters: int, rank: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Adapters with random factors on these modules, and the table of the modules."""
    for i in range(adapters):
        write_adapter(folder / f"a{i}", shapes, rank, seed=i, base_id=BASE, dtype=dtype)
    (folder / "shapes.json").write_text(json.dumps(shapes))


def recipe_of(folder: Path) -> Recipe:
    """A recipe of the adapters in a folder, with a random weight for every module and adapter."""
    adapters = [open_adapter(str(path)) for path in sorted(folder.glob("a*"))]
    shapes = json.loads((folder / "shapes.json").read_text())
    drawn = torch.randn(len(shapes), len(adapters), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    references, rank = [adapter.path.name for adapter in adapters], adapters[0].config.rank
    return Recipe(
        base=RecipeBase(BASE, None, "0" * 64),
        adapters=tuple(
            RecipeAdapter(r, None, None, None, dict(a.sha256), rank, 2.0 * rank, False, "bfloat16", BASE)
            for r, a in zip(references, adapters, strict=True)
        ),
        data=(RecipeData("none.jsonl", "0" * 64, "text", 1.0, 1, 1, 0, (), 0, 0, None, ""),),
        fit=FitRecord("cat", {}, "nats per token", (), (), 0, False, 1.0, 0.0, 1.0),
        mixing=RecipeMixing("module", dict(zip(shapes, map(tuple, drawn.tolist()), strict=True)), drawn.numel()),
        modules=tuple(BaseModule(name, "linear", inner, out) for name, (out, inner) in sorted(shapes.items())),
        dtype="bfloat16",
        held_out=HeldOut(
            "none.jsonl",
            1,
            1,
            references[0],
            (HeldOutRow("fit", 1.0, 0.0, (-0.1, 0.1), 0.5),),
            (),
            "too few records",
        ),
        versions={"loracat": "0"},
        folder=folder,
    )


if __name__ == "__main__":
    main()
