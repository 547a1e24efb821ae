"""A LoRA adapter as a value: what its directory holds, checked, ready for algebra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from loracli.adapters.config import AdapterConfig, read_config
from loracli.adapters.hub import Fetched, fetch_adapter
from loracli.adapters.mlx import is_mlx, read_mlx
from loracli.adapters.names import (
    CONFIG_FILE,
    TENSOR_FILE,
    Part,
    format_tensor_name,
    parse_tensor_name,
    whole_parameter,
)
from loracli.adapters.references import Reference
from loracli.adapters.tensor_file import TensorFile, TensorReader, open_tensor_file, tensor_reader
from loracli.algebra.factors import Factors
from loracli.errors import IntegrityError, MalformedAdapter

AdapterKind = Literal["linear", "embedding"]
Key = TypeVar("Key")


@dataclass(frozen=True)
class LoraModule:
    """The update of one module of the base model.

    Args:
        name: the module's path in the base model, `model.layers.0.self_attn.q_proj`.
        kind: `linear` (nn.Linear and Conv1D) or `embedding` (then "in" is the vocabulary and "out" the width).
        factors: lora_A (r, in), lora_B (out, r) as stored, and the scaling.
    """

    name: str
    kind: AdapterKind
    factors: Factors


@dataclass(frozen=True)
class SavedTensor:
    """A parameter of a module that was saved whole: the tensor's name in the file, its shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter: its origin, its config and the factors of every module.

    Args:
        source: the reference it was read from.
        path: the directory that was read.
        commit: of the Hub repository, None for a local directory.
        config: the checked `adapter_config.json`.
        modules: by the module's path, in sorted order.
        base_copies: names of base matrices that PEFT stored beside embeddings; must equal the base's, never exported.
        dtype: the widest dtype among the factors and the modules that were saved whole.
        sha256: of each file that was read, by file name.
        saved: modules that replace the base's (modules_to_save): by module, then by the parameter's path in the base.
    """

    source: Reference
    path: Path
    commit: str | None
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    base_copies: Mapping[str, str]
    dtype: torch.dtype
    sha256: Mapping[str, str]
    saved: Mapping[str, Mapping[str, SavedTensor]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The reference as it was typed."""
        return self.source.text

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({module.factors.rank for module in self.modules.values()}))

    def read_base_copy(self, module: str) -> Tensor:
        """The stored copy of the base's matrix of `module`."""
        with tensor_reader(self.path / TENSOR_FILE) as reader:
            return reader.read(self.base_copies[module])

    def read_saved(self, tensor: SavedTensor) -> Tensor:
        """A parameter of a module that was saved whole.

        Raises:
            IntegrityError: if the file has changed since it was checked.
        """
        with tensor_reader(self.path / TENSOR_FILE) as reader:
            found = reader.read(tensor.name)
        if (tuple(found.shape), found.dtype) != (tensor.shape, tensor.dtype):
            raise IntegrityError(f"{self.path / TENSOR_FILE} has changed since it was checked")
        return found


def read_adapter(source: str | Fetched) -> LoraAdapter:
    """Reads an adapter's directory; a reference is fetched first.

    Raises:
        MalformedAdapter: if a file is damaged, or tensors and config contradict each other.
        UnsupportedAdapter: if the adapter uses a feature that cannot be honoured exactly.
    """
    fetched = fetch_adapter(source) if isinstance(source, str) else source
    read = _read_mlx if is_mlx(fetched.path) else _read_peft
    config, modules, others, file = read(fetched.path)
    dtypes = [module.factors.lora_A.dtype for module in modules.values()]
    dtypes += [tensor.dtype for tensors in others.saved.values() for tensor in tensors.values()]
    return LoraAdapter(
        source=fetched.reference,
        path=fetched.path,
        commit=fetched.commit,
        config=config,
        modules=modules,
        base_copies=others.copies,
        dtype=widest_dtype(dtypes),
        sha256={
            CONFIG_FILE: sha256((fetched.path / CONFIG_FILE).read_bytes()).hexdigest(),
            file.path.name: file.sha256,
        },
        saved=others.saved,
    )


@dataclass(frozen=True)
class _Others:
    """What a file holds beside updates: names of base matrices by module, and modules that were saved whole."""

    copies: Mapping[str, str]
    saved: Mapping[str, Mapping[str, SavedTensor]]


_Read = tuple[AdapterConfig, dict[str, LoraModule], _Others, TensorFile]


def _read_peft(folder: Path) -> _Read:
    config = read_config(folder / CONFIG_FILE)
    path = folder / TENSOR_FILE

    def sort(names: Iterable[str]) -> _Sorted:
        return _sort_tensors(names, str(path), config.modules_to_save)

    file = open_tensor_file(path, check_names=sort, any_shape=_may_have_any_shape)
    parts, copies, whole = sort(file.shapes)
    saved = {
        module: {path: SavedTensor(name, file.shapes[name], file.dtypes[name]) for path, name in sorted(names.items())}
        for module, names in sorted(whole.items())
    }
    with file.reader() as reader:
        modules = {name: _read_module(name, parts[name], config, file, reader) for name in sorted(parts)}
    return config, modules, _Others(copies, saved), file


