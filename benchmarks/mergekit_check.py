"""mergekit beside loracat on the same base and adapters: what each writes, how exact it is, how long it takes.

    python -m venv mergekit && mergekit/bin/pip install mergekit
    python benchmarks/mergekit_check.py mergekit/bin --base SmolLM2-135M-Instruct --adapters math code

The composition is the average. mergekit bakes each adapter into a full copy of the base, adds the differences to the
base (`task_arithmetic`), and takes an adapter out of the result again (`mergekit-extract-lora`). loracat fuses the
adapters into the base, and exports one adapter, concatenated and with --merge. All start from what is on disk, in turn;
processes are timed whole, their peak memory is the resident size that the system reports, and mergekit's cache of baked
copies is emptied before each round.

The error of a model is |W' - W - dW|_F / |dW|_F over all adapted modules together, against dW in float64; that of a
model whose every weight is W + dW in float64, rounded once, stands below. The error of an adapter is
|dW' - dW|_F / |dW|_F. Prints Markdown.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.measuring import BenchmarkParser, left_out
from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.demo.run import example_folder


@dataclass(frozen=True)
class Run:
    """One process: its seconds on the clock and on the processor, and its peak memory in MB."""

    seconds: float
    processor: float
    memory: float


def run(*command: str | Path) -> Run:
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed:\n{said.decode()[-2000:]}")
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def exact_updates(adapters: list[LoraAdapter]) -> dict[str, Tensor]:
    """The average of the dense updates by module, float64."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            found[name] = found.get(name, 0) + module.factors.delta_weight() / len(adapters)
    return found


def error_of_model(folder: Path, base: Path, exact: Mapping[str, Tensor]) -> float:
    """Of one file of weights beside another."""
    with (
        safe_open(folder / "model.safetensors", "pt") as written,
        safe_open(base / "model.safetensors", "pt") as bare,
    ):
        return relative(
            exact,
            lambda name: (
                written.get_tensor(f"{name}.weight").double() - bare.get_tensor(f"{name}.weight").double() - exact[name]
            ),
        )


def error_of_rounding(base: Path, exact: Mapping[str, Tensor]) -> float:
    """Of the best there can be in the base's dtype."""

    def difference(name: str) -> Tensor:
        weight = bare.get_tensor(f"{name}.weight")
        return (weight.double() + exact[name]).to(weight.dtype).double() - weight.double() - exact[name]

    with safe_open(base / "model.safetensors", "pt") as bare:
        return relative(exact, difference)


def error_of_adapter(folder: Path, exact: Mapping[str, Tensor]) -> float:
    modules = read_adapter(str(folder)).modules
    zero = torch.zeros((), dtype=torch.float64)
    return relative(
        exact, lambda name: (modules[name].factors.delta_weight() if name in modules else zero) - exact[name]
    )


def relative(exact: Mapping[str, Tensor], difference: Callable[[str], Tensor]) -> float:
    total = sum(float(difference(name).square().sum()) for name in exact)
    return math.sqrt(total / sum(float(update.square().sum()) for update in exact.values()))


def mergekit_config(base: Path, adapters: list[Path], path: Path) -> Path:
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1 / len(adapters)}} for adapter in adapters]
    content = {"merge_method": "task_arithmetic", "base_model": str(base), "dtype": "bfloat16", "models": models}
    path.write_text(json.dumps(content))  # which is YAML too
    return path


def main() -> None:
    example = example_folder()
    parser = BenchmarkParser(__doc__)
    parser.add_argument("mergekit", type=Path, quick=None, help="the folder of mergekit's commands")
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        quick=example / "base",
        help="a directory with one model.safetensors in bfloat16",
    )
    parser.add_argument("--adapters", type=Path, nargs="+", required=True, quick=[example / "know", example / "form"])
    parser.add_argument("--rounds", type=int, default=3, quick=1)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    base, adapters = arguments.base.resolve(), [path.resolve() for path in arguments.adapters]
    read = [read_adapter(str(path)) for path in adapters]
    rank = sum(max(adapter.ranks) for adapter in read)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = mergekit_config(base, adapters, folder / "merge.yml")
        loracat = [sys.executable, "-m", "loracli"]
        method = ["--method", "uniform", "--adapters", *adapters, "--quiet", "--force", "--output"]
        cut = ["--merge", "--rank", str(max(max(adapter.ranks) for adapter in read))]
        extract = ["--model", folder / "model", "--base-model", base, "--max-rank", str(rank), "--out-path"]
        merge = [config, folder / "model", "--lora-merge-cache", folder / "baked"]
        theirs: dict[str, list[str | Path]] = {}
        if arguments.mergekit is None:
            left_out("mergekit, as no folder of its commands was given")
        else:
            yaml, extracting = arguments.mergekit / "mergekit-yaml", arguments.mergekit / "mergekit-extract-lora"
            theirs = {
                "mergekit-yaml": [yaml, *merge],
                "mergekit-extract-lora": [extracting, *extract, folder / "extracted"],
            }
        commands: dict[str, list[str | Path]] = {
            **theirs,
            "loracat fuse": [*loracat, "fuse", "--base", base, *method, folder / "fused"],
            "loracat export": [*loracat, "export", *method, folder / "exported"],
            "loracat export --merge": [*loracat, "export", *cut, *method, folder / "merged"],
        }
        if arguments.quick:
            del commands["loracat export"]  # whose code is that of the next
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            shutil.rmtree(folder / "baked", ignore_errors=True)
            for name, command in commands.items():
                runs[name].append(run(*command))
        exact = exact_updates(read)
        written = {
            "mergekit-yaml": ("a model", "model"),
            "mergekit-extract-lora": (f"an adapter, rank {rank}", "extracted"),
            "loracat fuse": ("a model", "fused"),
            "loracat export": (f"an adapter, rank {rank}", "exported"),
            "loracat export --merge": (f"an adapter, rank {cut[-1]}", "merged"),
        }
        print(f"Medians of {arguments.rounds} rounds; {len(exact)} modules.\n")
        print("| | writes | relative error of the update | seconds | of the processor | peak MB |")
        print("|---|---|--:|--:|--:|--:|")
        for name, found in runs.items():
            middle = [
                statistics.median(getattr(one, what) for one in found) for what in ("seconds", "processor", "memory")
            ]
            kind, place = written[name]
            error = (
                error_of_model(folder / place, base, exact)
                if kind == "a model"
                else error_of_adapter(folder / place, exact)
            )
            print(f"| {name} | {kind} | {error:.2e} | {middle[0]:.1f} | {middle[1]:.1f} | {middle[2]:.0f} |")
        print(f"\nEvery weight in float64 and rounded once: {error_of_rounding(base, exact):.2e}.")


if __name__ == "__main__":
    main()
