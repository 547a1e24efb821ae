"""What test_placement.py starts twice: a base model sharded over two processes beside the same one whole."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.render import Example
from loracli.errors import UsageError
from loracli.fitting.mixing import make_layout
from loracli.fitting.processes import connect
from loracli.model.attach import AttachedModel, attach
from loracli.model.base import BaseModel, _whole, check_fits, load_base
from loracli.model.loss import Objective
from loracli.model.modules import base_modules
from loracli.model.reference import BaseReference
from loracli.model.session import _checkpointed
from loracli.system.machine import read_launch


def batch(seed: int, length: int) -> Batch:
    ids = torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return make_batch([Example(1, tuple(ids), (False,) * 4 + (True,) * (length - 4))], [0])


def run(base: BaseModel, adapters: list[LoraAdapter], rank: int, *, recompute: bool) -> list[torch.Tensor]:
    """Two steps, each on other tokens in each process: nats without a gradient, nats and the gradient of the weights
    through our head, logits and the gradient of the input embeddings through the model's."""
    modules = make_layout(adapters).modules
    weights = torch.linspace(-0.5, 1, len(modules) * 2).view(-1, 2).requires_grad_(True)
    results = []
    around: Any = _checkpointed(base.model) if recompute else nullcontext()
    with attach(base.model, adapters, modules) as attached, around:
        objective = Objective(attached, base.model.get_output_embeddings(), own_head=True)
        for step in range(2):
            attached.set_weights(weights)
            mine = batch(10 * step + rank, 9 + 3 * rank)
            with torch.no_grad():
                results.append(objective.nats(mine))
            nats = objective.nats(mine).sum()
            results += [nats.detach(), *torch.autograd.grad(nats, weights)]
            results += through_inputs(attached, step)
    return results


def through_inputs(attached: AttachedModel, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1, 7, 32, generator=generator).requires_grad_(True)
    logits = attached.model(inputs_embeds=inputs, use_cache=False).logits
    return [logits.detach(), *torch.autograd.grad(logits.logsumexp(-1).sum(), inputs)]


def main(folder: Path) -> None:
    adapters = [read_adapter(str(folder / name)) for name in ("first", "second")]
    reference = BaseReference("tiny/base", folder / "base", None)
    plain = load_base(reference, dtype="float32", device="cpu")
    with connect(read_launch(), sharded=True) as processes:
        sharded = load_base(reference, dtype="float32", shard=2)
        check_fits(sharded, adapters)
        weight = sharded.model.get_submodule("model.layers.0.self_attn.q_proj").weight
        outcome = {
            "modules": base_modules(sharded.model, adapters) == base_modules(plain.model, adapters),
            "local": list(weight.to_local().shape),
            "whole": torch.equal(_whole(weight), plain.model.get_submodule("model.layers.0.self_attn.q_proj").weight),
        }
        for recompute in (False, True):
            pairs = [run(base, adapters, processes.rank, recompute=recompute) for base in (plain, sharded)]
            worst = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*pairs, strict=True)]
            outcome[f"recompute {recompute}"] = max(worst)
        try:
            load_base(BaseReference("tiny/gpt2", folder / "gpt2", None), dtype="float32", shard=2)
        except UsageError as error:
            outcome["no plan"] = str(error)
        everyone = [processes.from_first(lambda: outcome), outcome]
        if processes.rank == 1:
            sys.stdout.write(json.dumps(everyone) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
