"""The ladder of mixings: each level contains the one below, and says the same update in more numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.fitting.mixing import (
    DiagonalMixing,
    FactorMixing,
    Layout,
    Mixing,
    count_numbers,
    make_diagonal,
    make_layout,
    make_mixing,
)
from loracli.fitting.search import LADDERS
from loracli.model.attach import AttachedModel, attach
from loracli.recipe.record import INLINE_KINDS, MIXING_KINDS, MixingKind, group_name
from tests.tiny import logits, make_adapter, make_base

STEPS = sorted({step for ladder in LADDERS.values() for step in pairwise(ladder)})
SETS = ("one", "two", "three")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-NeoX, which normalises in float64 where the model is float64."""
    return make_base(tmp_path_factory.mktemp("mixing") / "base", "neox")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, list[LoraAdapter]]:
    """One adapter; two of different ranks, of which each lacks modules of the other; and a third on one layer and the
    embedding, which stands outside the layers."""
    folder = tmp_path_factory.mktemp("adapters")
    attention, dense = "query_key_value", "dense_4h_to_h"
    made = [
        make_adapter(folder / "a", base, targets=(attention, dense), rank=3, alpha=6, seed=1),
        make_adapter(folder / "b", base, targets=(attention, "dense"), rank=2, alpha=3, seed=2, use_rslora=True),
        make_adapter(folder / "c", base, targets=(attention, "embed_in"), rank=1, seed=3, exclude_modules=r".*\.0\..*"),
    ]
    adapters = [read_adapter(str(path)) for path in made]
    return {"one": adapters[:1], "two": adapters[:2], "three": adapters}


@contextmanager
def attached_to(
    base: Path, adapters: list[LoraAdapter], *, canonical: bool = True
) -> Iterator[tuple[AttachedModel, Layout]]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval().requires_grad_(False)
    layout = make_layout(adapters)
    with attach(model, adapters, layout.modules, canonical=canonical) as attached:
        yield attached, layout


def updates(attached: AttachedModel, mixing: Mixing, theta: Tensor) -> list[Tensor]:
    """L products B M A (out, in), float64."""
    if isinstance(mixing, FactorMixing):
        return [b.double() @ a.double() for a, b in mixing.factors(theta)]
    pairs = zip(attached.factors(), mixing.matrices(theta), strict=True)
    return [lora_B @ matrix @ lora_A for (lora_A, lora_B), matrix in pairs]


def attached_logits(attached: AttachedModel, mixing: Mixing, theta: Tensor) -> Tensor:
    mixing.apply(attached, theta)
    return logits(attached.model)


def random_theta(mixing: Mixing, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mixing.numbers, generator=generator, dtype=torch.float64).to(mixing.dtype)


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize(("lower", "upper"), STEPS)
def test_a_level_says_the_update_of_the_one_below(
    base: Path, every: dict[str, list[LoraAdapter]], lower: MixingKind, upper: MixingKind, which: str
) -> None:
    """Products B M A and logits; to float64's rounding, from `factors` on to float32's, in which those are trained."""
    with attached_to(base, every[which]) as (attached, layout):
        below, above = (make_mixing(attached, layout, kind) for kind in (lower, upper))
        theta = random_theta(below)
        lifted = above.lift(below, theta)
        assert lifted.shape == (above.numbers,) and lifted.dtype == above.dtype
        tolerance = 1e-6 if upper == "factors" else 1e-12
        for name, one, other in zip(
            layout.modules, updates(attached, below, theta), updates(attached, above, lifted), strict=True
        ):
            assert float(one.abs().max()) > 1e-2
            assert float((one - other).abs().max()) <= tolerance * float(one.abs().max()), name
        ours, theirs = (attached_logits(attached, m, t) for m, t in ((below, theta), (above, lifted)))
        assert float((theirs - attached_logits(attached, below, 0 * theta)).abs().max()) > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e3 * tolerance)


def test_every_level_of_a_ladder_is_tested_against_the_one_below() -> None:
    assert {upper for _, upper in STEPS} == {*MIXING_KINDS} - {"adapter"}


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("kind", MIXING_KINDS)
def test_the_same_weights_everywhere_are_the_plain_sum_of_the_adapters(
    base: Path, every: dict[str, list[LoraAdapter]], kind: MixingKind, which: str
) -> None:
    """Against the adapters' own s B A and against `set_weights`, in the files' basis too where that is what is
    attached."""
    adapters, weights = every[which], [0.7, -1.3, 0.4][: len(every[which])]
    for canonical in {True, kind not in INLINE_KINDS}:
        with attached_to(base, adapters, canonical=canonical) as (attached, layout):
            mixing = make_mixing(attached, layout, kind)
            theta = mixing.constant(weights)
            tolerance = 1e-6 if kind == "factors" else 1e-12
            for name, ours in zip(layout.modules, updates(attached, mixing, theta), strict=True):
                parts = [
                    (w, a.modules[name].factors) for w, a in zip(weights, adapters, strict=True) if name in a.modules
                ]
                expected = torch.stack([w * f.delta_weight().double() for w, f in parts]).sum(dim=0)
                assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max()), name
            ours = attached_logits(attached, mixing, theta)
            attached.set_weights(torch.tensor(weights, dtype=torch.float64).expand(len(layout.modules), -1))
            torch.testing.assert_close(ours, logits(attached.model), rtol=0, atol=1e3 * tolerance)


