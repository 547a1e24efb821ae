"""W' = W + dW, rounded once, a few rows at a time.

With left (rows, R) and right (R, columns) of `update.py`: for an output in bfloat16 or float16 both are rounded to
float32 once and W + left @ right is summed there; for float32 and float64, and where W is computed from a quantised
weight, it is summed in float64. With
eps = 2^-24 or 2^-53, the number before the last rounding is off by at most

    (R + 4) eps (|W| + |left_i| |right_j|)        |.| of row i of left and column j of right: Euclidean norms

since a sum of R + 1 products is off by at most (R + 1) eps times the sum of their sizes (Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1), whatever its order, and by Cauchy and Schwarz. That is far below the spacing of
bfloat16 numbers: the result is the correctly rounded one unless the exact sum lies so close to the middle between two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.errors import BaseModelMismatch, UsageError

BLOCK_BYTES = 8 << 20  # of a tensor's rows that are worked on at a time


@dataclass(frozen=True)
class Fold:
    """What is added to a matrix, or to each of several, left @ right; both in the precision of the sum."""

    left: Tensor
    right: Tensor


def make_fold(left: Tensor, right: Tensor, precision: torch.dtype) -> Fold:
    """The update of a tensor in the precision of the sum."""
    return Fold(left.to(precision).contiguous(), right.to(precision).contiguous())


def precision_for(output: torch.dtype) -> torch.dtype:
    """Of the sum: well beyond the output's own."""
    return torch.float32 if output.itemsize == 2 else torch.float64


def fold_rows(name: str, weight: Tensor, start: int, fold: Fold | None, output: torch.dtype) -> Tensor:
    """Rows of W' from rows of W.

    Args:
        name: of the tensor, for errors.
        weight: (rows, ...) of the base, beginning with row `start`; of experts one matrix each.
        start: their place in the tensor.
        fold: what is added, None to round alone.
        output: the dtype of the result.
    Raises:
        BaseModelMismatch: if the base's own numbers are not finite.
        UsageError: if the result overflows the output's dtype.
    """
    total = weight.to(fold.left.dtype if fold is not None else weight.dtype, copy=fold is not None)
    if fold is not None:
        stop = start + len(weight)
        if total.dim() == 3:
            total.baddbmm_(fold.left[start:stop], fold.right[start:stop])
        else:
            total.addmm_(fold.left[start:stop], fold.right)
    result = total.to(output)
    # A finite sum is proof of finite terms, at a tenth of the price of a look at each. The narrow range of float16,
    # and the rare number that only rounding makes infinite, show in the largest.
    wide = total.abs().amax() if output == torch.float16 else total.sum()
    if not torch.isfinite(wide) or float(wide.abs()) > torch.finfo(output).max:
        _refuse(name, weight, result, output)
    return result


def _refuse(name: str, weight: Tensor, result: Tensor, output: torch.dtype) -> None:
    if torch.isfinite(result).all():
        return  # only the sum of all overflowed
    if not torch.isfinite(weight).all():
        raise BaseModelMismatch(f"the base model's {name} holds values that are infinite or not a number")
    dtype = str(output).removeprefix("torch.")
    raise UsageError(f"{name} overflows {dtype}", hint="fuse with --dtype float32 or bfloat16")


def rounding_bounds(weight: Tensor, left: Tensor, right: Tensor, output: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that each entry of W' may have, by the bound at the top.

    Args:
        weight: rows of W, in any dtype, or one matrix for each of some experts.
        left: (rows, R) of exactly these rows, float64; of experts with one dimension more in front.
        right: (R, columns), float64, likewise.
        output: of W'.
    """
    exact = weight.double() + left @ right
    eps = 2.0**-24 if precision_for(output) == torch.float32 else 2.0**-53
    sizes = left.norm(dim=-1)[..., None] * right.norm(dim=-2)[..., None, :] + weight.double().abs()
    slack = sizes.mul_((left.shape[-1] + 4) * eps)
    return (exact - slack).to(output), (exact + slack).to(output)
