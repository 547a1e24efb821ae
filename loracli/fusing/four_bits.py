"""Weights of bitsandbytes in 4 bits, NF4 or FP4 (QLoRA, arXiv 2305.14314), two in a byte, the first in the upper half:

    W_i = code[q_i] a[i // 64]          i counts the entries of W (out, in) row by row, a: X.weight.absmax
    a_j = code2[p_j] b[j // 256] + c    where a is quantised itself: p in X.weight.absmax, b in X.weight.nested_absmax

with the tables code (16) and code2 (256) in X.weight.quant_map and X.weight.nested_quant_map, and shape, block sizes
and c in X.weight.quant_state.bitsandbytes__nf4, which is JSON. bitsandbytes (0.50) computes it in float32 and rounds to
its dtype; here it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import Checkpoint, StoredTensor
from loracli.system.strict_json import StrictJsonError, parse_json

_STATE = ".quant_state.bitsandbytes__"
_HINT = "give the unquantised model with --base"


@dataclass(frozen=True)
class FourBits:
    """A packed tensor.

    Args:
        name: of the weight.
        shape: (out, in).
        block: entries that have an absmax in common.
        nested: of the absmax, the same, and what is added; None where it is stored as it is.
        unused: names of all tensors beside the packed one.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    nested: tuple[int, float] | None
    unused: tuple[str, ...]

    def decoder(self, checkpoint: Checkpoint) -> Callable[[Tensor, int], Tensor]:
        """As that of `loracli.fusing.quantised.Quantised`."""

        def read(part: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return checkpoint.read(checkpoint.tensors[f"{self.name}.{part}"]).view(dtype).flatten()

        columns, code = self.shape[1], read("quant_map").double()
        if self.nested is None:
            absmax = read("absmax").double()
        else:
            block, offset = self.nested
            coarse = read("nested_absmax").double().repeat_interleave(block)
            absmax = read("nested_quant_map").double()[read("absmax", torch.uint8).int()]
            absmax = absmax * coarse[: len(absmax)] + offset

        def decode(rows: Tensor, start: int) -> Tensor:
            halves = torch.stack([rows >> 4, rows & 15], dim=1).flatten().int()
            first = start * columns
            of_entry = torch.arange(first, first + len(halves)) // self.block
            return (code[halves] * absmax[of_entry]).view(-1, columns)

        return decode


def find_four_bits(checkpoint: Checkpoint) -> dict[str, FourBits]:
    """Every packed tensor by its name.

    Raises:
        BaseModelMismatch: if what is stored beside one does not fit it.
    """
    found = {}
    for state_name, state in checkpoint.tensors.items():
        name, mark, _ = state_name.partition(_STATE)
        if mark and name in checkpoint.tensors:
            beside = tuple(sorted(other for other in checkpoint.tensors if other.startswith(f"{name}.")))
            found[name] = _four_bits(checkpoint, checkpoint.tensors[name], state, beside)
    return found


def _four_bits(checkpoint: Checkpoint, tensor: StoredTensor, state: StoredTensor, beside: tuple[str, ...]) -> FourBits:
    try:
        fields: Any = parse_json(bytes(checkpoint.read(state).tolist()))
        rows, columns = fields["shape"]
        block, nested = fields["blocksize"], None
        if "nested_blocksize" in fields:
            nested = (fields["nested_blocksize"], float(fields["nested_offset"]))
    except (StrictJsonError, KeyError, TypeError, ValueError, OverflowError):
        raise BaseModelMismatch(f"{state.name} of the base model's weights is damaged", hint=_HINT) from None
    entries = _product(rows, columns, block, *(nested or (1,))[:1])
    expected: dict[str, tuple[str, int]] = {"quant_map": ("F32", 16)}
    if entries and nested is None:
        expected["absmax"] = ("F32", -(-rows * columns // block))
    elif entries and nested is not None:
        blocks = -(-rows * columns // block)
        expected |= {"absmax": ("U8", blocks), "nested_quant_map": ("F32", 256)}
        expected["nested_absmax"] = ("F32", -(-blocks // nested[0]))
    wrong = [part for part, wanted in expected.items() if _stored(checkpoint, f"{tensor.name}.{part}") != wanted]
    if not entries or columns % 2 or tensor.dtype != "U8" or 2 * tensor.size != rows * columns or wrong:
        what = f"{tensor.name}.{wrong[0]}" if wrong else state.name
        raise BaseModelMismatch(f"{what} of the base model's weights does not fit {tensor.name}", hint=_HINT)
    return FourBits(tensor.name, (rows, columns), block, nested, beside)


def _product(*sizes: Any) -> int:
    """Of whole numbers above 0; 0 if one is none."""
    return math.prod(sizes) if all(type(size) is int and size > 0 for size in sizes) else 0


def _stored(checkpoint: Checkpoint, name: str) -> tuple[str, int] | None:
    tensor: StoredTensor | None = checkpoint.tensors.get(name)
    return None if tensor is None else (tensor.dtype, math.prod(tensor.shape))
