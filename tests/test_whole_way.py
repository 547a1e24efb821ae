"""From the files of adapters to the one that is served: inspect, fit, export, with stock PEFT as the witness at both
ends.

The losses that a fit reports of each adapter alone are those of stock PEFT with that adapter; the loss of the fit is
that of stock PEFT with what was exported.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loracli.adapters.compatible import inspect_adapters
from loracli.calibration.records import parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.recipe.recipe import load_recipe
from tests.tiny import make_adapter, make_base, random_records, write_jsonl

# Of each kind of module one, for the new LoRA that a fit trains by default.
CONTROLLED = ("embeddings", "head", "both of a tied base", "lora_bias", "conv1d")
CONV1D = {"fan_in_fan_out": True}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "embeddings": ("llama", [{"targets": ("embed_tokens", "q_proj")}, {"targets": ("embed_tokens",), "rank": 2}]),
    "head": ("llama", [{"targets": ("lm_head", "v_proj")}, {"targets": ("lm_head",), "use_rslora": True}]),
    "embeddings of a tied base": ("llama-tied", [{"targets": ("embed_tokens",)}, {"targets": ("q_proj",)}]),
    "head of a tied base": ("llama-tied", [{"targets": ("lm_head", "q_proj")}, {"targets": ("lm_head",), "rank": 2}]),
    "both of a tied base": ("llama-tied", [{"targets": ("embed_tokens", "lm_head")}, {"targets": ("lm_head",)}]),
    "both as one": ("llama-tied", [{"targets": ("embed_tokens",), "ensure_weight_tying": True}, {}]),
    "lora_bias": ("qwen2", [{"lora_bias": True, "use_rslora": True}, {"targets": ("v_proj", "up_proj"), "rank": 2}]),
    "lora_bias of both": ("neox", [{"targets": ("query_key_value",), "lora_bias": True, "alpha": 3}] * 2),
    "lora_bias, no bias below": ("llama", [{"lora_bias": True}, {"lora_bias": True, "targets": ("lm_head",)}]),
    "lora_bias and conv1d": ("gpt2", [{"targets": ("c_attn", "c_fc"), "lora_bias": True, **CONV1D}] * 2),
    "conv1d": ("gpt2", [{"targets": ("c_attn", "c_proj"), **CONV1D}, {"targets": ("c_fc", "wte"), **CONV1D}]),
    "conv1d and a tied head": ("gpt2", [{"targets": ("c_attn",), **CONV1D}, {"targets": ("lm_head", "wpe")}]),
}


def make_case(folder: Path, case: str) -> tuple[Path, list[Path]]:
    kind, options = CASES[case]
    base = make_base(folder / "base", kind)
    defaults = {"targets": ("q_proj", "v_proj"), "rank": 4, "alpha": 8}
    paths = [make_adapter(folder / f"a{i}", base, seed=i + 1, **{**defaults, **o}) for i, o in enumerate(options)]
    return base, paths


def fit_case(folder: Path, base: Path, adapters: list[Path], *, control: str | None = "none", **more: Any) -> Any:
    write_jsonl(folder / "val.jsonl", random_records(24))
    write_jsonl(folder / "test.jsonl", random_records(20, seed=1))
    return fit_mixing(
        [str(path) for path in adapters],
        folder / "val.jsonl",
        eval_data=folder / "test.jsonl",
        base=str(base),
        settings=FitSettings(passes=2, control=control, **more),
    )


def nats_of_peft(base: Path, adapter: Path, data: Path) -> float:
    """Nats per scored token of stock PEFT with an adapter, record by record."""
    (source,) = parse_sources(data)
    rendered = render_file(read_records(source), AutoTokenizer.from_pretrained(base), max_length=256)
    nats, tokens = 0.0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's advice on tied embeddings and on Conv1D
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for example in rendered.examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        for place in (i for i, scored in enumerate(example.scored) if scored):
            nats -= float(log_p[place - 1, example.input_ids[place]])
            tokens += 1
    return nats / tokens


def assert_whole_way(folder: Path, base: Path, recipe: Any, witnesses: list[Path], **export: Any) -> None:
    """The witness of an adapter is what stock PEFT loads to run it."""
    data = folder / "test.jsonl"
    for adapter, witness in zip(recipe.adapters, witnesses, strict=True):
        expected = nats_of_peft(base, witness, data)
        assert recipe.held_out.row(adapter.reference).nats_per_token == pytest.approx(expected, rel=2e-5)
        assert abs(expected - recipe.held_out.row("base").nats_per_token) > 1e-2  # the adapter does something
    export_adapter(ExportRequest(recipe, **export), folder / "out")
    expected = nats_of_peft(base, folder / "out", data)
    assert recipe.held_out.row("fit").nats_per_token == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_inspected_fitted_and_exported_is_what_peft_runs(tmp_path: Path, case: str) -> None:
    base, adapters = make_case(tmp_path, case)
    inspection = inspect_adapters([str(path) for path in adapters])
    assert inspection.problems == () and all(summary.norm > 0 for summary in inspection.adapters)
    recipe = fit_case(tmp_path, base, adapters, control=None if case in CONTROLLED else "none")
    assert bool(recipe.held_out.controls) == (case in CONTROLLED)
    assert_whole_way(tmp_path, base, recipe, adapters)


def test_names_as_other_trainers_leave_them_go_the_whole_way(tmp_path: Path) -> None:
    """The witness holds the same numbers under PEFT's own names."""
    base, adapters = make_case(tmp_path, "head")
    odd = []
    for path, before, inside in zip(
        adapters, ("", "_orig_mod.base_model.model.base_model.model."), (".weight", ".default.weight"), strict=True
    ):
        folder = tmp_path / f"odd-{path.name}"
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
        tensors = load_file(path / "adapter_model.safetensors")
        renamed = {
            before + name.removeprefix("base_model.model.").replace(".weight", inside): tensor
            for name, tensor in tensors.items()
        }
        save_file(renamed, folder / "adapter_model.safetensors")
        odd.append(folder)
    recipe = fit_case(tmp_path, base, odd)
    assert_whole_way(tmp_path, base, recipe, adapters)


def write_as_mlx(peft: Path, folder: Path, *, rank: int, scale: float) -> Path:
    """The same numbers as mlx-lm keeps them."""
    tensors = load_file(peft / "adapter_model.safetensors")
    folder.mkdir()
    turned = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.T.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(turned, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "model": "tiny/base", "lora_parameters": {"rank": rank, "scale": scale}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_mlx_adapter_beside_one_of_peft_goes_the_whole_way(tmp_path: Path, tiny_base: Path) -> None:
    """The witness holds the same numbers in PEFT's format."""
    twin = make_adapter(tmp_path / "twin", tiny_base, targets=("q_proj", "down_proj"), rank=3, alpha=6, seed=1)
    other = make_adapter(tmp_path / "other", tiny_base, seed=2)
    mlx = write_as_mlx(twin, tmp_path / "mlx", rank=3, scale=2.0)
    recipe = fit_case(tmp_path, tiny_base, [mlx, other])
    recipe.save(tmp_path / "recipe.json")
    assert_whole_way(tmp_path, tiny_base, load_recipe(tmp_path / "recipe.json"), [twin, other])
