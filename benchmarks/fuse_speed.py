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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loracli.model.checkpoint import header_bytes

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
        keys = self.hidden // 4
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="of the 32 of an 8B model")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this, for a look in a minute")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
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
    adapters = [write_adapter(folder / f"a{i}", shapes, arguments.rank, i) for i in range(arguments.adapters)]
    size = sum(file.stat().st_size for file in base.iterdir())
    times: dict[str, list[float]] = {"copy": [], "cp": [], "fuse": []}
    work: dict[str, list[float]] = {name: [] for name in times}
    memory = 0.0
    for _ in range(arguments.rounds):
        for name in times:
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            if name == "fuse":
                found = fuse(base, adapters, folder / "out", arguments.threads)
                seconds, spent, memory = found["seconds"], found["cpu"], max(memory, found["memory"])
            else:
                started, before = time.perf_counter(), cpu_seconds()
                copy(base, folder / "out") if name == "copy" else subprocess.run(
                    ["cp", "-r", base, folder / "out"], check=True
                )
                seconds, spent = time.perf_counter() - started, cpu_seconds() - before
            times[name].append(seconds)
            work[name].append(spent)
    print(
        f"{size / 1e9:.1f} GB in bfloat16, {arguments.layers} layers, {arguments.adapters} adapters of rank "
        f"{arguments.rank}, {arguments.threads} threads, medians of {arguments.rounds} rounds\n"
    )
    print("| | seconds | GB/s | processor | fuse takes | pairs |\n|---|--:|--:|--:|--:|---|")
    for name, found in times.items():
        ratios = [a / b for a, b in zip(times["fuse"], found, strict=True)]
        pairs = "" if name == "fuse" else " ".join(f"{ratio:.2f}" for ratio in ratios)
        middle = statistics.median(found)
        print(
            f"| {name} | {middle:.1f} | {size / 1e9 / middle:.2f} | {statistics.median(work[name]):.1f} s | "
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


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def fuse(base: Path, adapters: list[Path], output: Path, threads: int) -> dict[str, float]:
    """Seconds, the processor's seconds, and bytes of memory above the imports."""
    words = [sys.executable, __file__, "--worker", str(threads), str(base), str(output), *map(str, adapters)]
    found: dict[str, float] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def worker(threads: str, base: str, output: str, *adapters: str) -> None:
    import peft  # noqa: F401
    import transformers

    from loracli.fusing.fuse import fuse_model

    transformers.AutoModelForCausalLM  # noqa: B018
    torch.set_num_threads(int(threads))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, spent = time.perf_counter(), cpu_seconds()
    fuse_model(None, output, adapters=adapters, method="sum", base=base)
    seconds, spent = time.perf_counter() - started, cpu_seconds() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "cpu": spent, "memory": 1024 * (peak - before)}))


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


def write_adapter(folder: Path, model: Shapes, rank: int, seed: int) -> Path:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.layers):
        for name, (rows, columns) in model.modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).mul_(0.01).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).mul_(0.01).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random/llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in model.modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
