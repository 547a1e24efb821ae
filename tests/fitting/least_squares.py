"""A model without a network, whose loss and optimum are known, for what a search does whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loracli.calibration.dataset import Batch
from loracli.calibration.render import Example
from loracli.fitting.criterion import Fold, loss_criterion
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Journal, Meter
from loracli.fitting.level import Task
from loracli.fitting.mixing import DiagonalMixing, Layout, make_diagonal
from loracli.fitting.settings import FitSettings
from loracli.progress import SILENT
from loracli.recipe.record import MixingKind

REFERENCES = ("first", "second")
LAYOUT = Layout(tuple(f"layers.{i}.proj" for i in range(6)), ((1, 1),) * 5 + ((1, 0),))
ROWS = len(LAYOUT.owner)  # R of all modules together


class LeastSquares:
    """An attached model and its objective in one. Of a scored token v at the weights c (R,) of all rank rows

        nats = 1 + (f_v . (c - truth) - noise_v)^2 / 2

    Args:
        truth: (R,) or what expands to it.
        noise: size of what no weights explain.
        width: of the features f_v.
    """

    def __init__(self, truth: Tensor, *, noise: float = 0.3, width: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(11)
        self.attached = self
        self.device = torch.device("cpu")
        self.truth = truth.double().expand(ROWS)
        self._features = width * torch.randn(259, ROWS, generator=generator, dtype=torch.float64)
        self._noise = noise * torch.randn(259, generator=generator, dtype=torch.float64)
        self._c = torch.zeros(ROWS, dtype=torch.float64)

    def set_diagonal(self, c: Tensor) -> None:
        self._c = c.double()

    def nats(self, batch: Batch) -> Tensor:
        residual = self._features[batch.labels] @ (self._c - self.truth) - self._noise[batch.labels]
        return 1 + residual.square() / 2

    def record_sums(self, batch: Batch) -> tuple[Tensor, Tensor]:
        nats = self.nats(batch).detach()
        zeros = torch.zeros(len(batch.indices), dtype=torch.float64)
        return zeros.index_add(0, batch.owners, nats), zeros.index_add(0, batch.owners, torch.ones_like(nats))


def engine_of(objective: LeastSquares, folder: Path | None = None, *, shared: bool = False) -> Engine:
    """With a folder, everything that is done is remembered there at once."""
    journal = Journal(folder, seconds=0)
    return Engine(objective, Meter(SILENT), journal=journal, shared=shared)  # type: ignore[arg-type]


def level(kind: MixingKind) -> DiagonalMixing:
    return make_diagonal(LAYOUT, kind)


def random_examples(lengths: Sequence[int], *, seed: int = 0) -> list[Example]:
    """Random tokens, all but the first scored."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(
            f"val.jsonl:{line}",
            tuple(torch.randint(3, 259, (length,), generator=generator).tolist()),
            (False,) + (True,) * (length - 1),
        )
        for line, length in enumerate(lengths, 1)
    ]


def one_task(engine: Engine, examples: Sequence[Example], settings: FitSettings, *, validate: bool = True) -> Task:
    """Every fifth record to choose with, or none."""
    held = tuple(examples[::5]) if validate else ()
    fold = Fold(tuple(example for example in examples if example not in held), held)
    return task_of(engine, (fold,), settings)


def task_of(engine: Engine, folds: tuple[Fold, ...], settings: FitSettings) -> Task:
    criterion = loss_criterion(engine, batch_tokens=settings.batch_tokens)
    return Task(engine, folds, criterion, settings, REFERENCES)
