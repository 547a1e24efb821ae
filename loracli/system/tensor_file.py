"""Safetensors: one reader of what strangers wrote, one writer whose bytes depend on the tensors alone.

    8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data

(https://github.com/huggingface/safetensors#format). Read, the header is checked first, with limits, then all data in
one pass; after that tensors are read one by one, when they are wanted. The safetensors library refuses a damaged layout
by itself; the limits here are on what it accepts and a hostile file abuses.

Written, the header is padded with spaces to a multiple of 8. The library's own `save_file` (0.8) puts metadata in
random order, ignores the umask and does not flush to the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loracli.errors import IntegrityError, MalformedAdapter, UnsupportedAdapter
from loracli.system.files import open_regular
from loracli.system.strict_json import StrictJsonError, parse_json

_MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000
_MAX_NAME = 1000  # characters of a tensor's name: what looks at each end of it is quick only while it is short
MAX_DIMENSIONS = 8
_MOST = torch.finfo(torch.float32).max  # of any value: products of larger ones overflow float64
BLOCK = 1 << 20  # bytes that are read at once; a multiple of every item size
GATHER = (
    "FSDP and DeepSpeed ZeRO-3 leave a shard to each process: save it with the weights gathered, by FULL_STATE_DICT or "
    "stage3_gather_16bit_weights_on_model_save; zero_to_fp32.py beside a checkpoint of ZeRO-3 does it later"
)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {  # of every dtype of the format
    **{name: dtype.itemsize for name, dtype in FLOATS.items()},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I64", "U64"), 8),
}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked.

    Args:
        path: the file.
        shapes: of each tensor; two dimensions, unless it was allowed any, and all at least 1.
        dtypes: of each tensor, one of float64, float32, float16, bfloat16.
        offsets: of the first byte of each tensor in the file.
        sha256: of the whole file.
        state: of the file when it was checked, to see whether it is still the same.
        zeros: names of tensors that are zero everywhere.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    offsets: dict[str, int]
    sha256: str
    state: tuple[int, ...]
    zeros: frozenset[str] = frozenset()

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Opens the file for reading; no memory map, so that a file that shrinks cannot kill the process.

        Raises:
            IntegrityError: if the file is not the one that was checked.
        """
        with open_regular(self.path) as opened:
            reader = TensorReader(self, opened.fileno())
            reader.check_unchanged()
            yield reader


