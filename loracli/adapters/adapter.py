"""A LoRA adapter as a value: what its directory holds, checked, ready for algebra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from loracli.adapters.config import AdapterConfig, read_config
from loracli.adapters.hub import Fetched, fetch_adapter
from loracli.adapters.mlx import is_mlx, read_mlx
from loracli.adapters.names import CONFIG_FILE, TENSOR_FILE, Part, format_tensor_name, parse_tensor_name, whole_module
from loracli.adapters.references import Reference
from loracli.adapters.tensor_file import TensorFile, TensorReader, open_tensor_file
from loracli.algebra.factors import Factors
from loracli.errors import MalformedAdapter

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
class LoraAdapter:
    """One adapter: its origin, its config and the factors of every module.

    Args:
        source: the reference it was read from.
        path: the directory that was read.
        commit: of the Hub repository, None for a local directory.
        config: the checked `adapter_config.json`.
        modules: by the module's path, in sorted order.
        base_copies: names of base matrices that PEFT stored beside embeddings; must equal the base's, never exported.
        dtype: the widest dtype among the factors.
        sha256: of each file that was read, by file name.
    """

    source: Reference
    path: Path
    commit: str | None
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    base_copies: Mapping[str, str]
    dtype: torch.dtype
    sha256: Mapping[str, str]

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
        with open_tensor_file(self.path / TENSOR_FILE).reader() as reader:
            return reader.read(self.base_copies[module])


def read_adapter(source: str | Fetched) -> LoraAdapter:
    """Reads an adapter's directory; a reference is fetched first.

    Raises:
        MalformedAdapter: if a file is damaged, or tensors and config contradict each other.
        UnsupportedAdapter: if the adapter uses a feature that cannot be honoured exactly.
    """
    fetched = fetch_adapter(source) if isinstance(source, str) else source
    read = _read_mlx if is_mlx(fetched.path) else _read_peft
    config, modules, copies, file = read(fetched.path)
    return LoraAdapter(
        source=fetched.reference,
        path=fetched.path,
        commit=fetched.commit,
        config=config,
        modules=modules,
        base_copies=copies,
        dtype=widest_dtype([module.factors.lora_A.dtype for module in modules.values()]),
        sha256={
            CONFIG_FILE: sha256((fetched.path / CONFIG_FILE).read_bytes()).hexdigest(),
            file.path.name: file.sha256,
        },
    )


_Read = tuple[AdapterConfig, dict[str, LoraModule], dict[str, str], TensorFile]


def _read_peft(folder: Path) -> _Read:
    config = read_config(folder / CONFIG_FILE)
    path = folder / TENSOR_FILE
    file = open_tensor_file(
        path, check_names=lambda names: _sort_tensors(names, str(path)), any_shape=lambda name: name.endswith(".bias")
    )
    parts, copies = _sort_tensors(file.shapes, str(path))
    with file.reader() as reader:
        modules = {name: _read_module(name, parts[name], config, file, reader) for name in sorted(parts)}
    return config, modules, copies, file


def _read_mlx(folder: Path) -> _Read:
    config, factors, file = read_mlx(folder)
    return config, {name: LoraModule(name, "linear", update) for name, update in factors.items()}, {}, file


def widest_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of them without loss: float16 with bfloat16 gives float32."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _sort_tensors(names: Iterable[str], where: str) -> tuple[dict[str, dict[Part, str]], dict[str, str]]:
    """Tensor names by module and part, and the names of base matrices by module."""
    parts: dict[str, dict[Part, str]] = {}
    copies: dict[str, str] = {}
    whole: dict[str, str] = {}
    for name in sorted(names):
        module = whole_module(name)
        if module is not None:
            _take(whole, module, name, where)
            continue
        parsed = parse_tensor_name(name, where=where)
        if parsed.part == "base_layer":
            _take(copies, parsed.module, name, where)
        else:
            _take(parts.setdefault(parsed.module, {}), parsed.part, name, where)
    for module, name in whole.items():
        if "lora_embedding_A" not in parts.get(module, {}):
            parse_tensor_name(name, where=where)  # says what it is, and refuses it
        _take(copies, module, name, where)  # PEFT wrote the embedding's own matrix under the name of the module itself
    if not parts:
        raise MalformedAdapter("holds no LoRA factors", where=where)
    stray = sorted(copies.keys() - parts.keys())
    if stray:
        raise MalformedAdapter(f"holds a base matrix of {stray[0]!r} but no factors for it", where=where)
    return parts, copies


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
