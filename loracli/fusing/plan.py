"""What a fused checkpoint will hold, tensor by tensor, decided before any weight is read.

Every tensor of the base stays where it is, in its file and its order. One that belongs to an adapted module gets its
update; of a parameter with experts that may be all of it, or a layer for each expert. Where an adapted matrix is tied
to another (an embedding that is the head too), PEFT and the attached model change the one and leave the other: so both
are written, the config says that they are not tied, and the tensor that the base did not keep apart is added behind the
one that it was tied to. The same holds where an adapter saved one of them whole, which replaces the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loracli.adapters.kinds import BaseModule, kind_of
from loracli.adapters.names import numbered_name
from loracli.errors import BaseModelMismatch
from loracli.fusing.quantised import BITSANDBYTES, Quantisation, Quantised, find_quantised
from loracli.model.checkpoint import Checkpoint, LoadedNames, StoredTensor, loaded_names, tied_parameters
from loracli.system.tensor_file import FLOAT_NAMES, FLOATS, header_bytes


@dataclass(frozen=True)
class FusedTensor:
    """A tensor of the result.

    Args:
        name: in the file.
        source: of the base.
        module: whose update is added, None for none: a module, a parameter with experts, or one expert's matrix in it.
        transposed: whether the matrix lies the other way round, as that of a Conv1D or an embedding does.
        rows: of the module's own matrix that this tensor has, from and to; None for all.
        dtype: as safetensors spells it.
        added: whether the base has no tensor of this name.
        quantised: what its numbers are computed with, None where they are stored.
        replaced: the parameter whose saved values it takes instead of the base's, None for none.
    """

    name: str
    source: StoredTensor
    module: str | None
    transposed: bool
    dtype: str
    added: bool = False
    rows: tuple[int, int] | None = None
    quantised: Quantised | None = None
    replaced: str | None = None

    @property
    def changes(self) -> str | None:
        """What of the model it changes."""
        return self.module if self.rows is None else f"{self.module}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its numbers."""
        return self.source.shape if self.quantised is None else self.quantised.shape

    @property
    def changed(self) -> bool:
        """Whether its bytes may differ from those of its source."""
        return self.module is not None or self.replaced is not None or self.dtype != self.source.dtype

    @property
    def size(self) -> int:
        if self.dtype == self.source.dtype:
            return self.source.size
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


@dataclass(frozen=True)
class FusedShard:
    """A file of the result: the same name as the base's, its tensors in order, its first bytes; and the tensors of the
    base's file that it leaves out."""

    name: str
    tensors: tuple[FusedTensor, ...]
    header: bytes
    left_out: tuple[StoredTensor, ...] = ()

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class FusionPlan:
    """All files of weights of the result.

    Args:
        shards: in the order of their names.
        untied: whether the config has to say that matrices are not tied.
    """

    shards: tuple[FusedShard, ...]
    untied: bool

    @property
    def added(self) -> tuple[FusedTensor, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard.tensors if tensor.added)

    @property
    def replaced(self) -> dict[str, str]:
        """Parameters that adapters saved whole, and the tensors that hold them."""
        every = (tensor for shard in self.shards for tensor in shard.tensors)
        return {tensor.replaced: tensor.name for tensor in every if tensor.replaced is not None}


