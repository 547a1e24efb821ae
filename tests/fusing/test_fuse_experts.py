"""A mixture with the updates of its experts folded in is the base with PEFT's own updates added, however its files keep
the experts; adapters with a layer for each expert included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.adapters.adapter import read_adapter
from loracli.errors import BaseModelMismatch, UsageError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.model.base import on_base
from loracli.model.reference import BaseReference
from loracli.recipe.recipe import load_recipe
from loracli.verifying.verify import verify_directory
from tests.mixtures import BOTH, EXPERTS, add, expert_layers, load, peft_deltas
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

QWEN = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
MIXTRAL = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}


def per_expert(kind: str, folder: Path, **more: Any) -> Path:
    if kind == "mixtral":
        return expert_layers(folder, MIXTRAL, "block_sparse_moe.experts", **more)
    return expert_layers(folder, QWEN, "mlp.experts", **more)


class Mixture:
    """A tiny mixture, an adapter of its parameters, and one with a layer for each expert."""

    def __init__(self, folder: Path, kind: str, *, original: bool) -> None:
        self.base = make_base(folder / "base", kind)
        self.layers = original and kind != "gpt-oss"
        if not original:
            load(self.base).save_pretrained(self.base, save_original_format=False)
        self.paths = [make_adapter(folder / "a", self.base, parameters=BOTH, rank=3, seed=1)]
        if kind != "gpt-oss":
            self.paths.append(per_expert(kind, folder / "b"))
        self.names = [str(path) for path in self.paths]

    def summed(self) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        for path in self.paths:
            for name, delta in peft_deltas(path, self.base).items():
                total[name] = total.get(name, torch.zeros_like(delta)) + delta
        return total


@pytest.fixture(
    scope="module",
    params=[("mixtral", True), ("mixtral", False), ("qwen3-moe", True), ("gpt-oss", True)],
    ids=["mixtral-layers", "mixtral-fused", "qwen3-moe-layers", "gpt-oss-fused"],
)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    kind, original = request.param
    return Mixture(tmp_path_factory.mktemp(kind), kind, original=original)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp("qwen"), "qwen3-moe", original=True)


def test_a_fused_mixture_is_the_base_with_the_dense_updates_added(tmp_path: Path, mixture: Mixture) -> None:
    """Also in every weight, as transformers loads them."""
    stored = sorted(load_file(mixture.base / "model.safetensors"))
    assert any("experts.3." in name for name in stored) == mixture.layers
    fused = fuse_model(FuseRequest(adapters=mixture.names, method="sum", base=str(mixture.base)), tmp_path / "out")
    assert fused.modules == 2 * (2 + 2)
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == stored
    expected, found = load(mixture.base, torch.float64), load(tmp_path / "out")
    before = dict(load(mixture.base).named_parameters())
    add(expected, mixture.summed())
    changed = 0
    for name, parameter in expected.named_parameters():
        own = found.get_parameter(name)
        assert torch.allclose(own.double(), parameter, rtol=1e-6, atol=1e-6), name
        changed += not torch.equal(own, before[name])
    assert changed == 2 * (2 + 2)
    verify_directory(tmp_path / "out", adapters=mixture.names, base=str(mixture.base))


def test_in_bfloat16_every_weight_is_rounded_once(tmp_path: Path, mixture: Mixture) -> None:
    options = {"adapters": mixture.names, "method": "sum", "base": str(mixture.base)}
    fuse_model(FuseRequest(dtype="bfloat16", **options), tmp_path / "out")  # type: ignore[arg-type]
    expected = load(mixture.base, torch.float64)
    add(expected, mixture.summed())
    found = load(tmp_path / "out", torch.bfloat16)
    for name, parameter in expected.named_parameters():
        rounded = parameter.to(torch.bfloat16)
        wrong = (found.get_parameter(name) != rounded).float().mean()
        assert float(wrong) < 2e-3, f"{name}: more than the few that lie in the middle between two"
    verify_directory(tmp_path / "out", adapters=mixture.names, base=str(mixture.base))


def test_verify_finds_one_wrong_entry_of_one_expert(tmp_path: Path, mixture: Mixture) -> None:
    fuse_model(FuseRequest(adapters=mixture.names, method="sum", base=str(mixture.base)), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(
        name
        for name in sorted(tensors, reverse=True)
        if "layers.1" in name and name.endswith(("w2.weight", "down_proj.weight", "down_proj"))
    )
    tensors[name].view(-1)[-3] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "out", adapters=mixture.names, base=str(mixture.base))
    assert any(f"{name}: 1 entries are not" in problem for problem in caught.value.problems)


def test_a_base_that_lacks_an_expert_is_refused_by_name(tmp_path: Path, qwen: Mixture) -> None:
    base = make_base(tmp_path / "base", "qwen3-moe")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatch, match=r"have 7 of 8 tensors of model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        fuse_model(FuseRequest(adapters=qwen.names, method="sum", base=str(base)), tmp_path / "out")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_layers_of_experts_are_taken_for_the_parameters_of_the_base(tmp_path: Path, kind: str) -> None:
    """As PEFT converts such an adapter: dW of gate and up one below the other, whatever the scaling of each."""
    base = make_base(tmp_path / "base", kind)
    path = per_expert(kind, tmp_path / "a")
    (adapter,) = on_base([read_adapter(str(path))], BaseReference("x", base, None))
    theirs = peft_deltas(path, base)
    assert adapter.targets.keys() == theirs.keys() and len(theirs) == 4
    for parameter, delta in theirs.items():
        own = torch.stack([module.factors.delta_weight() for module in adapter.targets[parameter]])
        assert torch.allclose(own, delta, rtol=0, atol=1e-6)
    one = per_expert(kind, tmp_path / "b", alpha_pattern={"up_proj": 1, "w3": 1})
    (other,) = on_base([read_adapter(str(one))], BaseReference("x", base, None))
    for parameter, delta in theirs.items():
        own = torch.stack([module.factors.delta_weight() for module in other.targets[parameter]])
        half = delta.shape[1] // 2
        scaled = torch.cat([delta[:, :half], delta[:, half:] / 6], dim=1) if "gate_up" in parameter else delta
        assert torch.allclose(own, scaled, rtol=0, atol=1e-6)


def test_a_layer_that_an_expert_lacks_is_zero(tmp_path: Path, qwen: Mixture) -> None:
    path = per_expert("qwen3-moe", tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    tensors = {name: t for name, t in tensors.items() if "experts.1.up_proj" not in name and "experts.2." not in name}
    save_file(tensors, path / "adapter_model.safetensors")
    (adapter,) = on_base([read_adapter(str(path))], BaseReference("x", qwen.base, None))
    experts = [m.factors.delta_weight() for m in adapter.targets["model.layers.0.mlp.experts.gate_up_proj"]]
    assert len(experts) == EXPERTS and not experts[2].any()
    assert experts[1][:24].any() and not experts[1][24:].any() and experts[3][24:].any()


def test_layers_that_a_parameter_cannot_stand_for_are_refused_by_name(tmp_path: Path, qwen: Mixture) -> None:
    reference = BaseReference("x", qwen.base, None)
    biased = per_expert("qwen3-moe", tmp_path / "biased", lora_bias=True)
    tensors = load_file(biased / "adapter_model.safetensors")
    tensors |= {name[:-6] + "bias": torch.ones(len(t)) for name, t in tensors.items() if "lora_B" in name}
    save_file(tensors, biased / "adapter_model.safetensors")
    with pytest.raises(BaseModelMismatch, match="has lora_bias for .*experts.0.*, which is a part of .*_proj"):
        on_base([read_adapter(str(biased))], reference)
    twice = per_expert("mixtral", tmp_path / "twice")
    tensors = load_file(twice / "adapter_model.safetensors")
    tensors |= {
        name.replace("block_sparse_moe", "mlp"): t.clone() for name, t in tensors.items() if "experts.1.w1" in name
    }
    save_file(tensors, twice / "adapter_model.safetensors")
    mixtral = BaseReference("x", make_base(tmp_path / "mixtral", "mixtral"), None)
    with pytest.raises(BaseModelMismatch, match=r"adapts .*gate_up_proj twice, once as .*experts\.1\."):
        on_base([read_adapter(str(twice))], mixtral)
    more = per_expert("qwen3-moe", tmp_path / "more", experts=(0, EXPERTS))
    with pytest.raises(BaseModelMismatch, match=r"adapts the expert 4 of .*, and the base has 4, from 0 on"):
        on_base([read_adapter(str(more))], reference)
    with pytest.raises(
        BaseModelMismatch, match=r"\(experts, in, out\) = \(4, 48, 32\); the base model has \(4, 24, 32\)"
    ):
        other = expert_layers(tmp_path / "other", {"down_proj": (32, 48)}, "mlp.experts")
        export_adapter(ExportRequest(method="sum", adapters=[str(other)], base=str(qwen.base)), tmp_path / "out")
    uneven = expert_layers(tmp_path / "uneven", {"gate_proj": (10, 32), "up_proj": (38, 32)}, "mlp.experts")
    with pytest.raises(BaseModelMismatch, match=r"gate_up_proj by layers of \(out, in\) = \(10, 32\), not \(24, 32\)"):
        on_base([read_adapter(str(uneven))], reference)  # together they have the base's 48 rows


def test_a_recipe_of_layers_and_parameters_is_fitted_and_exported(tmp_path: Path, qwen: Mixture) -> None:
    """From the recipe's table alone, without the base; the export is the sum of what PEFT makes of each."""
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    settings = FitSettings(passes=2, holdout=0.4, control="none")
    recipe = fit_mixing(qwen.names, data, base=str(qwen.base), settings=settings)
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "out")
    expected: dict[str, torch.Tensor] = {}
    for index, path in enumerate(qwen.paths):
        for name, delta in peft_deltas(path, qwen.base).items():
            weight = load_recipe(tmp_path / "recipe.json").weights_of(name)[index]
            assert weight is not None
            expected[name] = expected.get(name, torch.zeros_like(delta)) + weight * delta
    found = peft_deltas(tmp_path / "out", qwen.base)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) < 1e-6 * float(delta.norm())
    verify_directory(tmp_path / "out", recipe=tmp_path / "recipe.json", base=str(qwen.base))
    fuse_model(FuseRequest(str(tmp_path / "recipe.json"), base=str(qwen.base)), tmp_path / "fused")
    whole = load(qwen.base)
    add(whole, expected)
    assert torch.allclose(logits(load(tmp_path / "fused")), logits(whole), rtol=0, atol=1e-3)


