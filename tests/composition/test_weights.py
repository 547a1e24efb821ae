"""Weights by hand: what each word of the command line and each key of a file means, and how the rest is refused."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from loracli.composition.weights import format_weights, kind_of, matches, parse_weights
from loracli.errors import SettingsError, UsageError

MATH = [f"model.layers.{i}.{leaf}" for i in range(4) for leaf in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
CODE = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]
EXPERTS = [f"model.layers.0.mlp.experts.down_proj[{e}]" for e in range(3)]
CALLED = [("./math", "math"), ("org/code", "code")]


def parsed(words: list[str], modules: list[list[str]] | None = None) -> dict[str, tuple[float | None, ...]]:
    return parse_weights(words, CALLED, modules or [MATH, CODE])


def of_file(path: Path, tables: Any, modules: list[list[str]] | None = None) -> dict[str, tuple[float | None, ...]]:
    file = path / "weights.json"
    file.write_text(tables if isinstance(tables, str) else json.dumps(tables))
    return parsed([str(file)], modules)


@pytest.mark.parametrize("words", [["0.7", "-0.3"], ["0.7,-0.3"], ["0.7, -0.3"]])
def test_numbers_hold_for_every_module_of_their_adapter(words: list[str]) -> None:
    found = parsed(words)
    assert found["model.layers.1.mlp.up_proj"] == (0.7, -0.3)
    assert found["model.layers.1.self_attn.q_proj"] == (0.7, None), "which the second adapter does not change"
    assert set(found) == set(MATH)


def test_the_experts_of_a_parameter_have_one_weight() -> None:
    assert parsed(["2", "3"], [EXPERTS, CODE])["model.layers.0.mlp.experts.down_proj"] == (2.0, None)


def test_the_narrower_key_decides(tmp_path: Path) -> None:
    table = {
        "model.layers.3.mlp.up_proj": 7,
        "*.3.mlp.*": 6,
        "2-3 mlp": 5,
        "1-3": 4,
        "attention": 3,
        "mlp": 2,
        "default": 1,
    }
    found = {name: row[0] for name, row in of_file(tmp_path, {"math": table, "#2": {"default": 1}}).items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.mlp.up_proj": 4,
        "model.layers.2.self_attn.q_proj": 4,
        "model.layers.2.mlp.up_proj": 5,
        "model.layers.3.self_attn.q_proj": 4,
        "model.layers.3.mlp.up_proj": 7,
        "lm_head": 1,
    }


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"attention": 1, "mlp": 1}, r"no weight for lm_head; add default = 0"),
        ({"mlp": 1}, r"no weight for lm_head and 4 more modules"),
        ({"default": "1"}, r"\[math\] default: expected a number"),
        ({"default": True}, r"expected a number"),
        ({"default": None}, r"expected a number"),
        ({"default": {"mlp": 1}}, r"expected a number"),
        ({"default": 1e9}, r"1e\+09 is beyond 1e\+06"),
        ({"default": 10**400}, r"inf is no weight"),
        ({"default": 1, "q_proj": 1}, r"q_proj: no module of the adapter; near: .*self_attn.q_proj|near: q_proj"),
        ({"default": 1, "*.k_proj": 1}, r"\*\.k_proj: no module of the adapter; near: q_proj"),
        ({"default": 1, "experts": 1}, r"experts: no module of the adapter"),
        ({"default": 1, "2-4": 1}, r"2-4: the adapter has layers 0 to 3"),
        ({"default": 1, "3-2": 1}, r"3-2: the adapter has layers 0 to 3"),
        ({"default": 1, "7": 1}, r"the adapter has layers 0 to 3"),
        ({"default": 1, "-1": 1}, r"no module of the adapter"),
        ({"default": 1, "0-1 vision": 1}, r"'vision' is none of experts, attention, mlp"),
        ({"default": 1, "0-2": 1, "2-3": 2}, r"2-3: 0-2 gives model.layers.2.mlp.up_proj another weight"),
        ({"default": 1, "*.q_proj": 1, "*.0.*": 2}, r"gives model.layers.0.self_attn.q_proj another weight"),
        ({"default": 1, "": 1}, r"no module of the adapter"),
        ({}, r"no weight for lm_head and 8 more"),
        ([1], r"expected a table of an adapter"),
        (0.7, r"expected a table of an adapter"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_named_with_the_way_out(tmp_path: Path, table: Any, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        of_file(tmp_path, {"math": table, "code": {"default": 1}})
    assert len(caught.value.problems) == 1 and re.search(reason, caught.value.problems[0]), caught.value.problems


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"math": {"default": 1}}, r"no table for the adapter org/code \(#2\)"),
        ({"math": {"default": 1}, "./math": {"default": 1}, "code": {"default": 1}}, r"a second table of one adapter"),
        ({"math": {"default": 1}, "code": {"default": 1}, "form": {"default": 1}}, r"names none of the adapters"),
        ({"#3": {"default": 1}, "math": {"default": 1}, "code": {"default": 1}}, r"\[#3\]: names none"),
    ],
)
def test_every_adapter_has_one_table(tmp_path: Path, tables: Any, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        of_file(tmp_path, tables)
    assert any(re.search(reason, problem) for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["0.7"], r"1 numbers for 2 adapters"),
        (["1", "2", "3"], r"3 numbers for 2 adapters"),
        (["0.7", "x"], r"'x' is no number"),
        (["0.7,"], r"neither numbers nor a file"),
        (["nan", "1"], r"nan is no weight"),
        (["1", "-inf"], r"-inf is no weight"),
        (["1e9", "1"], r"1e\+09 is beyond 1e\+06"),
        (["weights.txt"], r"neither numbers nor a file ending in \.toml or \.json"),
        (["gone.toml"], r"cannot be read: No such file"),
        (["a.toml", "b.toml"], r"'a.toml' is no number"),
        ([""], r"neither numbers nor a file"),
    ],
)
def test_words_that_are_no_weights_are_refused(words: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parsed(words)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not valid JSON"),
        ("[]", "has no table"),
        ("{}", "has no table"),
        ('{"math": {"default": NaN}}', "NaN is not a JSON number"),
        ('{"math": {"default": 1, "default": 2}}', "appears twice"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        of_file(tmp_path, text)


def test_what_is_printed_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    weights = {name: (0.1 + i / 7, None if name not in CODE else -0.0 if i else 1e-17) for i, name in enumerate(MATH)}
    file = tmp_path / "weights.toml"
    file.write_text(format_weights(["math", "code"], weights))
    assert parsed([str(file)]) == weights
    file.write_text(format_weights(["math", "code"], dict.fromkeys(MATH, (1 / 3, 0.5)) | {"lm_head": (1 / 3, None)}))
    assert "default = 0.3333333333333333" in file.read_text()


@pytest.mark.parametrize("pattern", ["*", "*a*", "a*", "*b", "a?b", "**", "", "?", "*ab*a", "a*b*a", "a*a"])
@pytest.mark.parametrize("name", ["", "a", "b", "ab", "aab", "aba", "abab", "baab", "a.b", "aabba"])
def test_a_glob_is_the_standard_librarys(pattern: str, name: str) -> None:
    assert matches(pattern, name) == fnmatchcase(name, pattern)


def test_kinds_follow_the_components_of_a_path() -> None:
    assert kind_of("model.layers.0.mlp.experts.down_proj") == "experts"
    assert kind_of("transformer.h.0.attn.c_attn") == "attention"
    assert kind_of("model.layers.0.mlp.up_proj") == "mlp"
    assert kind_of("model.embed_tokens") is None