def plan_fusion(
    checkpoint: Checkpoint,
    skeleton: Any,
    modules: Iterable[BaseModule],
    dtype: torch.dtype | None,
    quantisation: Quantisation | None = None,
    replaced: Iterable[str] = (),
) -> FusionPlan:
    """Places the updates of these modules, and the parameters that replace the base's.

    Args:
        checkpoint: of the base.
        skeleton: its model without numbers.
        modules: that are changed, as the base has them.
        dtype: of the result's floating point tensors; None leaves each its own.
        quantisation: of a base whose weights are to be computed; `dtype` is given then.
        replaced: paths of parameters that adapters saved whole.
    Raises:
        BaseModelMismatch: if the weight of a module, or such a parameter, is not one tensor of the checkpoint, by name.
    """
    quantised, unused = find_quantised(checkpoint, quantisation)
    if quantisation is not None and quantisation.method == BITSANDBYTES:
        _refuse_transposed(skeleton)
    names, tied = loaded_names(skeleton, checkpoint.tensors.keys() - unused), tied_parameters(skeleton)
    placed: dict[str, _Own] = {}  # by name of the stored tensor
    added: dict[str, tuple[str, _Own]] = {}  # by new name: stored tensor, whose it is
    changes = {parameter: _Own(None, replaced=parameter) for parameter in replaced}
    for module in modules:
        if kind_of(module).of_experts:
            placed |= _placed_experts(checkpoint, names, skeleton, module, quantised)
        else:
            changes[f"{module.name}.weight"] = _Own(module.name, kind_of(module).transposed)
    untied = any(len(tied.get(parameter, ())) > 1 for parameter in changes)
    for parameter, own in changes.items():
        group = tied.get(parameter, (parameter,))
        for member in group:
            mine = own if member == parameter else _NOBODY
            if member in names.stored:
                stored = _the_one(names.stored[member], member)
                _check(checkpoint.tensors[stored], skeleton, member, quantised, replaced=own.replaced is not None)
                if mine is not _NOBODY:
                    placed[stored] = mine
            elif mine is not _NOBODY or member not in added:
                added[member] = (_tied_source(checkpoint, names, skeleton, group, member, quantised), mine)
    shards = []
    for name, shard in checkpoint.shards.items():
        tensors = [
            _kept(tensor, placed.get(tensor.name, _NOBODY), dtype, quantised.get(tensor.name))
            for tensor in shard.tensors
            if tensor.name not in unused
        ]
        for new, (stored, whose) in sorted(added.items()):
            source = checkpoint.tensors[stored]
            if source.shard == name:
                tensor = _kept(source, whose, dtype, quantised.get(stored))
                tensors.append(replace(tensor, name=new, added=True))
        header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
        left_out = tuple(tensor for tensor in shard.tensors if tensor.name in unused)
        shards.append(FusedShard(name, tuple(tensors), header, left_out))
    return FusionPlan(tuple(shards), untied)


@dataclass(frozen=True)
class _Own:
    """Whose update a stored tensor gets: the fields of `FusedTensor` that say so."""

    module: str | None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    replaced: str | None = None


_NOBODY = _Own(None)


