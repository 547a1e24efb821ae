"""The weights of a base model as they lie on the disk, in one safetensors file or in shards with an index, and which
parameter each becomes.

A stranger wrote them. Headers are read with the limits of `system.tensor_file` and checked before a byte of data is;
the names of files in an index are looked up among those that are in the directory, and never make a path.

A checkpoint may leave out or add the prefix of the inner model (GPT-2's `h.0.attn.c_attn.weight` is the model's
`transformer.h.0.attn.c_attn.weight`), be renamed by a table, or be computed from several tensors, as fused experts are.
transformers applies its tables when it loads (`core_model_loading.rename_source_key`, 5.3 to 5.23); they are asked here
instead of guessed at, without reading a weight.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracli.errors import BaseModelMismatch, MalformedAdapter
from loracli.system.files import open_regular
from loracli.system.strict_json import read_object
from loracli.system.tensor_file import FLOATS, ITEM_BYTES, read_header

_SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a shard.

    Args:
        name: in the file.
        shard: the file's name.
        dtype: as safetensors spells it, `BF16`.
        shape: any number of dimensions.
        begin, end: where its bytes are in the file.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order of their bytes, which fill it from the end of the header to its own."""

    path: Path
    header: bytes
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a base model.

    Args:
        folder: the directory.
        shards: by name, in the order of the names.
        index: the fields of the index, None for a single file.
        tensors: of all shards, by name.
    """

    folder: Path
    shards: dict[str, Shard]
    index: dict[str, Any] | None
    tensors: dict[str, StoredTensor]

    @contextmanager
    def open(self, tensor: StoredTensor) -> Iterator[TensorRows]:
        """Opens the file of a matrix, to read rows of it."""
        with _open(self.folder / tensor.shard) as file:
            yield TensorRows(file.fileno(), tensor)

    def read(self, tensor: StoredTensor) -> Tensor:
        """All bytes of a tensor, as uint8."""
        with _open(self.folder / tensor.shard) as file:
            return read_bytes(file.fileno(), tensor.begin, tensor.size)


class TensorRows:
    """Reads rows of a matrix with floating point numbers, without a memory map."""

    def __init__(self, descriptor: int, tensor: StoredTensor) -> None:
        self._descriptor, self._tensor = descriptor, tensor

    def read(self, start: int, stop: int) -> Tensor:
        """Rows from `start` to before `stop`, in the file's dtype."""
        tensor = self._tensor
        row = tensor.size // tensor.shape[0]
        buffer = read_bytes(self._descriptor, tensor.begin + start * row, (stop - start) * row)
        return buffer.view(FLOATS[tensor.dtype]).view(stop - start, *tensor.shape[1:])


def read_bytes(descriptor: int, offset: int, size: int) -> Tensor:
    """`size` bytes of an open file as uint8.

    Raises:
        BaseModelMismatch: if the file has become shorter.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    view, done = buffer.numpy().data, 0
    while done < size:
        read = os.preadv(descriptor, [view[done:]], offset + done)
        if read == 0:
            raise BaseModelMismatch("a file of the base model's weights became shorter while it was read")
        done += read
    return buffer


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks the index and the header of every shard.

    Raises:
        BaseModelMismatch: if there are no safetensors, one is damaged, or index and files contradict each other.
    """
    names, index = shard_names(folder)
    shards = {name: _read_shard(folder / name) for name in names}
    tensors: dict[str, StoredTensor] = {}
    for shard in shards.values():
        for tensor in shard.tensors:
            if tensor.name in tensors:
                raise BaseModelMismatch(f"the tensor {tensor.name!r} is in two files", where=str(folder))
            tensors[tensor.name] = tensor
    for name, file in (index or {"weight_map": {}})["weight_map"].items():
        if name not in tensors or tensors[name].shard != file:
            raise BaseModelMismatch(f"the index names {name!r} in {file!r}, which does not hold it", where=str(folder))
    return Checkpoint(folder, shards, index, tensors)


