"""Many adapters of which two matter: what the others cost in loss, rank and time.

The adapters of the embedded example, or of a task, and beside them adapters that know nothing: factors drawn at random
in the shapes of the first, of the same norms. Fitted as `loracat fit` fits, on the calibration records, and scored on
the test records. `rank` is the largest that a module of the export has, without `--merge`.
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

from benchmarks.paper.tasks import Experiment, Part, Unit
from benchmarks.paper.ways import Pair
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings

NAME = "pools"
ASKS = (
    "Many adapters of which few matter: those of the embedded example, or of a task, beside adapters with random "
    "factors of the same norms."
)
COUNTS, MIXING = (2, 10, 30), "module"


def experiment(pairs: Sequence[Pair], quick: bool) -> Experiment:
    """A pool of each size about each pair."""
    units = [
        Unit(
            f"{pair.name}-{count}-adapters-{pair.seed}",
            {**pair.made_of, "adapters": count, "mixing": MIXING},
            _seconds(pair, count) / (10 if quick else 1),
            partial(measured, pair, count),
        )
        for pair in pairs
        for count in ((2, 3) if quick else COUNTS)
    ]
    return Experiment(NAME, ASKS, lambda *_: units, parts)


def _seconds(pair: Pair, count: int) -> float:
    size = sum(file.stat().st_size for file in pair.base.reference.path.glob("*.safetensors"))
    return (20 + 2 * count) * (1 + 5e-8 * size)


def measured(pair: Pair, count: int) -> dict[str, Any]:
    """Held-out loss, adapters dropped, largest rank of the export, seconds of the fit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = [str(path) for _, path in pair.adapters]
        first, more = pair.adapters[0][1], count - len(names)
        names += [str(noise(first, folder / f"noise{i}", pair.seed * 1000 + i)) for i in range(more)]
        started = time.monotonic()
        recipe = fit_mixing(
            names,
            pair.calibration,
            eval_data=pair.test,
            base=str(pair.base.reference.path),
            settings=FitSettings(mixing=MIXING, seed=pair.seed, passes=pair.passes),
        )
        seconds = time.monotonic() - started
        recipe.save(folder / "recipe.json")
        export_adapter(ExportRequest(folder / "recipe.json"), folder / "out")
        tensors = load_file(folder / "out" / "adapter_model.safetensors")
    return {
        "pair": pair.name,
        "adapters": count,
        "seed": pair.seed,
        "records": len(pair.calibration.read_text("utf-8").splitlines()),
        "tested": recipe.held_out.records,
        "nats_per_token": recipe.held_out.row("fit").nats_per_token,
        "dropped": len(recipe.fit.dropped),
        "idle": more,
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
    """A table for each pair, fitted on so many records."""
    every = sorted(found.values(), key=lambda one: (one["seed"], one["adapters"]))
    alone = {(one["pair"], one["seed"]): one["nats_per_token"] for one in every if not one["idle"]}
    heads = ("adapters", "seed", "nats per token", "more than those alone", "dropped", "rank", "seconds")
    tables = []
    for pair, records, tested in dict.fromkeys((one["pair"], one["records"], one["tested"]) for one in every):
        rows = tuple(
            (
                str(one["adapters"]),
                str(one["seed"]),
                f"{one['nats_per_token']:.4f}",
                f"{one['nats_per_token'] - alone[pair, one['seed']]:+.4f}",
                f"{one['dropped']} of {one['idle']}",
                str(one["rank"]),
                f"{one['seconds']:.0f}",
            )
            for one in every
            if (one["pair"], one["records"], one["tested"]) == (pair, records, tested)
        )
        title = (
            f"`{pair}`, a weight for each module and adapter, {records} records to fit on, {tested} others to score:"
        )
        tables.append(Part(title, heads, rows))
    return tuple(tables)
