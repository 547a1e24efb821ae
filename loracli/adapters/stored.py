"""Factors that stay in their file until they are wanted, so that an export holds one module at a time.

LoRA on the experts of a mixture, as PEFT keeps it: one update for each expert of a parameter W (E, ., .).

    base_model.model.<module>.lora_A.weight    (E r, in)     all experts, see algebra/packing.py
    base_model.model.<module>.lora_B.weight    (out, r E)

That is the order of PEFT 0.20 and later. PEFT 0.17 to 0.19 has lora_A and lora_B of a parameter (E, out, in) the other
way round, PEFT 0.19 those of a parameter (E, in, out) too: then lora_A is (E r, out) and lora_B (in, r E), dW_e = s
A_e^T B_e^T. unsloth before September 2026 kept lora_B expert after expert as well, (out, E r); its later versions say
which in the config's `lora_B_layout`.

LoRA on convolutions, as PEFT keeps it: kernels for factors, one pair of them for all groups.

    base_model.model.<module>.lora_A.weight    (r, in, kh, kw)    one size for nn.Conv1d, three for nn.Conv3d
    base_model.model.<module>.lora_B.weight    (out, r / groups, 1, 1)

The update of a group is read as that of a module of its own, `encoder.conv[1]`, with flat factors: A (r / groups,
in kh kw) and B (out / groups, r / groups). That of a convolution of one group goes by its own name. How many groups
there are, the two shapes tell (algebra/packing.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor

from loracli.adapters.kinds import MAX_EXPERTS
from loracli.algebra.factors import Factors
from loracli.algebra.packing import Convolution, split_experts
from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.tensor_file import TensorFile


class StoredFactors(Factors):
    """The factors of a module in a checked file, or of one group of a convolution.

    `lora_A`, `lora_B` and `bias` are read from it every time, in the widest of their dtypes; rank and sizes come from
    the header. Reading raises IntegrityError if the file has changed since it was checked.

    Args:
        file: that holds them.
        name_A: of lora_A (r, in) in it; of a convolution's, all dimensions after the first are "in".
        name_B: of lora_B (out, r) in it.
        scaling: s.
        name_bias: of b (out,) in it, None without one.
        group: g, of which the rows are read (algebra/packing.py).
        groups: G, 1 of what is no grouped convolution.
    """

    file: TensorFile
    name_A: str
    name_B: str
    name_bias: str | None
    group: int
    groups: int

    def __init__(
        self,
        file: TensorFile,
        name_A: str,
        name_B: str,
        scaling: float,
        name_bias: str | None = None,
        *,
        group: int = 0,
        groups: int = 1,
    ) -> None:
        # Factors are frozen
        vars(self).update(
            file=file, name_A=name_A, name_B=name_B, scaling=scaling, name_bias=name_bias, group=group, groups=groups
        )

    @property
    def lora_A(self) -> Tensor:
        return self._read(self.name_A).flatten(1)

    @property
    def lora_B(self) -> Tensor:
        return self._read(self.name_B).flatten(1)

    @property
    def bias(self) -> Tensor | None:
        return None if self.name_bias is None else self._read(self.name_bias)

    @property
    def rank(self) -> int:
        return self.file.shapes[self.name_A][0] // self.groups

    @property
    def in_features(self) -> int:
        return math.prod(self.file.shapes[self.name_A][1:])

    @property
    def out_features(self) -> int:
        return self.file.shapes[self.name_B][0] // self.groups

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of what it is made of."""
        names = (self.name_A, self.name_B, self.name_bias)
        return reduce(torch.promote_types, (self.file.dtypes[name] for name in names if name is not None))

    def loaded(self) -> Factors:
        """The same factors in memory."""
        return Factors(self.lora_A, self.lora_B, self.scaling, self.bias)

    def _read(self, name: str) -> Tensor:
        count = self.file.shapes[name][0] // self.groups
        with self.file.reader() as reader:
            return reader.read(name, range(self.group * count, (self.group + 1) * count)).to(self.dtype)


# What unsloth writes into `lora_B_layout` (unsloth-zoo, pull request 1232); the first is PEFT's.
RANK_MAJOR, GROUPED_BY_EXPERT = "rank_major", "grouped_by_expert"
LORA_B_LAYOUTS = (RANK_MAJOR, GROUPED_BY_EXPERT)


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


class FusedExpert(Factors):
    """The update of one expert's matrix, made of those of its parts when it is wanted.

    Args:
        parts: one below the other; where their scalings differ, those go into lora_B, which is float64 then.
    """

    parts: Sequence[Factors]

    def __init__(self, parts: Sequence[Factors]) -> None:
        scalings = {part.scaling for part in parts}
        # Factors are frozen
        vars(self).update(parts=parts, scaling=scalings.pop() if len(scalings) == 1 else 1.0, bias=None)

    @property
    def lora_A(self) -> Tensor:
        return torch.cat([part.lora_A.to(self.dtype) for part in self.parts])

    @property
    def lora_B(self) -> Tensor:
        scaled = (
            part.lora_B.to(self.dtype) * (1.0 if part.scaling == self.scaling else part.scaling) for part in self.parts
        )
        return torch.block_diag(*scaled)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its parts."""
        own = torch.float64 if len({part.scaling for part in self.parts}) > 1 else self.parts[0].dtype
        return reduce(torch.promote_types, (part.dtype for part in self.parts), own)

    def loaded(self) -> Factors:
        """The same factors in memory."""
        return Factors(self.lora_A, self.lora_B, self.scaling)


_DIMENSIONS = (3, 4, 5)  # of the kernels of nn.Conv1d, nn.Conv2d and nn.Conv3d


def convolution_of(module: str, lora_A: tuple[int, ...], lora_B: tuple[int, ...], where: str) -> Convolution:
    """The convolution that factors of these shapes belong to.

    Args:
        module: whose they are.
        lora_A, lora_B: shapes in the file, one of them at least no matrix's.
        where: the file, for errors.
    Raises:
        MalformedAdapter: if PEFT has no convolution with such factors.
    """
    fits = len(lora_A) == len(lora_B) and len(lora_A) in _DIMENSIONS and set(lora_B[2:]) == {1}
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
