"""What comes along of the base beside its weights: every file as it is, except weights in other formats, adapters, and
the card; and the two that the fusion itself may change, the config and the index of the shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from loracli.errors import BaseModelMismatch
from loracli.fusing.plan import FusionPlan
from loracli.fusing.quantised import Quantisation
from loracli.fusing.workplace import FUSE_CERTIFICATE
from loracli.model.checkpoint import INDEX_FILE, Checkpoint
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import open_regular

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 << 20

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|pkl|pickle|ckpt|gguf|ggml|h5|msgpack|npz|onnx|onnx_data|tflite|ot|mlmodel)"
    r"|.*\.index\.json|adapter_config\.json",
    re.IGNORECASE,
)
_OURS = frozenset({"README.md", "loracat.json", FUSE_CERTIFICATE, CONFIG, INDEX_FILE})


def other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Names of the files that come along, and of what is left behind, both sorted; hidden files are neither."""
    taken: list[str] = []
    left: list[str] = []
    for entry in sorted(checkpoint.folder.iterdir()):
        name = entry.name
        if name.startswith(".") or name in _OURS or name in checkpoint.shards:
            continue
        (taken if entry.is_file() and not _WEIGHTS.fullmatch(name) else left).append(name)
    return taken, left


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of the base's config.

    Raises:
        BaseModelMismatch: if it is damaged.
    """
    path = folder / CONFIG
    with open_regular(path) as file:
        data: bytes = file.read(MAX_CONFIG_BYTES + 1)
    try:
        fields = parse_json(data) if len(data) <= MAX_CONFIG_BYTES else None
    except StrictJsonError as error:
        raise BaseModelMismatch(f"the base model's config is {error}", where=str(path)) from None
    if not isinstance(fields, dict):
        raise BaseModelMismatch("the base model's config is no JSON object", where=str(path))
    return fields


def config_bytes(
    folder: Path, *, untied: bool, dtype: torch.dtype | None, quantisation: Quantisation | None = None
) -> bytes:
    """The base's config: as it is, or saying that matrices are not tied, or that the weights have another dtype, and
    that they are quantised no longer."""
    if not untied and dtype is None:
        return (folder / CONFIG).read_bytes()
    fields = read_config(folder)
    if quantisation is not None:
        for key in ("quantization_config", "compression_config"):
            fields.pop(key, None)
    parts = [fields, *(value for key, value in fields.items() if key == "text_config" and isinstance(value, dict))]
    for part in parts:
        if untied and (part is fields or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if dtype is not None:
            _set_dtype(part, str(dtype).removeprefix("torch."))
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(fields: dict[str, Any], name: str) -> None:
    """Under the key that is there; transformers 5 writes `dtype`, earlier ones `torch_dtype`."""
    for key in [key for key in ("dtype", "torch_dtype") if key in fields] or ["dtype"]:
        fields[key] = name


def index_bytes(checkpoint: Checkpoint, plan: FusionPlan) -> bytes | None:
    """The index of the shards: the base's own bytes where the names and sizes of tensors stay, None for one file."""
    if checkpoint.index is None:
        return None
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    if all(not tensor.added and tensor.size == tensor.source.size for tensor in tensors):
        return (checkpoint.folder / INDEX_FILE).read_bytes()
    names = {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
    content = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": dict(sorted(names.items())),
    }
    return (json.dumps(content, indent=2) + "\n").encode()
