"""Weights by hand: what each word of the command line and each key of a table means, and how the rest is refused."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatchcase
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from loracli.composition.weights import (
    _kind_of,
    _matches,
    equal_weights,
    parse_words,
    toml_text,
    weight_tables,
    weights_of_modules,
)
from loracli.errors import SettingsError, UsageError
from loracli.hub.references import Reference
from loracli.system.document import MAX_PROBLEMS

MATH = [f"model.layers.{i}.{leaf}" for i in range(4) for leaf in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
CODE = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]


def adapter(reference: Reference, path: str, modules: list[str]) -> Any:
    """What weights look at in an adapter."""
    text = reference.text
    return SimpleNamespace(
        reference=text, source=reference, path=Path(path), commit="f" * 40, targets=dict.fromkeys(modules)
    )


ADAPTERS = [
    adapter(Reference("./math", path=Path("math")), "/of/mine/math", MATH),
    adapter(Reference("hf://org/code@v1", repo_id="org/code", revision="v1"), "/cache/models--org--code", CODE),
]


def of_file(path: Path, tables: Any) -> dict[str, tuple[float | None, ...]]:
    file = path / "weights.json"
    file.write_text(tables if isinstance(tables, str) else json.dumps(tables))
    return weights_of_modules(file, ADAPTERS)


@pytest.mark.parametrize("words", [["0.7", "-0.3"], ["0.7,-0.3"], ["0.7, -0.3"], ["7e-1", "-.3"]])
def test_numbers_hold_for_every_module_of_their_adapter(words: list[str]) -> None:
    found = weights_of_modules(parse_words(words), ADAPTERS)
    assert found["model.layers.1.mlp.up_proj"] == (0.7, -0.3)
    assert found["model.layers.1.self_attn.q_proj"] == (0.7, None), "which the second adapter does not change"
    assert set(found) == set(MATH) and equal_weights(found) == (0.7, -0.3)


def test_the_narrower_key_decides() -> None:
    table = {
        "model.layers.3.mlp.up_proj": 7,
        "*.3.mlp.*": 6,
        "2-3 mlp": 5,
        "1-3": 4,
        "attention": 3,
        "mlp": 2,
        "default": 1,
    }
    for order in (table, dict(reversed(table.items()))):
        rows = weights_of_modules({"math": order, "#2": {"default": 1}}, ADAPTERS)
        assert {name: row[0] for name, row in rows.items()} == {
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
        assert equal_weights(rows) is None


def test_a_contradiction_that_a_narrower_key_settles_is_none_in_any_order() -> None:
    table = {"default": 1, "0-1": 0.5, "0": 0.3, "*.layers.0.*": 0.1}
    for order in permutations(table.items()):
        rows = weights_of_modules({"math": dict(order), "#2": {"default": 1}}, ADAPTERS)
        assert [rows[f"model.layers.{i}.mlp.up_proj"][0] for i in range(3)] == [0.1, 0.5, 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [("math", "org/code"), ("./math", "hf://org/code@v1"), ("mine/math", f"org/code@{'f' * 40}"), ("#1", "#2")],
)
def test_an_adapter_goes_by_its_place_reference_repository_or_the_end_of_its_path(first: str, second: str) -> None:
    found = weights_of_modules({second: {"default": 2}, first: {"default": 1}}, ADAPTERS)
    assert equal_weights(found) == (1, 2)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"attention": 1, "mlp": 1}, r"no weight for lm_head; add default = 0"),
        ({"mlp": 1}, r"no weight for lm_head and 4 more modules"),
        ({"defalt": 1}, r"\[math\] defalt: no module of the adapter; did you mean default\?"),
        ({"default": "1"}, r"\[math\] default: expected a number"),
        ({"default": True}, r"expected a number"),
        ({"default": None}, r"expected a number"),
        ({"default": 1, "model": {"layers": 1}}, r"expected a number; quote a name that has dots"),
        ({"default": 1e9}, r"1e\+09 is beyond 1e\+06"),
        ({"default": 10**400}, r"a number of that size is beyond 1e\+06"),
        ({"default": 1, "q_proj": 1}, r"q_proj: no module of the adapter; near: .*q_proj"),
        ({"default": 1, "*.k_proj": 1}, r"\*\.k_proj: no module of the adapter; near: \*\.q_proj"),
        ({"default": 1, "experts": 1}, r"experts: no module of the adapter"),
        ({"default": 1, "2-4": 1}, r"2-4: the adapter has layers 0 to 3"),
        ({"default": 1, "3-2": 1}, r"3-2: the adapter has layers 0 to 3"),
        ({"default": 1, "7": 1}, r"the adapter has layers 0 to 3"),
        ({"default": 1, "-1": 1}, r"no module of the adapter"),
        ({"default": 1, "3-": 1}, r"no module of the adapter"),
        ({"default": 1, "\u0663": 1}, r"no module of the adapter"),
        ({"default": 1, "0-1 vision": 1}, r"'vision' is none of experts, attention, mlp"),
        ({"default": 1, "0-2": 1, "2-3": 2}, r"2-3: 0-2 gives model.layers.2.mlp.up_proj another weight"),
        ({"default": 1, "*.q_proj": 1, "*.0.*": 2}, r"gives model.layers.0.self_attn.q_proj another weight"),
        ({"default": 1, "": 1}, r"no module of the adapter"),
        ({"default": 1, "*" * 1001: 1}, r"longer than 1000 characters"),
        (
            {"default": 1} | {f"*{i}": 1 for i in range(1000)},
            r"1001 keys are not names of its modules, and at most 1000",
        ),
        ({}, r"no weight for lm_head and 8 more"),
        ([1], r"expected a number, or a table of an adapter"),
        (True, r"expected a number, or a table of an adapter"),
        (1e9, r"\[math\] default: 1e\+09 is beyond 1e\+06"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_named_with_the_way_out(tmp_path: Path, table: Any, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        of_file(tmp_path, {"math": table, "org/code": {"default": 1}})
    assert len(caught.value.problems) == 1 and re.search(reason, caught.value.problems[0]), caught.value.problems


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"math": {"default": 1}}, r"no table for the adapter hf://org/code@v1 \(#2\)"),
        ({"math": {"default": 1}, "./math": {"default": 1}, "#2": {"default": 1}}, r"a second table of one adapter"),
        ({"math": {"default": 1}, "#2": {"default": 1}, "form": {"default": 1}}, r"names none of the adapters"),
        ({"#3": {"default": 1}, "math": {"default": 1}, "#2": {"default": 1}}, r"\[#3\]: names none"),
    ],
)
def test_every_adapter_has_one_table(tmp_path: Path, tables: Any, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        of_file(tmp_path, tables)
    assert any(re.search(reason, problem) for problem in caught.value.problems), caught.value.problems


def test_a_number_alone_is_the_default_of_its_adapter(tmp_path: Path) -> None:
    bare = {"math": 0.7, "org/code": {"default": 0.3}}
    assert of_file(tmp_path, bare) == weights_of_modules(bare, ADAPTERS) == weights_of_modules([0.7, 0.3], ADAPTERS)


def test_problems_stop_where_nobody_reads_on() -> None:
    with pytest.raises(SettingsError) as caught:
        weights_of_modules({str(place): {"default": 1} for place in range(5000)}, ADAPTERS)
    assert len(caught.value.problems) == MAX_PROBLEMS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "has no table"),
        ("{}", "has no table"),
        ('{"loracat": 1}', "has no table"),
        ('{"math": {"default": NaN}}', "NaN is not a JSON number"),
        ('{"math": {"default": 1, "default": 2}}', "appears twice"),
        ('{"math": {"default": ' + "1" * 5000 + "}}", "digits"),
        ("[" * 60_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        of_file(tmp_path, text)


def test_what_is_printed_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    weights = {name: (0.1 + i / 7, None if name not in CODE else -0.5 if i else 1e-17) for i, name in enumerate(MATH)}
    tables = weight_tables(["math", "org/code"], weights)
    file = tmp_path / "weights.toml"
    file.write_text(toml_text(tables, ["loracat", "export"]))
    assert weights_of_modules(file, ADAPTERS) == weights == weights_of_modules(tables, ADAPTERS)
    equal = {name: (1 / 3, 0.5 if name in CODE else None) for name in MATH}
    assert weight_tables(["math", "#2"], equal) == {"math": {"default": 1 / 3}, "#2": {"default": 0.5}}


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "\x1b[31m", "é", "\U0001f600", "\x7f", "\u202e", "a b", "#"])
def test_any_name_is_one_line_of_toml_and_comes_back(name: str) -> None:
    text = toml_text({name: {name: 0.5}}, ["loracat", "export", "--adapters", name])
    assert tomllib.loads(text) == {name: {name: 0.5}}
    assert len(text.splitlines()) == 4 and all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("pattern", ["*", "*a*", "a*", "*b", "a?b", "**", "", "?", "*ab*a", "a*b*a", "a*a"])
@pytest.mark.parametrize("name", ["", "a", "b", "ab", "aab", "aba", "abab", "baab", "a.b", "aabba"])
def test_a_glob_is_the_standard_librarys(pattern: str, name: str) -> None:
    assert _matches(pattern, name) == fnmatchcase(name, pattern)


def test_experts_in_an_mlp_go_by_experts_alone_and_the_error_says_so() -> None:
    experts = adapter(ADAPTERS[0].source, "/math", ["model.layers.0.mlp.experts.down_proj"])
    for key in ("mlp", "0 mlp"):
        with pytest.raises(SettingsError, match="mlp in their path are experts, which go by the key experts"):
            weights_of_modules({"#1": {"default": 1, key: 2}}, [experts])


def test_kinds_follow_the_components_of_a_path() -> None:
    assert _kind_of("model.layers.0.mlp.experts.down_proj") == "experts"
    assert _kind_of("transformer.h.0.attn.c_attn") == "attention"
    assert _kind_of("model.layers.0.mlp.up_proj") == "mlp"
    assert _kind_of("model.embed_tokens") is None


@pytest.mark.parametrize(
    ("model", "size"),
    {
        "T5ForConditionalGeneration": {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "num_layers": 2},
        "BartForConditionalGeneration": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        "BertForSequenceClassification": {"num_hidden_layers": 2},
        "BertLMHeadModel": {"num_hidden_layers": 1, "is_decoder": True, "add_cross_attention": True},
        "AlbertForSequenceClassification": {"num_hidden_layers": 2},
        "GPT2LMHeadModel": {"n_layer": 2, "add_cross_attention": True},
        "OPTForCausalLM": {"num_hidden_layers": 1},
    }.items(),
)
def test_in_a_layer_what_belongs_to_no_attention_by_its_class_is_mlp(model: str, size: dict[str, Any]) -> None:
    """Architectures with cross attention, or without blocks around their feed-forward layers. Which module is of an
    attention is told by the classes of transformers around it, of which every attention has that word in its name."""
    found = getattr(transformers, model)
    with torch.device("meta"):
        modules = dict(found._from_config(found.config_class(**size)).named_modules())
    layers = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and re.search(r"\.\d+\.", n)]
    assert {_kind_of(name) for name in layers} == {"attention", "mlp"}
    for name in layers:
        around = [type(modules[name[: dot.start()]]).__name__ for dot in re.finditer(r"\.", name)]
        assert _kind_of(name) == ("attention" if any("Attention" in one for one in around) else "mlp"), name
    assert not any(_kind_of(name) for name in ("bert.pooler.dense", "lm_head", "classifier", "model.shared"))
