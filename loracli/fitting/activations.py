"""What a module's factors see on records: the second moment of z = A x, (R, R) numbers that stand for all of x.

    G = E[z z^T]        over every token that reaches the module, x its input, A (R, in) of the composition

With it |dW x|^2 has the mean trace(B G B^T), so a cut can be judged by what it does to the activations that occur
without an (in, in) matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loracli.algebra.factors import Factors
from loracli.calibration.batches import Batch
from loracli.fitting.loss import Objective


def second_moments(objective: Objective, factors: Mapping[str, Factors], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """G (R, R) of each module in float64, at the weights that are attached now.

    Args:
        objective: of the attached model.
        factors: of each module, whose lora_A is A; products with it are in float32 or the model's wider dtype.
        batches: one record each, so that no padding is counted. An adapted head sees scored positions only.
    """
    model = objective.attached.model
    moments = {name: torch.zeros(f.rank, f.rank, dtype=torch.float64) for name, f in factors.items()}
    rows = dict.fromkeys(factors, 0)
    handles = []

    def watch(name: str, module: nn.Module) -> Any:
        precision = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        lora_A = factors[name].lora_A.to(module.weight.device, precision)  # type: ignore[arg-type]
        scale = float(getattr(module, "embed_scale", 1.0))

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(module, nn.Embedding):
                z = F.embedding(x.reshape(-1), lora_A.T) * scale
            else:
                z = F.linear(x.reshape(-1, x.shape[-1]).to(lora_A), lora_A)
            z = z.cpu().double()  # (T, R)
            moments[name].addmm_(z.T, z)
            rows[name] += len(z)

        return module.register_forward_pre_hook(add)

    try:
        for name in factors:
            handles.append(watch(name, model.get_submodule(name)))
        for batch in batches:
            objective.record_sums(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment / max(rows[name], 1) for name, moment in moments.items()}
