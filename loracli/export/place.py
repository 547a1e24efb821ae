"""Where a factor goes: which tensor of the file holds which factor of which module, and how it lies there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loracli.algebra.factors import Factors


@dataclass(frozen=True)
class Place:
    """One tensor of an exported file.

    Args:
        module: whose update it is a factor of.
        side: lora_A (r, in), lora_B (out, r), or the bias of lora_B (out).
        factor_shape: of that factor.
        transposed: whether the file holds the transpose.
        kernel: size of the kernel that the file holds the factor as, (1, 1) for the B of a convolution; empty for a
            matrix.
    """

    module: str
    side: Literal["A", "B", "bias"]
    factor_shape: tuple[int, ...]
    transposed: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        if self.kernel:
            rows, columns = self.factor_shape
            return rows, columns // math.prod(self.kernel), *self.kernel
        return self.factor_shape[::-1] if self.transposed else self.factor_shape

    def tensor_of(self, factors: Factors) -> Tensor:
        """The tensor as the file holds it."""
        if self.side == "bias":
            return factors.lora_B.new_zeros(self.factor_shape) if factors.bias is None else factors.bias
        factor = factors.lora_A if self.side == "A" else factors.lora_B
        if self.kernel:
            return factor.reshape(self.shape)
        return factor.T.contiguous() if self.transposed else factor

    def factor_of(self, tensor: Tensor) -> Tensor:
        """The factor that a tensor of the file is."""
        return tensor.T if self.transposed else tensor
