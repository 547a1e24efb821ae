"""A base's weights by name: the same tensors as the loaded model has, from one file or many, tied or under other
names; anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.conversion.read import BaseWeights
from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import _SINGLE_FILE, INDEX_FILE
from tests.tiny import make_base


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_parameter_of_the_loaded_model_is_found(tmp_path: Path, kind: str, sharded: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "whole", kind))
    folder = tmp_path / "whole"
    if sharded:
        folder = tmp_path / "sharded"
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    weights = BaseWeights(folder, prefix=model.base_model_prefix, tied=model.all_tied_weights_keys)
    for name, parameter in model.state_dict().items():
        assert name in weights
        assert torch.equal(weights.read(name), parameter), name
    assert "model.layers.9.q_proj.weight" not in weights


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """GPT-2's own files say h.0 for transformer.h.0."""
    path = make_base(tmp_path, "gpt2") / _SINGLE_FILE
    tensors = load_file(path)
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, path)
    weights = BaseWeights(tmp_path, prefix="transformer", tied={"lm_head.weight": "transformer.wte.weight"})
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(weights.read(name), tensors[name])
    assert torch.equal(weights.read("lm_head.weight"), tensors["transformer.wte.weight"])
    assert weights.tied("lm_head.weight") == "transformer.wte.weight"
    assert weights.tied("transformer.wte.weight") == "lm_head.weight"
    assert weights.tied(name) is None


def refused(folder: Path, match: str, name: str = "a") -> None:
    with pytest.raises(BaseModelMismatch, match=match):
        BaseWeights(folder).read(name)


def test_what_is_no_weight_to_compute_with_is_refused(tmp_path: Path) -> None:
    save_file(
        {"a": torch.tensor([[1.0, float("inf")]]), "b": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / _SINGLE_FILE
    )
    refused(tmp_path, "infinite")
    refused(tmp_path, "dtype I8", "b")
    refused(tmp_path, "no tensor 'c'", "c")


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}',
     '{"weight_map": {"a": "model.bin"}}', '{"weight_map": {"a": "/etc/x.safetensors"}}'],
)  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    refused(tmp_path, "the index (cannot be read|has no map|names)")


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no weights in safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    refused(tmp_path, "not in the directory")
    (tmp_path / "one.safetensors").write_bytes(b"\xff" * 64)
    refused(tmp_path, "cannot be used")
    save_file({"b": torch.ones(2)}, tmp_path / "one.safetensors")
    refused(tmp_path, "does not hold it")
