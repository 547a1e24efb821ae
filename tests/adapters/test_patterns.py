"""Keys of `rank_pattern` are matched as PEFT matches them, in time that does not grow with their number, and no
stranger's regular expression is ever compiled."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loracli.adapters.patterns import _MAX_ITEMS, _MAX_KEY, _MAX_KEYS, _MAX_PLACES, ModulePatterns, PatternError
from tests.steps import steps

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
    # As people write them.
    r".*\.(q_proj|v_proj)$",
    r".*\.(q_proj|v_proj)",
    "(q_proj|c_attn)",
    "q_proj|c_attn",
    "^q_proj|c_attn$",
    r"^model\.layers\.0\.(self_attn|mlp)\.q_proj$",
    r"^model\.layers\.(0|1)\.(?:self_attn\.(q_proj|qkv_proj)|mlp)",
    "model.layers.[0-9]+.self_attn.q_proj",
    r"model\.layers\.\d+\.self_attn\.q_proj",
    r"layers\.\d{2}\.self_attn\.[^.]+$",
    r"layers\.[0-9]\..*\.?q_proj",
    r".*\.layers\.1\..*(q_proj|k_proj|v_proj|o_proj)$",
    r"(.*\.)?layers\.(1|10)\.\w+\.q_proj",
    r"(^|\.)a\.b",
    ".*q_proj",
    ".*?self_attn.*",
    ".*attn.*",
    r".+\.q[-_]proj",
    "q_pro(j|j2)?",
    "q_proj2?",
    "[qk]_proj",
    r"q\_proj",
)


def lookup(pattern: Mapping[str, int], module: str, default: int) -> int:
    return ModulePatterns(pattern).get(module, default)


def theirs(pattern: dict[str, int], module: str) -> int:
    """What PEFT takes: its own key lookup, then the dictionary's value."""
    return pattern.get(get_pattern_key(pattern.keys(), module), -1)


@pytest.mark.parametrize("key", KEYS)
def test_one_key_matches_exactly_the_modules_that_peft_matches(key: str) -> None:
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


ATOMS = tuple(
    r"a b . \. q _ 1 - [ab] [^.] [a-b-] \d \w [0-9] (a|b) (?:a|.) (a|b1)? ^ $ (^|\.) a|b .* .*\. (a|(b|.)q)".split()
)
REPEATED = (*[""] * 6, "*", "+", "?", "{2}", "{1,2}", "{0,2}", "{1,}", "*?", "??", "+?")


def test_what_is_read_of_regular_expressions_matches_what_re_matches() -> None:
    """Random keys, of which a half is read; short names of few characters, so that every branch is met. Several at
    once, so that the first that matches counts among names and automaton."""
    generator = random.Random(2)
    found = missed = 0
    while found < 3000:
        keys: list[str] = []
        while len(keys) < 3:
            key = "".join(generator.choice(ATOMS) + generator.choice(REPEATED) for _ in range(generator.randint(1, 5)))
            try:
                ModulePatterns({key: 0})
            except PatternError:
                continue
            keys.append(key)
        pattern = {key: place for place, key in enumerate(keys)}
        patterns = ModulePatterns(pattern)
        for _ in range(10):
            module = "".join(generator.choices("ab.q1_", k=generator.randint(1, 7)))
            right = next((i for k, i in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), -1)
            assert patterns.get(module, -1) == right, (pattern, module)
            found += right >= 0
            missed += right < 0
    assert missed > 1000


@pytest.mark.parametrize(
    "key",
    [
        "(([a-z._0-9]+)+)+$X",  # takes re time without end
        "(q_proj)*",
        "(a|b){2}",
        "a**",
        "a*+",
        "a{2}{3}",
        "a{3,2}",
        "a{",
        "^*",
        "$?",
        "q_proj^",
        "a$b",
        "a(^b)",
        "(a",
        "a)",
        "a)|(b",  # which PEFT's own brackets would close
        "[",
        "[]",
        "[^]",
        "[b-a]",
        r"[\w-z]",
        "[[:alpha:]]",
        "(?i)q",
        "(?=q)",
        "(?P<n>q)",
        r"(q)\1",
        r"\bq",
        r"q\Z",
        "\\",
        "q\\",
        "q proj",
        "q_proj\n",
        "é",
        "\x1b",
        "(" * 9 + "a" + ")" * 9,
    ],
)
def test_other_regular_expressions_are_not_read(key: str) -> None:
    with pytest.raises(PatternError) as caught:
        ModulePatterns({"q_proj": 1, key: 2})
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["q"] + [f"q{i}" for i in range(_MAX_KEYS)], f"has {_MAX_KEYS + 1} keys"),
        (["q" * (_MAX_KEY + 1)], "longer than"),
        (["(a|b)" * 20], "too many alternatives"),
        ([f"(a|{'b' * 900})?{i}" + "(c|d)" * 8 for i in range(20)], "alternatives of together more than"),
        ([".*" + "q" * 900 + str(i) for i in range(_MAX_ITEMS // 900 + 1)], f"more than {_MAX_ITEMS} characters"),
    ],
    ids=["keys", "long", "alternatives", "together", "expressions"],
)
def test_more_than_any_config_has_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(PatternError, match=said):
        ModulePatterns(dict.fromkeys(keys, 1))


def test_names_with_unescaped_dots_in_ever_other_places_are_still_matched() -> None:
    """Beyond the ways that are looked up by text."""
    length = _MAX_PLACES + 4
    keys = ["a" * place + "." + "a" * (length - place - 1) for place in range(length)]
    for place, key in enumerate(keys):
        module = key.replace(".", "x")
        assert lookup({key: i for i, key in enumerate(keys)}, module, -1) == place
        assert lookup({key: i for i, key in enumerate(keys)}, f"model.{module}", -1) == place


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.{}.self_attn.q_proj",
        r"^model\.layers\.{}\.self_attn\.q_proj$",
        r".*\.layers\.{}\.self_attn\.(q_proj|k_proj)",
        r".*\.layers\.{}\..*(q_proj|v_proj)$",
    ],
)
def test_twice_as_many_keys_and_modules_are_twice_as_much_work(key: str) -> None:
    def work(count: int) -> tuple[int, int]:
        patterns: list[ModulePatterns[int]] = []
        reading = steps(lambda: patterns.append(ModulePatterns({key.format(i): i for i in range(count)})))
        modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(count)]
        found: list[int] = []
        looking = steps(lambda: found.extend(patterns[0].get(module, -1) for module in modules))
        assert found == list(range(count))
        return reading, looking

    (reading, looking), (reading_twice, looking_twice) = work(100), work(200)
    assert reading_twice < 2.2 * reading  # three digits are more than two
    assert looking_twice < 2.5 * looking


@given(
    st.text(alphabet=r"ab.q1_-^$\|()[]?:*+{},dw é", max_size=12)
    | st.lists(st.sampled_from(ATOMS), max_size=5).map("".join),
    st.lists(st.text(alphabet="ab.q1_-", min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_any_text_is_a_key_that_matches_as_in_re_or_is_not_read(key: str, modules: list[str]) -> None:
    try:
        patterns = ModulePatterns({key: 1})
    except PatternError as error:
        assert error.key == key and str(error)
        return
    for module in modules:
        assert (patterns.get(module, 0) == 1) == (re.match(rf"(.*\.)?({key})$", module) is not None), module
