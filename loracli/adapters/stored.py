"""Factors that stay in their file until they are wanted, so that an export holds one module at a time."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from loracli.algebra.factors import Factors
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