def test_methods_with_a_base_take_layers_for_parameters_and_verify(tmp_path: Path, qwen: Mixture) -> None:
    export_adapter(ExportRequest(method="ties", adapters=qwen.names, base=str(qwen.base)), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=qwen.names, base=str(qwen.base))
    assert any("every tensor against the composition" in said for said in found.checked)
    names = read_adapter(str(tmp_path / "out")).modules
    assert "model.layers.0.mlp.experts.gate_up_proj[3]" in names and len(names) == 2 * (2 * EXPERTS + 2)


def test_levels_that_experts_do_not_have_are_refused_for_layers_too(tmp_path: Path, qwen: Mixture) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    with pytest.raises(UsageError, match="updates of experts, which --mixing core cannot weigh"):
        prepare_fit(qwen.names[1:], data, base=str(qwen.base), settings=FitSettings(mixing="core"))


def test_adapters_of_some_experts_are_zero_at_the_others_and_compose(tmp_path: Path, qwen: Mixture) -> None:
    """Two that have no expert in common give what one with all of them gives, in a fusion and in an export."""
    whole = per_expert("qwen3-moe", tmp_path / "whole")
    parts = [tmp_path / "first", tmp_path / "last"]
    for path, numbers in zip(parts, ((0, 1), (2, 3)), strict=True):
        per_expert("qwen3-moe", path, experts=numbers)
        tensors = load_file(whole / "adapter_model.safetensors")
        kept = {n: t for n, t in tensors.items() if any(f"experts.{number}." in n for number in numbers)}
        save_file(kept, path / "adapter_model.safetensors")
    names, theirs = [str(path) for path in parts], peft_deltas(whole, qwen.base)
    export_adapter(ExportRequest(method="sum", adapters=names, base=str(qwen.base)), tmp_path / "out")
    found = peft_deltas(tmp_path / "out", qwen.base)
    assert found.keys() == theirs.keys()
    assert all(torch.allclose(found[name], delta, rtol=0, atol=1e-6) for name, delta in theirs.items())
    export_adapter(ExportRequest(method="sum", adapters=names[:1], base=str(qwen.base)), tmp_path / "one")
    for name, delta in peft_deltas(tmp_path / "one", qwen.base).items():
        assert torch.allclose(delta[:2], theirs[name][:2], rtol=0, atol=1e-6) and not delta[2:].any()
    fuse_model(FuseRequest(adapters=names, method="sum", base=str(qwen.base)), tmp_path / "fused")
    model = load(qwen.base)
    add(model, theirs)
    assert torch.allclose(logits(load(tmp_path / "fused")), logits(model), rtol=0, atol=1e-4)
    for made in ("out", "fused"):
        verify_directory(tmp_path / made, adapters=names, base=str(qwen.base))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_a_router_is_adapted_by_its_old_name_and_by_its_new(tmp_path: Path, kind: str) -> None:
    """A linear layer before transformers 5, a parameter since; stock PEFT loads both."""
    base = make_base(tmp_path / "base", kind)
    new = make_adapter(tmp_path / "new", base, parameters=(*BOTH, "mlp.gate.weight"), rank=3, seed=1)
    old = per_expert(kind, tmp_path / "old")
    router = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
    tensors = load_file(old / "adapter_model.safetensors")
    for layer in (0, 1):
        name = f"base_model.model.model.layers.{layer}.{router}"
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(EXPERTS, 2)}
    save_file(tensors, old / "adapter_model.safetensors")
    config = json.loads((old / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": [*config["target_modules"], "gate"]})
    )
    names, model = [str(new), str(old)], load(base)
    theirs = [peft_deltas(path, base) for path in (new, old)]
    assert all(f"model.layers.{layer}.mlp.gate" in deltas for deltas in theirs for layer in (0, 1))
    for deltas in theirs:
        add(model, deltas)
    fuse_model(FuseRequest(adapters=names, method="sum", base=str(base)), tmp_path / "fused")
    assert torch.allclose(logits(load(tmp_path / "fused")), logits(model), rtol=0, atol=1e-3)
    export_adapter(ExportRequest(method="sum", adapters=names, base=str(base)), tmp_path / "out")
    found = peft_deltas(tmp_path / "out", base)
    for name, delta in found.items():
        expected = sum((deltas[name] for deltas in theirs if name in deltas), torch.zeros(()))
        assert float((delta - expected).norm()) < 1e-6 * float(delta.norm()), name
    assert len(found) == 2 * (2 + 2 + 1)
    for made in ("out", "fused"):
        verify_directory(tmp_path / made, adapters=names, base=str(base))
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    settings = FitSettings(passes=2, holdout=0.4, control="none")
    recipe = fit_mixing(names, data, base=str(base), settings=settings)
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "fitted")
    verify_directory(tmp_path / "fitted", recipe=tmp_path / "recipe.json", base=str(base))
    weight = recipe.weights_of("model.layers.1.mlp.gate")
    expected = sum(w * deltas["model.layers.1.mlp.gate"] for w, deltas in zip(weight, theirs, strict=True))  # type: ignore[operator]
    found = peft_deltas(tmp_path / "fitted", base)["model.layers.1.mlp.gate"]
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
