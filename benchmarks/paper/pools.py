"""Many adapters of which two matter: what the others cost in loss, rank and time.

The two adapters of the embedded example, and beside them adapters that know nothing: factors drawn at random in the
shapes of `know`, of the same norms. Fitted as `loracat fit` fits, on the example's calibration records, and scored on
its test records. `rank` is the largest that a module of the export has, without `--merge`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.made_inputs import part_of_example
from benchmarks.paper.tasks import Experiment, Part, Unit
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings

COUNTS, MIXING = (2, 10, 30), "module"
_SECONDS = {2: 25, 10: 35, 30: 80}


def units(seeds: Sequence[int], quick: bool) -> list[Unit]:
    counts = (2, 3) if quick else COUNTS
    return [
        Unit(
            f"{count}-adapters-{seed}",
            {"adapters": count, "seed": seed, "mixing": MIXING, "quick": quick},
            _SECONDS.get(count, 10) / (10 if quick else 1),
            partial(measured, count, seed, quick),
        )
        for seed in seeds
        for count in counts
    ]


def measured(count: int, seed: int, quick: bool) -> dict[str, float]:
    """Held-out loss, adapters dropped, largest rank of the export, seconds of the fit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        example = part_of_example(folder / "part", calibration=8 if quick else 32, test=8 if quick else 128)
        names = [str(example / "know"), str(example / "form")]
        names += [str(noise(example / "know", folder / f"noise{i}", seed * 1000 + i)) for i in range(count - 2)]
        started = time.monotonic()
        recipe = fit_mixing(
            names,
            example / "calibration.jsonl",
            eval_data=example / "test.jsonl",
            base=str(example / "base"),
            settings=FitSettings(mixing=MIXING, seed=seed, passes=2.0 if quick else None),
        )
        seconds = time.monotonic() - started
        recipe.save(folder / "recipe.json")
        export_adapter(ExportRequest(folder / "recipe.json"), folder / "out")
        tensors = load_file(folder / "out" / "adapter_model.safetensors")
    return {
        "adapters": count,
        "seed": seed,
        "nats_per_token": recipe.held_out.row("fit").nats_per_token,
        "dropped": len(recipe.fit.dropped),
        "rank": max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name),
        "seconds": seconds,
    }


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


def parts(found: Mapping[str, Any]) -> tuple[Part, ...]:
    alone = {one["seed"]: one["nats_per_token"] for one in found.values() if one["adapters"] == 2}
    rows = tuple(
        (
            str(one["adapters"]),
            str(one["seed"]),
            f"{one['nats_per_token']:.4f}",
            f"{one['nats_per_token'] - alone[one['seed']]:+.4f}",
            f"{one['dropped']} of {one['adapters'] - 2}",
            str(one["rank"]),
            f"{one['seconds']:.0f}",
        )
        for one in sorted(found.values(), key=lambda one: (one["seed"], one["adapters"]))
    )
    heads = ("adapters", "seed", "nats per token", "more than two alone", "dropped", "rank", "seconds")
    return (Part("One weight for each module and adapter:", heads, rows),)


POOLS = Experiment(
    "pools",
    "Many adapters of which two matter: the two of the embedded example, beside adapters with random factors of the "
    "same norms. 32 records to fit on, 128 others to score.",
    units,
    parts,
)
