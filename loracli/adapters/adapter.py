"""A LoRA adapter as a value: what its directory holds, checked, ready for algebra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loracli.adapters.config import AdapterConfig, read_config
from loracli.adapters.kinds import KINDS, ModuleKind
from loracli.adapters.mlx import is_mlx, read_mlx
from loracli.adapters.names import (
    BasePlace,
    Part,
    format_tensor_name,
    parse_tensor_name,
    refuse_name,
    target_of,
    targeted_parameters,
    whole_parameter,
)
from loracli.adapters.stored import RANK_MAJOR, ExpertTensors, StoredExpert, StoredFactors, convolution_of
from loracli.adapters.targets import Shapes, tied_modules
from loracli.algebra.factors import Factors
from loracli.algebra.packing import Convolution
from loracli.errors import IntegrityError, MalformedAdapter, UnsupportedAdapter
from loracli.hub.fetch import Fetched, fetch_adapter
from loracli.hub.references import Named, Reference
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.system.display import count_text, names_text, repr_line
from loracli.system.document import dtype_name
from loracli.system.files import CONFIG_FILE, TENSOR_FILE, file_sha256
from loracli.system.tensor_file import GATHER, TensorFile, open_tensor_file

_MAX_UPDATES = 1 << 19  # of experts and groups, of which a small file can claim many more than it has tensors
_MAY_BE_NO_MATRIX = frozenset({"lora_A", "lora_B", "lora_magnitude_vector"})

IDLE = (
    "changes nothing: in every module lora_A or lora_B is zero. It was saved before its training, or another file was "
    "taken for the one of the training"
)
_IDLE_BUT_SAVED = "only its modules_to_save change anything: in every module lora_A or lora_B is zero"

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class LoraModule:
    """The update of one module of the base model, of one expert's matrix in a parameter, or of one group of a
    convolution.

    Args:
        name: the module's path in the base model, `model.layers.0.self_attn.q_proj`, or the matrix's or group's name,
            `model.layers.0.mlp.experts.down_proj[3]`.
        kind: `linear` (nn.Linear and Conv1D), `embedding` (then "in" is the vocabulary and "out" the width),
            `parameter` (the weight of a module of another class, as a mixture's router is, dW = s B A), `experts`, of
            which an adapter changes all of a parameter or none, or `convolution` (then "in" is channels times kernel,
            and "out" the channels of a group).
        factors: lora_A (r, in), lora_B (out, r) as stored, and the scaling; from `open_adapter` they are read from the
            file each time they are wanted.
        kernel: size of a convolution's, (kh, kw); empty for others.
    """

    name: str
    kind: ModuleKind
    factors: Factors
    kernel: tuple[int, ...] = ()


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
        modules: by name, in sorted order; experts in their own.
        base_copies: names of base matrices that PEFT stored beside embeddings; must equal the base's, never exported.
        dtype: the widest dtype among the factors and the modules that were saved whole.
        sha256: of each file that was read, by file name.
        file: that the tensors are in, None of an adapter that was made in memory.
        saved: modules that replace the base's (modules_to_save): by module, then by the parameter's path in the base.
        warnings: what whoever uses it should know, in a sentence each.
        places: where the base has what the files call otherwise, by the files' names; once the base is known.
    """

    source: Reference
    path: Path
    commit: str | None
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    base_copies: Mapping[str, str]
    dtype: torch.dtype
    sha256: Mapping[str, str]
    file: TensorFile | None = field(default=None, repr=False)
    saved: Mapping[str, Mapping[str, SavedTensor]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    places: Mapping[str, BasePlace] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The reference as it was typed."""
        return self.source.text

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({module.factors.rank for module in self.modules.values()}))

    def __repr__(self) -> str:
        ranks = self.ranks
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
        return repr_line(
            self, names_text([self.source.label]), rank, count_text(len(self.targets), "module"), dtype_name(self.dtype)
        )

    @cached_property
    def targets(self) -> dict[str, tuple[LoraModule, ...]]:
        """What was adapted, each with its updates: a module with its one, a parameter with one for each expert."""
        found: dict[str, list[LoraModule]] = {}
        for name, module in self.modules.items():
            found.setdefault(target_of(name), []).append(module)
        return {name: tuple(modules) for name, modules in found.items()}

    def loaded(self) -> LoraAdapter:
        """The same adapter with all factors in memory."""
        modules = {name: replace(module, factors=module.factors.loaded()) for name, module in self.modules.items()}
        return replace(self, modules=modules)

    def read_base_copy(self, module: str) -> Tensor:
        """The stored copy of the base's matrix of `module`."""
        return self._read(self.base_copies[module])

    def read_saved(self, tensor: SavedTensor) -> Tensor:
        """A parameter of a module that was saved whole.

        Raises:
            IntegrityError: if the file has changed since it was checked.
        """
        return self._read(tensor.name)

    def _read(self, name: str) -> Tensor:
        assert self.file is not None
        with self.file.reader() as reader:
            return reader.read(name)


@takes_bar
def read_adapter(source: Named | Fetched, *, progress: Progress | Bar = SILENT) -> LoraAdapter:
    """Reads an adapter's directory into memory; a reference is fetched first, and `progress` is told its warnings.

    Raises:
        MalformedAdapter: if a file is damaged, or tensors and config contradict each other.
        UnsupportedAdapter: if the adapter uses a feature that cannot be honoured exactly.
    """
    progress = drawn(progress)
    return open_adapter(source, progress=progress).loaded()


def open_adapter(source: Named | Fetched, *, progress: Progress = SILENT) -> LoraAdapter:
    """As `read_adapter`, with all of its checks, but the factors stay in the file: for work that goes through the
    modules once. Factors that are read after the file has changed raise IntegrityError.

    Raises:
        MalformedAdapter, UnsupportedAdapter: as `read_adapter`.
        IntegrityError: if the config changes while it is read.
    """
    fetched = source if isinstance(source, Fetched) else fetch_adapter(source)
    before = file_sha256(fetched.path / CONFIG_FILE)
    adapter = _open(fetched)
    if adapter.sha256[CONFIG_FILE] != before:  # its hash would be recorded for what it never said
        raise IntegrityError(f"{CONFIG_FILE} changed while it was read", where=str(fetched.path))
    for warning in adapter.warnings:
        progress.warn(warning)
    return adapter


def _open(fetched: Fetched) -> LoraAdapter:
    if is_mlx(fetched.path):
        config, factors, file = read_mlx(fetched.path)
        modules = {name: LoraModule(name, "linear", update) for name, update in factors.items()}
        idle = not any(bool(f.lora_A.any() and f.lora_B.any()) for f in factors.values())
        return _adapter(fetched, config, modules, file, idle=idle, copies={}, saved={})
    config = read_config(fetched.path / CONFIG_FILE)
    path = fetched.path / TENSOR_FILE

    def sort(names: Iterable[str]) -> _Sorted:
        return sort_tensors(names, str(path), config)

    file = open_tensor_file(path, check_names=sort, any_shape=may_have_any_shape)
    return build_adapter(fetched, config, file, file.shapes)


def build_adapter(fetched: Fetched, config: AdapterConfig, file: TensorFile, names: Iterable[str]) -> LoraAdapter:
    """The adapter of the tensors of these names, of a file that has been opened.

    Raises:
        MalformedAdapter, UnsupportedAdapter: as `read_adapter`.
    """
    parts, copies, whole = sort_tensors(names, str(file.path), config)
    _check_matrices(parts, file)
    saved = {
        module: {
            path: SavedTensor(name, file.shapes[name], file.dtypes[name]) for path, name in sorted(tensors.items())
        }
        for module, tensors in sorted(whole.items())
    }
    as_layer = {
        name: "lora_A" not in tensors or file.shapes[tensors["lora_A"]][0] == config.rank_of(name)
        for name, tensors in parts.items()
    }
    parameters = targeted_parameters(as_layer, config.target_parameters, str(file.path))
    tied = _tied(parts, file) if config.ensure_weight_tying else {}
    config = _doubting(config, sorted(parts.keys() - parameters.keys() - tied.keys()))
    modules: dict[str, LoraModule] = {}
    for name in sorted(parts, key=lambda name: parameters.get(name, name)):
        if name in parameters and _is_matrix(parameters[name], parts[name], config, file):
            modules |= _read_module(name, parts[name], config, file, parameter=parameters[name])
        elif name in parameters:
            modules |= _read_experts(parameters[name], name, parts[name], config, file)
        else:
            modules |= _read_module(name, parts[name], config, file, tied_to=tied.get(name))
        if len(modules) > _MAX_UPDATES:
            raise MalformedAdapter(
                f"has more than {_MAX_UPDATES} experts and groups, which no model has", where=str(file.path)
            )
    return _adapter(fetched, config, modules, file, idle=_are_idle(parts, file), copies=copies, saved=saved)


def _tied(parts: Mapping[str, Mapping[Part, str]], file: TensorFile) -> dict[str, str]:
    """The modules that may be tied to embeddings, which their factors are the transposed ones of; each with its own."""

    def shapes(a: Part, b: Part) -> dict[str, Shapes]:
        return {
            name: (file.shapes[tensors[a]], file.shapes[tensors[b]])
            for name, tensors in parts.items()
            if a in tensors and b in tensors
        }

    return tied_modules(shapes("lora_embedding_A", "lora_embedding_B"), shapes("lora_A", "lora_B"))


def _doubting(config: AdapterConfig, modules: Sequence[str]) -> AdapterConfig:
    """The config with a doubt where PEFT leaves some of the modules alone."""
    left_out = [(obstacle, name) for name in modules if (obstacle := config.targets.obstacle(name)) is not None]
    if not left_out:
        return config
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    doubt = f"{' '.join(left_out[0])}{more}, so PEFT leaves out what is composed here"
    return replace(config, doubts=(*config.doubts, doubt))


def _are_idle(parts: Mapping[str, Mapping[Part, str]], file: TensorFile) -> bool:
    """Whether the update of every module is zero, because one of its factors is, and its bias too."""

    def idle(tensors: Mapping[Part, str]) -> bool:
        factors = (name in file.zeros for part, name in tensors.items() if part != "lora_bias")
        return any(factors) and ("lora_bias" not in tensors or tensors["lora_bias"] in file.zeros)

    return all(map(idle, parts.values()))


def _adapter(
    fetched: Fetched,
    config: AdapterConfig,
    modules: Mapping[str, LoraModule],
    file: TensorFile,
    *,
    idle: bool,
    copies: Mapping[str, str],
    saved: Mapping[str, Mapping[str, SavedTensor]],
) -> LoraAdapter:
    """The adapter of what a file holds: updates, `idle` if all are zero, names of base matrices by module, and modules
    that were saved whole."""
    dtypes = [module.factors.dtype for module in modules.values()]
    dtypes += [tensor.dtype for tensors in saved.values() for tensor in tensors.values()]
    return LoraAdapter(
        source=fetched.reference,
        path=fetched.path,
        commit=fetched.commit,
        config=config,
        modules=modules,
        base_copies=copies,
        dtype=widest_dtype(dtypes),
        sha256={
            CONFIG_FILE: file_sha256(fetched.path / CONFIG_FILE),
            file.path.name: file.sha256,
        },
        file=file,
        saved=saved,
        warnings=tuple(
            f"{fetched.reference.text}: {warning}"
            for warning in (*config.doubts, *([_IDLE_BUT_SAVED if saved else IDLE] if idle else []))
        ),
    )


def kernels_of(adapters: Sequence[LoraAdapter]) -> dict[str, tuple[int, ...]]:
    """The convolutions that any of the adapters changes, with the sizes of their kernels."""
    return {target_of(name): m.kernel for adapter in adapters for name, m in adapter.modules.items() if m.kernel}


def module_names(adapters: Sequence[LoraAdapter]) -> tuple[str, ...]:
    """The modules that any of the adapters changes, sorted; experts and groups in their own order."""
    return tuple(sorted(dict.fromkeys(name for adapter in adapters for name in adapter.modules), key=target_of))


def widest_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of them without loss: float16 with bfloat16 gives float32."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


_Sorted = tuple[dict[str, dict[Part, str]], dict[str, str], dict[str, dict[str, str]]]


def sort_tensors(names: Iterable[str], where: str, config: AdapterConfig) -> _Sorted:
    """Tensor names by module and part; of base matrices by module; of modules saved whole by module and parameter."""
    parts: dict[str, dict[Part, str]] = {}
    copies: dict[str, str] = {}
    saved: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for name in sorted(names):
        parameter = whole_parameter(name)
        if parameter is not None:
            take_name(others, parameter, name, where)
            continue
        parsed = parse_tensor_name(name, where=where)
        if parsed.part == "lora_magnitude_vector":
            refuse_name(name, where=where)
        elif parsed.part == "base_layer":
            take_name(copies, parsed.module, name, where)
        else:
            take_name(parts.setdefault(parsed.module, {}), parsed.part, name, where)
    owners = {parameter: _saved_module(parameter, config.modules_to_save) for parameter in others}
    if config.ensure_weight_tying and any(owners.values()):  # before a tied tensor, which the config need not name
        raise UnsupportedAdapter(
            "modules_to_save with ensure_weight_tying is not supported",
            where=str(Path(where).with_name(CONFIG_FILE)),
            hint="name embeddings and head in modules_to_save, and save without ensure_weight_tying",
        )
    for parameter, name in others.items():
        module = parameter.rpartition(".")[0]
        owner = owners[parameter]
        if owner is not None:
            saved.setdefault(owner, {})[parameter] = name
        elif parameter.endswith(".weight") and "lora_embedding_A" in parts.get(module, {}):
            take_name(copies, module, name, where)  # PEFT wrote the embedding's own matrix under the name of the module
        else:
            refuse_name(name, where=where)
    _check_sorted(parts, copies, where)
    return parts, copies, saved


def _check_sorted(parts: Mapping[str, object], copies: Mapping[str, str], where: str) -> None:
    if not parts:
        raise MalformedAdapter("holds no LoRA factors", where=where, hint=GATHER)
    stray = sorted(copies.keys() - parts.keys())
    if stray:
        raise MalformedAdapter(f"holds a base matrix of {stray[0]!r} but no factors for it", where=where)


def _saved_module(parameter: str, modules_to_save: tuple[str, ...]) -> str | None:
    """The outermost module around a parameter whose name ends in one that was saved whole, as PEFT looks it up."""
    ends = (place for place, character in enumerate(parameter) if character == ".")
    return next((parameter[:end] for end in ends if parameter.endswith(modules_to_save, 0, end)), None)


def may_have_any_shape(name: str) -> bool:
    """Copies of base matrices and the factors of embeddings are matrices; factors of a convolution, biases, magnitudes
    and modules saved whole need not be."""
    listed = not _MAY_BE_NO_MATRIX.isdisjoint(name.split("."))
    return listed or name.endswith(".bias") or whole_parameter(name) is not None


def take_name(names: dict[_Key, str], key: _Key, name: str, where: str) -> None:
    if key in names:
        raise MalformedAdapter(
            f"{names[key]!r} and {name!r} are two spellings of one tensor",
            where=where,
            hint="the file holds two adapters, or one twice: save the one that is meant alone",
        )
    names[key] = name


def _check_matrices(parts: Mapping[str, Mapping[Part, str]], file: TensorFile) -> None:
    for tensors in parts.values():
        for part, name in tensors.items():
            if part != "lora_bias" and len(file.shapes[name]) < 2:
                raise MalformedAdapter(f"the tensor {name!r} is not a matrix", where=str(file.path))


def _is_matrix(parameter: str, tensors: Mapping[Part, str], config: AdapterConfig, file: TensorFile) -> bool:
    """Whether one of the target_parameters is the one matrix of a module, rather than those of several experts."""
    plain = {"lora_A", "lora_B"} == tensors.keys() and all(len(file.shapes[name]) == 2 for name in tensors.values())
    return plain and parameter.endswith(".weight") and file.shapes[tensors["lora_A"]][0] == config.rank_of(parameter)


def _read_experts(
    parameter: str, module: str, tensors: dict[Part, str], config: AdapterConfig, file: TensorFile
) -> dict[str, LoraModule]:
    """The updates of the experts of a parameter, whose tensors go by the name of a module."""
    wanted = KINDS["experts"].parts
    for part in wanted:
        if part not in tensors:
            raise MalformedAdapter(f"lacks {format_tensor_name(module, part)!r}", where=str(file.path))
    if len(tensors) > len(wanted):
        raise MalformedAdapter(f"mixes factors of experts with others for {module!r}", where=str(file.path))
    kernel = next((tensors[part] for part in wanted if len(file.shapes[tensors[part]]) > 2), None)
    if kernel is not None:
        raise MalformedAdapter(f"{kernel!r} is of one of the target_parameters and not a matrix", where=str(file.path))
    stored = ExpertTensors(
        file, tensors["lora_A"], tensors["lora_B"], config.rank_of(parameter), config.lora_B_layout or RANK_MAJOR
    )
    scaling = config.scaling_of(parameter)
    return {
        name: LoraModule(name, "experts", StoredExpert(stored, expert, scaling))
        for expert, name in enumerate(KINDS["experts"].updates(parameter, stored.experts))
    }


def _read_module(
    name: str,
    tensors: dict[Part, str],
    config: AdapterConfig,
    file: TensorFile,
    *,
    parameter: str | None = None,
    tied_to: str | None = None,
) -> dict[str, LoraModule]:
    """The update of a module, or those of the groups of a convolution; with `parameter` that of its weight, which
    patterns go by. One that is tied has the rank of the embedding and a scaling of its own, as in PEFT."""
    where, patterned = str(file.path), parameter or name
    kind: ModuleKind = "linear" if tensors.keys().isdisjoint(KINDS["embedding"].parts) else "embedding"
    wanted = KINDS[kind].parts
    biased = KINDS[kind].biased and config.lora_bias
    expected = {*wanted, "lora_bias"} if biased else {*wanted}
    missing = [format_tensor_name(name, part) for part in (*wanted, "lora_bias") if part in expected - tensors.keys()]
    if missing:
        raise MalformedAdapter(f"lacks {missing[0]!r}", where=where)
    if "lora_bias" in tensors and not biased:
        problem = "lora_bias is off" if KINDS[kind].biased else f"an {kind} has no lora_bias"
        raise MalformedAdapter(f"holds {tensors['lora_bias']!r}, but in {CONFIG_FILE} {problem}", where=where)
    if tensors.keys() != expected:
        raise MalformedAdapter(f"mixes linear and embedding factors for {name!r}", where=where)
    shape_A, shape_B = (file.shapes[tensors[part]] for part in wanted)
    found = Convolution(1, ())
    if max(len(shape_A), len(shape_B)) > 2:
        kind, found = "convolution", convolution_of(name, shape_A, shape_B, where)
    elif shape_A[0] != shape_B[1]:
        raise MalformedAdapter(
            f"{name!r} has lora_A {shape_A} and lora_B {shape_B}, whose ranks differ",
            where=where,
        )
    rank = config.rank_of(tied_to or patterned)
    if shape_A[0] != rank:
        raise MalformedAdapter(
            f"{name!r} has rank {shape_A[0]} in the tensors and {rank} in {CONFIG_FILE}",
            where=where,
        )
    if biased and file.shapes[tensors["lora_bias"]] != shape_B[:1]:
        shape = file.shapes[tensors["lora_bias"]]
        raise MalformedAdapter(f"{name!r} has lora_B {shape_B} with a bias {shape}", where=where)
    kind = kind if parameter is None else "parameter"
    stored = file, tensors[wanted[0]], tensors[wanted[1]], config.scaling_of(patterned), tensors.get("lora_bias")
    return {
        one: LoraModule(one, kind, StoredFactors(*stored, group=group, groups=found.groups), found.kernel)
        for group, one in enumerate(KINDS[kind].updates(name, found.groups))
    }
