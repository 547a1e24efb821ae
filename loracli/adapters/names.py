"""The grammar of tensor names in a LoRA file, in PEFT's spelling and in those that other trainers leave behind.

base_model.model.<module>.lora_A.weight            (r, in)         nn.Linear, Conv1D
base_model.model.<module>.lora_B.weight            (out, r)
base_model.model.<module>.lora_A.weight            (r, in, kh, kw)     nn.Conv2d; adapters/kinds.py
base_model.model.<module>.lora_B.weight            (out, r / groups, 1, 1)
base_model.model.<module>.lora_B.bias              (out,)          with lora_bias
base_model.model.<module>.lora_embedding_A         (r, vocab)      nn.Embedding
base_model.model.<module>.lora_embedding_B         (dim, r)
base_model.model.<module>.lora_magnitude_vector    (out,)          with use_dora
base_model.model.<module>.base_layer.weight        a copy of the base's matrix that PEFT writes beside embeddings and
heads

One expert's matrix in a parameter W (E, ., .) goes by the parameter's path and its number, as in Python:
`model.layers.0.mlp.experts.down_proj[3]`, and so does one group of a grouped convolution, `encoder.conv[1]`. No tensor
has such a name: those of a parameter have the name of its module, and of another parameter of the same module

    base_model.model.<module>.base_layer.lora_A.weight    one `base_layer` more for each level

The config's target_parameters tell which parameters there are, and PEFT wraps those of one module in the order in which
the module has them, so that the first lies innermost.

Read as the same:

    lora_A.default.weight              a state dict that was saved as it is, with the adapter's name inside
    lora_magnitude_vector.weight       of another PEFT
    <module>.lora_A.weight             without `base_model.model.`, or with it more than once, after a second wrapping
    _orig_mod, _fsdp_wrapped_module    components that torch.compile, FSDP and activation checkpointing put in,
    and _checkpoint_wrapped_module     anywhere; `module.` in front, from DDP and DeepSpeed
    <module>.base_layer.lora_A.weight  a LoRA on a layer that was wrapped already

Two tensors of a file that come to the same name are refused: it cannot be told which of them is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.document import added

PREFIX = "base_model.model."

Part = Literal[
    "lora_A", "lora_B", "lora_bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "base_layer"
]

_BARE = frozenset({"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})  # without `weight` at their end
_OF_UPDATES = _BARE | {"lora_A", "lora_B"}
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_INSIDE = frozenset({"original_module", "token_adapter"})  # parts of what PEFT wraps around a module
_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")

_NOT_NAMED = "the config's modules_to_save does not name its module: add it there, or remove the tensor"

# What other tensors mean, and the way out. Looked for in this order.
_REFUSED = (
    (
        re.compile(r"\.lora_magnitude_vector"),
        "DoRA",
        "convert it, if use_dora is set: loracat convert ADAPTER --base MODEL",
    ),
    (
        re.compile(r"\.lora\.(down|up)\.weight$"),
        "the older names of diffusers",
        "lora.down is lora_A, lora.up lora_B: rename them",
    ),
    (
        re.compile(r"\.original_module\."),
        "modules_to_save",
        "it is the base's own, beside the trained one: remove the tensor",
    ),
    (re.compile(r"\.modules_to_save\."), "modules_to_save", _NOT_NAMED),
    (re.compile(r"\.token_adapter\."), "trainable tokens", "train it without trainable_token_indices"),
    (re.compile(r"\.bias$"), "trained biases", 'train it with bias="none"'),
    (re.compile(r"^(?!.*lora_)[\w.]+\.weight$"), "modules_to_save", _NOT_NAMED),
)


@dataclass(frozen=True)
class TensorName:
    """A tensor's name, taken apart: the module's path in the base model, and which tensor of it this is."""

    module: str
    part: Part


def parse_tensor_name(name: str, *, where: str) -> TensorName:
    """Takes a tensor's name apart.

    Args:
        name: the name in the file.
        where: the file, for the error.
    Raises:
        UnsupportedAdapter: if the name belongs to a feature that is not honoured, by the feature's name.
        MalformedAdapter: if it is no name of a LoRA file at all.
    """
    words = _plain_words(name)
    part, place = _part_of(words)
    if part is not None:
        module = _without_base_layers(words[:place])
        if _PATH.fullmatch(module):
            return TensorName(module, part)
    refuse_name(name, where=where)


def refuse_name(name: str, *, where: str) -> NoReturn:
    """Raises UnsupportedAdapter or MalformedAdapter, as `parse_tensor_name` does."""
    for pattern, feature, way_out in _REFUSED:
        if pattern.search(name):
            raise UnsupportedAdapter(f"the tensor {name!r} belongs to {feature}", where=where, hint=way_out)
    raise MalformedAdapter(
        f"{name!r} is not a tensor name of a PEFT LoRA file",
        where=where,
        hint="expected names like base_model.model.<module>.lora_A.weight, as PEFT's save_pretrained writes them",
    )


def whole_parameter(name: str) -> str | None:
    """The parameter of the base that the tensor is, `lm_head.weight`, rather than a part of an update; None for others.

    In a state dict that was saved as it is, `lm_head.modules_to_save.default.weight`.
    """
    words = _plain_words(name)
    if _part_of(words)[1] < len(words) or any(word.startswith("lora_") or word in _INSIDE for word in words):
        return None
    if "modules_to_save" in words:
        place = words.index("modules_to_save")
        words = words[:place] + words[min(place + 2, len(words) - 1) :]
    path = ".".join(words)
    return path if len(words) > 1 and _PATH.fullmatch(path) else None


def _plain_words(name: str) -> list[str]:
    """The components of a name in the base model: without wrappers and without what PEFT puts in front."""
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    start = 0
    while words[start : start + 1] == ["module"]:
        start += 1
    if words[start : start + 2] != ["base_model", "model"]:  # then `module` is the base's own
        return words
    while words[start : start + 2] == ["base_model", "model"]:
        start += 2
    return words[start:]


def _part_of(words: list[str]) -> tuple[Part | None, int]:
    """Which tensor of an update these components end in, and where the module's path ends; None and all of them where
    no word is one of an update's."""
    if words[-2:] == ["base_layer", "weight"]:
        return "base_layer", len(words) - 2
    place = next((i for i, word in enumerate(words) if word in _OF_UPDATES), len(words))
    if place == len(words):
        return None, place
    part, tail = words[place], words[place + 1 :]
    if part not in _BARE:
        if tail[-1:] == ["bias"] and part == "lora_B":
            part = "lora_bias"
        elif tail[-1:] != ["weight"]:
            return None, place
        tail = tail[:-1]
    elif part == "lora_magnitude_vector" and tail[-1:] == ["weight"]:
        tail = tail[:-1]
    named = len(tail) == 1 and _ADAPTER_NAME.fullmatch(tail[0])
    return (part, place) if named or not tail else (None, place)  # type: ignore[return-value]


