"""Adapters on what is no single matrix: the experts of a mixture, and convolutions.

LoRA on the experts of a mixture, as PEFT keeps it: one update for each expert of a parameter W (E, ., .).

    base_model.model.<module>.lora_A.weight               (E r, in)     all experts, see algebra/packing.py
    base_model.model.<module>.lora_B.weight               (out, r E)
    base_model.model.<module>.base_layer.lora_A.weight    of another parameter of the same module, one for each level

That is the order of PEFT 0.20 and later. PEFT 0.17 to 0.19 has lora_A and lora_B of a parameter (E, out, in) the other
way round, PEFT 0.19 those of a parameter (E, in, out) too: then lora_A is (E r, out) and lora_B (in, r E), dW_e = s
A_e^T B_e^T. unsloth before September 2026 kept lora_B expert after expert as well, (out, E r); its later versions say
which in the config's `lora_B_layout`.

No tensor tells its parameter: the config's target_parameters do, and PEFT wraps those of one module in the order in
which the module has them, so that the first lies innermost. An expert's update is read as that of a module of its own,
`model.layers.0.mlp.experts.down_proj[3]`.

LoRA on convolutions, as PEFT keeps it: kernels for factors, one pair of them for all groups.

    base_model.model.<module>.lora_A.weight    (r, in, kh, kw)    one size for nn.Conv1d, three for nn.Conv3d
    base_model.model.<module>.lora_B.weight    (out, r / groups, 1, 1)

The update of a group is read as that of a module of its own, `encoder.conv[1]`, with flat factors: A (r / groups,
in kh kw) and B (out / groups, r / groups). That of a convolution of one group goes by its own name. How many groups
there are, the two shapes tell (algebra/packing.py).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
from loracli.algebra.packing import Convolution, split_experts
from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.tensor_file import TensorFile

# What unsloth writes into `lora_B_layout` (unsloth-zoo, pull request 1232); the first is PEFT's.
RANK_MAJOR, GROUPED_BY_EXPERT = "rank_major", "grouped_by_expert"
LORA_B_LAYOUTS = (RANK_MAJOR, GROUPED_BY_EXPERT)

# The order in which transformers' mixtures have the parameters of their experts.
ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
WRAPPED = ".base_layer"
MAX_EXPERTS = 1 << 14  # of a parameter


def targeted_parameters(modules: Mapping[str, bool], target_parameters: Iterable[str], where: str) -> dict[str, str]:
    """The parameter, by its path in the base, that each module of tensor names stands for.

    A target that is the name of a parameter alone is one of any module that has it, and that does not stand in the
    file: of modules whose factors are not those of a layer.

    Args:
        modules: of tensor names, `mlp.experts` and `mlp.experts.base_layer`, and whether their rank is a layer's.
        target_parameters: of the config.
        where: the file, for errors.
    Raises:
        UnsupportedAdapter: if it cannot be told which of a module's parameters lies innermost.
        MalformedAdapter: if there are more levels than parameters, or fewer.
    """
    by_container: dict[str, set[str]] = {}
    for target in target_parameters:
        container, _, parameter = target.rpartition(".")
        by_container.setdefault(container, set()).add(parameter)
    anywhere = by_container.pop("", set())
    levels: dict[str, list[str]] = {}
    for module in modules:
        levels.setdefault(plain_module(module), []).append(module)
    found: dict[str, str] = {}
    for module, names in levels.items():
        alone = set() if any(modules[name] for name in names) else anywhere
        parameters = _of_module(module, by_container, alone)
        if not parameters:
            continue
        if len(names) != len(parameters):
            raise MalformedAdapter(
                f"has {len(names)} pairs of factors for {len(parameters)} target_parameters of {module!r}: "
                f"{', '.join(parameters)}",
                where=where,
            )
        inner_first = sorted(names, key=len, reverse=True)
        found |= {name: f"{module}.{parameter}" for name, parameter in zip(inner_first, parameters, strict=True)}
    return found


def plain_module(module: str) -> str:
    """The module without the levels of PEFT's wrapping."""
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    return module


