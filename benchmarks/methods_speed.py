"""The cost of the methods that need no data, beside an export of the same adapters. Prints Markdown.

    python benchmarks/methods_speed.py
    python benchmarks/methods_speed.py --widths 2048 --adapters 4 --rank 16

Adapters with random factors on every linear module of some layers of a Llama's shapes are written to disk once. Then,
in turns in one process and in several rounds: an export of their sum as the whole command does it, without reading the
adapters (composition, certificate, writing, reading back), and each method over all modules. The median of each is
shown as a multiple of the export's. `ties`, `dare` and `dare-ties` have results of full rank and form dense matrices;
the others work on factors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.composition.attached import of_method
from loracli.export.method import export_method
from loracli.fitting.mixing import Layout, make_layout

LAYERS = 2
DENSE = [name for name, method in METHODS.items() if method.full_rank]
DATA_FREE = [name for name, method in METHODS.items() if method.search is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[576, 1024, 2048])
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.adapters} adapters of rank {arguments.rank}, {LAYERS} layers of 7 modules, one thread;")
    print(f"multiples of an export, medians of {arguments.rounds} rounds.\n")
    print(f"| width | an export | {' | '.join(DATA_FREE)} | on factors, together | all together |")
    print(f"|--:|--:|{'--:|' * (len(DATA_FREE) + 2)}")
    for width in arguments.widths:
        print(measured(width, arguments.adapters, arguments.rank, arguments.rounds), flush=True)


def measured(width: int, count: int, rank: int, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_adapter(Path(folder) / f"a{i}", width, rank, seed=i) for i in range(count)]
        adapters = [read_adapter(str(path)) for path in paths]
        layout = make_layout(adapters)
        work: dict[str, Callable[[], object]] = {
            "export": lambda: export_method("sum", Path(folder) / "out", adapters=[str(p) for p in paths], force=True),
            "reading": lambda: [read_adapter(str(path)) for path in paths],
            **{name: composing(METHODS[name], adapters, layout) for name in DATA_FREE},
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, run in work.items():
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(found) for name, found in times.items()}
    export = median["export"] - median["reading"]
    ratios = {name: median[name] / export for name in DATA_FREE}
    cheap = sum(ratio for name, ratio in ratios.items() if name not in DENSE)
    each = " | ".join(f"{ratio:.2f}" for ratio in ratios.values())
    return f"| {width} | {export:.2f} s | {each} | {cheap:.2f} | {sum(ratios.values()):.2f} |"


def composing(method: Method, adapters: Sequence[LoraAdapter], layout: Layout) -> Callable[[], object]:
    return lambda: of_method(method, MethodOptions(), adapters, layout)


def write_adapter(folder: Path, width: int, rank: int, *, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = {"self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width)}
    shapes |= {f"self_attn.{name}": (width // 4, width) for name in ("k_proj", "v_proj")}
    shapes |= {f"mlp.{name}": (3 * width, width) for name in ("gate_proj", "up_proj")}
    shapes |= {"mlp.down_proj": (width, 3 * width)}
    for layer in range(LAYERS):
        for name, (rows, columns) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random/llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in shapes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
