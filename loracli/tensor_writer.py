"""A safetensors writer whose bytes depend on the tensors alone.

The library's own `save_file` (0.8) puts metadata in random order, ignores the umask and does not flush to the disk. The
format is https://github.com/huggingface/safetensors#format: 8 bytes length, a JSON header padded with spaces to a
multiple of 8, raw data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from loracli.adapters.tensor_file import DTYPES, tensor_bytes

PEFT_METADATA = MappingProxyType({"format": "pt"})  # PEFT and transformers look for it

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] = PEFT_METADATA,
) -> None:
    """Writes a new file, one tensor at a time, and flushes it to the disk.

    Args:
        path: must not exist.
        shapes: of every tensor, by name; the file is in sorted order.
        dtype: of all of them.
        tensor: gives the tensor of a name, in `dtype`; asked for once each, in sorted order.
        metadata: the header's `__metadata__`.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        for part in file_parts(shapes, dtype, tensor, metadata=metadata):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def file_parts(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] = PEFT_METADATA,
) -> Iterator[bytes | memoryview]:
    """The bytes that `write_tensors` writes: the header, then each tensor.

    Raises:
        ValueError: if a tensor is not what was announced.
    """
    yield _header(shapes, dtype, metadata)
    for name in sorted(shapes):
        value = tensor(name)
        if value.dtype != dtype or tuple(value.shape) != tuple(shapes[name]):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, announced as {dtype} {shapes[name]}")
        yield tensor_bytes(value.contiguous())


def file_size(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, metadata: Mapping[str, str] = PEFT_METADATA
) -> int:
    """Bytes of the file that `write_tensors` writes."""
    data = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    return len(_header(shapes, dtype, metadata)) + data


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(shapes):
        size = torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
