"""Which ways to compose are compared: the rows to be, each with the work that comes before its first forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loracli.adapters.adapter import LoraAdapter, module_names
from loracli.algebra.methods import METHODS
from loracli.comparison.controls import random_adapters, train_fresh_lora
from loracli.comparison.inputs import CompareInputs
from loracli.comparison.settings import ALL, DATA_FREE, DATAMIX, FRESH_LORA, RANDOM, RUNGS
from loracli.composition.attached import Composition, of_factors, of_method, of_recipe, weighted
from loracli.composition.composition import compose_module
from loracli.composition.fitted import PAPER, SEARCH_RECORDS, Calibration, fit_rung, search_weights
from loracli.errors import UsageError
from loracli.evaluation.comparison import RowKind, Skipped
from loracli.evaluation.statistics import FIT
from loracli.fitting.mixing import make_layout
from loracli.fitting.settings import AUTO, AUTO_PASSES, PASSES

UNIFORM = "uniform"
EVALUATIONS = 40  # of a search, at most: what the progress bar expects


@dataclass(frozen=True)
class Candidate:
    """A row to be.

    Args:
        name: of the row.
        kind: of the row.
        compose: what is set on the model; raises ValueError where the adapters cannot be honoured.
        cost: of it: tokens forward plus tokens backward.
        fitted: whether it attaches the adapters itself, so that it comes before the comparison does.
        by_name: whether it was asked for by name, so that it may not be left out.
    """

    name: str
    kind: RowKind
    compose: Callable[[], Composition]
    cost: int = 0
    fitted: bool = False
    by_name: bool = True

    def composed(self, skipped: list[Skipped]) -> Composition | None:
        """What is set; None with an entry in `skipped` where the adapters cannot be honoured.

        Raises:
            UsageError: in its place, if the row was asked for by name.
        """
        try:
            return self.compose()
        except (ValueError, UsageError) as error:
            if self.by_name:
                raise UsageError(f"{self.name} cannot be had here: {error}", hint=_way_out(error)) from None
            skipped.append(Skipped(self.name, str(error)))
            return None


def _way_out(error: Exception) -> str:
    return getattr(error, "hint", None) or "leave it out of --methods, or compare `data-free` or `all` of them"


def candidates(inputs: CompareInputs, calibration: Calibration | None, skipped: list[Skipped]) -> list[Candidate]:
    """Base, ingredients, methods, fit and controls; those of `all` that cannot be had go into `skipped`.

    Raises:
        UsageError: if a method that was asked for by name needs calibration records and there are none.
    """
    layout, adapters, n = inputs.layout, inputs.adapters, inputs.layout.adapters
    rows = [Candidate("base", "base", partial(weighted, layout, [0.0] * n))]
    for place, reference in enumerate(inputs.references):
        alone = [float(place == other) for other in range(n)]
        rows.append(Candidate(reference, "ingredient", partial(weighted, layout, alone)))
    for name, by_name in _names(inputs).items():
        if calibration is None and _needs_data(name):
            if by_name:
                raise UsageError(f"{name} has to be fitted", hint="give calibration records with --fit-data")
            skipped.append(Skipped(name, "has to be fitted: give calibration records with --fit-data"))
            continue
        rows.append(_method(name, inputs, calibration, by_name))
    if inputs.recipe is not None:
        rows.append(Candidate(FIT, "fit", partial(of_recipe, inputs.recipe.mixing, adapters, layout)))
    if calibration is not None:
        rows += _controls(inputs, calibration)
    return rows


def _names(inputs: CompareInputs) -> dict[str, bool]:
    """The methods, each with whether it was asked for by name; `uniform` is always there, to be compared with."""
    asked = inputs.settings.methods
    names = {UNIFORM: False} if inputs.layout.adapters > 1 else {}
    for word in asked:
        if word in (ALL, DATA_FREE):
            every = (*METHODS, *RUNGS) if word == ALL else tuple(n for n in METHODS if not _needs_data(n))
            names = {**{name: False for name in every}, **names}
    return names | {word: True for word in asked if word not in (ALL, DATA_FREE)}


def _needs_data(name: str) -> bool:
    return name not in METHODS or METHODS[name].search is not None


def _method(name: str, inputs: CompareInputs, calibration: Calibration | None, by_name: bool) -> Candidate:
    layout, adapters, options = inputs.layout, inputs.adapters, inputs.settings.options
    if not _needs_data(name):
        return Candidate(name, "method", partial(of_method, METHODS[name], options, adapters, layout), by_name=by_name)
    assert calibration is not None
    tokens = sum(len(example.input_ids) for example in calibration.examples)
    if name in RUNGS:
        passes = {PAPER: 1.0, AUTO: AUTO_PASSES}.get(name, PASSES)
        if name != PAPER and calibration.settings.passes is not None:
            passes = calibration.settings.passes
        return Candidate(
            name,
            "method",
            partial(_rung, name, inputs, calibration),
            round(2 * passes * tokens),
            fitted=True,
            by_name=by_name,
        )
    share = min(1.0, SEARCH_RECORDS / len(calibration.examples))
    search = partial(search_weights, METHODS[name], options, calibration, adapters, layout)
    return Candidate(name, "method", search, round(EVALUATIONS * share * tokens), fitted=True, by_name=by_name)


def _controls(inputs: CompareInputs, calibration: Calibration) -> list[Candidate]:
    wanted, rows = inputs.settings.controls, []
    tokens = sum(len(example.input_ids) for example in calibration.examples)
    cost = round(2 * (calibration.settings.passes or PASSES) * tokens)
    if wanted.fresh_lora:
        train = partial(train_fresh_lora, calibration, inputs.layout, inputs.adapters, rank=max(inputs.layout.sizes))
        rows.append(Candidate(FRESH_LORA, "control", train, cost, fitted=True))
    if wanted.random:
        rows.append(Candidate(RANDOM, "control", partial(_random, inputs, calibration), cost, fitted=True))
    return rows


def _rung(name: str, inputs: CompareInputs, calibration: Calibration) -> Composition:
    fitted = fit_rung(name, calibration, inputs.adapters, inputs.references, inputs.layout)
    return of_recipe(fitted.mixing, inputs.adapters, inputs.layout, note=fitted.note)


def _random(inputs: CompareInputs, calibration: Calibration) -> Composition:
    """The fit on random adapters, as factors: where it is measured, the true ones are attached."""
    drawn = random_adapters(inputs.adapters, seed=calibration.settings.seed)
    kind = "module" if inputs.recipe is None else inputs.recipe.mixing.kind
    fitted = fit_rung(kind, calibration, drawn, inputs.references, inputs.layout)
    factors = {name: compose_module(fitted.mixing, drawn, name) for name in module_names(drawn)}
    return of_factors(factors, note=f"{kind} on random directions of the same norms")


def datamix_candidate(adapter: LoraAdapter) -> Candidate:
    """The control adapter by itself."""
    layout = make_layout([adapter])
    return Candidate(DATAMIX, "control", partial(weighted, layout, [1.0]))
