"""Which ways to compose are compared, each with the work that comes before its first forward pass; the controls of a
sceptic among them: a new LoRA on the same records, and adapters that know nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar

import torch

from loracli.adapters.adapter import LoraAdapter, LoraModule, module_names
from loracli.algebra.factors import Factors, norm
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method
from loracli.comparison.inputs import CompareInputs
from loracli.comparison.settings import (
    ALL,
    DATA_FREE,
    DATAMIX,
    FITTED_MIXINGS,
    RANDOM,
    UNIFORM,
    WEIGHTS,
    needs_records,
    records_needed,
)
from loracli.composition.attached import MixingPoint, of_factors, of_method, of_recipe, of_weights, weighted
from loracli.composition.composition import CPU, OwnMoments, compose_module, updates_of
from loracli.composition.fitted import (
    Calibration,
    check_own_records,
    fit_level,
    level_cost,
    moments_cost,
    own_moments,
    regressed,
    search_cost,
    search_weights,
)
from loracli.errors import UsageError
from loracli.evaluation.comparison import RowKind, Skipped
from loracli.fitting.control import FreshTraining
from loracli.fitting.mixing import Layout, make_layout
from loracli.fitting.settings import FRESH_LORA
from loracli.fitting.work import Cost

_DRAWS = 5  # of random adapters


def random_adapters(adapters: Sequence[LoraAdapter], *, seed: int) -> list[LoraAdapter]:
    """Each adapter with factors drawn from a normal distribution in place of its own, of the same shapes, scaled so
    that |dW|_F of every module stays as it is; without lora_bias."""
    return [
        replace(
            adapter, modules={name: _random_weights(m, f"{seed}:{index}:{name}") for name, m in adapter.modules.items()}
        )
        for index, adapter in enumerate(adapters)
    ]


def _random_weights(module: LoraModule, key: str) -> LoraModule:
    factors = module.factors
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    lora_A = torch.randn(factors.lora_A.shape, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(factors.lora_B.shape, generator=generator, dtype=torch.float64)
    drawn = Factors(lora_A, lora_B, factors.scaling)
    size = norm(drawn)
    share = math.sqrt(norm(factors) / size) if size > 0 else 0.0
    dtype = factors.lora_A.dtype
    return replace(module, factors=Factors((lora_A * share).to(dtype), (lora_B * share).to(dtype), factors.scaling))


def train_fresh_lora(calibration: Calibration, layout: Layout, adapters: Sequence[LoraAdapter]) -> MixingPoint:
    """A new LoRA of the composition's rank on the adapters' modules, as `FreshTraining` trains it.

    Raises:
        NonFiniteLoss: naming the records of a batch.
        UsageError: if an adapter changes experts.
    """
    with calibration.engine(adapters, layout.modules) as engine:
        fresh, theta, passes = _training_of(calibration, layout).run(engine, adapters)
    factors = {name: Factors(*pair) for name, pair in zip(layout.modules, fresh.factors(theta), strict=True)}
    return of_factors(factors, note=f"{fresh.numbers} numbers, stopped after {passes:.1f} passes")


def _training_of(calibration: Calibration, layout: Layout) -> FreshTraining:
    return FreshTraining(layout, calibration.examples, calibration.data.training, calibration.settings)


_T = TypeVar("_T")


def _nothing_known() -> None:
    """Of most rows."""


@dataclass(frozen=True)
class Candidate:
    """A row to be.

    Args:
        name: of the row.
        kind: of the row.
        compose: what is set on the model; raises ValueError where the adapters cannot be honoured.
        cost: of it and all its draws, at most.
        fitted: whether it attaches the adapters itself, so that it comes before the comparison does.
        by_name: whether it was asked for by name, so that it may not be left out.
        more: further draws of what `compose` gives, where the row is the mean of all.
        check: raises as `compose` does for what is known before any work.
    """

    name: str
    kind: RowKind
    compose: Callable[[], MixingPoint]
    cost: Cost = Cost()  # noqa: RUF009  # frozen
    fitted: bool = False
    by_name: bool = True
    more: tuple[Callable[[], MixingPoint], ...] = ()
    check: Callable[[], None] = _nothing_known

    @property
    def draws(self) -> tuple[Candidate, ...]:
        """One for each draw; itself alone where there is one."""
        shared = self.cost * (1 / (1 + len(self.more)))
        return tuple(replace(self, compose=one, cost=shared, more=()) for one in (self.compose, *self.more))

    def composed(self, skipped: list[Skipped]) -> MixingPoint | None:
        """What is set; None with an entry in `skipped` where the adapters cannot be honoured.

        Raises:
            UsageError: in its place, if the row was asked for by name.
        """
        return self._tried(self.compose, skipped)

    def possible(self, skipped: list[Skipped]) -> bool:
        """Whether nothing that is known beforehand speaks against the row; else as `composed`."""

        def known() -> bool:
            self.check()
            return True

        return self._tried(known, skipped) is not None

    def _tried(self, work: Callable[[], _T], skipped: list[Skipped]) -> _T | None:
        try:
            return work()
        except (ValueError, UsageError) as error:
            if self.by_name:
                raise UsageError(f"{self.name} cannot be computed here: {error}", hint=_way_out(error)) from None
            skipped.append(Skipped(self.name, str(error)))
            return None


def _way_out(error: Exception) -> str:
    return getattr(error, "hint", None) or "leave it out of --methods, or compare `data-free` or `all` of them"


def candidates(
    inputs: CompareInputs, calibration: Calibration | None, skipped: list[Skipped], device: torch.device = CPU
) -> list[Candidate]:
    """Base, ingredients, methods, weights, fits and controls; those of `all` that cannot be had go into `skipped`.

    Methods are computed on the device.

    Raises:
        UsageError: if one that was asked for by name cannot be had, as far as that is known beforehand.
    """
    layout, adapters, n = inputs.layout, inputs.adapters, inputs.layout.adapters
    rows = [Candidate("base", "base", partial(weighted, layout, [0.0] * n))]
    for place, reference in enumerate(inputs.references):
        alone = [float(place == other) for other in range(n)]
        rows.append(Candidate(reference, "ingredient", partial(weighted, layout, alone)))

    @cache
    def moments() -> OwnMoments:
        assert calibration is not None
        return own_moments(calibration, inputs.owners, adapters, layout)

    for name, by_name in _names(inputs).items():
        if calibration is None and needs_records(name):
            skipped.append(Skipped(name, ": ".join(records_needed(name))))
            continue
        rows.append(_method(name, inputs, calibration, by_name, moments, device))
    if inputs.weights is not None:
        rows.append(Candidate(WEIGHTS, "method", partial(of_weights, inputs.weights, adapters, layout)))
    rows += [Candidate(one.row, "fit", partial(one.point, adapters, layout)) for one in inputs.recipes]
    if calibration is not None:
        rows += _controls(inputs, calibration)
    return [row for row in rows if row.possible(skipped)]


def _names(inputs: CompareInputs) -> dict[str, bool]:
    """The methods, each with whether it was asked for by name; `uniform` is always there, to be compared with."""
    asked = inputs.settings.methods
    names = {UNIFORM: False} if inputs.layout.adapters > 1 else {}
    for word in asked:
        if word in (ALL, DATA_FREE):
            every = (*METHODS, *FITTED_MIXINGS) if word == ALL else tuple(n for n in METHODS if not needs_records(n))
            names = {**{name: False for name in every}, **names}
    return names | {word: True for word in asked if word not in (ALL, DATA_FREE)}


def _method(
    name: str,
    inputs: CompareInputs,
    calibration: Calibration | None,
    by_name: bool,
    moments: Callable[[], OwnMoments],
    device: torch.device,
) -> Candidate:
    layout, adapters, options = inputs.layout, inputs.adapters, inputs.settings.options_of(name)
    if not needs_records(name):
        merge = partial(of_method, METHODS[name], options, adapters, layout, device)
        return Candidate(name, "method", merge, by_name=by_name, check=partial(_check_updates, METHODS[name], adapters))
    assert calibration is not None
    if name in FITTED_MIXINGS:
        rung, cost = partial(_rung, name, inputs, calibration), _cost_of_level(name, inputs, calibration)
        return Candidate(name, "method", rung, cost, fitted=True, by_name=by_name)
    if METHODS[name].regress is not None:

        def regress() -> MixingPoint:
            return regressed(METHODS[name], moments(), adapters, device)

        cost = moments_cost(calibration, layout.adapters)
        check = partial(check_own_records, name, inputs.owners, inputs.references)
        return Candidate(name, "method", regress, cost, fitted=True, by_name=by_name, check=check)
    search = partial(search_weights, METHODS[name], options, calibration, adapters, layout)
    cost, installed = search_cost(METHODS[name], calibration), METHODS[name].check_installed
    return Candidate(name, "method", search, cost, fitted=True, by_name=by_name, check=installed)


def _check_updates(method: Method, adapters: Sequence[LoraAdapter]) -> None:
    """Raises ValueError if it cannot honour the adapters, as far as that is known before they are merged."""
    if method.merge is not None:
        for name in module_names(adapters):
            method.check_updates(updates_of(adapters, name))


def _cost_of_level(name: str, inputs: CompareInputs, calibration: Calibration) -> Cost:
    """Of none that the records are too few for: whoever composes it will say so."""
    try:
        return level_cost(name, calibration, inputs.adapters, inputs.references, inputs.layout)
    except UsageError:
        return Cost()


def _controls(inputs: CompareInputs, calibration: Calibration) -> list[Candidate]:
    wanted, rows = inputs.settings.controls, []
    if wanted.fresh_lora:
        train = partial(train_fresh_lora, calibration, inputs.layout, inputs.adapters)
        cost = _training_of(calibration, inputs.layout).cost
        rows.append(Candidate(FRESH_LORA, "control", train, cost, fitted=True))
    if wanted.random:
        cost = _cost_of_level(_random_kind(inputs), inputs, calibration) * _DRAWS
        first, *more = (partial(_random, inputs, calibration, draw) for draw in range(_DRAWS))
        rows.append(Candidate(RANDOM, "control", first, cost, fitted=True, more=tuple(more)))
    return rows


def _rung(name: str, inputs: CompareInputs, calibration: Calibration) -> MixingPoint:
    mixing, note = fit_level(name, calibration, inputs.adapters, inputs.references, inputs.layout)
    return of_recipe(mixing, inputs.adapters, inputs.layout, note=note)


def _random(inputs: CompareInputs, calibration: Calibration, draw: int) -> MixingPoint:
    """The fit on random adapters, as factors: where it is measured, the true ones are attached."""
    drawn = random_adapters(inputs.adapters, seed=calibration.settings.seed + draw)
    kind = _random_kind(inputs)
    mixing, _ = fit_level(kind, calibration, drawn, inputs.references, inputs.layout)
    factors = {name: compose_module(mixing, drawn, name) for name in module_names(drawn)}
    return of_factors(factors, note=f"{kind} on random directions of the same norms")


def _random_kind(inputs: CompareInputs) -> str:
    return inputs.recipes[0].recipe.mixing.kind if inputs.recipes else "module"


def datamix_candidate(adapter: LoraAdapter) -> Candidate:
    """The control adapter by itself."""
    layout = make_layout([adapter])
    return Candidate(DATAMIX, "control", partial(weighted, layout, [1.0]))
