"""The control of a fit: a new LoRA on the same records, which knows nothing of the adapters' skills.

What all calibration records share, such as the form of the answers, any directions can be taught, and so a fit of
adapters that know nothing has a lower loss than each of them alone. A composition has shown its adapters' skills where
a LoRA that was trained from nothing on the same records does not come as low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.records import Record
from loracli.calibration.render import Example
from loracli.errors import OutOfResources, UsageError
from loracli.fitting.criterion import one_fold
from loracli.fitting.descent import WARM_UP, AdamW, Descent, plan_steps
from loracli.fitting.engine import Engine
from loracli.fitting.inputs import FitInputs
from loracli.fitting.mixing import FreshLora, Layout, parameter_of_experts
from loracli.fitting.settings import FRESH_LORA, FitSettings
from loracli.fitting.work import Cost, Work, cost_of, descent_cost
from loracli.model.session import Opening
from loracli.progress import SILENT, Progress

# A short schedule, whose rate has fallen when it ends: with a longer one the loss on other records was higher.
_STEPS, _FEWEST, _FEWEST_PASSES, _MOST_PASSES = 128, 32, 2.0, 4.0
_CHECKS_A_PASS = 2
_PATIENCE = 4  # checks in a row that are worse than the best


class FreshTraining:
    """The training of a new LoRA of the composition's rank on some records: AdamW, stopped where the loss on the fifth
    of them that is set aside was lowest.

    It takes 128 steps, but 2 passes at least and 4 at most, and never more than the settings give a fit.

    Args:
        layout: of the adapters that it stands beside.
        training: the records.
        records: that they were rendered from.
        settings: of the fit.
    """

    def __init__(
        self, layout: Layout, training: Sequence[Example], records: Sequence[Record], settings: FitSettings
    ) -> None:
        self._layout, self._settings = layout, settings
        self._fold = one_fold(training, records, seed=settings.seed + 1)
        self._plan = plan_steps(self._fold.fitting, batch_tokens=settings.batch_tokens, seed=settings.seed)
        a_pass = self._plan.steps_a_pass
        passes = min(max(_STEPS / a_pass, _FEWEST_PASSES), _MOST_PASSES)
        if settings.passes is None:
            self._steps = max(round(passes * a_pass), _FEWEST)
        else:
            self._steps = max(round(min(passes, settings.passes) * a_pass), 1)
        self._between = max(1, a_pass // _CHECKS_A_PASS)

    @property
    def cost(self) -> Cost:
        """The most that it takes."""
        whole = math.ceil(self._steps / self._plan.steps_a_pass) * self._plan.tokens
        return descent_cost(self._plan, whole) + self._check * math.ceil(self._steps / self._between)

    @property
    def _check(self) -> Cost:
        return cost_of(self._batches) if self._fold.validation else Cost()

    @property
    def _batches(self) -> list[Batch]:
        return plan_batches(self._fold.validation, batch_tokens=self._settings.batch_tokens)

    def run(
        self, engine: Engine, adapters: Sequence[LoraAdapter], *, key: str | None = None
    ) -> tuple[FreshLora, Tensor, float]:
        """The LoRA, its theta, and after how many passes it was stopped.

        Args:
            engine: of the base with the adapters attached.
            adapters: of the layout.
            key: of what is remembered; None to remember nothing.
        Raises:
            NonFiniteLoss: naming the records of a batch.
            UsageError: if an adapter changes experts.
        """
        shapes = _shapes(adapters, self._layout)
        fresh = FreshLora(self._layout, shapes, max(self._layout.sizes), seed=self._settings.seed)
        adam = AdamW(fresh.start, steps=self._steps, rate=fresh.rate, warm_up=max(1, round(WARM_UP * self._steps)))
        engine.meter.validation = None
        engine.meter.stage("training", rung=FRESH_LORA, start="", stage="control", ridge=0.0)
        descent = Descent(engine, fresh, self._fold.fitting, self._plan.step, adam, fresh.start)

        def run(steps: int, done: int) -> None:
            descent.run(steps, key=key and f"{key}, from step {done}")

        def check(done: int) -> float | None:
            if not self._fold.validation:
                return None
            at = key and f"{key}, after {done} steps"
            scores = engine.score(fresh, descent.theta, self._batches, self._fold.validation, key=at)
            engine.meter.validation = scores.nats_per_token
            return scores.nats_per_token

        theta, at = _descend(run, check, lambda: descent.theta, self._steps, self._between)
        return fresh, theta, at / self._plan.steps_a_pass


def _descend(
    run: Callable[[int, int], None],
    check: Callable[[int], float | None],
    theta: Callable[[], Tensor],
    steps: int,
    between: int,
) -> tuple[Tensor, int]:
    """Theta at the best check, and after how many steps it was; the last step's where nothing can be checked."""
    best, kept, kept_at, worse, done = math.inf, theta(), 0, 0, 0
    while done < steps and worse < _PATIENCE:
        count = min(between, steps - done)
        run(count, done)
        done += count
        loss = check(done)
        if loss is None or loss < best:
            best, kept, kept_at, worse = math.inf if loss is None else loss, theta(), done, 0
        else:
            worse += 1
    return kept, kept_at


def _shapes(adapters: Sequence[LoraAdapter], layout: Layout) -> list[tuple[int, int]]:
    """(in, out) of each module.

    Raises:
        UsageError: if one of them is a parameter with experts.
    """
    if (experts := parameter_of_experts(adapters)) is not None:
        raise UsageError(f"a new LoRA cannot be trained on the experts of {experts}", hint="leave fresh-lora out")
    found = [next(a.modules[m].factors for a in adapters if m in a.modules) for m in layout.modules]
    return [(factors.in_features, factors.out_features) for factors in found]


def fresh_training(inputs: FitInputs, training: Sequence[Example]) -> FreshTraining:
    """Beside a fit of some of its training records."""
    return FreshTraining(inputs.layout, training, inputs.data.training, inputs.settings)


def control_stage(number: int) -> str:
    """The stage of the new LoRA that is trained beside the fit, 0, or beside that of a part."""
    return f"a fresh LoRA for part {number}" if number else "a fresh LoRA"


def controls(work: Work) -> bool:
    """Whether a new LoRA is trained beside the fit."""
    return any(control_stage(number) in work.after for number in (0, 1))


def as_memory_allows(
    inputs: FitInputs,
    opening: Opening,
    *,
    agree: Callable[[Callable[[], bool]], bool] = lambda decide: decide(),
    progress: Progress = SILENT,
) -> FitInputs:
    """The inputs, which know where the factors of a new LoRA may not find the memory, or would have layers run again:
    then no control is trained that nobody asked for.

    Args:
        inputs: of the fit.
        opening: of its base, with checkpointing where the fit needs it.
        agree: has one of several processes decide for all.
        progress: told where it is left out.
    """
    if inputs.settings.control is not None or opening.trains_factors:
        return inputs

    def enough() -> bool:
        try:
            decision = replace(opening, trains_factors=True).memory(opening.plan())[1]
        except OutOfResources:
            return False
        return not decision.tight and (opening.placement.checkpointing or not decision.checkpointing)

    if agree(enough):
        return inputs
    progress.note("no fresh LoRA is trained beside the fit: memory may run out; --control fresh-lora trains it")
    return replace(inputs, room=False)
