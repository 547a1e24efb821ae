"""The baseline that a sceptic asks for: a new LoRA trained on the same calibration records, stopped early."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from loracli.calibration.batches import plan_batches
from loracli.calibration.render import Example
from loracli.model.attach import attach
from loracli.model.loss import make_objective

STEPS = 120
CHECK_EVERY = 10
RATE = 2e-3
VALIDATION_SHARE = 0.25


def train_fresh_lora(model: Any, targets: Sequence[str], rank: int, examples: Sequence[Example], *, seed: int) -> Any:
    """A PEFT model with a new LoRA of the rank on `targets`, trained by AdamW on the examples.

    A quarter of the examples chooses the step to stop at.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    fresh = get_peft_model(copy.deepcopy(model), config).eval()
    held = max(1, round(VALIDATION_SHARE * len(examples)))
    training = plan_batches(examples[held:], batch_tokens=1 << 16)
    checks = plan_batches(examples[:held], batch_tokens=1 << 16)
    parameters = [p for p in fresh.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    with attach(fresh, (), ()) as attached:
        objective = make_objective(attached, checks[0])
        best, kept = float("inf"), get_peft_model_state_dict(fresh)
        for step in range(STEPS + 1):
            if step % CHECK_EVERY == 0:
                loss = objective.score(checks, held).nats_per_token
                if loss < best:
                    best = loss
                    kept = {name: value.detach().clone() for name, value in get_peft_model_state_dict(fresh).items()}
            adam.zero_grad()
            for batch in training:
                (objective.nats(batch).sum() / sum(b.scored_tokens for b in training)).backward()  # type: ignore[no-untyped-call]
            adam.step()
    set_peft_model_state_dict(fresh, kept)
    return fresh