def shard_names(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The files that hold the weights, as transformers chooses them, and the fields of their index, None without one.

    Raises:
        BaseModelMismatch: if there are none, or the index names what is no file directly in the directory.
    """
    present = sorted(entry.name for entry in folder.iterdir())
    if _SINGLE_FILE in present:
        return [_SINGLE_FILE], None
    if INDEX_FILE not in present:
        raise BaseModelMismatch(
            "the base model has no weights in safetensors",
            where=str(folder),
            hint="load and save it once with transformers, or give another copy with --base",
        )
    index = _read_index(folder / INDEX_FILE)
    names = sorted(set(index["weight_map"].values()))
    if len({name.casefold() for name in names}) < len(names):
        raise BaseModelMismatch("two files of the index differ only in case", where=str(folder / INDEX_FILE))
    known = set(present)
    missing = [name for name in names if name not in known or not _SHARD_NAME.fullmatch(name)]
    if missing:
        raise BaseModelMismatch(
            f"the index names the file {missing[0]!r}, which is not in the directory",
            where=str(folder / INDEX_FILE),
            hint="the download is incomplete: fetch the base again",
        )
    return names, index


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file; what is wrong with it is the base's fault."""
    try:
        with open_regular(path) as file:
            yield file
    except MalformedAdapter as error:
        raise BaseModelMismatch(f"the base model's weights cannot be used: {error.what}", where=error.where) from None


def _read_index(path: Path) -> dict[str, Any]:
    fields = read_object(
        path,
        _MAX_INDEX_BYTES,
        lambda reason: BaseModelMismatch(f"the index cannot be read: {reason}", where=str(path)),
    )
    names = fields.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise BaseModelMismatch("the index has no map of tensors to files", where=str(path))
    return fields


def _read_shard(path: Path) -> Shard:
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        header, raw = read_header(file, size, str(path))
    tensors = sorted(
        (_tensor(name, entry, path, len(raw)) for name, entry in header.items()), key=lambda t: (t.begin, t.end)
    )
    expected = len(raw)
    for tensor in tensors:
        if tensor.begin != expected:
            raise BaseModelMismatch(f"{tensor.name!r} overlaps another tensor or leaves a gap", where=str(path))
        expected = tensor.end
    if expected != size:
        raise BaseModelMismatch(f"describes {expected} bytes but holds {size}: truncated or damaged", where=str(path))
    return Shard(path, raw, tuple(tensors))


def _tensor(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise BaseModelMismatch(f"the tensor {name!r} lacks dtype, shape or offsets", where=str(path)) from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BaseModelMismatch(f"the tensor {name!r} has the dtype {dtype!r}, which is not known", where=str(path))
    if not whole or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise BaseModelMismatch(f"the tensor {name!r} has a shape that contradicts its offsets", where=str(path))
    return StoredTensor(name, path.name, dtype, tuple(shape), start + begin, start + end)


@dataclass(frozen=True)
class Loaded:
    """What becomes of a tensor.

    Args:
        parameter: of the model.
        computed: whether it is made of several tensors.
        expert: whose matrix of a parameter with experts the tensor is; None for others.
        parts_of_experts: which part of that matrix, from its first row down, and how many parts there are.
    """

    parameter: str
    computed: bool = False
    expert: int | None = None
    parts_of_experts: tuple[int, int] | None = None


@dataclass(frozen=True)
class LoadedNames:
    """Where the parameters of a model come from.

    Args:
        stored: names in the checkpoint that become a parameter as they are, by the parameter's name.
        computed: what a parameter is made of, by its name: names in the checkpoint, with what becomes of each.
    """

    stored: dict[str, tuple[str, ...]]
    computed: dict[str, dict[str, Loaded]]


class LoadingRules:
    """transformers' rules for one model.

    Args:
        skeleton: the model without numbers.
    """

    def __init__(self, skeleton: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(skeleton)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = skeleton.base_model_prefix
        self._own = dict(_every_parameter(skeleton))

    def has(self, parameter: str) -> bool:
        """Whether the model has a parameter of that name."""
        return parameter in self._own

    def loaded(self, name: str) -> Loaded:
        """What becomes of a tensor of this name."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, rename_source_key

        parameter, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._own)
        if pattern is None:
            return Loaded(parameter)
        converter = next(rule for rule in self._converters if pattern in rule.source_patterns)
        kinds, numbers, rest = [type(op) for op in converter.operations], _numbers(name), _numbers(parameter)
        merged = kinds[:1] == [MergeModulelist] and converter.operations[0].dim == 0
        joined = kinds[1:] == [Concatenate] and converter.operations[1].dim == 1
        below = joined or (len(kinds) == 1 and len(converter.source_patterns) == 1)
        if not merged or not below or len(converter.target_patterns) != 1 or not numbers or numbers[:-1] != rest:
            return Loaded(parameter, computed=True)
        place = converter.source_patterns.index(pattern), len(converter.source_patterns)
        return Loaded(parameter, computed=True, expert=numbers[-1], parts_of_experts=place)


def loaded_names(skeleton: Any, names: Iterable[str]) -> LoadedNames:
    """How the tensors of these names load into a model without numbers."""
    rules = LoadingRules(skeleton)
    stored: dict[str, tuple[str, ...]] = {}
    computed: dict[str, dict[str, Loaded]] = {}
    for name in sorted(names):
        loaded = rules.loaded(name)
        if loaded.computed:
            computed.setdefault(loaded.parameter, {})[name] = loaded
        else:
            stored[loaded.parameter] = (*stored.get(loaded.parameter, ()), name)
    return LoadedNames(stored, computed)


def tied_parameters(skeleton: nn.Module) -> dict[str, tuple[str, ...]]:
    """By name of each parameter, the names of all that are the same one, itself included."""
    groups: dict[int, list[str]] = {}
    for name, parameter in _every_parameter(skeleton):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(sorted(group)) for group in groups.values() for name in group}


def _every_parameter(skeleton: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return skeleton.named_parameters(remove_duplicate=False)


def _numbers(name: str) -> list[int]:
    """Of layers and experts, in a name."""
    return [int(word) for word in name.split(".") if re.fullmatch(r"\d{1,6}", word, re.ASCII)]
