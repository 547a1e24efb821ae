"""What each layer of a recipe does, against weights by hand, factors by hand, and sums over records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loracli.adapters.names import layer
from loracli.comparison.compare import run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.layers import LayerEffects, _order, _reading, layer_effects
from loracli.comparison.settings import CompareSettings
from loracli.composition.attached import of_factors
from loracli.composition.composition import compose_module
from loracli.errors import UsageError
from loracli.fitting.engine import Engine
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Scores
from loracli.model.session import Opening, open_session
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.recipe.record import RecipeMixing
from tests.heard import Heard
from tests.tiny import random_records, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, two_adapters: tuple[Path, Path]) -> Path:
    """module.json, core.json and adapter.json, of a fit on val.jsonl each or by hand; test.jsonl has others."""
    folder = tmp_path_factory.mktemp("layers")
    write_jsonl(folder / "val.jsonl", random_records(40, seed=1))
    write_jsonl(folder / "test.jsonl", random_records(8, seed=2))
    for kind in ("module", "core"):
        fitted = fit_mixing(
            [str(path) for path in two_adapters],
            folder / "val.jsonl",
            base=str(tiny_base),
            settings=FitSettings(mixing=kind, passes=2, max_length=40, holdout=0.2, control="none"),
        )
        fitted.save(folder / f"{kind}.json")
    recipe = load_recipe(folder / "module.json")
    replace(recipe, mixing=RecipeMixing("adapter", {"*": (0.7, -0.4)}, 2)).save(folder / "adapter.json")
    return folder


def effects(folder: Path, base: Path, name: str) -> LayerEffects:
    return layer_effects(folder / f"{name}.json", folder / "test.jsonl", base=str(base))


def without(recipe: Recipe, present: Recipe, out: str) -> dict[str, dict[str, float]]:
    """The recipe's weights as tables by hand, 0 in one layer, where the other recipe says that an adapter acts."""
    tables: dict[str, dict[str, float]] = {}
    for module in recipe.modules:
        both = zip(recipe.weights_of(module.name), present.weights_of(module.name), strict=True)
        for place, (weight, here) in enumerate(both, 1):
            if weight is not None and here is not None:
                tables.setdefault(f"#{place}", {})[module.name] = 0.0 if layer(module.name) == out else weight
    return tables


@pytest.mark.parametrize("name", ["module", "adapter"])
def test_a_layer_that_is_left_out_costs_what_its_weights_at_zero_do(folder: Path, tiny_base: Path, name: str) -> None:
    found = effects(folder, tiny_base, name)
    recipe, present = (load_recipe(folder / f"{one}.json") for one in (name, "module"))
    assert [effect.layer for effect in found.layers] == [f"model.layers.{number}" for number in range(3)]
    assert sum(effect.modules for effect in found.layers) == len(recipe.modules)
    for effect in found.layers:
        settings = CompareSettings(
            ("uniform",), weights=without(recipe, present, effect.layer), fit=FitSettings(max_length=40)
        )
        inputs = prepare_comparison(
            folder / "test.jsonl", recipe=folder / f"{name}.json", base=str(tiny_base), settings=settings
        )
        table = run_comparison(inputs)
        assert effect.nats_per_token == pytest.approx(table.row("weights").nats_per_token, abs=1e-6)
        assert found.nats_per_token == pytest.approx(table.row("fit").nats_per_token, abs=1e-6)
        assert effect.change == pytest.approx(effect.nats_per_token - found.nats_per_token, abs=1e-12)
        assert effect.change != 0 and (found.records, found.scored_tokens) == (table.records, table.scored_tokens)


def test_of_factors_a_layer_is_left_out_whole(folder: Path, tiny_base: Path) -> None:
    """A mixing that is no weight for each adapter, against its factors with lora_B at 0, scored apart."""
    found = effects(folder, tiny_base, "core")
    inputs = prepare_comparison(folder / "test.jsonl", recipe=folder / "core.json", base=str(tiny_base))
    mixing = inputs.recipes[0].recipe.mixing
    with open_session(Opening(inputs.base, inputs.adapters, 1024, 40)) as session:
        examples = session.render(inputs.test)
        with session.attached(inputs.adapters, inputs.layout.modules, examples) as objective:
            for effect in found.layers:
                factors = {name: compose_module(mixing, inputs.adapters, name) for name in inputs.layout.modules}
                for name, whole in factors.items():
                    if layer(name) == effect.layer:
                        factors[name] = replace(whole, lora_B=torch.zeros_like(whole.lora_B))
                point = of_factors(factors)
                point.mixing.apply(objective.attached, point.theta)
                scores = objective.score(session.batches(examples), len(examples))
                assert effect.nats_per_token == pytest.approx(scores.nats_per_token, abs=1e-6)


