"""What a server finds: the files of an adapter, also of one that loracat itself refuses, read as leniently as is safe;
and what the config of the base tells of it.

Only the config and the headers of the tensors are read, with limits; a config's regular expressions are never compiled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from torch import nn

from loracli.adapters.claims import TASKS
from loracli.adapters.config import MAX_CONFIG_BYTES, MAX_PARAMETERS
from loracli.adapters.names import PREFIX, targeted_parameters
from loracli.adapters.patterns import ModulePatterns, PatternError
from loracli.adapters.targets import Shapes, tied_modules
from loracli.errors import AdapterNotFound, MalformedAdapter, UnsupportedAdapter
from loracli.hub.fetch import from_pickle_hint
from loracli.hub.references import Named, whole_model_hint
from loracli.model.base import plan_from_config
from loracli.model.modules import BaseNames, expert_shape, kind_and_shape
from loracli.progress import SILENT, Progress
from loracli.system.escaping import shell_word
from loracli.system.files import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    GGUF_FILE,
    MLX_TENSOR_FILE,
    PICKLE_FILE,
    TENSOR_FILE,
    file_sha256,
    open_regular,
)
from loracli.system.strict_json import read_object
from loracli.system.tensor_file import BLOCK, FLOATS, ITEM_BYTES, MAX_DIMENSIONS, check_by_library, read_header

AdapterLayout = Literal["peft", "mlx"]
_MAX_SIZE = 1 << 48  # of a dimension
_MAX_CERTIFICATE_BYTES = 64 << 20
_SIGNED_FLOATS = frozenset({*FLOATS, "F8_E4M3", "F8_E5M2"})  # the last byte begins with the sign
_UNSIGNED = bytes(byte & 0x7F for byte in range(256))

_PEFT = re.compile(r"(?P<module>.+?)\.(lora_(?P<side>[AB])(\.default)?\.weight|lora_embedding_(?P<embedding>[AB]))")
_MLX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")


@dataclass(frozen=True)
class Header:
    """What the header of a file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Pair:
    """The factors of one module, as far as they are there.

    Args:
        a: shape of the first factor, as (rank, in), of a convolution (rank, in, kh, kw).
        b: shape of the second, as (out, rank), of a convolution (out, rank / groups, 1, 1).
        embedding: whether it is an embedding's.
        experts: of how many experts it is, None for the factors of a module.
        parameter: whether it is of the one matrix of a module among the target_parameters.
    """

    a: tuple[int, ...] | None = None
    b: tuple[int, ...] | None = None
    embedding: bool = False
    experts: int | None = None
    parameter: bool = False

    @property
    def is_convolution(self) -> bool:
        """Whether the factors are kernels."""
        return self.a is not None and len(self.a) > 2

    @property
    def rank(self) -> int | None:
        """Of the factors, of each expert; None without a first one."""
        return self.a[0] // (self.experts or 1) if self.a and len(self.a) >= 2 else None