class TensorReader:
    """Reads tensors of an open file, whose values `open_tensor_file` has found finite."""

    def __init__(self, file: TensorFile, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor

    def check_unchanged(self) -> None:
        """Raises IntegrityError if the file has been written to, or another has taken its name, since it was checked:
        same inode, size and time of its last change."""
        if _state(self._descriptor) != self._file.state:
            raise IntegrityError(
                "has changed since it was checked", where=str(self._file.path), hint="run the same command again"
            )

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """The tensor, or some of its rows, which follow each other.

        Raises:
            IntegrityError: if the file has changed since it was checked.
        """
        first, *rest = self._file.shapes[name]
        rows = range(first) if rows is None else rows
        tensor = torch.empty((len(rows), *rest), dtype=self._file.dtypes[name])
        before = rows.start * math.prod(rest) * tensor.itemsize
        read = _fill(self._descriptor, tensor, self._file.offsets[name] + before)
        self.check_unchanged()
        if read < tensor.nbytes:
            raise MalformedAdapter(f"cannot be read: it ends within {name!r}", where=str(self._file.path))
        return tensor


def open_tensor_file(
    path: Path,
    *,
    check_names: Callable[[Iterable[str]], object] | None = None,
    any_shape: Callable[[str], bool] = lambda name: False,
) -> TensorFile:
    """Checks the header of a safetensors file, then hashes the file and checks every value in one pass.

    Args:
        path: the file.
        check_names: is given all tensor names before any shape is looked at, to refuse by name what would be refused
            for its shape: most tensors of other features are vectors.
        any_shape: which tensors, by name, need not be matrices.
    Raises:
        MalformedAdapter: if the header is damaged, beyond the limits, or describes something else than matrices where
            only matrices may be, or if a tensor holds an infinite value, one beyond float32, or NaN.
        UnsupportedAdapter: if a tensor has a dtype that is not a floating point format of 16 bits or more.
    """
    where = str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header, raw = read_header(file, size, where)
        if check_names is not None:
            check_names(header)
        shapes, dtypes, offsets = _check_header(header, where, size - len(raw), any_shape)
        check_by_library(path)
        digest = hashlib.sha256(raw)
        places = {name: len(raw) + begin for name, begin in offsets.items()}
        checked = TensorFile(path, shapes, dtypes, places, "", _state(file.fileno()))
        zeros = _check_data(checked, file.fileno(), digest)
    return replace(checked, sha256=digest.hexdigest(), zeros=zeros)


def check_by_library(path: Path) -> None:
    """Raises MalformedAdapter for what the safetensors library has against a file; it reads the header alone."""
    try:
        with safe_open(path, framework="pt", backend="pread"):
            pass
    except (SafetensorError, OSError) as error:
        raise MalformedAdapter(f"cannot be read: {error}", where=str(path)) from None


def read_header(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Any], bytes]:
    """What the header of an open safetensors file of `size` bytes says of each tensor, unchecked, and the bytes before
    the data.

    Raises:
        MalformedAdapter: if it is damaged or beyond the limits.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise MalformedAdapter("the file is cut short, or it is not a safetensors file", where=where)
    if length > _MAX_HEADER_BYTES:
        raise MalformedAdapter(f"the header claims {length} bytes; at most {_MAX_HEADER_BYTES} are read", where=where)
    raw = file.read(length)
    try:
        header = parse_json(raw)
    except StrictJsonError as error:
        raise MalformedAdapter(f"the header cannot be read: {error}", where=where) from None
    if not isinstance(header, dict):
        raise MalformedAdapter("the header is not a JSON object", where=where)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise MalformedAdapter(f"it holds {len(header)} tensors; at most {MAX_TENSORS} are read", where=where)
    name = next((name for name in header if len(name) > _MAX_NAME), None)
    if name is not None:
        raise MalformedAdapter(
            f"the tensor {name[:60]!r}... has a name of {len(name)} characters; at most {_MAX_NAME} are read",
            where=where,
        )
    return header, start + raw


def _check_data(file: TensorFile, descriptor: int, digest: Any) -> frozenset[str]:
    """Feeds all tensors, in the order of the file, to the digest, and refuses one that is not finite everywhere, a
    float64 one also in float32; gives the names of those that are zero everywhere.

    In blocks that stay in the cache between the two.
    """
    zeros = set(file.offsets)
    block = torch.empty(BLOCK, dtype=torch.uint8)
    for name in sorted(file.offsets, key=file.offsets.__getitem__):
        offset, dtype, bad = file.offsets[name], file.dtypes[name], 0
        end = offset + math.prod(file.shapes[name]) * dtype.itemsize
        for begin in range(offset, end, BLOCK):
            part = block[: min(BLOCK, end - begin)]
            if _fill(descriptor, part, begin) < part.numel():
                raise MalformedAdapter(f"cannot be read: it ends within {name!r}", where=str(file.path))
            digest.update(part.numpy())
            values = part.view(dtype)
            least, most = values.aminmax()
            if least or most:
                zeros.discard(name)
            if not float(max(-least, most)) <= _MOST:  # NaN comes through
                bad += values.numel() - int((values.double().abs() <= _MOST).sum())
        if bad:
            of_float64 = " in float32" if dtype == torch.float64 else ""
            raise MalformedAdapter(
                f"the tensor {name!r} holds {bad} values that are infinite or not a number{of_float64}",
                where=str(file.path),
                hint="the adapter's training has diverged; use an earlier checkpoint",
            )
    return frozenset(zeros)


def _fill(descriptor: int, tensor: Tensor, offset: int) -> int:
    """Reads the bytes of a tensor from a place in a file; fewer than it has only where the file ends."""
    view = tensor_bytes(tensor)
    done = 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lack it


def _state(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _check_header(
    header: dict[str, Any], where: str, data_bytes: int, any_shape: Callable[[str], bool]
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype], dict[str, int]]:
    """Shape, dtype and place within the data of every tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    offsets: dict[str, int] = {}
    total = 0
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if isinstance(shape, list) and 0 in shape and begin == end:
                raise MalformedAdapter(f"the tensor {name!r} is empty, of shape {shape}", where=where, hint=GATHER)
            if len(shape) != 2 and not (any_shape(name) and 1 <= len(shape) <= MAX_DIMENSIONS):
                raise ValueError
            whole = all(type(number) is int for number in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            what = "tensor of the expected shape" if any_shape(name) else "matrix"
            raise MalformedAdapter(
                f"the tensor {name!r} is not a {what} with a dtype and offsets", where=where
            ) from None
        if not isinstance(dtype, str) or dtype not in FLOATS:
            raise UnsupportedAdapter(
                f"the tensor {name!r} has dtype {dtype!r}",
                where=where,
                hint="store the adapter in float32, float16 or bfloat16",
            )
        if not whole or any(size < 1 for size in shape):
            raise MalformedAdapter(f"the tensor {name!r} has the impossible shape {shape}", where=where)
        if end - begin != math.prod(shape) * FLOATS[dtype].itemsize:
            raise MalformedAdapter(f"the tensor {name!r} has a shape that contradicts its offsets", where=where)
        shapes[name], dtypes[name], offsets[name] = tuple(shape), FLOATS[dtype], begin
        total += end - begin
    if total != data_bytes:
        raise MalformedAdapter(
            f"describes {total} bytes of data but holds {data_bytes}: truncated or damaged", where=where
        )
    return shapes, dtypes, offsets


_PEFT_METADATA = MappingProxyType({"format": "pt"})  # PEFT and transformers look for it

FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] = _PEFT_METADATA,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Writes a new file, one tensor at a time, and flushes it to the disk.

    Args:
        path: must not exist.
        shapes: of every tensor, by name; the file is in sorted order.
        dtype: of all of them.
        tensor: gives the tensor of a name, in `dtype`; asked for once each, in sorted order.
        metadata: the header's `__metadata__`.
        meanwhile: is called in a thread of its own once all is written, while it goes to the disk.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        for part in file_parts(shapes, dtype, tensor, metadata=metadata):
            file.write(part)
        file.flush()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(meanwhile)
            os.fsync(file.fileno())
        done.result()


def file_parts(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] = _PEFT_METADATA,
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
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, metadata: Mapping[str, str] = _PEFT_METADATA
) -> int:
    """Bytes of the file that `write_tensors` writes."""
    data = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    return len(_header(shapes, dtype, metadata)) + data


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    return header_bytes([(name, FLOAT_NAMES[dtype], shapes[name]) for name in sorted(shapes)], metadata)


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] = _PEFT_METADATA
) -> bytes:
    """The beginning of a safetensors file with these tensors in this order: name, dtype as the format calls it, and
    shape of each."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