def test_a_layer_whose_weights_are_zero_changes_exactly_nothing(folder: Path, tiny_base: Path) -> None:
    recipe = load_recipe(folder / "module.json")
    out = "model.layers.1"
    weights = {m: (0.0,) * len(w) if layer(m) == out else w for m, w in recipe.mixing.weights.items()}
    replace(recipe, mixing=replace(recipe.mixing, weights=weights)).save(folder / "without.json")
    changes = {e.layer: (e.change, e.standard_error) for e in effects(folder, tiny_base, "without").layers}
    assert changes[out] == (0.0, 0.0) and all(change != 0 for name, (change, _) in changes.items() if name != out)


def test_the_standard_error_is_that_of_the_paired_difference_and_each_layer_takes_one_pass(
    folder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Scores] = []
    inner = Engine.score

    def score(self: Engine, *words: object, **options: object) -> Scores:
        seen.append(inner(self, *words, **options))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(Engine, "score", score)
    found = effects(folder, tiny_base, "module")
    whole, *left = seen
    assert len(left) == len(found.layers) == 3
    tokens = whole.tokens.tolist()
    for effect, scores in zip(found.layers, left, strict=True):
        more = [a - b for a, b in zip(scores.nats.tolist(), whole.nats.tolist(), strict=True)]
        n, ratio = len(more), sum(more) / sum(tokens)
        squares = sum((d - ratio * t) ** 2 for d, t in zip(more, tokens, strict=True))
        assert effect.standard_error == pytest.approx(math.sqrt(n / (n - 1) * squares) / sum(tokens))
        assert effect.change == pytest.approx(ratio)
    (folder / "one.jsonl").write_text((folder / "test.jsonl").read_text().splitlines()[0])
    one = layer_effects(folder / "module.json", folder / "one.jsonl", base=str(tiny_base))
    assert one.records == 1 and [effect.standard_error for effect in one.layers] == [None] * 3


def test_records_of_the_fit_are_counted_and_the_bar_is_told_of_every_pass(folder: Path, tiny_base: Path) -> None:
    class Told(Heard):
        done = total = 0

        def begin(self, task: str, total: int | None, unit: str) -> None:
            self.total = total or 0

        def advance(self, task: str, amount: int, status: str = "") -> None:
            self.done += amount

    told = Told()
    known = layer_effects(folder / "module.json", folder / "val.jsonl", base=str(tiny_base), progress=told)
    assert known.repeated_records == load_recipe(folder / "module.json").data[0].records > 0
    assert any("stand in the calibration data too" in warning for warning in told.warnings)
    assert told.done == told.total > 0


def test_records_are_read_as_the_fit_read_its_own_and_damage_is_left_out(folder: Path) -> None:
    recipe = load_recipe(folder / "module.json")

    def read(**settings: int | float | str | bool | None) -> FitSettings:
        return _reading(replace(recipe, fit=replace(recipe.fit, settings={**recipe.fit.settings, **settings})))

    assert read().max_length == 40
    assert read(fields="prompt=q", batch_tokens=7, seed=3) == FitSettings(
        max_length=40, fields="prompt=q", batch_tokens=7
    )
    assert read(max_length="many", batch_tokens=True, fields=4, format=None) == FitSettings()
    with pytest.raises(UsageError, match="--max-length -1 is not between"):
        read(max_length=-1)


def test_layers_stand_in_the_order_of_their_numbers_and_what_belongs_to_none_last() -> None:
    names = ["lm_head", *(f"model.layers.{number}.mlp.up_proj" for number in (10, 2, 0)), "model.embed_tokens"]
    assert sorted(names, key=_order) == [
        *(f"model.layers.{number}.mlp.up_proj" for number in (0, 2, 10)),
        "lm_head",
        "model.embed_tokens",
    ]
