"""PEFT's small models: adapters that differ in everything, weights of every sign, embeddings, Conv1D, padding.

After tests/test_custom_models.py (`test_multiple_active_adapters_forward`, `test_add_weighted_adapter_*`,
`test_multiple_adapters_same_modules_to_save_*`) and tests/test_initialization.py (rsLoRA and the patterns).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loracli.algebra.methods.method import MethodOptions
from loracli.errors import InputError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from tests.peft_cases.composition import (
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

BOTH = {"target_modules": ["lin0", "lin1"]}
ATTENTION = {"target_modules": ["q_proj", "o_proj"]}
# By name: the model, the fields of each adapter's config, the weights.
UNLIKE: dict[str, tuple[str, list[dict[str, Any]], tuple[float, ...]]] = {
    "same module": ("mlp", [{"target_modules": ["lin0"]}] * 2, (1, 1)),
    "different modules": ("mlp", [{"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}], (1, 1)),
    "rank_pattern": ("mlp", [{**BOTH, "rank_pattern": {"lin0": 2}}, {**BOTH, "rank_pattern": {"lin0": 16}}], (1, 1)),
    "both patterns and rslora": (
        "mlp",
        [
            {**BOTH, "rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin1": 5, "lin0": 1}, "use_rslora": True},
            {**BOTH, "alpha_pattern": {"lin0": 9}},
        ],
        (0.3, -2),
    ),
    "rslora": ("mlp", [{**BOTH, "use_rslora": True, "r": 4}, {**BOTH, "use_rslora": True}], (1, 0)),
    "rslora of the second": ("mlp", [{**BOTH}, {**BOTH, "use_rslora": True, "r": 5, "lora_alpha": 7}], (0.7, 0.3)),
    "ranks and alphas": ("mlp", [{**BOTH, "r": 2, "lora_alpha": 16}, {**BOTH, "r": 11, "lora_alpha": 3}], (0.7, 0.3)),
    "three": ("mlp", [{**BOTH}, {"target_modules": ["lin0"], "r": 1}, {"target_modules": ["lin1"]}], (-1, 0.5, 2)),
    "conv1d": ("emb-conv1d", [{"target_modules": ["conv1d"]}, {"target_modules": ["conv1d"], "r": 3}], (0.5, -1)),
    "embedding": ("emb-conv1d", [{"target_modules": ["emb"]}, {"target_modules": ["emb"], "r": 2}], (0.5, 1.5)),
    "two kinds": ("emb-conv1d", [{"target_modules": ["emb", "conv1d"]}, {"target_modules": ["emb"]}], (1, -1)),
    "some layers": ("qwen2", [{**ATTENTION, "layers_to_transform": [1]}, {"target_modules": ["up_proj"]}], (1, 1)),
    "whole block": ("llama", [{"target_modules": "all-linear"}, {"target_modules": ["v_proj", "down_proj"]}], (0.6, 2)),
    "head": ("llama", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"], "r": 2}], (1, 0.2)),
}


class Composed:
    """A case: its model, its adapters, and the dense change of every parameter."""

    def __init__(self, folder: Path, case: str) -> None:
        kind, fields, self.weights = UNLIKE[case]
        self.model = build(kind)
        self.paths = [
            save_adapter(folder / f"a{i}", self.model, self._config(kind, own), i) for i, own in enumerate(fields)
        ]
        self.change = weighted([changes(self.model, path) for path in self.paths], self.weights)
        self.rank = sum(self._largest(path) for path in self.paths)

    @staticmethod
    def _config(kind: str, fields: dict[str, Any]) -> Any:
        linear = kind == "emb-conv1d" and "conv1d" not in fields["target_modules"]
        return lora_config(kind, **({"fan_in_fan_out": False} if linear else {}), **fields)

    @staticmethod
    def _largest(path: Path) -> int:
        config = json.loads((path / "adapter_config.json").read_text())
        return max(config["r"], *config["rank_pattern"].values(), 0)


@pytest.mark.parametrize("profile", ["peft", None], ids=["peft", "default"])
@pytest.mark.parametrize("case", UNLIKE)
def test_adapters_that_differ_in_everything_add_up(tmp_path: Path, case: str, profile: str | None) -> None:
    """Concatenated, and merged at a rank that loses nothing, beside the first ingredient in one model."""
    made = Composed(tmp_path, case)
    own = {f"a{i}": path for i, path in enumerate(made.paths)}
    cat = export(tmp_path / "cat", made.model, made.paths, made.weights, profile=profile)
    merged = export(
        tmp_path / "merged", made.model, made.paths, made.weights, profile=profile, merge=True, rank=made.rank
    )
    peft_model = load(made.model, {**own, "cat": cat, "merged": merged})
    unchanged, expected = outputs(made.model), outputs(dense(made.model, made.change))
    for name in ("cat", "merged"):
        assert_update(peft_model, name, made.change, tolerance=1e-5, close=5e-6 if name == "merged" else 1e-6)
        peft_model.set_adapter(name)
        assert_same(outputs(peft_model), expected, unchanged, tolerance=1e-5)
    if set(made.weights) == {1}:
        peft_model.base_model.set_adapter(list(own))
        assert_same(outputs(peft_model), expected, unchanged, tolerance=1e-5)


@pytest.mark.parametrize("profile", ["peft", "portable"])
def test_a_rank_pattern_survives_saving_by_peft(tmp_path: Path, profile: str) -> None:
    """What PEFT's own combination of such adapters does not: it forgets the patterns and cannot be loaded again."""
    made = Composed(tmp_path, "some layers")
    ours = export(tmp_path / "ours", made.model, made.paths, made.weights, profile=profile)
    load(made.model, {"ours": ours}).save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = load(made.model, {"again": tmp_path / "again" / "ours"})
    assert_update(again, "again", made.change, tolerance=1e-5)


