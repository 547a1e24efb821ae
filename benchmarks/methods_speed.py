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

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.made_inputs import llama_layer, of_layers, write_adapter
from benchmarks.measuring import BenchmarkParser, in_turns, median
from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.composition.attached import of_method
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.mixing import Layout, make_layout

LAYERS = 2
DENSE = [name for name, method in METHODS.items() if method.full_rank]
DATA_FREE = [name for name, method in METHODS.items() if not method.needs_records]


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--widths", nargs="+", type=int, default=[576, 1024, 2048], quick=[64])
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, quick=1)
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
        shapes = of_layers(llama_layer(width, 3 * width, width // 4), LAYERS)
        paths = [
            write_adapter(Path(folder) / f"a{i}", shapes, rank, seed=i, base_id="random/llama") for i in range(count)
        ]
        adapters = [read_adapter(str(path)) for path in paths]
        layout = make_layout(adapters)
        work: dict[str, Callable[[], object]] = {
            "export": lambda: export_adapter(
                ExportRequest(method="sum", adapters=[str(p) for p in paths]), Path(folder) / "out", force=True
            ),
            "reading": lambda: [read_adapter(str(path)) for path in paths],
            **{name: composing(METHODS[name], adapters, layout) for name in DATA_FREE},
        }
        seconds = {name: median(found).seconds for name, found in in_turns(work, rounds).items()}
    export = seconds["export"] - seconds["reading"]
    ratios = {name: seconds[name] / export for name in DATA_FREE}
    cheap = sum(ratio for name, ratio in ratios.items() if name not in DENSE)
    each = " | ".join(f"{ratio:.2f}" for ratio in ratios.values())
    return f"| {width} | {export:.2f} s | {each} | {cheap:.2f} | {sum(ratios.values()):.2f} |"


def composing(method: Method, adapters: Sequence[LoraAdapter], layout: Layout) -> Callable[[], object]:
    return lambda: of_method(method, MethodOptions(), adapters, layout)


if __name__ == "__main__":
    main()