def order_of(parameter: str) -> int:
    """The place of a parameter among those of its module."""
    return ORDER.index(parameter) if parameter in ORDER else len(ORDER)


def _of_module(module: str, by_container: Mapping[str, set[str]], alone: set[str]) -> list[str]:
    """The parameters of a module that are targeted, as PEFT looks them up: by the path or an end of it; the innermost
    first."""
    words = module.split(".")
    ends = [".".join(words[start:]) for start in range(len(words))]
    return _in_order(alone.union(*(by_container.get(end, set()) for end in ends)))


def _in_order(parameters: Collection[str]) -> list[str]:
    unknown = min(set(parameters) - set(ORDER), default=None)
    if unknown is not None and len(parameters) > 1:
        raise UnsupportedAdapter(
            f"target_parameters has {' and '.join(sorted(parameters))} of one module, and which tensors belong to "
            f"{unknown} cannot be told from their names",
            hint=f"train an adapter for each of them; known are {', '.join(ORDER)}",
        )
    return sorted(parameters, key=order_of)


def module_of_parameter(parameter: str, targeted: Collection[str]) -> str:
    """The inverse of `targeted_parameters`: the module that tensor names have for one of the targeted parameters.

    Raises:
        UnsupportedAdapter: if it cannot be told which of a module's parameters lies innermost.
    """
    module = parameter.rpartition(".")[0]
    parameters = _in_order([name.rpartition(".")[2] for name in targeted if name.rpartition(".")[0] == module])
    outside = len(parameters) - 1 - parameters.index(parameter.rpartition(".")[2])
    return module + outside * WRAPPED


def turned_by_version(peft_version: tuple[int, ...] | None, *, transposed: bool) -> bool:
    """Whether the PEFT of this version keeps lora_A and lora_B of experts the other way round; False where it is not
    known.

    Args:
        peft_version: major and minor.
        transposed: whether the parameter is (E, in, out).
    """
    if peft_version is None or peft_version >= (0, 20):
        return False
    return peft_version >= (0, 19) or not transposed


