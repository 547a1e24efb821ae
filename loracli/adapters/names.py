"""The grammar of tensor names in a PEFT LoRA file.

base_model.model.<module>.lora_A.weight            (r, in)         nn.Linear, Conv1D
base_model.model.<module>.lora_B.weight            (out, r)
base_model.model.<module>.lora_embedding_A         (r, vocab)      nn.Embedding
base_model.model.<module>.lora_embedding_B         (dim, r)
base_model.model.<module>.base_layer.weight        a copy of the base's matrix that PEFT writes beside embeddings and
heads
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from loracli.errors import MalformedAdapter, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

PREFIX = "base_model.model."

Part = Literal["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"]

_NAME = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|base_layer\.weight)"
)

# What other tensors mean, and the way out. Looked for in this order.
_REFUSED = (
    (re.compile(r"\.lora_magnitude_vector"), "DoRA", "convert it, if use_dora is set: loracat convert"),
    (re.compile(r"\.lora_B(\.\w+)?\.bias$"), "lora_bias", "train it without lora_bias"),
    (re.compile(r"\.lora_[AB]\.\w+\.weight$"), "a raw state dict", "save it with PEFT's save_pretrained"),
    (re.compile(r"\.(modules_to_save|original_module)\."), "modules_to_save", "train it without modules_to_save"),
    (re.compile(r"\.token_adapter\."), "trainable tokens", "train it without trainable_token_indices"),
    (re.compile(r"\.bias$"), "trained biases", 'train it with bias="none"'),
    (
        re.compile(r"^base_model\.model\.(?!.*lora_)[\w.]+\.weight$"),
        "modules_to_save",
        "train it without modules_to_save",
    ),
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
    match = _NAME.fullmatch(name)
    if match:
        part = match["part"].removesuffix(".weight")
        return TensorName(match["module"], part)  # type: ignore[arg-type]
    for pattern, feature, way_out in _REFUSED:
        if pattern.search(name):
            raise UnsupportedAdapter(f"the tensor {name!r} belongs to {feature}", where=where, hint=way_out)
    raise MalformedAdapter(
        f"{name!r} is not a tensor name of a PEFT LoRA file",
        where=where,
        hint="expected names like base_model.model.<module>.lora_A.weight, as PEFT's save_pretrained writes them",
    )


def format_tensor_name(module: str, part: Part) -> str:
    """The name PEFT gives a tensor of `module`."""
    return f"{PREFIX}{module}.{part}" + ("" if part.startswith("lora_embedding") else ".weight")


def leaf(module: str) -> str:
    """The last component of a module's path: `q_proj`."""
    return module.rpartition(".")[2]


def layer(module: str) -> str:
    """The decoder layer that a module belongs to: its path up to the first numeric component, `model.layers.0`.

    A module without one is its own group.
    """
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module if number is None else ".".join(parts[: number + 1])
