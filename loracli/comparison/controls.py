"""The baselines that a sceptic asks for: a new LoRA on the same records, and adapters that know nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.algebra.factors import Factors, norm
from loracli.calibration.batches import plan_batches
from loracli.comparison.settings import FRESH_LORA
from loracli.composition.attached import Composition, of_factors
from loracli.composition.fitted import Calibration
from loracli.errors import UsageError
from loracli.fitting.criterion import one_fold
from loracli.fitting.descent import WARM_UP, AdamW, Descent, plan_steps
from loracli.fitting.mixing import Layout, Mixing
from loracli.fitting.settings import PASSES
from loracli.model.attach import AttachedModel
from loracli.recipe.recipe import MixingKind

# A usual recipe for a LoRA on few records: lora_alpha twice the rank, so that the scaling is 2.
RATE, SCALING = 1e-3, 2.0
CHECKS_A_PASS = 2
PATIENCE = 4  # checks in a row that are worse than the best


def random_adapters(adapters: Sequence[LoraAdapter], *, seed: int) -> list[LoraAdapter]:
    """Each adapter with factors drawn from a normal distribution in place of its own, of the same shapes, scaled so
    that |dW|_F of every module stays as it is; without lora_bias."""
    return [
        replace(adapter, modules={name: _random(m, f"{seed}:{index}:{name}") for name, m in adapter.modules.items()})
        for index, adapter in enumerate(adapters)
    ]


def _random(module: LoraModule, key: str) -> LoraModule:
    factors = module.factors
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    lora_A = torch.randn(factors.lora_A.shape, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(factors.lora_B.shape, generator=generator, dtype=torch.float64)
    drawn = Factors(lora_A, lora_B, factors.scaling)
    size = norm(drawn)
    share = math.sqrt(norm(factors) / size) if size > 0 else 0.0
    dtype = factors.lora_A.dtype
    return replace(module, factors=Factors((lora_A * share).to(dtype), (lora_B * share).to(dtype), factors.scaling))


class FreshLora(Mixing):
    """A new LoRA on the modules of a layout: theta holds A of each module and then B of each.

    A is drawn as PEFT draws it, uniform within 1 / sqrt(in) (Kaiming, a = sqrt 5), and B is 0, so it starts at the base
    model.

    Args:
        layout: of the adapters that it stands beside.
        shapes: (in, out) of each module.
        rank: r.
        seed: of the draw.
    """

    kind: MixingKind = "factors"
    dtype = torch.float32

    def __init__(self, layout: Layout, shapes: Sequence[tuple[int, int]], rank: int, *, seed: int) -> None:
        self.layout = layout
        self._shapes = [(rank, width) for width, _ in shapes] + [(out, rank) for _, out in shapes]
        generator = torch.Generator().manual_seed(seed)
        drawn = [(2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width) for width, _ in shapes]
        zeros = torch.zeros(self.numbers - sum(a.numel() for a in drawn))
        self.start = torch.cat([*(a.flatten() for a in drawn), zeros])

    @property
    def numbers(self) -> int:
        return sum(rows * columns for rows, columns in self._shapes)

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """L pairs of lora_A (r, in) and lora_B (out, r), the scaling in B."""
        parts = torch.split(theta, [rows * columns for rows, columns in self._shapes])
        both = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        half = len(both) // 2
        return [(lora_A, SCALING * lora_B) for lora_A, lora_B in zip(both[:half], both[half:], strict=True)]

    def apply(self, attached: AttachedModel, theta: Tensor) -> None:
        attached.set_factors(self.factors(theta))

    def lift(self, lower: Mixing, theta: Tensor) -> Tensor:
        raise TypeError("a new LoRA contains no mixing of other adapters")

    def matrices(self, theta: Tensor) -> list[Tensor]:
        raise TypeError("a new LoRA is no mixing of other adapters")


def train_fresh_lora(
    calibration: Calibration, layout: Layout, adapters: Sequence[LoraAdapter], *, rank: int
) -> Composition:
    """A new LoRA of the rank on the adapters' modules, trained by AdamW on the calibration records within the budget of
    a fit, and stopped where the loss on its validation records was lowest.

    Raises:
        NonFiniteLoss: naming the records of a batch.
        UsageError: if an adapter changes experts.
    """
    settings, examples = calibration.settings, calibration.examples
    records = calibration.data.training
    fold = one_fold(examples, records, seed=settings.seed + 1)
    plan = plan_steps(fold.fitting, batch_tokens=settings.batch_tokens, seed=settings.seed)
    steps = max(1, round((settings.passes or PASSES) * plan.steps_a_pass))
    fresh = FreshLora(layout, _shapes(adapters, layout), rank, seed=settings.seed)
    adam = AdamW(fresh.start, steps=steps, rate=RATE, warm_up=max(1, round(WARM_UP * steps)))
    with calibration.engine(adapters, layout.modules) as (engine, _):
        engine.meter.stage(FRESH_LORA)
        descent = Descent(engine, fresh, fold.fitting, plan.step, adam, fresh.start)

        def check() -> float | None:
            if not fold.validation:
                return None
            batches = plan_batches(fold.validation, batch_tokens=settings.batch_tokens)
            return engine.score(fresh, descent.theta, batches, fold.validation).nats_per_token

        theta, at = _descend(descent, check, steps, max(1, plan.steps_a_pass // CHECKS_A_PASS))
    factors = {name: Factors(*pair) for name, pair in zip(layout.modules, fresh.factors(theta), strict=True)}
    return of_factors(factors, note=f"{fresh.numbers} numbers, stopped after {at / plan.steps_a_pass:.1f} passes")


def _descend(descent: Descent, check: Callable[[], float | None], steps: int, between: int) -> tuple[Tensor, int]:
    """Theta at the best check, and after how many steps it was; the last step's where nothing can be checked."""
    best, kept, kept_at, worse, done = math.inf, descent.theta, 0, 0, 0
    while done < steps and worse < PATIENCE:
        run = min(between, steps - done)
        descent.run(run)
        done += run
        loss = check()
        if loss is None or loss < best:
            best, kept, kept_at, worse = math.inf if loss is None else loss, descent.theta, done, 0
        else:
            worse += 1
    return kept, kept_at


def _shapes(adapters: Sequence[LoraAdapter], layout: Layout) -> list[tuple[int, int]]:
    """(in, out) of each module.

    Raises:
        UsageError: if one of them is a parameter with experts.
    """
    experts = next((name for a in adapters for name, m in a.targets.items() if m[0].kind == "experts"), None)
    if experts is not None:
        raise UsageError(f"a new LoRA cannot be trained on the experts of {experts}", hint="leave fresh-lora out")
    found = [next(a.modules[m].factors for a in adapters if m in a.modules) for m in layout.modules]
    return [(factors.in_features, factors.out_features) for factors in found]
