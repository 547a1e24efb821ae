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

from loracli.calibration.batches import make_batch
from loracli.calibration.dataset import shuffled
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.descent import AdamW, Descent, Step
from loracli.fitting.engine import Engine
from loracli.fitting.mixing import DiagonalMixing
from loracli.fitting.search import Found
from loracli.fitting.settings import FitSettings
from loracli.recipe.record import RungRecord, StageRecord, StartRecord

RATE = 1e-4
WARM_UP_STEPS = 100
RECORDS_A_STEP = 6
BETAS = (0.9, 0.999)  # the defaults of transformers' Trainer


def with_prompts(example: Example) -> Example:
    """The example with every token scored but the first, as with the reference's train_on_inputs."""
    return replace(example, scored=(False, *(True for _ in example.input_ids[1:])))


def fit_as_published(
    engine: Engine, mixing: DiagonalMixing, training: Sequence[Example], settings: FitSettings
) -> Found:
    """One epoch; theta are the logits."""
    examples = [with_prompts(example) for example in training]
    order = shuffled(range(len(examples)), seed=settings.seed)
    batches = [make_batch(examples, order[i : i + RECORDS_A_STEP]) for i in range(0, len(order), RECORDS_A_STEP)]
    generator = torch.Generator().manual_seed(settings.seed)
    logits = torch.randn(mixing.present.numel(), generator=generator, dtype=mixing.dtype)  # (G * N,)
    start = logits[mixing.present]
    rate = settings.learning_rate or RATE
    adam = AdamW(start, steps=len(batches), rate=rate, warm_up=WARM_UP_STEPS, betas=BETAS)
    steps = [Step((batch,), 1.0 / batch.scored_tokens) for batch in batches]
    engine.meter.stage("published recipe", rung=mixing.kind, start="random", stage="descent", ridge=None)
    descent = Descent(engine, mixing, examples, lambda number: steps[number], adam, start)
    stopped, stages = None, tuple[StageRecord, ...]()
    try:
        stages = (descent.run(len(steps)).recorded(mixing.kind, "random", "descent", 0.0),)
    except NonFiniteLoss as error:
        if adam.step_number == 0:
            raise
        stopped = str(error)
    starts = (StartRecord("random", None, None, None),)
    why = "the published recipe has one rung and one start"
    rung = RungRecord(mixing.kind, mixing.numbers, starts, "random", None, None, None, None, True, why)
    return Found(mixing, descent.theta, start, (rung,), stages, None, False, stopped)
