"""Keys of `rank_pattern` are matched as PEFT matches them, and no stranger's regular expression is ever compiled."""

from __future__ import annotations

import itertools
import random

import pytest
from peft.utils.other import get_pattern_key

from loracli.adapters.patterns import lookup, parse_pattern

MODULES = (
    "q_proj",
    "xq_proj",
    "q_proj2",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.0.mlp.q_proj.0",
    "layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.q-proj",
    "model_layers_0.self_attn.q_proj",
    "transformer.h.0.attn.c_attn",
    "a.b",
    "x.a.b",
    "xa.b",
    "axb",
    "a",
)

KEYS = (
    "q_proj",
    "^q_proj",
    "q_proj$",
    "^q_proj$",
    "_proj",
    "self_attn.q_proj",
    r"self_attn\.q_proj",
    r"self_attn.q\.proj",
    "self_attn.q.proj",
    r"0\.self_attn\.q_proj",
    "layers.0.self_attn.q_proj",
    r"^model\.layers\.0\.self_attn\.q_proj",
    r"^model\.layers\.0\.self_attn\.q_proj$",
    "^model.layers.0.self_attn.q_proj",
    "^layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    ".q_proj",
    r"\.q_proj",
    "..proj",
    "......",
    "a.b",
    r"a\.b",
    "^a.b",
    r"^a\.b",
    r"\.b",
    ".b",
    "a",
    "^a",
    "c_attn",
    "attn.c_attn",
    "Q_PROJ",
    r".*\.q_proj",
    r".*\.self_attn.q_proj$",
    "q_proj.",
    "model",
)


def theirs(pattern: dict[str, int], module: str) -> int:
    """What PEFT takes: its own key lookup, then the dictionary's value."""
    return pattern.get(get_pattern_key(pattern.keys(), module), -1)


@pytest.mark.parametrize("key", KEYS)
def test_one_key_matches_exactly_the_modules_that_peft_matches(key: str) -> None:
    assert parse_pattern(key) is not None
    for module in MODULES:
        assert lookup({key: 7}, module, -1) == theirs({key: 7}, module), module


def test_the_table_has_matches_and_near_misses_of_every_sort() -> None:
    """Or the test above could not fail: most keys match some module and miss another."""
    outcomes = {(key, theirs({key: 7}, module) == 7) for key, module in itertools.product(KEYS, MODULES)}
    assert sum((key, True) in outcomes for key in KEYS) > len(KEYS) * 2 // 3
    assert all((key, False) in outcomes for key in KEYS)


def test_of_several_keys_the_first_that_matches_counts() -> None:
    assert lookup({"q_proj": 1, "self_attn.q_proj": 2}, "l.self_attn.q_proj", 0) == 1
    assert lookup({"self_attn.q_proj": 2, "q_proj": 1}, "l.self_attn.q_proj", 0) == 2
    assert lookup({"k_proj": 3, "q_proj": 1, "proj": 4}, "l.self_attn.q_proj", 0) == 1


def test_no_key_means_the_default() -> None:
    assert lookup({}, "q_proj", 5) == 5
    assert lookup({"k_proj": 1}, "q_proj", 5) == 5


def test_several_keys_agree_with_peft_on_random_patterns() -> None:
    generator = random.Random(0)
    found = 0
    for _ in range(500):
        pattern = {key: i for i, key in enumerate(generator.sample(KEYS, 4))}
        module = generator.choice(MODULES)
        assert lookup(pattern, module, -1) == theirs(pattern, module), (pattern, module)
        found += lookup(pattern, module, -1) >= 0
    assert 100 < found < 400


def test_random_keys_over_a_small_alphabet_agree_with_peft() -> None:
    """Short names collide often, so every branch of the match is met."""
    generator = random.Random(1)
    found = 0
    for _ in range(3000):
        body = "".join(generator.choices(("a", "b", ".", r"\."), k=generator.randint(1, 4)))
        key = generator.choice(("", "^", r".*\.")) + body + generator.choice(("", "$"))
        module = ".".join("".join(generator.choices("ab", k=generator.randint(1, 3))) for _ in range(3))
        assert lookup({key: 1}, module, -1) == theirs({key: 1}, module), (key, module)
        found += lookup({key: 1}, module, -1) == 1
    assert found > 80


@pytest.mark.parametrize(
    "key",
    [
        "(([a-z._0-9]+)+)+$X",
        ".*",
        "q_proj|k_proj",
        "(q_proj)",
        "[qk]_proj",
        "q_proj+",
        "q_proj*",
        "q?",
        r"layers\.\d+\.q_proj",
        r"\w+",
        "q{2}",
        "q_proj^",
        "a$b",
        "$",
        "^",
        "",
        "\\",
        "q\\",
        r"q\_proj",
        "q proj",
        "q_proj\n",
        "q_proj$\n",
        "é",
        "\x1b",
        "(?i)q",
    ],
)
def test_other_regular_expressions_are_not_read(key: str) -> None:
    assert parse_pattern(key) is None
