"""Many adapters of which two matter: what the others cost in loss, rank and time. Prints Markdown.

    python benchmarks/pools.py [--adapters 2 10 30] [--seeds 0 1 2]

The two adapters of the embedded example, and beside them adapters that know nothing: factors drawn at random in the
shapes of `know`, of the same norms. Fitted as `loracat fit` fits, on the example's calibration records, and scored on
its test records. `rank` is the largest that a module of the export has, without `--merge`. --quick takes
three adapters and a few records.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measuring import BenchmarkParser
from loracli.demo.run import example_folder
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 10, 30], quick=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], quick=[0])
    parser.add_argument("--mixing", nargs="+", default=["module"], quick=["adapter"])
    parser.add_argument("--records", type=int, default=32, quick=8, help="the first so many to fit on")
    parser.add_argument("--test-records", type=int, default=128, quick=8)
    arguments = parser.parse_args()
    example = example_folder()
    print("| adapters | mixing | seed | nats per token | more than two alone | dropped | rank | seconds |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    for mixing in arguments.mixing:
        for seed in arguments.seeds:
            alone: float | None = None
            for count in [2, *(n for n in arguments.adapters if n != 2)]:
                with tempfile.TemporaryDirectory() as scratch:
                    row = measured(example, Path(scratch), count, mixing, seed, arguments)
                alone = row[0] if alone is None else alone
                loss, dropped, rank, seconds = row
                told = f"{loss:.4f} | {loss - alone:+.4f} | {dropped} of {count - 2} | {rank} | {seconds:.0f}"
                print(f"| {count} | {mixing} | {seed} | {told} |", flush=True)


def measured(
    example: Path, folder: Path, count: int, mixing: str, seed: int, arguments: argparse.Namespace
) -> tuple[float, int, int, float]:
    """Held-out loss, adapters dropped, largest rank of the export, seconds of the fit."""
    names = [str(example / "know"), str(example / "form")]
    names += [str(noise(example / "know", folder / f"noise{i}", seed * 1000 + i)) for i in range(count - 2)]
    data, test = (
        part(example / name, folder / name, many)
        for name, many in (("calibration.jsonl", arguments.records), ("test.jsonl", arguments.test_records))
    )
    started = time.monotonic()
    recipe = fit_mixing(
        names, data, eval_data=test, base=str(example / "base"), settings=FitSettings(mixing=mixing, seed=seed)
    )
    seconds = time.monotonic() - started
    recipe.save(folder / "recipe.json")
    export_adapter(ExportRequest(folder / "recipe.json"), folder / "out")
    tensors = load_file(folder / "out" / "adapter_model.safetensors")
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    return recipe.held_out.row("fit").nats_per_token, len(recipe.fit.dropped), rank, seconds


def noise(source: Path, folder: Path, seed: int) -> Path:
    """An adapter of the same shapes and norms whose directions are drawn at random."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, tensor in sorted(load_file(source / "adapter_model.safetensors").items()):
        values = torch.randn(tensor.shape, generator=generator)
        drawn[name] = (values * (tensor.float().norm() / values.norm())).to(tensor.dtype)
    save_file(drawn, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def part(source: Path, path: Path, count: int) -> Path:
    """The first records of a file, in one of their own."""
    path.write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return path


if __name__ == "__main__":
    main()
