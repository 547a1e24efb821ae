"""The factors of experts in the orders of unsloth and of older PEFT are read as they were trained, and what a config
leaves open is named and tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.compatible import inspect_adapters
from loracli.adapters.expert_orders import open_orders
from loracli.calibration.records import parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.base import BaseReference, on_base
from loracli.progress import Silent
from loracli.verifying.verify import verify_directory
from tests.mixtures import BOTH, EXPERTS, load, peft_deltas
from tests.tiny import make_adapter, make_base, random_records, write_jsonl

RANK = 3
UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}


def rewritten(peft: Path, folder: Path, *, grouped: bool = False, turned: bool = False, **fields: object) -> Path:
    """The same updates with lora_B expert after expert, or with lora_A and lora_B the other way round."""
    tensors = load_file(peft / "adapter_model.safetensors")
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        A = tensors[name].view(EXPERTS, RANK, -1)
        B = tensors[other].view(-1, RANK, EXPERTS).permute(2, 0, 1)  # (E, out, r)
        if turned:
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        order = (1, 0, 2) if grouped else (1, 2, 0)
        tensors[name], tensors[other] = A.flatten(0, 1).contiguous(), B.permute(order).flatten(1).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {**json.loads((peft / "adapter_config.json").read_text()), **fields}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


class Said(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def trained(base: Path, adapter: Path, data: Path) -> Path:
    """The adapter after a few steps of stock PEFT on the records."""
    (source,) = parse_sources(data)
    examples = render_file(read_records(source), AutoTokenizer.from_pretrained(base), max_length=256).examples
    model = PeftModel.from_pretrained(load(base), str(adapter), is_trainable=True)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        for example in examples[:8]:
            ids = torch.tensor([example.input_ids])
            optimiser.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    return adapter


def assert_same(adapter: LoraAdapter, deltas: dict[str, Tensor], *, transposed: bool = False) -> None:
    for name, delta in deltas.items():
        if delta.dim() < 3:
            continue
        own = torch.stack([module.factors.delta_weight() for module in adapter.targets[name]])
        assert torch.allclose(own, delta.mT if transposed else delta, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("kind", "how", "fields"),
    [
        ("qwen3-moe", {"grouped": True}, {"lora_B_layout": "grouped_by_expert"}),
        ("qwen3-moe", {}, {"lora_B_layout": "rank_major", **UNSLOTH}),
        ("qwen3-moe", {"turned": True}, {"peft_version": "0.18.1"}),
        ("qwen3-moe", {"turned": True}, {"peft_version": None}),
        ("qwen3-moe", {"turned": True, "grouped": True}, {"lora_B_layout": "grouped_by_expert"}),
        ("square-moe", {"turned": True}, {"peft_version": "0.19.0"}),
        ("square-moe", {}, {"peft_version": "0.21.1.dev0"}),
        ("gpt-oss", {}, {"peft_version": "0.18.1"}),
        ("gpt-oss", {"turned": True}, {"peft_version": "0.19.1"}),
    ],
    ids=str,
)
def test_a_known_order_is_honoured_wherever_the_adapter_goes(
    tmp_path: Path, kind: str, how: dict[str, bool], fields: dict[str, object]
) -> None:
    """What is exported is in the order of today's PEFT, which loads it with the updates that were trained."""
    base = make_base(tmp_path / "base", kind)
    peft = make_adapter(tmp_path / "peft", base, targets=("q_proj",), parameters=BOTH, rank=RANK)
    path, deltas = rewritten(peft, tmp_path / "a", **how, **fields), peft_deltas(peft, base)
    if how.get("turned") and not how.get("grouped") and kind != "gpt-oss":  # by PEFT 0.18's own formula
        tensors = load_file(path / "adapter_model.safetensors")
        name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
        A, B = (tensors[name.format(side)].double() for side in "AB")
        found = torch.einsum("ore,eri->eio", B.view(len(B), -1, EXPERTS), A.view(EXPERTS, -1, A.shape[1]))
        assert torch.allclose(2 * found * 4 / RANK, deltas["model.layers.0.mlp.experts.down_proj"], atol=1e-6)
    (adapter,) = on_base([read_adapter(str(path))], BaseReference("x", base, None))
    assert_same(adapter, deltas, transposed=kind == "gpt-oss")
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    recipe = fit_mixing([str(path)], data, base=str(base), settings=FitSettings(passes=2), folder=tmp_path)
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "fitted")
    export_adapter(ExportRequest(method="sum", adapters=[str(path)], base=str(base)), tmp_path / "sum")
    fitted, summed = (peft_deltas(tmp_path / made, base) for made in ("fitted", "sum"))
    for name, delta in deltas.items():
        weight = recipe.weights_of(name)[0]
        assert weight is not None
        assert torch.allclose(summed[name], delta, rtol=0, atol=1e-6)
        assert torch.allclose(fitted[name], weight * delta, rtol=0, atol=1e-6)
    verify_directory(tmp_path / "fitted", recipe=tmp_path / "recipe.json", base=str(base))
    verify_directory(tmp_path / "sum", adapters=[str(path)], base=str(base))
    assert open_orders(read_adapter(str(tmp_path / "sum"))) == ()