@dataclass(frozen=True)
class AdapterFiles:
    """A directory.

    Args:
        path: of it.
        layout: PEFT's or MLX's, by the name of the tensor file; PEFT's if there is none.
        config: the fields of adapter_config.json, unchecked.
        tensors: headers, by name.
        names: of all files in it.
    """

    path: Path
    layout: AdapterLayout
    config: Mapping[str, Any]
    tensors: Mapping[str, Header]
    names: frozenset[str] = field(default_factory=frozenset)

    @property
    def tensor_file(self) -> str:
        return MLX_TENSOR_FILE if self.layout == "mlx" else TENSOR_FILE

    @cached_property
    def pairs(self) -> Mapping[str, Pair]:
        """Factors by the module's path in the base, of tensors with ordinary names, sorted; of experts by that of their
        parameter."""
        found: dict[str, Pair] = {}
        pattern = _MLX if self.layout == "mlx" else _PEFT
        for name, header in sorted(self.tensors.items()):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            pair = found.setdefault(match["module"].removeprefix(PREFIX), Pair())
            groups = match.groupdict()
            pair.embedding = pair.embedding or groups.get("embedding") is not None
            shape = header.shape[::-1] if self.layout == "mlx" else header.shape
            if (groups["side"] or groups.get("embedding") or "").upper() == "A":
                pair.a = shape
            else:
                pair.b = shape
        return self._with_experts(found)

    def _with_experts(self, pairs: dict[str, Pair]) -> dict[str, Pair]:
        named, ranks = self.config.get("target_parameters"), self.patterns["rank_pattern"]
        targets = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        if not 0 < len(targets) <= MAX_PARAMETERS or isinstance(ranks, PatternError):
            return pairs
        as_layer = {name: pair.rank == ranks.get(name, self.config.get("r")) for name, pair in pairs.items()}
        try:
            parameters = targeted_parameters(as_layer, targets, str(self.path))
        except (MalformedAdapter, UnsupportedAdapter):
            return pairs
        for module, parameter in parameters.items():
            rank = ranks.get(parameter, self.config.get("r"))
            rows = (pairs[module].a or (0,))[0]
            if type(rank) is int and rank > 0 and rows % rank == 0 and rows > rank:
                pairs[parameter] = replace(pairs.pop(module), experts=rows // rank)
            elif type(rank) is int and rows == rank and parameter.endswith(".weight"):
                pairs[module] = replace(pairs[module], parameter=True)
        return dict(sorted(pairs.items()))

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """The modules that `ensure_weight_tying` may tie to embeddings, each with its own."""
        if self.config.get("ensure_weight_tying") is not True:
            return {}
        embeddings: dict[str, Shapes] = {}
        others: dict[str, Shapes] = {}
        for name, pair in self.pairs.items():
            if pair.a and pair.b:
                (embeddings if pair.embedding else others)[name] = pair.a, pair.b
        return tied_modules(embeddings, others)

    @cached_property
    def patterns(self) -> Mapping[str, ModulePatterns[Any] | PatternError]:
        """`rank_pattern` and `alpha_pattern` of the config, or why they are not read."""
        return {field: _patterns(self.config.get(field)) for field in ("rank_pattern", "alpha_pattern")}

    def changes_nothing(self) -> bool:
        """Whether all of the second factors are zero, or all of the first; each is read up to one that is not.

        Raises:
            MalformedAdapter: if the file cannot be read.
        """
        sides: dict[str, list[str]] = {}
        pattern = _MLX if self.layout == "mlx" else _PEFT
        for name in self.tensors:
            match = pattern.fullmatch(name)
            if match is not None:
                side = match["side"] or match["embedding"]
                sides.setdefault(side.upper(), []).append(name)
        path = self.path / self.tensor_file
        with open_regular(path) as file:
            header, raw = read_header(file, os.fstat(file.fileno()).st_size, str(path))
            return any(
                not any(_has_a_value(file, len(raw), header.get(name)) for name in names) for names in sides.values()
            )

    @cached_property
    def largest_rank(self) -> int:
        """Of tensors and config, and at least 1."""
        pattern = self.config.get("rank_pattern")
        said = [self.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        parameters = self.config.get("lora_parameters")
        said += [parameters.get("rank")] if isinstance(parameters, dict) else []
        return max([1, *(r for r in said if type(r) is int), *(p.rank for p in self.pairs.values() if p.rank)])

    @cached_property
    def exported_gguf(self) -> bool:
        """Whether there is a GGUF file and `loracat export` wrote it: its hash stands in the certificate."""
        if not {GGUF_FILE, CERTIFICATE_FILE} <= self.names:
            return False
        try:
            document = read_object(self.path / CERTIFICATE_FILE, _MAX_CERTIFICATE_BYTES)
            recorded = document["certificate"]["sha256"][GGUF_FILE]
        except (MalformedAdapter, KeyError, TypeError):
            return False
        return bool(recorded == file_sha256(self.path / GGUF_FILE))


def read_adapter_files(path: Path) -> AdapterFiles:
    """Looks into a directory.

    Raises:
        AdapterNotFound: if it is no directory with an adapter_config.json and a safetensors file of an adapter.
        MalformedAdapter: if a file is damaged or beyond the limits, or holds tensors that no program loads.
    """
    fetch = "a directory is needed; loracat fetch REF prints the one it fetches to"
    if not path.is_dir():
        export = f"`loracat export {shell_word(str(path))}` writes an adapter of a recipe"
        raise AdapterNotFound(
            "is not a directory" if path.exists() else "no such directory",
            where=str(path),
            hint=export if path.is_file() and path.suffix == ".json" else fetch,
        )
    names = frozenset(entry.name for entry in os.scandir(path))
    if CONFIG_FILE not in names:
        hint = whole_model_hint(path) or f"name the directory that holds {CONFIG_FILE}"
        raise AdapterNotFound(f"the directory holds no {CONFIG_FILE}", where=str(path), hint=hint)
    layout: AdapterLayout = "mlx" if MLX_TENSOR_FILE in names and TENSOR_FILE not in names else "peft"
    file = MLX_TENSOR_FILE if layout == "mlx" else TENSOR_FILE
    if file not in names:
        hint = from_pickle_hint(str(path)) if PICKLE_FILE in names else fetch
        raise AdapterNotFound(f"no {TENSOR_FILE} or {MLX_TENSOR_FILE} in it", where=str(path), hint=hint)
    config = read_object(path / CONFIG_FILE, MAX_CONFIG_BYTES)
    headers = _read_headers(path / file)
    _refuse_ungathered(headers, _MLX if layout == "mlx" else _PEFT, path / file)
    return AdapterFiles(path, layout, config, headers, names)


def _refuse_ungathered(headers: Mapping[str, Header], factors: re.Pattern[str], path: Path) -> None:
    """Raises MalformedAdapter for a tensor without values, and for a factor that is a vector: no program loads those,
    and rules about shapes would give another reason."""
    for name, header in sorted(headers.items()):
        shape = list(header.shape)
        if 0 in shape:
            found = f"the tensor {name!r} has the shape {shape} and no values"
        elif len(shape) < 2 and factors.fullmatch(name):
            found = f"the factor {name!r} has the shape {shape} and is not a matrix"
        else:
            continue
        raise MalformedAdapter(
            found,
            where=str(path),
            hint="a rank of 0, or the part of one process of a training that shares weights out (ZeRO-3, FSDP): gather "
            "them before save_pretrained",
        )


def _read_headers(path: Path) -> dict[str, Header]:
    """The headers of a safetensors file: any dtype and number of dimensions, within the limits on untrusted files.

    Raises:
        MalformedAdapter: if the header is damaged or beyond the limits.
    """
    with open_regular(path) as file:
        header, _ = read_header(file, os.fstat(file.fileno()).st_size, str(path))
    check_by_library(path)
    found = {}
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape)
        ):
            raise MalformedAdapter(f"the tensor {name!r} has no dtype and shape", where=str(path))
        found[name] = Header(dtype, tuple(shape))
    return found


