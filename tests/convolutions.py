"""A small model with convolutions, adapters of stock PEFT on it, and the dense formula that judges what becomes of
them: dW = s B A for each output channel, with the rows of A that belong to the channel's group."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

BASE = "tiny/vision"
GROUPS = 2
ALL = ("first", "second", "head")


class Vision(nn.Module):
    """Two convolutions, the second of two groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, (1, 2), groups=GROUPS)
        self.head = nn.Linear(6 * 4 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))
        return result


class Adapted(nn.Module):
    """The same, with dense updates: a grouped convolution gets that of its outputs from all channels."""

    def __init__(self, model: nn.Module, deltas: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.deltas, self.biases = model, deltas, biases

    def forward(self, x: Tensor) -> Tensor:
        handles = [self.model.get_submodule(name).register_forward_hook(self._add(name)) for name in self.deltas]
        result: Tensor = self.model(x)
        for handle in handles:
            handle.remove()
        return result

    def _add(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            delta, bias = self.deltas[name], self.biases.get(name)
            if isinstance(module, nn.Linear):
                return output + nn.functional.linear(inputs[0], delta, bias)
            run = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[delta.dim()]
            return output + run(inputs[0], delta, bias, module.stride, module.padding)

        return hook


def model() -> Any:
    torch.manual_seed(0)
    return Vision().double().eval().requires_grad_(False)


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapt(folder: Path, base: nn.Module, targets: Sequence[str] = ALL, *, seed: int = 0, **fields: Any) -> Path:
    """An adapter with random factors in float64, as stock PEFT saves it."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        # That an update of several groups cannot be merged; that biases are no matrices.
        warnings.simplefilter("ignore", UserWarning)
        made = get_peft_model(deepcopy(base), LoraConfig(target_modules=list(targets), **fields))
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        made.peft_config["default"].base_model_name_or_path = BASE
        made.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(adapter: Path, base: nn.Module | None = None) -> Any:
    """The model with the adapter, as stock PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = PeftModel.from_pretrained(deepcopy(base or model()), str(adapter), autocast_adapter_dtype=False)
    return loaded.double().eval().requires_grad_(False)


def scalings(adapter: Path, base: nn.Module | None = None) -> dict[str, float]:
    """s of every module, as stock PEFT has it."""
    layers = load(adapter, base).base_model.model.named_modules()
    return {name: layer.scaling["default"] for name, layer in layers if hasattr(layer, "scaling")}


def deltas(adapter: Path, base: nn.Module | None = None) -> dict[str, Tensor]:
    """dW in float64 by the file: (out, in) of a linear layer, (out, in, kh, kw) of a convolution."""
    tensors, scaling = load_file(adapter / "adapter_model.safetensors"), scalings(adapter, base)
    found = {}
    for name, s in scaling.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        columns, out = b.shape[1], b.shape[0]
        groups = a.shape[0] // columns
        dense = torch.zeros(out, *a.shape[1:], dtype=torch.float64)
        for channel in range(out):
            first = channel // (out // groups) * columns
            for column in range(columns):
                dense[channel] += s * b[channel, column].item() * a[first + column]
        found[name] = dense
    return found


def biases(adapter: Path, base: nn.Module | None = None) -> dict[str, Tensor]:
    """s b in float64 by the file, of an adapter with lora_bias."""
    tensors, scaling = load_file(adapter / "adapter_model.safetensors"), scalings(adapter, base)
    return {name: s * tensors[f"base_model.model.{name}.lora_B.bias"].double() for name, s in scaling.items()}


def total(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i of the tensors of a name."""
    found: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, tensor in part.items():
            found[name] = found.get(name, torch.zeros_like(tensor)) + weight * tensor
    return found


def config_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


def close(found: Tensor, expected: Tensor, change: float = 1e-12) -> None:
    """Equal up to a part of the largest entry."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= change * float(expected.abs().max())