def _without_base_layers(words: list[str]) -> str:
    """The path without `base_layer` at its end; below `experts` it tells one matrix from another and stays."""
    end = len(words)
    while end > 1 and words[end - 1] == "base_layer" and words[end - 2] != "experts":
        end -= 1
    return ".".join(words[:end])


def format_tensor_name(module: str, part: Part) -> str:
    """The name PEFT gives a tensor of `module`."""
    if part == "lora_bias":
        return f"{PREFIX}{module}.lora_B.bias"
    return f"{PREFIX}{module}.{part}" + ("" if part in _BARE else ".weight")


def numbered_name(target: str, number: int) -> str:
    """The name of one of several updates: of an expert's matrix, `mlp.experts.down_proj[3]`, or a group of a
    convolution, `encoder.conv[1]`."""
    return f"{target}[{number}]"


def target_of(module: str) -> str:
    """What was targeted: the parameter of an expert's matrix, the convolution of a group, else the module itself."""
    return module.partition("[")[0]


@dataclass(frozen=True)
class BasePlace:
    """Where a base has what an adapter has a module for.

    Args:
        target: the module's path in the base, or that of a parameter with experts.
        expert: whose matrix in the parameter it is; None for a module, and for the parameter as a whole.
        part: which part of the matrix, from its first row down.
        parts: how many there are.
        turned: whether lora_A and lora_B of each expert change places, as adapters of older PEFT need it.
    """

    target: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    turned: bool = False

    @property
    def name(self) -> str:
        """Of the module, or of the expert's matrix."""
        return self.target if self.expert is None else numbered_name(self.target, self.expert)


def is_numbered(module: str) -> bool:
    """Whether the name is that of one of several updates: of an expert's matrix, or a group of a convolution."""
    return module.endswith("]")


