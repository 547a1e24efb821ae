"""What a kind of module says of itself agrees with how updates are packed, and with what PEFT's layers hold."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loracli.adapters.kinds import KINDS, BaseModule, ModuleKind, kind_of
from loracli.adapters.names import target_of
from loracli.algebra.factors import Factors
from loracli.algebra.packing import pack

CARRIED = [kind for kind in KINDS.values() if kind.carriers or kind.packing]


def test_every_name_that_a_recipe_may_have_is_a_kind() -> None:
    assert set(KINDS) == set(get_args(ModuleKind))
    assert all(kind.name == name for name, kind in KINDS.items())


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_does_not_change(kind: object) -> None:
    with pytest.raises(AttributeError):
        kind.biased = True  # type: ignore[attr-defined]


@given(st.sampled_from(CARRIED), *[st.integers(1, 4)] * 4)
def test_updates_are_packed_into_matrices_of_the_shapes_that_the_kind_says(
    kind: object, count: int, rank: int, inner: int, out: int
) -> None:
    kind = KINDS[kind.name]  # type: ignore[attr-defined]
    count = count if kind.packing else 1
    names = kind.updates("a.b", count)
    assert len(set(names)) == count and {target_of(name) for name in names} == {"a.b"}
    updates = [Factors(torch.ones(rank, inner), torch.ones(out, rank)) for _ in names]
    packed = pack(kind.packing, updates, rank + 1)
    shapes = kind.shapes(BaseModule("a.b", kind.name, inner, out), rank + 1, count)
    assert (tuple(packed.lora_A.shape), tuple(packed.lora_B.shape)) == shapes


def test_only_one_of_several_updates_is_numbered_unless_it_is_an_experts() -> None:
    assert {name: kind.updates("a", 1) for name, kind in KINDS.items() if kind.updates("a", 1) != ("a",)} == {
        "experts": ("a[0]",)
    }


@pytest.mark.parametrize(
    ("kind", "base", "carried"),
    [
        ("linear", "linear", True),
        ("linear", "conv1d", True),
        ("linear", "embedding", False),
        ("linear", "parameter", False),
        ("embedding", "embedding", True),
        ("embedding", "linear", False),
        ("parameter", "parameter", True),
        ("experts", "experts", True),
        ("experts", "linear", False),
        ("convolution", "other", False),
        ("other", "other", False),
    ],
)
def test_a_kind_is_carried_by_the_modules_that_peft_would_put_it_on(
    kind: ModuleKind, base: ModuleKind, carried: bool
) -> None:
    assert (base in KINDS[kind].carriers) == carried
    assert kind_of(BaseModule("a", kind, 1, 1)) is KINDS[kind]