class ExpertTensors:
    """The two matrices of a parameter in a checked file.

    Reading raises IntegrityError if the file has changed since it was checked. What a thread read last of a file is
    kept for the next expert, so that going through the experts reads them once, however many adapters take turns. That
    is one parameter of each file, for as long as the thread lives, and it is not held against the file again.

    Args:
        file: that holds them.
        name_A: of the matrix (E r, in).
        name_B: of the matrix (out, r E).
        rank: r, by the config.
        layout: of lora_B, one of `LORA_B_LAYOUTS`.
    Raises:
        MalformedAdapter, UnsupportedAdapter: if their shapes are not those of several experts of this rank.
    """

    _kept = threading.local()

    def __init__(self, file: TensorFile, name_A: str, name_B: str, rank: int, layout: str = RANK_MAJOR) -> None:
        self.file, self.rank, self._layout = file, rank, layout
        self._name_A, self._name_B = name_A, name_B
        rows, columns = file.shapes[name_A][0], file.shapes[name_B][1]
        if rows != columns or rows % rank:
            raise MalformedAdapter(
                f"{name_A!r} has {rows} rows and {name_B!r} {columns} columns; both have to be the number of experts "
                f"times the rank {rank}",
                where=str(file.path),
            )
        self.experts = rows // rank
        if self.experts > MAX_EXPERTS:
            raise MalformedAdapter(
                f"{name_A!r} has {rows} rows, those of {self.experts} experts of rank {rank}; at most {MAX_EXPERTS} "
                "are read",
                where=str(file.path),
            )
        if self.experts == 1:
            raise UnsupportedAdapter(
                f"{name_A!r} is of one of the target_parameters, a matrix that is not a module's weight",
                where=str(file.path),
                hint="train the adapter with the weight of a module or with experts in target_parameters",
            )

    @property
    def in_features(self) -> int:
        return self.file.shapes[self._name_A][1]

    @property
    def out_features(self) -> int:
        return self.file.shapes[self._name_B][0]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The wider dtype of the two."""
        return torch.promote_types(self.file.dtypes[self._name_A], self.file.dtypes[self._name_B])

    def read(self) -> tuple[Tensor, Tensor]:
        """A_e (E, r, in) and B_e (E, out, r)."""
        last: dict[Path, tuple[ExpertTensors, tuple[Tensor, Tensor]]] = vars(self._kept).setdefault("last", {})
        owner, factors = last.get(self.file.path, (None, None))
        if owner is not self or factors is None:
            with self.file.reader() as reader:
                lora_A, lora_B = (reader.read(name).to(self.dtype) for name in (self._name_A, self._name_B))
            factors = split_experts(lora_A, lora_B, self.experts, by_expert=self._layout == GROUPED_BY_EXPERT)
            last[self.file.path] = self, factors
        return factors


class StoredExpert(Factors):
    """The factors of one expert, read when they are wanted.

    Args:
        tensors: of all experts.
        expert: e.
        scaling: s.
    """

    tensors: ExpertTensors
    expert: int

    def __init__(self, tensors: ExpertTensors, expert: int, scaling: float) -> None:
        # Factors are frozen
        vars(self).update(tensors=tensors, expert=expert, scaling=scaling, bias=None)

    @property
    def lora_A(self) -> Tensor:
        return self.tensors.read()[0][self.expert]

    @property
    def lora_B(self) -> Tensor:
        return self.tensors.read()[1][self.expert]

    @property
    def rank(self) -> int:
        return self.tensors.rank

    @property
    def in_features(self) -> int:
        return self.tensors.in_features

    @property
    def out_features(self) -> int:
        return self.tensors.out_features

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors.dtype

    def loaded(self) -> Factors:
        """The same factors in memory."""
        return Factors(self.lora_A, self.lora_B, self.scaling)


class TurnedExpert(Factors):
    """The update of one expert of a parameter whose lora_A and lora_B an older PEFT kept the other way round:
    (B A)^T = A^T B^T.

    Args:
        stored: the factors as the file has them.
    """

    stored: Factors

    def __init__(self, stored: Factors) -> None:
        # Factors are frozen
        vars(self).update(stored=stored, scaling=stored.scaling, bias=None)

    @property
    def lora_A(self) -> Tensor:
        return self.stored.lora_B.T

    @property
    def lora_B(self) -> Tensor:
        return self.stored.lora_A.T

    @property
    def rank(self) -> int:
        return self.stored.rank

    @property
    def in_features(self) -> int:
        return self.stored.out_features

    @property
    def out_features(self) -> int:
        return self.stored.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def loaded(self) -> Factors:
        """The same factors in memory."""
        return Factors(self.lora_A.contiguous(), self.lora_B.contiguous(), self.scaling)


Shape = tuple[int, ...]
DIMENSIONS = (3, 4, 5)  # of the kernels of nn.Conv1d, nn.Conv2d and nn.Conv3d


def convolution_of(module: str, lora_A: Shape, lora_B: Shape, where: str) -> Convolution:
    """The convolution that factors of these shapes belong to.

    Args:
        module: whose they are.
        lora_A, lora_B: shapes in the file, one of them at least no matrix's.
        where: the file, for errors.
    Raises:
        MalformedAdapter: if PEFT has no convolution with such factors.
    """
    fits = len(lora_A) == len(lora_B) and len(lora_A) in DIMENSIONS and set(lora_B[2:]) == {1}
    if not fits or lora_A[0] % lora_B[1]:
        raise MalformedAdapter(
            f"{module!r} has lora_A {lora_A} and lora_B {lora_B}, which are neither matrices nor the kernels of a "
            "convolution",
            where=where,
            hint="expected (r, in, kh, kw) and (out, r / groups, 1, 1)",
        )
    groups = lora_A[0] // lora_B[1]
    if lora_A[1] % groups or lora_B[0] % groups:
        raise MalformedAdapter(
            f"{module!r} has {groups} groups, by the ranks of lora_A {lora_A} and lora_B {lora_B}, and they do not "
            "divide its channels",
            where=where,
        )
    return Convolution(groups, lora_A[2:])