def test_orders_of_several_versions_go_together(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3-moe")
    one, two = (make_adapter(tmp_path / str(i), base, targets=(), parameters=BOTH, rank=RANK, seed=i) for i in (1, 2))
    old = rewritten(two, tmp_path / "old", turned=True, peft_version="0.18.0")
    assert inspect_adapters([str(one), str(old)]).problems == ()
    export_adapter(ExportRequest(method="sum", adapters=[str(one), str(old)], base=str(base)), tmp_path / "sum")
    expected = [peft_deltas(path, base) for path in (one, two)]
    for name, delta in peft_deltas(tmp_path / "sum", base).items():
        assert torch.allclose(delta, expected[0][name] + expected[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "fields", "written", "likelier"),
    [
        ({"grouped": True}, UNSLOTH, "lora_B_layout", "grouped_by_expert"),
        ({}, UNSLOTH, "lora_B_layout", "rank_major"),
        ({"turned": True}, {"peft_version": None}, "peft_version", "0.17.0"),
        ({}, {"peft_version": None}, "peft_version", "0.20.0"),
    ],
    ids=["grouped", "rank-major", "older", "newer"],
)
def test_an_open_order_is_named_and_the_likelier_one_is_said(
    tmp_path: Path, how: dict[str, bool], fields: dict[str, object], written: str, likelier: str
) -> None:
    """The adapter is trained on the records, so that the order of its training costs least there. What is advised
    settles it."""
    base = make_base(tmp_path / "base", "square-moe")
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    peft = trained(base, make_adapter(tmp_path / "peft", base, targets=(), parameters=BOTH, rank=RANK, size=0.1), data)
    path = rewritten(peft, tmp_path / "a", **how, **fields)
    said = Said()
    inspect_adapters([str(path)], progress=said)
    assert f'write "{written}": ' in said.warnings[0] and "read as PEFT reads them" in said.warnings[0]
    for run in ("fit", "compare"):
        said = Said()
        if run == "fit":
            fit_mixing(
                [str(path)], data, base=str(base), settings=FitSettings(passes=2), folder=tmp_path, progress=said
            )
        else:
            settings = CompareSettings(("sum",))
            compare_adapters(data, adapters=[str(path)], base=str(base), settings=settings, progress=said)
        (told,) = [warning for warning in said.warnings if "is likelier" in warning]
        assert f'"{likelier}" is likelier; write it into its adapter_config.json' in told
    settled = rewritten(peft, tmp_path / "b", **how, **{**fields, written: likelier})
    assert open_orders(read_adapter(str(settled))) == ()
    (adapter,) = on_base([read_adapter(str(settled))], BaseReference("x", base, None))
    assert_same(adapter, peft_deltas(peft, base))
