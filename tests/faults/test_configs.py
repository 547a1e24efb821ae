"""Thirty fields of `adapter_config.json`, nine ways to spoil each: refused by name, or read as numbers in their range;
nothing that a config names is ever imported or compiled."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loracli.adapters.config import _MAX_RANK, read_config
from loracli.errors import MalformedAdapter, UnsupportedAdapter
from tests.faults.trials import Tally

CANARY = "loracat_canary"
BOMB = "(([a-z._0-9]+)+)+$X"
SOUND: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}
FIELDS = tuple(
    "peft_type base_model_name_or_path revision r lora_alpha lora_dropout target_modules exclude_modules rank_pattern "
    "alpha_pattern layers_pattern layers_to_transform bias lora_bias use_rslora use_dora init_lora_weights "
    "modules_to_save trainable_token_indices layer_replication target_parameters alora_invocation_tokens use_qalora "
    "auto_mapping megatron_config megatron_core eva_config loftq_config runtime_config from_the_future".split()
)
WAYS: dict[str, Any] = {
    "missing": None,  # the field is taken out
    "null": None,
    "of another type": [{"x": 1}],
    "huge": 10**12,
    "negative": -1,
    "not a number": float("nan"),
    "nested": {"a": {"b": [[[{"c": 1}]]]}},
    "a regular expression": BOMB,
    "an import": f"{CANARY}.attack",
}


def test_there_are_270() -> None:
    assert len(set(FIELDS)) * len(WAYS) == 270


@pytest.mark.parametrize("way", WAYS)
def test_a_spoilt_field_is_refused_by_name_or_read_within_its_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally, way: str
) -> None:
    (tmp_path / CANARY).mkdir()
    (tmp_path / CANARY / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    compiled: list[object] = []
    real = re._compiler.compile  # type: ignore[attr-defined]
    monkeypatch.setattr(re._compiler, "compile", lambda p, *rest: (compiled.append(p), real(p, *rest))[1])  # type: ignore[attr-defined]
    path = tmp_path / "adapter_config.json"
    for field in FIELDS:
        spoilt = {**SOUND, field: WAYS[way]}
        if field.endswith("_pattern") and way == "a regular expression":
            spoilt[field] = {BOMB: 2}
        if way == "missing":
            spoilt.pop(field)
        path.write_text(json.dumps(spoilt))
        try:
            config = read_config(path)
        except (MalformedAdapter, UnsupportedAdapter) as error:
            assert str(path) in str(error)
            named = field in str(error) or (way == "not a number" and "NaN" in str(error))
            assert named or error.hint, (field, str(error))
            tally.add("spoilt configs", type(error).__name__)
            continue
        assert 1 <= config.rank <= _MAX_RANK
        assert all(math.isfinite(value) for value in (config.lora_alpha, config.scaling_of("q_proj")))
        tally.add("spoilt configs", "read")
    assert CANARY not in sys.modules
    assert not [pattern for pattern in compiled if BOMB in str(pattern)]