def test_a_merge_at_more_rank_than_a_module_can_have_stops_at_its_shorter_side(tmp_path: Path) -> None:
    """10 by 20 and 20 by 2 at rank 13: what PEFT's `svd_rank` writes there cannot be loaded."""
    made = Composed(tmp_path, "ranks and alphas")
    path = export(tmp_path / "out", made.model, made.paths, made.weights, merge=True, rank=13, profile="peft")
    stored = load_file(path / "adapter_model.safetensors")
    ranks = {name.split(".")[2]: tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name}
    assert ranks == {"lin0": 10, "lin1": 2}
    assert_update(load(made.model, {"a": made.paths[0], "ours": path}), "ours", made.change, tolerance=1e-5, close=5e-6)


def test_modules_that_only_fill_the_layout_are_zero_and_change_no_output(tmp_path: Path) -> None:
    """One layer of two is adapted: the other holds zeros in `portable` and nothing in `peft`."""
    model = build("qwen2")
    config = lora_config("qwen2", **ATTENTION, layers_to_transform=[1])
    path = save_adapter(tmp_path / "one", model, config, seed=1)
    padded = export(tmp_path / "padded", model, [path], [1], profile="portable")
    bare = export(tmp_path / "bare", model, [path], [1], profile="peft")
    stored, without = (load_file(p / "adapter_model.safetensors") for p in (padded, bare))
    added = {name: tensor for name, tensor in stored.items() if name not in without}
    assert len(added) == 4 and all(".layers.0." in name and not tensor.any() for name, tensor in added.items())
    peft_model = load(model, {"padded": padded, "bare": bare, "one": path})
    found = {}
    for name in ("padded", "bare", "one"):
        peft_model.set_adapter(name)
        found[name] = outputs(peft_model)
    assert torch.equal(found["padded"], found["bare"])
    assert_same(found["padded"], found["one"], outputs(model), tolerance=1e-6)


def test_weight_minus_one_negates_and_equal_adapters_cancel(tmp_path: Path) -> None:
    model = build("mlp")
    paths = [save_adapter(tmp_path / name, model, lora_config("mlp", **BOTH), seed=42) for name in ("a", "b")]
    negative = export(tmp_path / "negative", model, paths[:1], [-1])
    cancelled = export(tmp_path / "cancelled", model, paths, (1, -1))
    peft_model = load(model, {"a": paths[0], "negative": negative, "cancelled": cancelled})
    own = delta_weights(peft_model, "a")
    for name, change in delta_weights(peft_model, "negative").items():
        torch.testing.assert_close(change, -own[name], atol=1e-6, rtol=0)
    for name, change in delta_weights(peft_model, "cancelled").items():
        torch.testing.assert_close(change, torch.zeros_like(own[name]))


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (5.0, 0.01), (-1.0, -1.0), (0.5, -0.3)])
def test_weights_and_scalings_that_differ(tmp_path: Path, weights: tuple[float, float]) -> None:
    """PEFT asks of its precise methods a correlation of 0.99 and a squared error of 0.01; of `linear` 0.6 and 1."""
    model = build("mlp")
    paths = [
        save_adapter(
            tmp_path / f"a{alpha}", model, lora_config("mlp", target_modules=["lin0"], lora_alpha=alpha), alpha
        )
        for alpha in (16, 32)
    ]
    change = weighted([changes(model, path) for path in paths], weights)
    cat = export(tmp_path / "cat", model, paths, weights)
    svd = export(tmp_path / "svd", model, paths, weights, merge=True)
    peft_model = load(model, {"a": paths[0], "cat": cat, "svd": svd})
    assert_update(peft_model, "cat", change, tolerance=1e-5)
    (found,) = delta_weights(peft_model, "svd").values()
    assert correlation(found.double(), change["lin0.weight"]) > 0.99
    assert float((found - change["lin0.weight"]).square().mean()) < 0.01


@pytest.mark.parametrize(("method", "least"), [("svd", 0.99), ("ties", 0.8), ("dare", 0.6), ("dare-ties", 0.55)])
def test_methods_follow_the_sum_as_closely_as_pefts(tmp_path: Path, method: str, least: float) -> None:
    """By the correlation that PEFT asks of its `svd` forms at density 0.5."""
    model = build("mlp")
    paths = [
        save_adapter(
            tmp_path / f"a{alpha}", model, lora_config("mlp", target_modules=["lin0"], lora_alpha=alpha), alpha
        )
        for alpha in (16, 32)
    ]
    options = MethodOptions() if method == "svd" else MethodOptions(density=0.5)
    export_adapter(
        ExportRequest(method=method, adapters=[str(p) for p in paths], method_options=options, rank=8), tmp_path / "out"
    )
    (found,) = delta_weights(load(model, {"a": paths[0], "ours": tmp_path / "out"}), "ours").values()
    change = weighted([changes(model, path) for path in paths], (1, 1))["lin0.weight"]
    assert correlation(found.double(), change) > least


def test_two_adapters_that_save_the_same_module_are_refused_by_name(tmp_path: Path) -> None:
    model = build("mlp")
    config = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    paths = [save_adapter(tmp_path / f"a{i}", model, lora_config("mlp", **config), i) for i in (1, 2)]
    with pytest.raises(InputError, match="modules_to_save"):
        export(tmp_path / "out", model, paths, (1, 1))
    assert not (tmp_path / "out").exists()
