"""What test_certificate.py starts twice: the gradients of records from one process, from two, and from a base model
that is sharded over them."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.fitting.certificate import _record_gradients
from loracli.fitting.mixing import make_diagonal, make_layout
from loracli.fitting.processes import ALONE, Processes, connect
from loracli.model.attach import attach
from loracli.model.base import load_base
from loracli.model.loss import Objective
from loracli.model.reference import BaseReference
from loracli.model.session import _checkpointed
from loracli.system.machine import read_launch


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 14, (11,), generator=generator).tolist()
    ids = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [Example(f"val.jsonl:{i}", tuple(x), (False,) * 4 + (True,) * (len(x) - 4)) for i, x in enumerate(ids)]


def table(model: Any, adapters: list[LoraAdapter], processes: Processes, *, recompute: bool) -> Tensor:
    """(11, 2 + 2P)."""
    records = examples()
    layout = make_layout(adapters)
    mixing = make_diagonal(layout, "module")
    theta = torch.linspace(-0.5, 1, mixing.numbers, dtype=torch.float64)
    rows = torch.zeros(len(records), 2 + 2 * mixing.numbers, dtype=torch.float64)
    around: Any = _checkpointed(model) if recompute else nullcontext()
    with attach(model, adapters, layout.modules) as attached, around:
        objective = Objective(attached, model.get_output_embeddings(), own_head=True)

        def work(batch: Batch) -> Tensor:
            return _record_gradients(objective, mixing, theta, batch, records, seed=0).rows().flatten()

        for batch, part in processes.in_order(plan_batches(records, batch_tokens=40), work):
            rows[list(batch.indices)] = part.view(len(batch.indices), -1)
    return rows


def main(folder: Path) -> None:
    adapters = [read_adapter(str(folder / name)) for name in ("first", "second")]
    reference = BaseReference("tiny/base", folder / "base", None)
    plain = load_base(reference, dtype="float32", device="cpu").model
    expected = table(plain, adapters, ALONE, recompute=False)
    with connect(read_launch(), sharded=True) as processes:
        sharded = load_base(reference, dtype="float32", shard=2).model
        two = table(plain, adapters, processes, recompute=False)
        shards = [table(sharded, adapters, processes, recompute=recompute) for recompute in (False, True)]
        outcome = {
            "equal": torch.equal(two, expected),
            "sharded": [float((rows - expected).abs().max() / expected.abs().max()) for rows in shards],
        }
        if processes.first:
            sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