def counted_by_hand(adapters: list[LoraAdapter], kind: MixingKind) -> int:
    """Straight from the tables in the documentation."""
    modules = {name for adapter in adapters for name in adapter.modules}
    ranks = {name: [a.modules[name].factors.rank for a in adapters if name in a.modules] for name in modules}
    if kind == "rank":
        return sum(sum(row) for row in ranks.values())
    if kind == "core":
        return sum(sum(row) ** 2 for row in ranks.values())
    if kind == "factors":
        shapes = [m.factors.delta_weight().shape for a in adapters for m in a.modules.values()]
        every = [m.factors.rank for a in adapters for m in a.modules.values()]
        return sum(rank * (shape[0] + shape[1]) for rank, shape in zip(every, shapes, strict=True))
    return len({(group_name(name, kind), i) for i, adapter in enumerate(adapters) for name in adapter.modules})


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("kind", MIXING_KINDS)
def test_the_numbers_of_a_level_are_counted_before_anything_is_attached(
    base: Path, every: dict[str, list[LoraAdapter]], kind: MixingKind, which: str
) -> None:
    adapters = every[which]
    with attached_to(base, adapters) as (attached, layout):
        mixing = make_mixing(attached, layout, kind)
    expected = counted_by_hand(adapters, kind)
    assert mixing.kind == kind
    assert mixing.numbers == count_numbers(adapters, layout, kind) == expected
    assert len(mixing.constant([1.0] * len(adapters))) == expected


def test_the_ladder_of_two_adapters_in_numbers(every: dict[str, list[LoraAdapter]]) -> None:
    """Two layers; ranks 3 and 2 in one module, 3 alone in another, 2 alone in a third."""
    layout = make_layout(every["two"])
    counts = {kind: count_numbers(every["two"], layout, kind) for kind in MIXING_KINDS}
    assert counts == {
        "adapter": 2,
        "layer": 2 * 2,
        "module": 2 * 4,
        "rank": 2 * (5 + 3 + 2),
        "core": 2 * (25 + 9 + 4),
        "factors": 2 * (5 * (32 + 96) + 3 * (48 + 32) + 2 * (32 + 32)),
    }


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("kind", INLINE_KINDS)
def test_by_group_names_the_weight_of_every_adapter_and_none_where_it_changes_nothing(
    every: dict[str, list[LoraAdapter]], kind: MixingKind, which: str
) -> None:
    adapters = every[which]
    layout = make_layout(adapters)
    mixing = make_diagonal(layout, kind)
    theta = random_theta(mixing)
    table = mixing.by_group(theta)
    assert list(table) == list(dict.fromkeys(group_name(name, kind) for name in layout.modules))
    for group, row in table.items():
        changed = [any(group_name(name, kind) == group for name in adapter.modules) for adapter in adapters]
        assert [weight is not None for weight in row] == changed
    assert sorted(w for row in table.values() for w in row if w is not None) == sorted(theta.tolist())
    for name, ranks, matrix in zip(layout.modules, layout.ranks, mixing.matrices(theta), strict=True):
        row = table[group_name(name, kind)]
        expected = [row[i] for i, rank in enumerate(ranks) for _ in range(rank)]
        assert torch.equal(matrix, torch.diag(torch.tensor(expected, dtype=torch.float64))), name


def test_a_group_without_one_of_the_adapters_has_none(every: dict[str, list[LoraAdapter]]) -> None:
    """The third adapter changes the second layer and the embedding, and nothing else does the latter."""
    mixing = make_diagonal(make_layout(every["three"]), "layer")
    table = mixing.by_group(mixing.constant([1.0, 2.0, 3.0]))
    assert table == {
        "gpt_neox.embed_in": (None, None, 3.0),
        "gpt_neox.layers.0": (1.0, 2.0, None),
        "gpt_neox.layers.1": (1.0, 2.0, 3.0),
    }


def test_a_softmax_is_lifted_as_the_weights_that_it_gives(every: dict[str, list[LoraAdapter]]) -> None:
    layout = make_layout(every["three"])
    published = make_diagonal(layout, "module", softmax=True)
    theta = random_theta(published)
    above = make_diagonal(layout, "rank")
    for one, other in zip(published.matrices(theta), above.matrices(above.lift(published, theta)), strict=True):
        assert torch.equal(one, other)


def test_a_level_that_does_not_contain_another_refuses_it(base: Path, every: dict[str, list[LoraAdapter]]) -> None:
    with attached_to(base, every["two"]) as (attached, layout):
        core, factors = (make_mixing(attached, layout, kind) for kind in ("core", "factors"))
    with pytest.raises(AssertionError, match="module does not contain core"):
        make_diagonal(layout, "module").lift(core, random_theta(core))
    with pytest.raises(TypeError, match="not a mixing of the adapters"):
        core.lift(factors, factors.constant([1.0, 1.0]))
    assert isinstance(make_diagonal(layout, "rank"), DiagonalMixing)
