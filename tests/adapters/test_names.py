"""Tensor names come apart into module and part, however a trainer spelled them; other names are refused."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracli.adapters.names import (
    Part,
    TensorName,
    format_tensor_name,
    is_numbered,
    numbered_name,
    parse_tensor_name,
    target_of,
    whole_parameter,
)
from loracli.errors import MalformedAdapter, UnsupportedAdapter

PARTS: tuple[Part, ...] = get_args(Part)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
MEANT = {*WRAPPERS, *FACTORS, "base_model", "base_layer", "module", "experts"}  # words that a path does not keep
PATHS = st.lists(st.from_regex(r"[A-Za-z0-9_]{1,6}", fullmatch=True).filter(lambda w: w not in MEANT), min_size=1,
                 max_size=4)  # fmt: skip


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, TensorName]:
    """A tensor's name as some trainer may leave it, and what it means."""
    path, part = draw(PATHS), draw(st.sampled_from(PARTS))
    words = [*path, *["base_layer"] * draw(st.integers(0, 2))]
    name = draw(st.none() | st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True)) if part != "base_layer" else None
    inside = [] if name is None else [name]
    if part in ("lora_embedding_A", "lora_embedding_B"):
        words += [part, *inside]
    elif part == "lora_bias":
        words += ["lora_B", *inside, "bias"]
    elif part == "lora_magnitude_vector":
        words += [part, *inside, *["weight"] * draw(st.integers(0, 1))]
    else:
        words += [part, *inside, "weight"]
    prefixes = draw(st.integers(0, 3))
    words = [*["module"] * draw(st.integers(0, 2 * bool(prefixes))), *["base_model", "model"] * prefixes, *words]
    for wrapper in draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)):
        words.insert(draw(st.integers(0, len(words))), wrapper)
    return ".".join(words), TensorName(".".join(path), part)


@given(spellings())
def test_every_spelling_of_a_name_means_the_same_module_and_part(spelled: tuple[str, TensorName]) -> None:
    name, meant = spelled
    assert parse_tensor_name(name, where="file") == meant


@given(PATHS, st.sampled_from(PARTS))
def test_pefts_own_spelling_comes_back(path: list[str], part: Part) -> None:
    name = format_tensor_name(".".join(path), part)
    assert parse_tensor_name(name, where="file") == TensorName(".".join(path), part)
    assert whole_parameter(name) is None


WORDS = st.sampled_from([*sorted(MEANT), "model", "q", "weight", "bias", "modules_to_save", "original_module",
                         "token_adapter", "", "ä", "a b", "[0]"])  # fmt: skip


@given(st.lists(WORDS, max_size=6).map(".".join) | st.text(max_size=20))
def test_any_text_is_a_name_or_refused_with_the_file(name: str) -> None:
    whole = whole_parameter(name)
    try:
        found = parse_tensor_name(name, where="file")
    except (MalformedAdapter, UnsupportedAdapter) as error:
        assert "file" in str(error) and repr(name) in error.what
    else:
        assert found.module and found.part in PARTS and whole is None


@pytest.mark.parametrize("number", [0, 7, 127])
def test_a_numbered_name_leads_back_to_what_was_targeted(number: int) -> None:
    name = numbered_name("mlp.experts.down_proj", number)
    assert is_numbered(name) and target_of(name) == "mlp.experts.down_proj" == target_of(target_of(name))
    assert not is_numbered(target_of(name))
