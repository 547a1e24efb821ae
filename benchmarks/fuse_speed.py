"""`loracat fuse` beside copying the same bytes, in turns, on a base with random weights in the shapes of an 8B Llama.

    python benchmarks/fuse_speed.py
    python benchmarks/fuse_speed.py --layers 8 --rounds 5 --folder /mnt/disk

Base and adapters are written once below `--folder`, which has to have room for three times the base. Then, in turns:

    copy    every file of the base read and written in blocks, each flushed to the disk; what a fusion cannot go below
    cp      `cp -r`, which leaves the bytes in the page cache
    fuse    `loracli.fuse_model` in a process of its own: reads, folds, hashes both sides, writes, flushes

Printed are the medians, the processor's seconds (which a busy machine changes less than the clock's), the ratios of the
pairs, and the peak memory of the process above that of its imports.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.made_inputs import llama_layer, of_layers, write_adapter
from benchmarks.measuring import BenchmarkParser, Spent, median, spent_by
from loracli.system.tensor_file import header_bytes

BLOCK = 16 << 20


@dataclass(frozen=True)
class Shapes:
    """Of the model; Llama 3.1's with 8B parameters, or its widths divided."""

    layers: int
    shrink: int

    @property
    def hidden(self) -> int:
        return 4096 // self.shrink

    @property
    def inner(self) -> int:
        return 14336 // self.shrink

    @property
    def vocabulary(self) -> int:
        return 128256 // self.shrink

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        return llama_layer(self.hidden, self.inner, self.hidden // 4)


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--layers", type=int, default=6, quick=1, help="of the 32 of an 8B model")
    parser.add_argument(
        "--shrink", type=int, default=1, quick=32, help="divide all widths by this, for a look in a minute"
    )
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, quick=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    shapes = Shapes(arguments.layers, arguments.shrink)
    base = write_base(folder / "base", shapes)
    adapters = [
        write_adapter(
            folder / f"a{i}",
            of_layers(shapes.modules, shapes.layers),
            arguments.rank,
            seed=i,
            base_id="random/llama",
            dtype=torch.bfloat16,
        )
        for i in range(arguments.adapters)
    ]
    size = sum(file.stat().st_size for file in base.iterdir())
    out = folder / "out"
    copies: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(base, out),
        "cp": lambda: subprocess.run(["cp", "-r", base, out], check=True),
    }
    spent: dict[str, list[Spent]] = {"copy": [], "cp": [], "fuse": []}
    memory = 0
    for _ in range(arguments.rounds):
        for name, found in spent.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if name in copies:
                found.append(spent_by(copies[name]))
            else:
                taken, peak = fuse(base, adapters, out, arguments.threads)
                found.append(taken)
                memory = max(memory, peak)
    print(
        f"{size / 1e9:.1f} GB in bfloat16, {arguments.layers} layers, {arguments.adapters} adapters of rank "
        f"{arguments.rank}, {arguments.threads} threads, medians of {arguments.rounds} rounds\n"
    )
    print("| | seconds | GB/s | processor | fuse takes | pairs |\n|---|--:|--:|--:|--:|---|")
    for name, found in spent.items():
        ratios = [a.seconds / b.seconds for a, b in zip(spent["fuse"], found, strict=True)]
        pairs = "" if name == "fuse" else " ".join(f"{ratio:.2f}" for ratio in ratios)
        middle = median(found)
        print(
            f"| {name} | {middle.seconds:.1f} | {size / 1e9 / middle.seconds:.2f} | {middle.processor:.1f} s | "
            f"{statistics.median(ratios):.2f} x | {pairs} |"
        )
    largest = 2 * max(shapes.vocabulary, shapes.inner) * shapes.hidden
    print(f"\npeak memory above the imports: {memory / 1e6:.0f} MB; the largest tensor has {largest / 1e6:.0f} MB")


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as read, (target / file.name).open("wb", buffering=0) as written:
            while block := read.read(BLOCK):
                written.write(block)
            os.fsync(written.fileno())


def fuse(base: Path, adapters: list[Path], output: Path, threads: int) -> tuple[Spent, int]:
    """What a fusion takes in a process of its own, and its bytes of memory above the imports."""
    words = [sys.executable, __file__, "--worker", str(threads), str(base), str(output), *map(str, adapters)]
    found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return Spent(found["seconds"], found["processor"]), found["memory"]


def worker(threads: str, base: str, output: str, *adapters: str) -> None:
    import peft  # noqa: F401
    import transformers

    from loracli.fusing.composition import FuseRequest
    from loracli.fusing.fuse import fuse_model

    transformers.AutoModelForCausalLM  # noqa: B018
    torch.set_num_threads(int(threads))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = spent_by(lambda: fuse_model(FuseRequest(adapters=adapters, method="sum", base=base), output))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**vars(spent), "memory": 1024 * (peak - before)}))


def write_base(folder: Path, model: Shapes) -> Path:
    """Random weights, four layers in a file; embedding and head in files of their own."""
    folder.mkdir()
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (model.vocabulary, model.hidden)},
        {"lm_head.weight": (model.vocabulary, model.hidden), "model.norm.weight": (model.hidden,)},
    ]
    for first in range(0, model.layers, 4):
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + 4, model.layers)):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in model.modules.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            shapes |= {f"model.layers.{layer}.{name}.weight": (model.hidden,) for name in norms}
        files.append(shapes)
    weight_map = {}
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, name))
        with (folder / name).open("wb") as file:
            file.write(header_bytes([(tensor, "BF16", shape) for tensor, shape in shapes.items()]))
            for shape in shapes.values():
                for block in random_blocks(shape):
                    file.write(block.view(torch.uint8).numpy().data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def random_block() -> torch.Tensor:
    return torch.randn(1 << 24).mul_(0.02).bfloat16()


def random_blocks(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Random numbers, the same again after 16 million of them."""
    rest = math.prod(shape)
    while rest > 0:
        yield random_block()[:rest]
        rest -= len(random_block())


if __name__ == "__main__":
    main()
