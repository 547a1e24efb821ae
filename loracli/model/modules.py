"""The modules of a base model: by the names that an adapter has for them, of which kind and shape, and whether what the
adapter brings is made for them.

Names go by the tables with which transformers renames a checkpoint's tensors, as PEFT uses them for adapters (in
utils/transformers_weight_conversion.py of peft 0.21). An adapter names modules as they were where it was trained:
`language_model.model.layers.0` before transformers 4.52, `block_sparse_moe.experts.3.w1` before version 5. Where no
table knows a name, it may be that of the text model that the base has inside, or of a model that has the base's text
model inside; PEFT does not look for these.

PEFT writes the whole embedding or head beside its factors where `save_embedding_layers` says so or the vocabulary was
resized. A copy changes nothing, and no composition has it; another matrix is a change that no adapter can carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.adapters.kinds import BaseModule, ModuleKind, kind_of
from loracli.adapters.names import BasePlace, leaf
from loracli.adapters.on_base import adapted_names, by_base_names, turned_by_version, without_wrapper
from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import Checkpoint, LoadingRules, loaded_names, tied_parameters
from loracli.model.quantisation import is_quantised
from loracli.system.tensor_file import FLOATS

_MAX_NAME = 512  # longer ones are not tried: no model has them, and tables are patterns


class BaseNames:
    """The names of a base model, and what becomes of others.

    Args:
        skeleton: the model without numbers.
    """

    def __init__(self, skeleton: Any) -> None:
        self._rules = LoadingRules(skeleton)
        matrices = {name for name, tensor in skeleton.named_parameters(remove_duplicate=False) if tensor.dim() == 3}
        self._known = {name for name, _ in skeleton.named_modules(remove_duplicate=False)} | matrices
        self._inner = _text_model(skeleton)

    def by_tables(self, name: str, parameter: str) -> BasePlace | None:
        """The place of a module, or of a parameter with experts, by its own name or by transformers' tables.

        Args:
            name: the adapter's.
            parameter: one of its parameters, by the same naming.
        Raises:
            BaseModelMismatch: if the base makes the parameter of others in a way that updates cannot follow.
        """
        if name in self._known:
            return BasePlace(name)
        if len(parameter) > _MAX_NAME:
            return None
        loaded = self._rules.loaded(parameter)
        if loaded.parts_of_experts is not None:
            part, parts = loaded.parts_of_experts
            return BasePlace(loaded.parameter, loaded.expert, part, parts) if loaded.parameter in self._known else None
        target = loaded.parameter.removesuffix(parameter.removeprefix(name))
        if target not in self._known or not self._rules.has(loaded.parameter):
            return None
        if loaded.computed:
            raise BaseModelMismatch(
                f"{name} is adapted, and the base model makes its {loaded.parameter} of several tensors",
                hint="train the adapter on the base model as transformers has it now",
            )
        return BasePlace(target)

    def places(self, adapter: LoraAdapter) -> dict[str, BasePlace]:
        """The places of all that the adapter says of the base; what is not found is left out.

        Raises:
            BaseModelMismatch: as `by_tables`.
        """
        wanted = adapted_names(adapter)
        found = {name: place for name, path in wanted.items() if (place := self.by_tables(name, path)) is not None}
        missing = [name for name in wanted if name not in found]
        for respelt in self._respellings() if missing else ():
            places = {
                name: place
                for name in missing
                if (place := self.by_tables(respelt(name), respelt(wanted[name]))) is not None
            }
            if len(places) == len(missing):
                return found | places
        return found

    def _respellings(self) -> list[Callable[[str], str]]:
        """Of names in a model around the base's text model, in the text model inside the base, and in that without its
        head."""
        respellings: list[Callable[[str], str]] = [without_wrapper]
        if self._inner is not None:
            path, prefix = self._inner
            respellings += [
                lambda name: path + name.removeprefix(prefix) if name.startswith(f"{prefix}.") else name,
                lambda name: f"{path}.{name}",
            ]
        return respellings


def _text_model(skeleton: Any) -> tuple[str, str] | None:
    """The path of the text model in the base, and the name that it has in its own causal language model."""
    decoder = skeleton.get_decoder()
    path = next((name for name, module in skeleton.named_modules() if module is decoder), "")
    prefix = getattr(decoder, "base_model_prefix", "")
    return (path, prefix) if path and prefix and path != prefix else None


def named_as(skeleton: Any, adapters: Sequence[LoraAdapter]) -> tuple[LoraAdapter, ...]:
    """As `on_base`, of a model without numbers."""
    names, found = BaseNames(skeleton), []
    for adapter in adapters:
        places = names.places(adapter)
        base = {place.target: _base_module(skeleton, place.target) for place in places.values()}
        turned = _turned_experts(skeleton, adapter, places)
        found.append(by_base_names(adapter, places | turned, {n: m for n, m in base.items() if m is not None}))
    return tuple(found)


def _base_module(skeleton: Any, target: str) -> BaseModule | None:
    """A module of the base or a parameter with experts; None of what carries no update."""
    if (shape := expert_shape(skeleton, target)) is not None:
        return BaseModule(target, "experts", shape[1], shape[2], shape[0])
    kind, in_features, out_features = kind_and_shape(skeleton.get_submodule(target))
    return None if kind == "other" else BaseModule(target, kind, in_features, out_features)


def _turned_experts(skeleton: Any, adapter: LoraAdapter, places: Mapping[str, BasePlace]) -> dict[str, BasePlace]:
    """The parameters whose lora_A and lora_B change places: by their shapes, and where those are alike by the PEFT that
    wrote them."""
    found = {}
    for target, modules in adapter.targets.items():
        shape = expert_shape(skeleton, places[target].target) if target in places else None
        if not kind_of(modules[0]).of_experts or shape is None or adapter.places:
            continue
        factors, sizes = modules[0].factors, shape[1:]
        theirs = factors.in_features, factors.out_features
        owner = skeleton.get_submodule(places[target].target.rpartition(".")[0])
        older = turned_by_version(adapter.config.peft_version, transposed=getattr(owner, "is_transposed", False))
        if theirs == sizes[::-1] and (sizes[0] != sizes[1] or older):
            found[target] = replace(places[target], turned=True)
    return found


def check_shapes(model: nn.Module, adapters: Sequence[LoraAdapter]) -> None:
    """As `check_fits`, for what a model without numbers can tell."""
    for adapter in adapters:
        for name, modules in adapter.targets.items():
            if kind_of(modules[0]).of_experts:
                _check_experts(model, adapter, name, modules)
            else:
                _check_module(model, adapter, modules[0])


def base_modules(model: nn.Module, adapters: Sequence[LoraAdapter]) -> tuple[BaseModule, ...]:
    """Every module of the base that any targeted leaf name matches: an export pads these without loading the base.

    Of parameters with experts, which it does not pad, those that are targeted.
    """
    targets = {name: kind_of(modules[0]) for adapter in adapters for name, modules in adapter.targets.items()}
    leaves = {leaf(name) for name, kind in targets.items() if not kind.of_experts}
    found = []
    for name in sorted(name for name, kind in targets.items() if kind.of_experts):
        if (shape := expert_shape(model, name)) is not None:
            found.append(BaseModule(name, "experts", shape[1], shape[2], shape[0]))
    for name, module in model.named_modules():
        if name and leaf(name) in leaves:
            kind, in_features, out_features = kind_and_shape(module)
            found.append(BaseModule(name, kind, in_features, out_features))
    return tuple(found)


def kind_and_shape(module: nn.Module) -> tuple[ModuleKind, int, int]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear) and (is_quantised(module) or _is_linear(module)):
        return "linear", module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return "conv1d", module.weight.shape[0], module.weight.shape[1]
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    known = isinstance(module, (nn.Linear, nn.Embedding))  # with a forward of its own, or numbers that are not stored
    if not known and weight is not None and weight.dim() == 2 and weight.is_floating_point():
        return "parameter", weight.shape[1], weight.shape[0]
    scaled = hasattr(module, "embed_scale")  # as Gemma 3 has it; PEFT scales the update too
    if isinstance(module, nn.Embedding) and (scaled or type(module).forward is nn.Embedding.forward):
        return "embedding", module.num_embeddings, module.embedding_dim
    return "other", 0, 0


def _is_linear(module: nn.Linear) -> bool:
    """Whether its forward is x W^T + b. That of a subclass is tried on a copy with a few numbers of its own: a layer of
    the same class and attributes, 3 x 5, on inputs of several shapes and sizes. One with more tensors than weight and
    bias, with another shape or kind of weight, or with hooks into it is not tried."""
    if type(module).forward is nn.Linear.forward:
        return True
    own = {**module._parameters, **module._buffers, **module._modules}
    plain = type(module.weight) is nn.Parameter and module.weight.is_floating_point()
    shape = (module.out_features, module.in_features)
    if own.keys() - {"weight", "bias"} or not plain or tuple(module.weight.shape) != shape:
        return False
    numbers = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64, device="cpu")

    tried = copy(module)
    weight, bias = draw(3, 5), None if module.bias is None else draw(3)
    parameters = {"weight": weight, "bias": bias}
    tried._parameters = {n: None if t is None else nn.Parameter(t, requires_grad=False) for n, t in parameters.items()}
    tried.in_features, tried.out_features = 5, 3
    try:
        with torch.no_grad():
            for x in (draw(5), draw(4, 5), 1e4 * draw(2, 4, 5), 1e-4 * draw(2, 4, 5)):
                y = type(module).forward(tried, x)
                if not isinstance(y, torch.Tensor) or not torch.allclose(y, F.linear(x, weight, bias), rtol=1e-9):
                    return False
    except Exception:  # a forward that takes or needs something else
        return False
    return True


def expert_shape(model: nn.Module, parameter: str) -> tuple[int, int, int] | None:
    """Number of experts, in and out of a parameter with a matrix for each expert; None if it is no such parameter.

    As PEFT takes it: (E, out, in), or (E, in, out) where the module says that it is transposed.
    """
    owner, _, name = parameter.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    tensor = dict(module.named_parameters(recurse=False)).get(name)
    if tensor is None or tensor.dim() != 3:
        return None
    experts, rows, columns = tensor.shape
    return (experts, rows, columns) if getattr(module, "is_transposed", False) else (experts, columns, rows)


def _check_experts(model: nn.Module, adapter: LoraAdapter, name: str, modules: Sequence[LoraModule]) -> None:
    shape = expert_shape(model, name)
    if shape is None:
        raise BaseModelMismatch(
            f"{adapter.reference} adapts {name} as experts, and the base model has no parameter of that name with a "
            "matrix for each expert",
            hint="the adapter was trained on another model or model class; check --base",
        )
    for factors in (module.factors for module in modules):
        theirs = (len(modules), factors.in_features, factors.out_features)
        if theirs == shape:
            continue
        raise BaseModelMismatch(
            f"{adapter.reference} expects {name} to be (experts, in, out) = {theirs}; the base model has {shape}",
            hint="the adapter was trained on another model; check --base",
        )


def _check_module(model: nn.Module, adapter: LoraAdapter, module: LoraModule) -> None:
    try:
        target = model.get_submodule(module.name)
    except AttributeError:
        raise BaseModelMismatch(
            f"{adapter.reference} adapts {module.name}, which the base model does not have",
            hint="the adapter was trained on another model or model class; check --base",
        ) from None
    kind, in_features, out_features = kind_and_shape(target)
    if kind not in kind_of(module).carriers:
        raise BaseModelMismatch(
            f"{adapter.reference} adapts {module.name}, a {type(target).__name__}, as {module.kind}"
        )
    theirs = (module.factors.out_features, module.factors.in_features)
    if theirs != (out_features, in_features):
        raise BaseModelMismatch(
            f"{adapter.reference} expects {module.name} to be (out, in) = {theirs}; the base model has "
            f"{(out_features, in_features)}",
            hint="the adapter was trained on another model; check --base",
        )


def check_base_copies(adapters: Sequence[LoraAdapter], weight_of: Callable[[str], Tensor]) -> None:
    """Holds every copy against the weight of its module.

    Args:
        adapters: that may carry copies.
        weight_of: a module's weight in the base, on the CPU, by the module's name.
    Raises:
        BaseModelMismatch: if one differs, by adapter and module.
    """
    for adapter in adapters:
        for name in adapter.base_copies:
            copy, own = adapter.read_base_copy(name), weight_of(name)
            # The base may have been trained on in fewer digits than it is stored in, or than it has here.
            same = torch.equal(copy.to(own.dtype), own) or torch.equal(own.to(copy.dtype), copy)
            if not same:
                raise BaseModelMismatch(
                    f"{adapter.reference} carries its own matrix for {name}, and it differs from the base model's",
                    hint="the adapter was trained with a changed embedding, which an adapter cannot carry",
                )


def stored_weights(checkpoint: Checkpoint, skeleton: Any) -> Callable[[str], Tensor]:
    """The weight of a module by its name, read from the base's files.

    Args:
        checkpoint: of the base.
        skeleton: its model without numbers.
    """
    names, tied = loaded_names(skeleton, checkpoint.tensors), tied_parameters(skeleton)

    def weight_of(module: str) -> Tensor:
        """Raises BaseModelMismatch if it is not stored as one tensor of floating point numbers."""
        parameter = f"{module}.weight"
        stored = [name for member in tied.get(parameter, (parameter,)) for name in names.stored.get(member, ())]
        tensor = checkpoint.tensors[stored[0]] if stored else None
        if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise BaseModelMismatch(
                f"an adapter carries its own matrix for {module}, and the base model's files have none of floating "
                "point numbers to compare it with",
                hint="give the unquantised model with --base",
            )
        with checkpoint.open(tensor) as rows:
            return rows.read(0, tensor.shape[0])

    return weight_of
