"""Data that a model with known mixing weights generated itself, and a search on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from loracli.adapters.adapter import LoraAdapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.render import Example
from loracli.evaluation.statistics import static_points
from loracli.fitting.criterion import Fold, loss_criterion
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.level import Solution, Task
from loracli.fitting.mixing import make_diagonal, make_layout, make_mixing
from loracli.fitting.search import search
from loracli.fitting.settings import FitSettings
from loracli.model.attach import AttachedModel, attach
from loracli.model.loss import make_objective
from loracli.progress import SILENT

REFERENCES = ("first", "second", "third")  # as many of them as there are adapters


def sampled_examples(model: object, count: int, length: int, seed: int) -> list[Example]:
    """Sequences drawn token by token from the model as it stands: random first token, all others scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (count, 1), generator=generator)
    seen = DynamicCache()
    with torch.no_grad():
        for _ in range(length - 1):
            done = model(input_ids=ids[:, -1:], past_key_values=seen, use_cache=True)  # type: ignore[operator]
            p = torch.softmax(done.logits[:, -1].double(), dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    flags = (False, *(True,) * (length - 1))
    return [Example(f"val.jsonl:{line}", tuple(row), flags) for line, row in enumerate(ids.tolist())]


@contextmanager
def planted(
    base: Path, adapters: list[LoraAdapter], truth: torch.Tensor, *, count: int, seed: int = 0, canonical: bool = False
) -> Iterator[tuple[AttachedModel, list[Example], list[Example]]]:
    """A model with adapters attached, and examples that it generated itself at `truth`, one row for all modules or one
    for each: to fit on, and held out."""
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    modules = make_layout(adapters).modules
    with attach(model, adapters, modules, canonical=canonical) as attached:
        attached.set_weights(truth if len(truth) == len(modules) else truth.expand(len(modules), -1))
        examples = sampled_examples(model, count + 60, 24, seed)
        yield attached, examples[:count], examples[count:]


def make_engine(attached: AttachedModel, examples: Sequence[Example]) -> Engine:
    return Engine(make_objective(attached, plan_batches(examples, batch_tokens=256)[0]), Meter(SILENT))


def run_search(
    attached: AttachedModel, adapters: list[LoraAdapter], examples: list[Example], settings: FitSettings
) -> tuple[Solution, float]:
    """What is found with a fifth of the examples to choose with, and the passes that it took."""
    held = len(examples) // 5
    engine = make_engine(attached, examples)
    fold = Fold(tuple(examples[held:]), tuple(examples[:held]))
    criterion = loss_criterion(engine, batch_tokens=settings.batch_tokens)
    layout = make_layout(adapters)
    task = Task(engine, (fold,), criterion, settings, REFERENCES[: layout.adapters])
    found = search(task, lambda kind: make_mixing(attached, layout, kind), examples)
    return found, engine.meter.spent / (2 * sum(len(e.input_ids) for e in examples))


def held_out_losses(
    attached: AttachedModel, adapters: list[LoraAdapter], held: list[Example], found: Solution
) -> dict[str, float]:
    engine = make_engine(attached, held)
    batches = plan_batches(held, batch_tokens=2048)
    level = make_diagonal(make_layout(adapters), "adapter")
    losses = {
        name: engine.score(level, level.constant(point), batches, held).nats_per_token
        for name, point in static_points(REFERENCES[: len(adapters)]).items()
    }
    return {**losses, "fit": engine.score(found.mixing, found.theta, batches, held).nats_per_token}


def different_by_layer(adapters: list[LoraAdapter]) -> torch.Tensor:
    """Weights (L, 2) that no static mixing comes near."""
    by_layer = torch.tensor([[1.5, -0.4], [0.2, 1.4], [1.2, 0.3]])
    return torch.stack([by_layer[int(name.split(".")[2])] for name in make_layout(adapters).modules])
