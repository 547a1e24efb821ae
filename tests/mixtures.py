"""Mixtures of experts with adapters of stock PEFT on them, and the dense formula that judges what becomes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny import BASE_ID

EXPERTS = 4
ROUTERS = {"mixtral": "mlp.gate", "qwen3-moe": "mlp.gate", "gpt-oss": "mlp.router"}
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation="eager").eval()


def peft_deltas(adapter: Path, base: Path) -> dict[str, Tensor]:
    """dW of every module and parameter that stock PEFT changes, by its own get_delta_weight; experts as (E, out, in)
    or (E, in, out), as the base has them, and a router's weight by the name of its module."""
    with warnings.catch_warnings():
        # Of patterns it says that they are ignored even where it has used them for a parameter.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        model = PeftModel.from_pretrained(load(base, torch.float64), str(adapter), autocast_adapter_dtype=False)
    found: dict[str, Tensor] = {}
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "get_delta_weight") or not getattr(layer, "lora_A", None):
            continue
        plain = name.replace(".base_layer", "")
        matrix = not isinstance(layer, ParamWrapper) or layer.num_experts == 1  # a router's weight
        name = plain if matrix else f"{plain}.{layer.parameter_name}"
        found[name] = layer.get_delta_weight("default").detach().double()
    return found


def file_deltas(adapter: Path, parameters: Mapping[str, str]) -> dict[str, Tensor]:
    """dW_e (E, out, in) in float64 by the file alone, of an adapter without patterns.

    Args:
        adapter: the directory.
        parameters: by the end of a tensor's module, `experts.base_layer`, the name of the parameter.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        end = next((end for end in parameters if module.endswith(f".{end}")), None)
        if not name.endswith("lora_A.weight") or end is None:
            continue
        lora_A, lora_B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        rank = len(lora_A) // EXPERTS
        scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        experts = [
            scaling * sum(torch.outer(lora_B[:, EXPERTS * k + e], lora_A[rank * e + k]) for k in range(rank))
            for e in range(EXPERTS)
        ]
        found[f"{module.removesuffix('.base_layer')}.{parameters[end]}"] = torch.stack(experts)
    return found


def add(model: Any, deltas: Mapping[str, Tensor], weight: float = 1.0) -> None:
    """Adds dW to the parameters of a bare model; of modules to their weight."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameter = parameters.get(name, parameters.get(f"{name}.weight"))
            parameter += (weight * delta).to(parameter.dtype)


def expert_layers(
    folder: Path,
    parts: Mapping[str, tuple[int, int]],
    module: str,
    *,
    experts: Iterable[int] = range(EXPERTS),
    rank: int = 2,
    **more: Any,
) -> Path:
    """An adapter with linear layers for the experts of two decoder layers, as they were trained before transformers 5.

    Args:
        folder: to make.
        parts: last names of the layers, with out and in.
        module: of the experts in a decoder layer, `mlp.experts`.
        experts: which of them.
        rank: of each.
        more: fields of the config.
    """
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in (0, 1):
        for expert in experts:
            for part, (out, width) in parts.items():
                name = f"base_model.model.model.layers.{layer}.{module}.{expert}.{part}"
                tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, width, generator=generator)
                tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank, "target_modules": sorted(parts),
              "base_model_name_or_path": BASE_ID, "task_type": "CAUSAL_LM", **more}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