def _patterns(value: object) -> ModulePatterns[Any] | PatternError:
    try:
        return ModulePatterns(value if isinstance(value, dict) else {})
    except PatternError as error:
        return error


def _has_a_value(file: BinaryIO, start: int, entry: Any) -> bool:
    """Whether any of a tensor's values is not 0, or -0 of a floating point format; also if they are not to be had."""
    try:
        begin, end = entry["data_offsets"]
        size = ITEM_BYTES[entry["dtype"]] if entry["dtype"] in _SIGNED_FLOATS else None
        file.seek(start + begin)
        while begin < end:
            block = bytearray(file.read(min(BLOCK, end - begin)))
            if not block:
                return True
            begin += len(block)
            if size is not None:
                block[size - 1 :: size] = block[size - 1 :: size].translate(_UNSIGNED)
            if block.strip(b"\0"):
                return True
    except (KeyError, TypeError, ValueError, OverflowError):
        return True
    return False


@dataclass(frozen=True)
class BaseFacts:
    """A base model.

    Args:
        id: as it was named.
        model_class: transformers' class of it, `LlamaForCausalLM`.
        layers: number of decoder layers.
        tied: whether the head is the embedding.
        modules: (out, in) of every linear layer, of a router's weight and of one expert of a parameter, and (dim,
            vocabulary) of every embedding, by path.
        experts: how many a parameter has, by its path.
        names: what becomes of an adapter's names.
    """

    id: str
    model_class: str
    layers: int
    tied: bool
    modules: Mapping[str, tuple[int, int]]
    experts: Mapping[str, int]
    names: BaseNames


def read_base_facts(base: Named, *, task: object = None, progress: Progress = SILENT) -> BaseFacts:
    """Of a directory or Hub id that the user names, as the model of a `task_type`, a causal language model where PEFT
    has none of that name; errors as of `plan_from_config`."""
    known = task if isinstance(task, str) and task in TASKS else None
    plan, _ = plan_from_config(base, task=known, progress=progress)
    modules, experts = {}, {}
    for name, module in plan.skeleton.named_modules():
        kind, in_features, out_features = kind_and_shape(module)
        if kind != "other":
            modules[name] = (out_features, in_features)
        elif isinstance(module, nn.Embedding):  # with a forward of its own, as OPT's positions: PEFT takes it
            modules[name] = (module.embedding_dim, module.num_embeddings)
    for name, _ in plan.skeleton.named_parameters():
        if (shape := expert_shape(plan.skeleton, name)) is not None:
            modules[name], experts[name] = (shape[2], shape[1]), shape[0]
    return BaseFacts(
        id=plan.reference.id,
        model_class=type(plan.skeleton).__name__,
        layers=int(plan.config.get_text_config().num_hidden_layers),
        tied=bool(plan.config.tie_word_embeddings),
        modules=modules,
        experts=experts,
        names=BaseNames(plan.skeleton),
    )
