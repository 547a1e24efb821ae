"""PEFT's `linear` combination with equal weights, for reproduction: it averages A and B apart.

    dW = (sum_i sqrt(|s_i| / N) B_i)(sum_i sign(s_i) sqrt(|s_i| / N) A_i)

so every adapter's B meets every other's A: of N^2 products B_i A_j only N are the adapters' own (PEFT 0.21,
tuners/lora/model.py, `_generalized_task_arithmetic_weighted_adapter`; the sums run over adapters that have the module).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Merged, Method, MethodOptions


def average_factors(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """The factor average of one module.

    Raises:
        ValueError: if the ranks differ, as PEFT does.
    """
    present = [update for update in updates if update is not None]
    ranks = sorted({update.rank for update in present})
    if len(ranks) > 1:
        raise ValueError(f"factors of the ranks {', '.join(map(str, ranks))} cannot be added, and PEFT refuses too")
    shares = [math.sqrt(abs(update.scaling) / len(updates)) for update in present]
    lora_A = torch.stack(
        [math.copysign(c, u.scaling) * u.lora_A.double() for c, u in zip(shares, present, strict=True)]
    )
    lora_B = torch.stack([c * u.lora_B.double() for c, u in zip(shares, present, strict=True)])
    return Merged(Factors(lora_A.sum(dim=0), lora_B.sum(dim=0)))


LINEAR_PEFT = Method("linear-peft", "PEFT's average of A and of B, with its cross terms", merge=average_factors)