def _refuse_transposed(skeleton: Any) -> None:
    """bitsandbytes keeps the weights of a Conv1D the other way round."""
    name = next((name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"), None)
    if name is not None:
        raise BaseModelMismatch(
            f"the base model's {name} is a Conv1D, which bitsandbytes stores the other way round",
            hint="give the unquantised model with --base",
        )


def _placed_experts(
    checkpoint: Checkpoint,
    names: LoadedNames,
    skeleton: Any,
    module: BaseModule,
    quantised: Mapping[str, Quantised],
) -> dict[str, _Own]:
    """Where the updates of a parameter's experts go: into one tensor, or into those of each expert's layers."""
    parameter, experts = module.name, skeleton.get_parameter(module.name).shape[0]
    turned = getattr(skeleton.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False)
    if parameter in names.stored:
        stored = _the_one(names.stored[parameter], parameter)
        _check(checkpoint.tensors[stored], skeleton, parameter, quantised)
        return {stored: _Own(parameter, transposed=turned)}
    found, places = {}, set()
    for name, loaded in names.computed.get(parameter, {}).items():
        tensor = checkpoint.tensors[name]
        shape = _shape_of(tensor, quantised)
        if loaded.expert is None or loaded.parts_of_experts is None or turned:
            raise _of_others(parameter)
        place, parts = loaded.parts_of_experts
        if shape != (module.out_features // parts, module.in_features):
            raise _of_others(parameter)
        _check_float(tensor, quantised)
        places.add((loaded.expert, place, parts))
        rows = (place * shape[0], (place + 1) * shape[0])
        found[name] = _Own(numbered_name(parameter, loaded.expert), rows=None if parts == 1 else rows)
    parts = max((parts for _, _, parts in places), default=1)
    if len(found) != len(places) or len(places) != experts * parts:
        raise BaseModelMismatch(
            f"the base model's weights have {len(found)} of {experts * parts} tensors of {parameter}",
            hint="the download is incomplete, or the checkpoint names its tensors in a way that is not known",
        )
    return found


def _of_others(parameter: str) -> BaseModelMismatch:
    return BaseModelMismatch(
        f"the base model's {parameter} is not stored as one tensor: it is made of others when the model loads",
        hint="load the base once with transformers and save it with save_pretrained(..., save_original_format=False), "
        "then name that copy with --base",
    )


def _kept(source: StoredTensor, own: _Own, dtype: torch.dtype | None, quantised: Quantised | None) -> FusedTensor:
    named = (source.name, source, own.module, own.transposed, _dtype_of(source, dtype, quantised))
    return FusedTensor(*named, rows=own.rows, quantised=quantised, replaced=own.replaced)


def _dtype_of(source: StoredTensor, dtype: torch.dtype | None, quantised: Quantised | None) -> str:
    numbers = quantised is not None or source.dtype in FLOATS
    return source.dtype if dtype is None or not numbers else FLOAT_NAMES[dtype]


def _the_one(stored: tuple[str, ...], parameter: str) -> str:
    if len(stored) > 1:
        raise BaseModelMismatch(f"the base model stores {parameter} twice, as {' and '.join(stored)}")
    return stored[0]


def _tied_source(
    checkpoint: Checkpoint,
    names: LoadedNames,
    skeleton: Any,
    group: tuple[str, ...],
    parameter: str,
    quantised: Mapping[str, Quantised],
) -> str:
    """The stored tensor that a parameter which is not stored itself is tied to."""
    if parameter in names.computed:
        raise _of_others(parameter)
    sources = [name for member in group for name in names.stored.get(member, ())]
    if len(sources) != 1:
        raise BaseModelMismatch(
            f"the base model's weights lack {parameter}",
            hint="the download is incomplete, or the checkpoint names its tensors in a way that is not known",
        )
    if loaded_names(skeleton, [parameter]).stored.get(parameter) != (parameter,):
        raise BaseModelMismatch(f"{parameter} is tied, and a tensor of its own would not load under its name")
    _check(checkpoint.tensors[sources[0]], skeleton, parameter, quantised)
    return sources[0]


def _check(
    tensor: StoredTensor,
    skeleton: Any,
    parameter: str,
    quantised: Mapping[str, Quantised],
    *,
    replaced: bool = False,
) -> None:
    """Refuses a weight that is no matrix, or matrices of experts, of floating point numbers in the model's shape; one
    that is replaced may have any, but is not quantised."""
    wanted = tuple(skeleton.get_parameter(parameter).shape)
    shape = _shape_of(tensor, quantised)
    if replaced and tensor.name in quantised:
        raise BaseModelMismatch(
            f"an adapter replaces {parameter} whole, and the base model has it quantised",
            hint="give the unquantised model with --base",
        )
    if shape != wanted or (len(wanted) not in (2, 3) and not replaced):
        raise BaseModelMismatch(
            f"{tensor.name} of the base model's weights has the shape {shape}; its config says {wanted}"
        )
    _check_float(tensor, quantised)


def _shape_of(tensor: StoredTensor, quantised: Mapping[str, Quantised]) -> tuple[int, ...]:
    return quantised[tensor.name].shape if tensor.name in quantised else tensor.shape


def _check_float(tensor: StoredTensor, quantised: Mapping[str, Quantised]) -> None:
    if tensor.dtype not in FLOATS and tensor.name not in quantised:
        raise BaseModelMismatch(
            f"{tensor.name} of the base model's weights is stored as {tensor.dtype}: the base is quantised",
            hint="give the unquantised model with --base",
        )
