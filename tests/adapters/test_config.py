"""`adapter_config.json`: what PEFT writes is accepted as it stands, what cannot be honoured is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.utils.other import get_pattern_key

from loracli.adapters.config import (
    _PLAIN_INITIALISATIONS,
    _SUBTRACTING_INITIALISATIONS,
    MAX_CONFIG_BYTES,
    AdapterConfig,
    read_config,
)
from loracli.adapters.patterns import ModulePatterns
from loracli.adapters.targets import Targets
from loracli.errors import InputError, MalformedAdapter, UnsupportedAdapter

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def read(folder: Path, **fields: Any) -> AdapterConfig:
    """What is read from the plain config with these fields instead."""
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | fields))
    return read_config(folder / "adapter_config.json")


def refused(folder: Path, kind: type[InputError], **fields: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(folder, **fields)
    assert type(caught.value) is kind
    assert str(folder / "adapter_config.json") in str(caught.value)
    return caught.value


def saved_by_peft(folder: Path, **fields: Any) -> AdapterConfig:
    LoraConfig(**{"target_modules": ["q_proj"], "base_model_name_or_path": "org/base", **fields}).save_pretrained(
        folder
    )
    return read_config(folder / "adapter_config.json")


# What is accepted.


def test_pefts_default_config_is_accepted_as_it_stands(tmp_path: Path) -> None:
    config = saved_by_peft(tmp_path)
    assert config == AdapterConfig(
        targets=Targets(frozenset({"q_proj"})),
        base_model="org/base",
        base_revision=None,
        rank=8,
        lora_alpha=8.0,
        use_rslora=False,
        rank_pattern=ModulePatterns({}),
        alpha_pattern=ModulePatterns({}),
        fan_in_fan_out=False,
        whole_names=frozenset({"q_proj"}),
        lora_dropout=0.0,
        task_type=None,
        peft_version=tuple(int(number) for number in peft.__version__.split(".")[:2]),
    )


def test_pefts_to_dict_is_accepted_as_json(tmp_path: Path) -> None:
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in LoraConfig(r=3, lora_alpha=5).to_dict().items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path / "adapter_config.json").scaling_of("q_proj") == 5 / 3


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.1},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"exclude_modules": ["lm_head"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"fan_in_fan_out": True},
        {"inference_mode": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"task_type": "CAUSAL_LM"},
        {"revision": "main"},
        {"ensure_weight_tying": True, "lora_dropout": 0.05},
    ],
    ids=str,
)
def test_peft_configs_of_plain_loras_are_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = saved_by_peft(tmp_path, r=4, lora_alpha=12, **fields)
    assert (config.rank, config.scaling_of("model.q_proj")) == (4, 3.0)
    assert config.lora_dropout == fields.get("lora_dropout", 0.0)
    assert config.fan_in_fan_out is fields.get("fan_in_fan_out", False)
    assert (config.task_type, config.base_revision) == (fields.get("task_type"), fields.get("revision"))


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    assert saved_by_peft(tmp_path, r=9, lora_alpha=6, use_rslora=True).scaling_of("q_proj") == 6 / 3
    assert saved_by_peft(tmp_path, r=9, lora_alpha=6, use_rslora=False).scaling_of("q_proj") == 6 / 9


def test_patterns_decide_rank_and_alpha_of_the_modules_they_match(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"^model.q_proj": 2, "v_proj": 16}, "alpha_pattern": {"q_proj": 5, "k_proj": 2.5}}
    config = saved_by_peft(tmp_path, r=8, lora_alpha=4, **patterns)
    assert [config.rank_of(f"model.{leaf}_proj") for leaf in "qkvo"] == [2, 8, 16, 8]
    assert [config.scaling_of(f"model.{leaf}_proj") for leaf in "qkvo"] == [5 / 2, 2.5 / 8, 4 / 16, 4 / 8]
    assert config.rank_of("other.model.q_proj") == 8
    assert config.scaling_of("other.model.q_proj") == 5 / 8


def test_patterns_and_rslora_together(tmp_path: Path) -> None:
    config = saved_by_peft(
        tmp_path, r=8, lora_alpha=4, use_rslora=True, rank_pattern={"q_proj": 25}, alpha_pattern={"q_proj": 10}
    )
    assert config.scaling_of("q_proj") == 2.0
    assert config.scaling_of("k_proj") == pytest.approx(4 / math.sqrt(8), rel=1e-15)


def test_an_old_config_with_few_keys_is_accepted(tmp_path: Path) -> None:
    assert (
        read(tmp_path, bias="none", loftq_config={}, modules_to_save=None, base_model_name_or_path="").base_model
        is None
    )


def test_a_config_of_pefts_first_versions_is_accepted_unless_it_splits_a_layer(tmp_path: Path) -> None:
    old = {"enable_lora": None, "merge_weights": True, "bias": "none", "fan_in_fan_out": False}
    assert read(tmp_path, **old).rank == 8
    with pytest.raises(UnsupportedAdapter, match="enable_lora"):
        read(tmp_path, **{**old, "enable_lora": [True, False, True]})


def test_an_alpha_below_zero_is_a_number(tmp_path: Path) -> None:
    assert read(tmp_path, lora_alpha=-4).scaling_of("q") == -0.5


@pytest.mark.parametrize("fields", [{"lora_alpha": 0}, {"lora_alpha": 0.0}, {"alpha_pattern": {"q_proj": 0}}], ids=str)
def test_an_alpha_of_zero_is_refused_with_what_to_set(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A converter of a trainer writes 0, and leaves it to people to put the number in."""
    error = refused(tmp_path, UnsupportedAdapter, **fields)
    assert (
        next(iter(fields)) in error.what and "is 0, and with it the update of each module that it is for" in error.what
    )
    assert "lora_alpha of the training" in str(error.hint)
    way_out = json.loads(json.dumps(fields).replace("0.0", "12").replace("0", "12"))
    assert read(tmp_path, **way_out).scaling_of("model.q_proj") == 12 / 8


