"""Trains one skill adapter with PEFT, on completion tokens; what is trained once is not trained again."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.paper.tasks import Training
from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.records import read_records
from loracli.calibration.render import Example, render_file
from loracli.model.attach import attach
from loracli.model.base import BaseModel, load_base
from loracli.model.loss import make_objective
from loracli.model.reference import BaseReference
from loracli.system.document import document_sha256
from loracli.system.files import file_sha256

MAX_LENGTH = 512
PROCEDURE = 1  # of `train`: another number where it trains otherwise, and no adapter is taken from before
_KEY = 12  # digits of a hash


@dataclass(frozen=True)
class Base:
    """A base model that adapters are trained on.

    Args:
        reference: where it is.
        sha256: of its weights, config and tokenizer.
        name: that the adapters' configs have.
        dtype: of its weights.
    """

    reference: BaseReference
    sha256: str
    name: str
    dtype: str = "auto"

    def load(self) -> BaseModel:
        return load_base(self.reference, dtype=self.dtype)


def identify(reference: BaseReference, name: str | None, dtype: str) -> Base:
    """A base by the bytes of its files."""
    files = sorted(f for f in reference.path.iterdir() if f.suffix in (".safetensors", ".json", ".jinja"))
    digest = document_sha256([[file.name, file_sha256(file)] for file in files])
    return Base(reference, digest, name or reference.id, dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter that is trained, or was: its folder's name ends in a hash of all that it is made from.

    Args:
        name: of the skill, or `datamix`.
        files: of records.
        training: how.
        base: on what.
        seed: of the factors and the order of records.
        folder: that its own is in.
        given: a folder that is taken as it is in place of training; None for none.
    """

    name: str
    files: tuple[Path, ...]
    training: Training
    base: Base
    seed: int
    folder: Path
    given: Path | None = None

    @property
    def key(self) -> str:
        if self.given is not None:
            parts = [file_sha256(self.given / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
            return document_sha256(parts)[:_KEY]
        made_of = {
            "training": {**asdict(self.training), "targets": sorted(self.training.targets)},
            "data": [file_sha256(file) for file in self.files],
            "base": [self.base.sha256, self.base.dtype],
            "seed": self.seed,
            "procedure": [PROCEDURE, MAX_LENGTH],
        }
        return document_sha256(made_of)[:_KEY]

    @property
    def path(self) -> Path:
        return self.given or self.folder / f"{self.name}-{self.key}"

    @property
    def done(self) -> bool:
        return self.path.exists()

    def tokens(self, tokenizer: Any) -> int:
        """That training goes through, forward and backward."""
        return self.training.epochs * sum(len(e.input_ids) for e in rendered(self.files, tokenizer))

    def train(self) -> None:
        train(
            self.name,
            self.files,
            self.training,
            self.base.load(),
            self.path,
            seed=self.seed,
            base_id=self.base.name,
        )


def rendered(files: Sequence[Path], tokenizer: Any) -> list[Example]:
    """The records of some files, as training and a plan see them."""
    return [
        example
        for path in files
        for example in render_file(read_records(path), tokenizer, max_length=MAX_LENGTH).examples
    ]


def train(
    name: str, files: Sequence[Path], training: Training, base: BaseModel, out: Path, *, seed: int, base_id: str
) -> None:
    """Trains one adapter on some files and saves it to `out`, with how it was made in `training.json`.

    AdamW, 5 % warm-up, linear decay, no dropout. The base is in its own dtype, the factors are in float32.
    """
    examples = rendered(files, base.tokenizer)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=training.rank, lora_alpha=2 * training.rank, target_modules=list(training.targets)
    )
    adapted = get_peft_model(base.model, config).eval()
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
                say(f"  {name}: step {step} of {steps}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s")
    made = {
        "records": len(examples),
        "steps": steps,
        "tokens": training.epochs * sum(len(example.input_ids) for example in examples),
        "seconds": round(time.monotonic() - started),
    }
    save(adapted, out, base_id, made)


def pace(base: Base, files: Sequence[Path]) -> float:
    """Tokens a second, forward and backward through the base without an adapter: the faster of two steps."""
    model = base.load()
    batch = make_batch(examples := rendered(files, model.tokenizer), range(min(8, len(examples))))
    times = []
    with attach(model.model, (), ()) as attached:
        objective = make_objective(attached, batch)
        embedding = model.model.get_input_embeddings().weight.requires_grad_()  # so that there is a way back to go
        for _ in range(2):
            started = time.monotonic()
            objective.nats(batch).sum().backward()
            times.append(time.monotonic() - started)
            embedding.grad = None
    return batch.tokens / min(times)


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
    """Writes the adapter beside `path` and gives it its name last, so that it is whole or not there."""
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
