"""PEFT's weighted combinations of three adapters, on the decoders of its tests, Qwen2 and Gemma included.

The cases are those of tests/testing_common.py, `_test_weighted_combination_of_adapters`: ranks 8, 8 and 20, lora_alpha
32, weights of either sign. There they are skipped for Qwen2 and Gemma, and only the update of one adapter is compared;
here every update is, with the dense formula.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft.utils.merge_utils import ties as ties_of_peft

from loracli.algebra.methods.method import MethodOptions
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from tests.peft_cases.composition import (
    DECODERS,
    assert_same,
    assert_update,
    build,
    changes,
    delta_weights,
    dense,
    export,
    load,
    lora_config,
    outputs,
    save_adapter,
    weighted,
)

POSITIVE, NEGATIVE = (0.5, 1.5, 1.5), (-0.5, -0.8, -1.2)
CASES = [(kind, POSITIVE) for kind in DECODERS] + [(kind, NEGATIVE) for kind in ("gpt2", "llama", "qwen2", "gemma")]
PEFTS = 1e-4  # its tolerance, absolute and relative


def rank_of(adapter: Path) -> int:
    rank: int = json.loads((adapter / "adapter_config.json").read_text())["r"]
    return rank


@pytest.mark.parametrize(
    ("kind", "weights"), CASES, ids=lambda case: case if isinstance(case, str) else f"{case[0]:+g}"
)
def test_every_combination_is_the_dense_weighted_sum(
    tmp_path: Path, kind: str, weights: tuple[float, float, float]
) -> None:
    model = build(kind)
    own = [
        save_adapter(tmp_path / f"adapter{i}", model, lora_config(kind, r=rank), seed=i)
        for i, rank in enumerate((8, 8, 20))
    ]
    parts = [changes(model, path) for path in own]
    later, last = weighted(parts[1:], weights[1:]), weighted(parts[:1], weights[:1])
    expected = {
        "single": last,
        "single_enabled": last,
        "cat": later,
        "full_rank": later,
        "all": weighted(parts, weights),
    }
    exported = {
        "single": export(tmp_path / "single", model, own[:1], weights[:1]),
        "single_enabled": export(tmp_path / "enabled", model, own[:2], (weights[0], 0)),
        "cat": export(tmp_path / "cat", model, own[1:], weights[1:]),
        "full_rank": export(tmp_path / "full", model, own[1:], weights[1:], merge=True, rank=28),
        "all": export(tmp_path / "all", model, own, weights),
        "svd": export(tmp_path / "svd", model, own[1:], weights[1:], merge=True, rank=20),
    }
    ranks = {name: rank_of(path) for name, path in exported.items()}
    # PEFT keeps the rank of an adapter of weight 0; here it costs none.
    assert ranks == {"single": 8, "single_enabled": 8, "cat": 28, "full_rank": 28, "all": 36, "svd": 20}

    peft_model = load(model, exported)
    unchanged = outputs(model)
    for name, change in expected.items():
        assert_update(peft_model, name, change, tolerance=PEFTS, close=1e-5 if name == "full_rank" else 1e-6)
        peft_model.set_adapter(name)
        assert peft_model.active_adapters == [name]
        assert_same(outputs(peft_model), outputs(dense(model, change)), unchanged, tolerance=PEFTS)
    for name, found in delta_weights(peft_model, "svd").items():
        left_out = torch.linalg.svdvals(later[name])[20:].norm()
        assert float((found - later[name]).norm()) == pytest.approx(float(left_out), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "gpt2"])
def test_ties_of_adapters_of_uneven_ranks_is_pefts_ties_of_the_dense_updates(tmp_path: Path, kind: str) -> None:
    """PEFT's `ties_svd` on ranks that it refuses for `ties`, at a rank that loses nothing."""
    model = build(kind)
    own = [save_adapter(tmp_path / f"a{i}", model, lora_config(kind, r=r), seed=i) for i, r in enumerate((8, 20))]
    parts = [changes(model, path) for path in own]
    export_adapter(
        ExportRequest(
            method="ties", adapters=[str(path) for path in own], method_options=MethodOptions(density=0.5), rank=32
        ),
        tmp_path / "ties",
    )
    found = delta_weights(load(copy.deepcopy(model), {"ties": tmp_path / "ties"}), "ties")
    assert found.keys() == parts[0].keys() == parts[1].keys()
    for name, change in found.items():
        merged = ties_of_peft([part[name] for part in parts], torch.ones(2, dtype=torch.float64), 0.5)
        torch.testing.assert_close(change.double(), merged, atol=PEFTS, rtol=PEFTS)
        assert float((change - merged).norm()) <= 1e-5 * float(merged.norm())