def leaf(module: str) -> str:
    """The last component of a module's path: `q_proj`; of a numbered name that of what was targeted."""
    return target_of(module).rpartition(".")[2]


def layer(module: str) -> str:
    """The decoder layer that a module belongs to: its path up to the first numeric component, `model.layers.0`.

    A module without one is its own group.
    """
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module if number is None else ".".join(parts[: number + 1])


# The order in which transformers' mixtures have the parameters of their experts.
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_WRAPPED = ".base_layer"


def targeted_parameters(modules: Mapping[str, bool], target_parameters: Iterable[str], where: str) -> dict[str, str]:
    """The parameter, by its path in the base, that each module of tensor names stands for.

    A target that is the name of a parameter alone is one of any module that has it, and that does not stand in the
    file: of modules whose factors are not those of a layer.

    Args:
        modules: of tensor names, `mlp.experts` and `mlp.experts.base_layer`, and whether their rank is a layer's.
        target_parameters: of the config.
        where: the file, for errors.
    Raises:
        UnsupportedAdapter: if it cannot be told which of a module's parameters lies innermost.
        MalformedAdapter: if there are more levels than parameters, or fewer.
    """
    by_container: dict[str, set[str]] = {}
    for target in target_parameters:
        container, _, parameter = target.rpartition(".")
        by_container.setdefault(container, set()).add(parameter)
    anywhere = by_container.pop("", set())
    levels: dict[str, list[str]] = {}
    for module in modules:
        levels.setdefault(plain_module(module), []).append(module)
    found: dict[str, str] = {}
    for module, names in levels.items():
        alone = set() if any(modules[name] for name in names) else anywhere
        parameters = _of_module(module, by_container, alone)
        if not parameters:
            continue
        if len(names) != len(parameters):
            raise MalformedAdapter(
                f"has {len(names)} pairs of factors for {len(parameters)} target_parameters of {module!r}: "
                f"{', '.join(parameters)}",
                where=where,
            )
        inner_first = sorted(names, key=len, reverse=True)
        found |= {name: f"{module}.{parameter}" for name, parameter in zip(inner_first, parameters, strict=True)}
    return found


def plain_module(module: str) -> str:
    """The module without the levels of PEFT's wrapping."""
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def order_of(parameter: str) -> int:
    """The place of a parameter among those of its module."""
    return _ORDER.index(parameter) if parameter in _ORDER else len(_ORDER)


def _of_module(module: str, by_container: Mapping[str, set[str]], alone: set[str]) -> list[str]:
    """The parameters of a module that are targeted, as PEFT looks them up: by the path or an end of it; the innermost
    first."""
    words = module.split(".")
    ends = [".".join(words[start:]) for start in range(len(words))]
    return _in_order(alone.union(*(by_container.get(end, set()) for end in ends)))


def _in_order(parameters: Collection[str]) -> list[str]:
    unknown = min(set(parameters) - set(_ORDER), default=None)
    if unknown is not None and len(parameters) > 1:
        raise UnsupportedAdapter(
            f"target_parameters has {' and '.join(sorted(parameters))} of one module, and which tensors belong to "
            f"{unknown} cannot be told from their names",
            hint=f"train an adapter for each of them; known are {', '.join(_ORDER)}",
        )
    return sorted(parameters, key=order_of)


def module_of_parameter(parameter: str, targeted: Collection[str]) -> str:
    """The inverse of `targeted_parameters`: the module that tensor names have for one of the targeted parameters.

    Raises:
        UnsupportedAdapter: if it cannot be told which of a module's parameters lies innermost.
    """
    module = parameter.rpartition(".")[0]
    parameters = _in_order([name.rpartition(".")[2] for name in targeted if name.rpartition(".")[0] == module])
    outside = len(parameters) - 1 - parameters.index(parameter.rpartition(".")[2])
    return module + outside * _WRAPPED


@dataclass(frozen=True)
class RecipePlace:
    """Where the base has what an adapter calls otherwise.

    Args:
        base: the module's path in the base, or an expert's matrix in a parameter, `mlp.experts.down_proj[3]`; each `*`
            is the number that the adapter's name has there.
        part: which part of the expert's matrix, from its first row down.
        parts: how many there are.
        turned: whether lora_A and lora_B of each expert change places.
    """

    base: str
    part: int = added(4, 0)
    parts: int = added(4, 1)
    turned: bool = added(4, False)
