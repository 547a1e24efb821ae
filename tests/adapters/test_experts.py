"""Factors of experts: which parameter they are of, how many experts there are, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from loracli.adapters.adapter import open_adapter, read_adapter
from loracli.adapters.names import module_of_parameter, targeted_parameters
from loracli.adapters.stored import MAX_EXPERTS
from loracli.algebra.factors import Factors
from loracli.algebra.packing import join_experts, split_experts
from loracli.errors import IntegrityError, MalformedAdapter, UnsupportedAdapter
from loracli.system.tensor_file import TensorFile

EXPERTS, RANK = 3, 2


def write(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": [], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(module: str, *, rows: int = EXPERTS * RANK, columns: int = EXPERTS * RANK) -> dict[str, Tensor]:
    name = f"base_model.model.model.layers.0.{module}"
    return {f"{name}.lora_A.weight": torch.randn(rows, 5), f"{name}.lora_B.weight": torch.randn(7, columns)}


def refused(kind: type[Exception], folder: Path, tensors: dict[str, Tensor], match: str, **fields: Any) -> None:
    with pytest.raises(kind, match=match):
        read_adapter(str(write(folder, tensors, **fields)))


def test_experts_come_apart_and_together_again() -> None:
    lora_A, lora_B = torch.randn(EXPERTS * RANK, 5), torch.randn(7, RANK * EXPERTS)
    parts = split_experts(lora_A, lora_B, EXPERTS)
    for expert in range(EXPERTS):
        dense = sum(
            torch.outer(lora_B[:, EXPERTS * k + expert], lora_A[RANK * expert + k]) for k in range(RANK)
        )  # rows expert after expert, columns rank after rank
        assert torch.allclose(parts[1][expert] @ parts[0][expert], dense, atol=1e-6)  # type: ignore[arg-type]
    updates = [Factors(a, b) for a, b in zip(*parts, strict=True)]
    joined = join_experts(updates, RANK)
    assert torch.equal(joined.lora_A, lora_A) and torch.equal(joined.lora_B, lora_B)
    padded = join_experts(updates, RANK + 1)
    again = split_experts(padded.lora_A, padded.lora_B, EXPERTS)
    assert torch.allclose(again[1] @ again[0], parts[1] @ parts[0], atol=1e-6)


class Experts(nn.Module):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(EXPERTS, 4, 4)))


@pytest.mark.parametrize(
    "names", [("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")]
)
def test_the_levels_of_a_module_are_those_of_peft(names: tuple[str, ...]) -> None:
    """Parameters in the order in which a mixture has them, whatever the order in the config."""
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts(names)})})
    targets = [f"experts.{name}" for name in reversed(names)]
    peft_model = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=targets))  # type: ignore[arg-type]
    levels = {
        name.removeprefix("base_model.model."): f"mlp.experts.{layer.parameter_name}"
        for name, layer in peft_model.named_modules()
        if hasattr(layer, "parameter_name")
    }
    assert targeted_parameters(dict.fromkeys(levels, False), targets, "x") == levels
    assert targeted_parameters(dict.fromkeys(levels, False), names, "x") == levels
    assert {parameter: module_of_parameter(parameter, levels.values()) for parameter in levels.values()} == {
        parameter: module for module, parameter in levels.items()
    }


def test_targets_are_looked_up_by_the_ends_of_paths() -> None:
    names = ["model.layers.0.mlp.experts", "model.layers.10.mlp.experts", "experts", "xexperts", "mlp.q_proj"]
    modules = {name: name == "mlp.q_proj" for name in names}
    found = targeted_parameters(modules, ["experts.down_proj"], "x")
    assert found == {name: f"{name}.down_proj" for name in names[:3]}
    assert targeted_parameters(modules, ["down_proj"], "x") == {name: f"{name}.down_proj" for name in names[:4]}
    assert targeted_parameters(modules, ["model.layers.0.mlp.experts.down_proj"], "x").keys() == {names[0]}
    assert targeted_parameters(modules, ["layers.1.mlp.experts.down_proj"], "x") == {}


def test_what_is_read_of_experts_is_read_again_only_from_the_same_file(tmp_path: Path) -> None:
    tensors = factors("mlp.experts") | {
        name.replace("layers.0", "layers.1"): t for name, t in factors("mlp.experts").items()
    }
    path = write(tmp_path / "a", tensors, target_parameters=["experts.down_proj"])
    adapter = open_adapter(str(path))
    first, second = (adapter.modules[f"model.layers.{i}.mlp.experts.down_proj[2]"].factors for i in (0, 1))
    assert torch.equal(second.loaded().lora_A, tensors["base_model.model.model.layers.1.mlp.experts.lora_A.weight"][4:])
    assert torch.equal(first.lora_B, tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"][:, 2::3])
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match="has changed"):
        second.loaded()


def test_experts_are_read_once_though_adapters_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        open_adapter(str(write(tmp_path / name, factors("mlp.experts"), target_parameters=["experts.down_proj"])))
        for name in "ab"
    ]
    opened: list[Path] = []
    own = TensorFile.reader
    monkeypatch.setattr(TensorFile, "reader", lambda file: (opened.append(file.path), own(file))[1])
    for expert in range(EXPERTS):
        for adapter in both:
            adapter.modules[f"model.layers.0.mlp.experts.down_proj[{expert}]"].factors.loaded()
    assert [path.parent.name for path in opened] == ["a", "b"]


def test_what_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    one = {"target_parameters": ["experts.down_proj"]}
    match = r"has 7 rows and .* 6 columns; both have to be the number of experts times the rank 2"
    refused(MalformedAdapter, tmp_path / "a", factors("mlp.experts", rows=7), match, **one)
    match = "has 5 rows .* times the rank 2"
    refused(MalformedAdapter, tmp_path / "b", factors("mlp.experts", rows=5, columns=5), match, **one)
    two = factors("mlp.experts") | factors("mlp.experts.base_layer")
    refused(MalformedAdapter, tmp_path / "c", two, "has 2 pairs of factors for 1 target_parameters", **one)
    lacking = {name: t for name, t in factors("mlp.experts").items() if "lora_B" not in name}
    refused(MalformedAdapter, tmp_path / "d", lacking, r"lacks .*experts\.lora_B", **one)


def test_more_experts_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes are an expert's factors, and what stands for it in memory is much more."""
    one: dict[str, Any] = {"target_parameters": ["experts.down_proj"]}
    many = factors("mlp.experts", rows=RANK * (MAX_EXPERTS + 1), columns=RANK * (MAX_EXPERTS + 1))
    refused(MalformedAdapter, tmp_path / "a", many, f"at most {MAX_EXPERTS} are read", **one)
    monkeypatch.setattr("loracli.adapters.adapter._MAX_UPDATES", EXPERTS - 1)
    refused(MalformedAdapter, tmp_path / "b", factors("mlp.experts"), f"more than {EXPERTS - 1} experts", **one)


def test_what_cannot_be_told_is_refused_by_name(tmp_path: Path) -> None:
    two = factors("ffn.experts") | factors("ffn.experts.base_layer")
    names = ["ffn.experts.v1", "ffn.experts.w1"]
    match = "target_parameters has v1 and w1 of one module, and which tensors belong to v1 cannot be told"
    refused(UnsupportedAdapter, tmp_path / "a", two, match, target_parameters=names)
    matrix = factors("mixer", rows=RANK, columns=RANK)
    match = "is of one of the target_parameters, a matrix that is not a module's weight"
    refused(UnsupportedAdapter, tmp_path / "b", matrix, match, target_parameters=["mixer.A_log"])
    layout = {"target_parameters": ["experts.down_proj"], "lora_B_layout": "expert_major"}
    match = "lora_B_layout is 'expert_major'; expected one of rank_major, grouped_by_expert"
    refused(MalformedAdapter, tmp_path / "c", factors("mlp.experts"), match, **layout)