@pytest.mark.parametrize("name", sorted(_PLAIN_INITIALISATIONS))
def test_an_initialisation_that_leaves_the_base_as_it_is_may_be_in_any_capitals(tmp_path: Path, name: str) -> None:
    for spelt in (name, name.upper(), name.capitalize()):
        assert read(tmp_path, init_lora_weights=spelt).scaling_of("q_proj") == 2.0


def test_every_initialisation_of_peft_is_known_for_what_it_does_to_the_base() -> None:
    """By the list in PEFT's own types: a new one fails here, and not in silence."""
    kinds = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    names = {name for kind in kinds for name in typing.get_args(kind)}
    assert {"gaussian", "pissa", "mica"} <= names
    others = {name for name in names - _PLAIN_INITIALISATIONS if not name.startswith(_SUBTRACTING_INITIALISATIONS)}
    assert others == {"loftq"}


@pytest.mark.parametrize(
    "fields",
    [
        {"swift_type": "LORA", "lora_dtype": None, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "enable_lora": None,
         "use_merged_linear": False, "use_qa_lora": False, "model_key_mapping": None},
        {"lora_dtype": "bf16", "lorap_lr_ratio": None, "lorap_emb_lr": 1e-6},
        {"nvfp4_merge_aware": {"scale_mode": "fresh", "pts_policy": "base_fused_max", "start_step": 0}},
        {"corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"direction": "ArB2r"}},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_keys_of_other_trainers_that_change_nothing_are_taken(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert read(tmp_path, **fields) == read(tmp_path)


def test_settings_of_an_initialisation_that_was_not_used_are_ignored_as_peft_ignores_them(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="will be ignored"):
        assert saved_by_peft(tmp_path, corda_config=CordaConfig()).rank == 8


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_whether_biases_were_trained_is_left_to_the_tensors(tmp_path: Path, bias: str) -> None:
    assert saved_by_peft(tmp_path, bias=bias).rank == 8


# What is refused by name.


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"], "lora_bias": True}, "target_parameters with lora_bias"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"trainable_token_indices": [5, 6]}, "trainable tokens"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable tokens"),
        ({"alora_invocation_tokens": [1, 2, 3]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "BD-LoRA"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"bias": None}, "bias is None"),
        ({"enable_lora": [True, False, True]}, "before 0.3"),
        ({"use_merged_linear": True}, "ms-swift"),
        ({"use_qa_lora": True}, "QA-LoRA"),
        ({"kasa_config": {"x": 1}}, "KaSA"),
        ({"velora_config": {"x": 1}}, "VeLoRA"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
        ({"arrow_config": {"x": 1}}, "Arrow"),
        *[
            ({"init_lora_weights": name}, name)
            for name in (
                "pissa",
                "pissa_niter_16",
                "olora",
                "corda",
                "loftq",
                "lora_ga",
                "true",
                "something",
                "PiSSA",
                "LoftQ",
                "OLoRA",
                "lora-ga",
            )
        ],
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights"),
        *[
            ({"peft_type": name}, repr(name))
            for name in ("ADALORA", "IA3", "LOHA", "VERA", "lora", "", None, 1, ["LORA"])
        ],
    ],
    ids=str,
)
def test_a_feature_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], name: str
) -> None:
    error = refused(tmp_path, UnsupportedAdapter, **fields)
    assert name in error.what
    assert error.hint
    assert "newer PEFT" not in str(error)


