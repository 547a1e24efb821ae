"""Trains one skill adapter with PEFT, on completion tokens."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.records import read_records
from loracli.calibration.render import Example, render_file
from loracli.model.attach import attach
from loracli.model.base import BaseModel
from loracli.model.loss import make_objective

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
MAX_LENGTH = 512


@dataclass(frozen=True)
class Training:
    """How one adapter is trained; its lora_alpha is twice its rank."""

    rank: int
    targets: list[str]
    rate: float
    epochs: int
    batch_size: int

    def config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM", r=self.rank, lora_alpha=2 * self.rank, target_modules=list(self.targets)
        )


def train(
    name: str, files: Sequence[Path], training: Training, base: BaseModel, out: Path, *, seed: int, base_id: str
) -> None:
    """Trains one adapter on some files and saves it to `out`, with how it was made in `training.json`.

    AdamW, 5 % warm-up, linear decay, no dropout. The base is in its own dtype, the factors are in float32.
    """
    examples = [
        example
        for path in files
        for example in render_file(read_records(path), base.tokenizer, max_length=MAX_LENGTH).examples
    ]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    adapted = get_peft_model(base.model, training.config()).eval()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
    batches = [batch for _ in range(training.epochs) for batch in epoch_of(examples, training.batch_size, rng)]
    steps, warmup = len(batches), max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    started = time.monotonic()
    with attach(adapted, (), ()) as attached:
        objective = make_objective(attached, batches[0])
        for step, batch in enumerate(batches, start=1):
            loss = objective.nats(batch).sum() / batch.scored_tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0 or step == steps:
                say(f"{name}: step {step} of {steps}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s")
    made = {
        "records": len(examples),
        "steps": steps,
        "tokens": training.epochs * sum(len(example.input_ids) for example in examples),
        "seconds": round(time.monotonic() - started),
    }
    save(adapted, out, base_id, made)


def epoch_of(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[Batch]:
    """One pass in a new order; four batches at a time are sorted by length, so that little is padding."""
    order = rng.sample(range(len(examples)), len(examples))
    groups: list[list[int]] = []
    for start in range(0, len(order), 4 * size):
        part = sorted(order[start : start + 4 * size], key=lambda i: len(examples[i].input_ids))
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(groups)
    for group in groups:
        yield make_batch(examples, group)


def save(adapted: Any, path: Path, base_id: str, made: dict[str, int]) -> None:
    """Writes the adapter beside `path` and gives it its name last, so that a stage is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    adapted.save_pretrained(str(partial))
    (partial / "README.md").unlink()  # PEFT's empty model card
    (partial / "adapter_model.safetensors").chmod(0o644)  # it is written for its owner alone
    config = partial / "adapter_config.json"
    fields = json.loads(config.read_text())
    # PEFT keeps the modules as a set, whose order changes from run to run
    fields |= {"base_model_name_or_path": base_id, "target_modules": sorted(fields["target_modules"])}
    config.write_text(json.dumps(fields, indent=2) + "\n")
    (partial / "training.json").write_text(json.dumps(made) + "\n")
    partial.rename(path)


def say(text: str) -> None:
    """Tells how far it is, on stderr."""
    print(text, file=sys.stderr, flush=True)
