"""An adapter read by stock PEFT: which modules it changes there, with which factors and which scaling.

PEFT's own loading code runs on a model without numbers: the base's own architecture where the base is at hand, else
empty layers of the recorded names and shapes. `target_modules`, patterns and alpha mean here what they mean to PEFT.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.adapters.kinds import BaseModule, ModuleKind, kind_of
from loracli.adapters.names import PREFIX, leaf, order_of, plain_module
from loracli.algebra.factors import Factors
from loracli.algebra.packing import Convolution, pack
from loracli.model.quantisation import import_peft


def skeleton_of(
    table: Sequence[BaseModule],
    experts: Mapping[str, int] | None = None,
    convolutions: Mapping[str, Convolution] | None = None,
) -> nn.Module:
    """A tree of empty layers with the names, kinds and shapes of the table, on the device `meta`; `experts` is how many
    a parameter has, `convolutions` are the groups and kernels of those."""
    root = nn.Module()
    with torch.device("meta"):
        # PEFT wraps the parameters of a module in the order in which it has them.
        for module in sorted(table, key=lambda module: order_of(leaf(module.name))):
            *parents, last = module.name.split(".")
            place = root
            for name in parents:
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            if convolutions and module.name in convolutions:
                place.add_module(last, _convolution(module, convolutions[module.name]))
            elif kind_of(module).of_experts:
                shape = (experts or {}).get(module.name, 1), module.out_features, module.in_features
                place.register_parameter(last, nn.Parameter(torch.empty(shape)))
            else:
                place.add_module(last, _LAYERS.get(module.kind, _none)(module))
    return root


def _convolution(module: BaseModule, known: Convolution) -> nn.Module:
    layer: type[nn.Conv1d | nn.Conv2d | nn.Conv3d] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(known.kernel) - 1]
    channels = known.groups * (module.in_features // (known.groups * math.prod(known.kernel)))
    return layer(channels, known.groups * module.out_features, known.kernel, groups=known.groups, bias=False)  # type: ignore[arg-type]


def _linear(module: BaseModule) -> nn.Module:
    return nn.Linear(module.in_features, module.out_features, bias=False)


def _conv1d(module: BaseModule) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(module.out_features, module.in_features)
    return layer


def _embedding(module: BaseModule) -> nn.Module:
    return nn.Embedding(module.in_features, module.out_features)


def _parameter(module: BaseModule) -> nn.Module:
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.empty(module.out_features, module.in_features))
    return owner


def _none(module: BaseModule) -> nn.Module:
    return nn.Identity()


_LAYERS: Mapping[ModuleKind, Callable[[BaseModule], nn.Module]] = {
    "linear": _linear,
    "conv1d": _conv1d,
    "embedding": _embedding,
    "parameter": _parameter,
}


def _on_cpu(skeleton: nn.Module) -> nn.Module:
    """The same model with every parameter one number seen everywhere: PEFT puts an adapter where its layer is, and on
    `meta` there would be nothing to compare."""
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return skeleton


def reload_differences(folder: Path, adapter: LoraAdapter, skeleton: nn.Module) -> list[str]:
    """What PEFT makes of the adapter in `folder` otherwise than `adapter` says.

    Args:
        folder: whose config names no code and no initialisation that changes the base: `read_adapter` has seen it.
        adapter: as loracat reads it.
        skeleton: a model without numbers; is changed.
    """
    peft = import_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on tied layers and Conv1D, and what is compared below
        config = peft.LoraConfig.from_pretrained(str(folder))
        try:
            model = peft.inject_adapter_in_model(config, _on_cpu(skeleton))
            weights = peft.utils.load_peft_weights(str(folder), device="cpu")
            plain = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
            loaded = peft.set_peft_model_state_dict(model, plain)
        except (ValueError, RuntimeError, KeyError) as error:
            return [f"PEFT cannot load it: {' '.join(str(error).split())}"]
    differences = [f"PEFT finds no module for the tensor {name}" for name in sorted(loaded.unexpected_keys)]
    adapted = ((name, m) for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    layers = {_target(name, layer): layer for name, layer in adapted}
    targets = adapter.targets
    for name in sorted(layers.keys() - targets.keys()):
        differences.append(f"PEFT adapts {name}, for which there are no tensors")
    for name in sorted(targets.keys() - layers.keys()):
        differences.append(f"PEFT does not adapt {name}")
    for name in sorted(targets.keys() & layers.keys()):
        layer, factors = layers[name], _matrices(targets[name])
        if layer.scaling["default"] != factors.scaling:
            differences.append(f"PEFT scales {name} by {layer.scaling['default']:g} instead of {factors.scaling:g}")
        if "default" in layer.lora_embedding_A:
            found = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            found = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for side, own, theirs in zip("AB", (factors.lora_A, factors.lora_B), found, strict=True):
            if not torch.equal(theirs.detach().float().flatten(1), own.float()):  # also of kernels
                differences.append(f"PEFT loads another lora_{side} for {name}")
        bias = getattr(layer.lora_B["default"], "bias", None) if "default" in layer.lora_B else None
        if (bias is None) != (factors.bias is None):
            differences.append(f"PEFT has {'no' if bias is None else 'a'} bias of lora_B for {name}")
        elif bias is not None and factors.bias is not None and not torch.equal(bias.float(), factors.bias.float()):
            differences.append(f"PEFT loads another bias of lora_B for {name}")
    return differences


def _target(name: str, layer: Any) -> str:
    """The path of the module or parameter that one of PEFT's layers changes; of a module's one matrix the module's."""
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None or (parameter == "weight" and layer.num_experts == 1):
        return plain_module(name)
    return f"{plain_module(name)}.{parameter}"


def _matrices(modules: Sequence[LoraModule]) -> Factors:
    """The two matrices of a module, of all experts of a parameter or all groups of a convolution, with the scaling."""
    first = modules[0]
    if len(modules) == 1:
        return first.factors
    packed = pack(kind_of(first).packing, [m.factors for m in modules], first.factors.rank)
    return replace(packed, scaling=first.factors.scaling)