def test_a_config_without_peft_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    with pytest.raises(UnsupportedAdapter, match="peft_type is missing"):
        read_config(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    "key",
    ["use_dora", "modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices",
     "alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config", "arrow_config", "from_the_future"],
)  # fmt: skip
@pytest.mark.parametrize("off", [None, False, [], {}], ids=repr)
def test_a_feature_that_is_off_is_accepted(tmp_path: Path, key: str, off: object) -> None:
    assert read(tmp_path, **{key: off}).rank == 8


@pytest.mark.parametrize("value", [True, 1, 0, 0.5, "", "off", [0], {"a": None}], ids=repr)
def test_an_unknown_key_that_is_not_off_is_refused_by_name(tmp_path: Path, value: object) -> None:
    assert "'from_the_future'" in refused(tmp_path, UnsupportedAdapter, from_the_future=value).what


def test_every_variant_of_peft_is_known_by_name(tmp_path: Path) -> None:
    """By the mark in PEFT's own fields: a new one fails here for want of a sentence of its own."""
    variants = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    assert {"use_dora", "kasa_config", "velora_config"} <= set(variants)
    for name in variants:
        error = refused(tmp_path, UnsupportedAdapter, **{name: {"x": 1}})
        assert repr(name) in error.what and "is not supported" in error.what


def test_a_config_of_mlx_vlm_is_refused_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"rank": 10, "alpha": 0.1, "dropout": 0.1}))
    with pytest.raises(UnsupportedAdapter, match="mlx-vlm") as caught:
        read_config(path)
    assert "mlx-lm or PEFT" in str(caught.value.hint)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_a_regular_expression_is_refused(tmp_path: Path, key: str) -> None:
    error = refused(tmp_path, UnsupportedAdapter, **{key: {"q_proj": 8, "(([a-z._0-9]+)+)+$X": 8}})
    assert key in error.what and "(([a-z._0-9]+)+)+$X" in error.what
    assert "write the names out" in str(error.hint)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_alternatives_that_people_write_decide_as_in_peft(tmp_path: Path, field: str) -> None:
    pattern = {r".*\.(q_proj|v_proj)$": 4, r"^model\.layers\.(0|1)\.mlp\.": 5, "model.layers.[0-9]+.mlp.up_proj": 6}
    config = read(tmp_path, **{field: pattern})
    modules = ["model.layers.0.self_attn.q_proj", "q_proj", "model.layers.11.mlp.up_proj", "model.layers.1.mlp.x"]
    default = {"rank_pattern": 8, "alpha_pattern": 16}[field]
    right = [pattern.get(get_pattern_key(pattern, module), default) for module in modules]
    assert right == [4, default, 6, default]
    if field == "rank_pattern":
        assert [config.rank_of(module) for module in modules] == right
    else:
        assert [config.scaling_of(module) for module in modules] == [value / 8 for value in right]


