"""The published recipe of LoRA Soups, for comparison (github.com/aksh555/LoRA-Soups, cat_train.py and train_cat.sh at
7ce7a2e).

Softmax over the adapters of each module, from N(0, 1) draws; AdamW at a peak of 1e-4 with 100 steps of warm-up and
linear decay, one epoch, six records a step, loss on prompt and completion. The sum of the rates over such an epoch is
below 0.1, so Adam cannot move a logit by more, and the weights stay near their draw. Ours differs in two ways: the draw
is seeded, and adapter dropout is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loracli.calibration.dataset import Batch, make_batch, shuffled
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.descent import AdamW, Descent, Step
from loracli.fitting.engine import Engine
from loracli.fitting.level import Solution
from loracli.fitting.mixing import DiagonalMixing
from loracli.fitting.settings import FitSettings
from loracli.recipe.record import LevelRecord, StageRecord, StartRecord
from loracli.system.display import count_text

_RATE = 1e-4
_WARM_UP = 100
_BATCH = 6
_BETAS = (0.9, 0.999)  # the defaults of transformers' Trainer


def _with_prompts(example: Example) -> Example:
    """The example with every token scored but the first, as with the reference's train_on_inputs."""
    return replace(example, scored=(False, *(True for _ in example.input_ids[1:])))


def published_batches(examples: Sequence[Example], settings: FitSettings) -> list[Batch]:
    """The batches of its one epoch, six records each, in an order that depends on `settings.seed`."""
    order = shuffled(range(len(examples)), seed=settings.seed)
    return [make_batch(examples, order[i : i + _BATCH]) for i in range(0, len(order), _BATCH)]


def fit_as_published(
    engine: Engine, mixing: DiagonalMixing, training: Sequence[Example], settings: FitSettings
) -> Solution:
    """One epoch of the published recipe; theta (P,) are the logits of the softmax, float64.

    Args:
        engine: the attached model.
        mixing: of the kind `module`, with softmax weights.
        training: all training records.
        settings: its seed, and its learning rate in the place of 1e-4.
    Raises:
        NonFiniteLoss: if the loss at the draw is not finite.
    """
    examples = [_with_prompts(example) for example in training]
    batches = published_batches(examples, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    logits = torch.randn(mixing.present.numel(), generator=generator, dtype=mixing.dtype)  # (G * N,)
    start = logits[mixing.present]
    rate = settings.learning_rate or _RATE
    adam = AdamW(start, steps=len(batches), rate=rate, warm_up=_WARM_UP, betas=_BETAS)
    steps = [Step((batch,), 1.0 / batch.scored_tokens) for batch in batches]
    engine.meter.stage(
        f"fitting {count_text(mixing.numbers, 'weight')}", rung=mixing.kind, start="random", stage="descent", ridge=None
    )
    descent = Descent(engine, mixing, examples, lambda number: steps[number], adam, start)
    stopped, stages = None, tuple[StageRecord, ...]()
    try:
        stages = (descent.run(len(steps), key="published recipe").recorded(mixing.kind, "random", "descent", 0.0),)
    except NonFiniteLoss as error:
        if adam.step_number == 0:
            raise
        stopped = str(error)
    starts = (StartRecord("random", None, None, None),)
    why = "the published recipe has one kind of mixing and one start"
    level = LevelRecord(mixing.kind, mixing.numbers, starts, "random", None, None, None, None, True, why)
    return Solution(
        mixing, (descent.theta,), (start,), None, starts, "random", None, stopped=stopped, stages=stages, rungs=(level,)
    )
