"""Reading a safetensors file that a stranger wrote: the header is checked first, with limits, then tensors are read one
by one.

The format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data. The
safetensors library refuses a damaged layout by itself; the limits here are on what it accepts and a hostile file
abuses.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.strict_json import StrictJsonError, parse_json

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked.

    Args:
        path: the file.
        shapes: of each tensor; two dimensions, unless it was allowed any, and all at least 1.
        dtypes: of each tensor, one of float64, float32, float16, bfloat16.
        sha256: of the whole file.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    sha256: str

    def reader(self) -> AbstractContextManager[TensorReader]:
        """Opens the file for reading."""
        return tensor_reader(self.path)


class TensorReader:
    """Reads tensors of an open file."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file

    def read(self, name: str) -> Tensor:
        """The tensor.

        Raises:
            MalformedAdapter: if it holds an infinite value or NaN.
        """
        tensor: Tensor = self._file.get_tensor(name)
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise MalformedAdapter(
                f"the tensor {name!r} holds {bad} values that are infinite or not a number",
                where=str(self._path),
                hint="the adapter's training has diverged; use an earlier checkpoint",
            )
        return tensor


@contextmanager
def tensor_reader(path: Path) -> Iterator[TensorReader]:
    """Opens a file that was checked before; no memory map, so that a file that shrinks cannot kill the process."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield TensorReader(path, file)
    except (SafetensorError, OSError) as error:
        raise MalformedAdapter(f"cannot be read: {error}", where=str(path)) from None


def open_tensor_file(
    path: Path,
    *,
    check_names: Callable[[Iterable[str]], object] | None = None,
    any_shape: Callable[[str], bool] = lambda name: False,
) -> TensorFile:
    """Checks the header of a safetensors file and hashes the file.

    Args:
        path: the file.
        check_names: is given all tensor names before any shape is looked at, to refuse by name what would be refused
            for its shape: most tensors of other features are vectors.
        any_shape: which tensors, by name, need not be matrices.
    Raises:
        MalformedAdapter: if the header is damaged, beyond the limits, or describes something else than matrices.
        UnsupportedAdapter: if a tensor has a dtype that is not a floating point format of 16 bits or more.
    """
    where = str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise MalformedAdapter("the file is cut short, or it is no safetensors file", where=where)
        if length > MAX_HEADER_BYTES:
            raise MalformedAdapter(
                f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read", where=where
            )
        raw = file.read(length)
        digest = hashlib.sha256(start + raw)
        while block := file.read(1 << 20):
            digest.update(block)
    try:
        header = parse_json(raw)
    except StrictJsonError as error:
        raise MalformedAdapter(f"the header is {error}", where=where) from None
    if not isinstance(header, dict):
        raise MalformedAdapter("the header is not a JSON object", where=where)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise MalformedAdapter(f"holds {len(header)} tensors; at most {MAX_TENSORS} are read", where=where)
    if check_names is not None:
        check_names(header)
    return _check_header(header, path, size - 8 - length, digest.hexdigest(), any_shape)


@contextmanager
def open_regular(path: Path) -> Iterator[Any]:
    """Opens a file for reading bytes; a directory, FIFO or device is refused instead of read from."""
    # O_NONBLOCK: opening a FIFO must not hang.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise MalformedAdapter(f"cannot be opened: {error.strerror}", where=str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MalformedAdapter("is not a regular file", where=str(path))
    with open(descriptor, "rb") as file:
        yield file


def _check_header(
    header: dict[str, Any], path: Path, data_bytes: int, sha256: str, any_shape: Callable[[str], bool]
) -> TensorFile:
    where = str(path)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    total = 0
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if len(shape) != 2 and not (any_shape(name) and 1 <= len(shape) <= MAX_DIMENSIONS):
                raise ValueError
            whole = all(type(number) is int for number in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            what = "tensor of the expected shape" if any_shape(name) else "matrix"
            raise MalformedAdapter(
                f"the tensor {name!r} is not a {what} with a dtype and offsets", where=where
            ) from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UnsupportedAdapter(
                f"the tensor {name!r} has dtype {dtype!r}",
                where=where,
                hint="store the adapter in float32, float16 or bfloat16",
            )
        if not whole or any(size < 1 for size in shape):
            raise MalformedAdapter(f"the tensor {name!r} has the impossible shape {shape}", where=where)
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise MalformedAdapter(f"the tensor {name!r} has a shape that contradicts its offsets", where=where)
        shapes[name], dtypes[name] = tuple(shape), DTYPES[dtype]
        total += end - begin
    if total != data_bytes:
        raise MalformedAdapter(
            f"describes {total} bytes of data but holds {data_bytes}: truncated or damaged", where=where
        )
    return TensorFile(path, shapes, dtypes, sha256)