# What is damaged.


@pytest.mark.parametrize("value", [0, -1, 16385, 10**12, 8.0, "8", True, None, [8], {}, 1.5], ids=repr)
@pytest.mark.parametrize("field", ["r", "rank_pattern"])
def test_a_rank_is_a_whole_number_within_limits(tmp_path: Path, field: str, value: object) -> None:
    fields = {"r": value} if field == "r" else {"rank_pattern": {"q_proj": value}}
    assert field in refused(tmp_path, MalformedAdapter, **fields).what


@pytest.mark.parametrize("rank", [1, 16384])
def test_the_limits_of_a_rank_are_ranks(tmp_path: Path, rank: int) -> None:
    assert read(tmp_path, r=rank).rank == rank


@pytest.mark.parametrize("value", ["16", True, None, [16], {}, 1e10, -1e10, 10**400], ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_is_a_number_within_limits(tmp_path: Path, field: str, value: object) -> None:
    fields = {"lora_alpha": value} if field == "lora_alpha" else {"alpha_pattern": {"q_proj": value}}
    assert field in refused(tmp_path, MalformedAdapter, **fields).what


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_an_alpha_that_is_not_finite_is_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(f'{{"peft_type": "LORA", "r": 8, "lora_alpha": {number}}}')
    with pytest.raises(MalformedAdapter):
        read_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "true"),
        ("use_rslora", 1),
        ("lora_bias", "true"),
        ("fan_in_fan_out", "no"),
        ("base_model_name_or_path", 5),
        ("base_model_name_or_path", ["a"]),
        ("base_model_name_or_path", "org/base\ncan be composed"),
        ("base_model_name_or_path", "\x1b[31mred"),
        ("base_model_name_or_path", "org/\u202ebase"),
        ("revision", {}),
        ("task_type", 1),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", "q_proj"),
        ("lora_dropout", "a lot"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    message = str(refused(tmp_path, MalformedAdapter, **{field: value}))
    assert field in message
    assert "\n" not in message and "\x1b" not in message


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_rank_and_alpha_are_never_guessed(tmp_path: Path, field: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in PLAIN.items() if k != field}))
    with pytest.raises(MalformedAdapter, match=field):
        read_config(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"peft_type": "LORA", "r": 8, "r": 4, "lora_alpha": 16}', "'r' appears twice"),
        (b'{"peft_type": "\xff"}', "not UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}', "surrogate"),
        (b" " * (MAX_CONFIG_BYTES + 1), "is larger than"),
    ],
    ids=["empty", "list", "twice", "bytes", "deep", "surrogate", "large"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(MalformedAdapter, match=reason) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_a_directory_and_a_fifo_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "folder", "fifo"):
        with pytest.raises(MalformedAdapter, match=name):
            read_config(tmp_path / name)


# Whatever stands there.

FIELDS = sorted(
    {*LoraConfig().to_dict(), "lora_B_layout", "enable_lora", "rank", "alpha", "lora_parameters", "unheard_of"}
)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["LORA", "q_proj", "pissa", r".*\.q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    plain=st.sampled_from([PLAIN, {}]),
    convertible=st.booleans(),
)
def test_any_json_object_gives_a_config_or_one_refusal(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], plain: dict[str, Any], convertible: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_config.json"
    path.write_text(json.dumps(plain | fields))
    try:
        config = read_config(path, convertible=convertible)
    except (MalformedAdapter, UnsupportedAdapter) as error:
        assert str(path) in str(error)
    else:
        assert config.rank >= 1 and math.isfinite(config.scaling_of("model.q_proj")) and config.scaling_of("q") != 0
