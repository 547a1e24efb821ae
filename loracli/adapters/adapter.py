"""A LoRA adapter as a value: what its directory holds, checked, ready for algebra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loracli.adapters.config import AdapterConfig, read_config
from loracli.adapters.hub import Fetched, fetch_adapter
from loracli.adapters.names import CONFIG_FILE, TENSOR_FILE, Part, format_tensor_name, parse_tensor_name
from loracli.adapters.references import Reference
from loracli.adapters.stored import StoredFactors
from loracli.adapters.tensor_file import TensorFile, open_tensor_file
from loracli.algebra.factors import Factors
from loracli.errors import MalformedAdapter

AdapterKind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class LoraModule:
    """The update of one module of the base model.

    Args:
        name: the module's path in the base model, `model.layers.0.self_attn.q_proj`.
        kind: `linear` (nn.Linear and Conv1D) or `embedding` (then "in" is the vocabulary and "out" the width).
        factors: lora_A (r, in), lora_B (out, r) as stored, and the scaling; from `open_adapter` they are read from the
            file each time they are wanted.
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

    def loaded(self) -> LoraAdapter:
        """The same adapter with all factors in memory."""
        held = {
            name: replace(module, factors=module.factors.loaded())
            for name, module in self.modules.items()
            if isinstance(module.factors, StoredFactors)
        }
        return replace(self, modules={**self.modules, **held})

    def read_base_copy(self, module: str) -> Tensor:
        """The stored copy of the base's matrix of `module`."""
        with open_tensor_file(self.path / TENSOR_FILE).reader() as reader:
            return reader.read(self.base_copies[module])


def read_adapter(source: str | Fetched) -> LoraAdapter:
    """Reads an adapter's directory into memory; a reference is fetched first.

    Raises:
        MalformedAdapter: if a file is damaged, or tensors and config contradict each other.
        UnsupportedAdapter: if the adapter uses a feature that cannot be honoured exactly.
    """
    return open_adapter(source).loaded()


def open_adapter(source: str | Fetched) -> LoraAdapter:
    """As `read_adapter`, with all of its checks, but the factors stay in the file: for work that goes through the
    modules once. Factors that are read after the file has changed raise IntegrityError.

    Raises:
        MalformedAdapter, UnsupportedAdapter: as `read_adapter`.
    """
    fetched = fetch_adapter(source) if isinstance(source, str) else source
    config = read_config(fetched.path / CONFIG_FILE)
    path = fetched.path / TENSOR_FILE
    file = open_tensor_file(path, check_names=lambda names: _sort_tensors(names, str(path)))
    parts, copies = _sort_tensors(file.shapes, str(path))
    modules = {name: _read_module(name, parts[name], config, file) for name in sorted(parts)}
    dtypes = [file.dtypes[name] for tensors in parts.values() for name in tensors.values()]
    return LoraAdapter(
        source=fetched.reference,
        path=fetched.path,
        commit=fetched.commit,
        config=config,
        modules=modules,
        base_copies=copies,
        dtype=widest_dtype(dtypes),
        sha256={
            CONFIG_FILE: sha256((fetched.path / CONFIG_FILE).read_bytes()).hexdigest(),
            TENSOR_FILE: file.sha256,
        },
    )


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
    plain: list[str] = []
    names = sorted(names)
    embeddings = {name.rpartition(".")[0] for name in names if name.endswith(".lora_embedding_A")}
    for name in names:
        if name.removesuffix(".weight") in embeddings:  # PEFT wrote the embedding's own matrix under this name
            plain.append(name)
            continue
        parsed = parse_tensor_name(name, where=where)
        if parsed.part == "base_layer":
            copies[parsed.module] = name
        else:
            parts.setdefault(parsed.module, {})[parsed.part] = name
    for name in plain:
        copies[name.removesuffix(".weight").removeprefix("base_model.model.")] = name
    if not parts:
        raise MalformedAdapter("holds no LoRA factors", where=where)
    stray = sorted(copies.keys() - parts.keys())
    if stray:
        raise MalformedAdapter(f"holds a base matrix of {stray[0]!r} but no factors for it", where=where)
    return parts, copies


def _read_module(name: str, tensors: dict[Part, str], config: AdapterConfig, file: TensorFile) -> LoraModule:
    where = str(file.path)
    kind: AdapterKind = "embedding" if "lora_embedding_A" in tensors or "lora_embedding_B" in tensors else "linear"
    wanted: tuple[Part, Part] = (
        ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    )
    missing = [format_tensor_name(name, part) for part in wanted if part not in tensors]
    if missing or len(tensors) != 2:
        problem = f"lacks {missing[0]!r}" if missing else f"mixes linear and embedding factors for {name!r}"
        raise MalformedAdapter(problem, where=where)
    factors = StoredFactors(file, tensors[wanted[0]], tensors[wanted[1]], config.scaling_of(name))
    shape_A, shape_B = (file.shapes[tensors[part]] for part in wanted)
    if shape_A[0] != shape_B[1]:
        raise MalformedAdapter(
            f"{name!r} has lora_A {shape_A} and lora_B {shape_B}, whose ranks differ",
            where=where,
        )
    if shape_A[0] != config.rank_of(name):
        raise MalformedAdapter(
            f"{name!r} has rank {shape_A[0]} in the tensors and {config.rank_of(name)} in {CONFIG_FILE}",
            where=where,
        )
    return LoraModule(name, kind, factors)