def _read_mlx(folder: Path) -> _Read:
    config, factors, file = read_mlx(folder)
    return config, {name: LoraModule(name, "linear", update) for name, update in factors.items()}, _Others({}, {}), file


def widest_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of them without loss: float16 with bfloat16 gives float32."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


_Sorted = tuple[dict[str, dict[Part, str]], dict[str, str], dict[str, dict[str, str]]]


def _sort_tensors(names: Iterable[str], where: str, modules_to_save: tuple[str, ...]) -> _Sorted:
    """Tensor names by module and part; of base matrices by module; of modules saved whole by module and parameter."""
    parts: dict[str, dict[Part, str]] = {}
    copies: dict[str, str] = {}
    saved: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for name in sorted(names):
        parameter = whole_parameter(name)
        if parameter is not None:
            _take(others, parameter, name, where)
            continue
        parsed = parse_tensor_name(name, where=where)
        if parsed.part == "base_layer":
            _take(copies, parsed.module, name, where)
        else:
            _take(parts.setdefault(parsed.module, {}), parsed.part, name, where)
    for parameter, name in others.items():
        module = parameter.rpartition(".")[0]
        owner = _saved_module(parameter, modules_to_save)
        if owner is not None:
            saved.setdefault(owner, {})[parameter] = name
        elif parameter.endswith(".weight") and "lora_embedding_A" in parts.get(module, {}):
            _take(copies, module, name, where)  # PEFT wrote the embedding's own matrix under the name of the module
        else:
            parse_tensor_name(name, where=where)  # says what it is, and refuses it
    _check_sorted(parts, copies, saved, where, modules_to_save)
    return parts, copies, saved


def _check_sorted(
    parts: Mapping[str, object],
    copies: Mapping[str, str],
    saved: Mapping[str, object],
    where: str,
    modules_to_save: Sequence[str],
) -> None:
    if not parts:
        raise MalformedAdapter("holds no LoRA factors", where=where)
    stray = sorted(copies.keys() - parts.keys())
    if stray:
        raise MalformedAdapter(f"holds a base matrix of {stray[0]!r} but no factors for it", where=where)
    for name in modules_to_save:
        if not any(module.endswith(name) for module in saved):
            raise MalformedAdapter(f"{CONFIG_FILE} has {name!r} in modules_to_save, but no tensor of it", where=where)


def _saved_module(parameter: str, modules_to_save: tuple[str, ...]) -> str | None:
    """The outermost module around a parameter whose name ends in one that was saved whole, as PEFT looks it up."""
    words = parameter.split(".")
    paths = (".".join(words[:end]) for end in range(1, len(words)))
    return next((path for path in paths if path.endswith(modules_to_save)), None)


def _may_have_any_shape(name: str) -> bool:
    """Factors and copies of base matrices are matrices; biases and modules saved whole need not be."""
    return name.endswith(".bias") or whole_parameter(name) is not None


def _take(names: dict[Key, str], key: Key, name: str, where: str) -> None:
    if key in names:
        raise MalformedAdapter(
            f"{names[key]!r} and {name!r} are two spellings of one tensor",
            where=where,
            hint="the file holds two adapters, or one twice: save the one that is meant alone",
        )
    names[key] = name


def _read_module(
    name: str, tensors: dict[Part, str], config: AdapterConfig, file: TensorFile, reader: TensorReader
) -> LoraModule:
    where = str(file.path)
    kind: AdapterKind = "embedding" if "lora_embedding_A" in tensors or "lora_embedding_B" in tensors else "linear"
    wanted: tuple[Part, Part] = (
        ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    )
    biased = kind == "linear" and config.lora_bias
    expected = {*wanted, "lora_bias"} if biased else {*wanted}
    missing = [format_tensor_name(name, part) for part in (*wanted, "lora_bias") if part in expected - tensors.keys()]
    if missing:
        raise MalformedAdapter(f"lacks {missing[0]!r}", where=where)
    if "lora_bias" in tensors and not biased:
        problem = "lora_bias is off" if kind == "linear" else "an embedding has no lora_bias"
        raise MalformedAdapter(f"holds {tensors['lora_bias']!r}, but in {CONFIG_FILE} {problem}", where=where)
    if tensors.keys() != expected:
        raise MalformedAdapter(f"mixes linear and embedding factors for {name!r}", where=where)
    lora_A, lora_B = (reader.read(tensors[part]) for part in wanted)
    if lora_A.shape[0] != lora_B.shape[1]:
        raise MalformedAdapter(
            f"{name!r} has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, whose ranks differ",
            where=where,
        )
    if lora_A.shape[0] != config.rank_of(name):
        raise MalformedAdapter(
            f"{name!r} has rank {lora_A.shape[0]} in the tensors and {config.rank_of(name)} in {CONFIG_FILE}",
            where=where,
        )
    bias = reader.read(tensors["lora_bias"]) if biased else None
    if bias is not None and bias.shape != lora_B.shape[:1]:
        raise MalformedAdapter(
            f"{name!r} has lora_B {tuple(lora_B.shape)} with a bias {tuple(bias.shape)}", where=where
        )
    common = widest_dtype([tensor.dtype for tensor in (lora_A, lora_B, bias) if tensor is not None])
    return LoraModule(name, kind, Factors(lora_A, lora_B, config.scaling_of(name), bias).to(common))
