"""The weights of a quantised base as numbers, in float64 and so exactly, from the tensors that it stores.

Weights of bitsandbytes in 4 bits, NF4 or FP4 (QLoRA, arXiv 2305.14314), two in a byte, the first in the upper half:

    W_i = code[q_i] a[i // 64]          i counts the entries of W (out, in) row by row, a: X.weight.absmax
    a_j = code2[p_j] b[j // 256] + c    where a is quantised itself: p in X.weight.absmax, b in X.weight.nested_absmax

with the tables code (16) and code2 (256) in X.weight.quant_map and X.weight.nested_quant_map, and shape, block sizes
and c in X.weight.quant_state.bitsandbytes__nf4, which is JSON. bitsandbytes (0.50) computes it in float32 and rounds to
its dtype; here it is float64.

Weights in 8 bits:

    W = s q        q (out, in) in 8 bits, s the scale of its block: of rows and columns, a row, a group of one, or all

    fp8                  F8_E4M3, F8_E5M2   X.weight_scale_inv   weight_block_size, or one scale: DeepSeek-V3, Qwen3-FP8
    compressed-tensors   the same, or I8    X.weight_scale       tensor, channel, group or block; symmetric
    bitsandbytes, 8 bit  I8                 X.SCB                a row, s = SCB / 127 (LLM.int8, arXiv 2208.07339)
    bitsandbytes, 4 bit  packed in U8       X.weight.absmax      as at the top

A product of 8 and 24 bits of significand has 32 at most, which float64 holds. transformers multiplies in float32 and
rounds that again (`Fp8Dequantize`, 5.23), so its weights may differ from ours in the last bit. What the formats keep
beside the weights for their kernels, scales of activations and of the cache, has no use in a model in full precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import Checkpoint, StoredTensor
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import FLOATS

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


def _find_four_bits(checkpoint: Checkpoint) -> dict[str, FourBits]:
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


_QUANTISED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
_SCALES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
_UNUSED = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale", "weight_format")
_COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized")
BITSANDBYTES = "bitsandbytes"
_WAY_OUT = "give the unquantised model with --base"


@dataclass(frozen=True)
class Quantisation:
    """How a base is quantised.

    Args:
        method: as its config calls it.
        scale: the last name of the scales of a weight.
        dtypes: of quantised weights, as safetensors spells them; others stand for something else, as I8 in an fp8 base
            does for two numbers in 4 bits.
        block: rows and columns that have a scale in common, None for a whole row or the whole matrix.
    """

    method: str
    scale: str
    dtypes: frozenset[str]
    block: tuple[int, int] | None


Decoder = Callable[[Tensor, int], Tensor]


class Quantised(Protocol):
    """The rest of a quantised tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, which may be stored in another."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the tensors that are of no use beside the weight."""

    def decoder(self, checkpoint: Checkpoint) -> Decoder:
        """A function of the bytes of some rows and the place of the first: these rows of W in float64."""


@dataclass(frozen=True)
class Scaled:
    """A tensor of 8-bit numbers with scales.

    Args:
        tensor: q.
        scales: s, (rows of blocks, columns of blocks).
        block: rows and columns of a block; the last ones may be cut short.
        divisor: of the scales.
    """

    tensor: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    divisor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def unused(self) -> tuple[str, ...]:
        return (self.scales.name,)

    def decoder(self, checkpoint: Checkpoint) -> Decoder:
        columns = self.tensor.shape[1]
        data = checkpoint.read(self.scales).view(_SCALES[self.scales.dtype])
        scales = data.double().view(_grid(self.scales.shape)) / self.divisor
        of_column = torch.arange(columns) // self.block[1]

        def decode(rows: Tensor, start: int) -> Tensor:
            weight = rows.view(_QUANTISED[self.tensor.dtype]).view(-1, columns).double()
            of_row = torch.arange(start, start + len(weight)) // self.block[0]
            return weight.mul_(scales[of_row][:, of_column])

        return decode


def read_quantisation(fields: Mapping[str, Any], path: Path) -> Quantisation | None:
    """What a base's config says; None of one that is not quantised.

    Raises:
        BaseModelMismatch: if it is a format that is not read here, by its name.
    """
    config = fields.get("quantization_config") or fields.get("compression_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method == "fp8":
        block = config.get("weight_block_size", [128, 128])
        return Quantisation("fp8", "weight_scale_inv", _FLOAT8, None if block is None else _pair(block, path))
    if method == "compressed-tensors":
        return _compressed(config, path)
    if method == BITSANDBYTES and isinstance(config, dict):
        four = bool(config.get("load_in_4bit") or config.get("_load_in_4bit"))
        return Quantisation(BITSANDBYTES, "absmax" if four else "SCB", frozenset({"U8"} if four else {"I8"}), None)
    raise BaseModelMismatch(
        f"the base model is quantised by {method}, which --dequantise does not read; it reads fp8, "
        f"bitsandbytes and, of compressed-tensors, {', '.join(_COMPRESSED)}",
        where=str(path),
        hint=_WAY_OUT,
    )


def _compressed(config: Mapping[str, Any], path: Path) -> Quantisation:
    """What all groups of a compressed-tensors config say together."""
    groups, blocks, dtypes = config.get("config_groups"), set[tuple[int, int] | None](), frozenset[str]()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        form = (group.get("format") if isinstance(group, dict) else None) or config.get("format")
        rotated = bool(config.get("transform_config"))
        if not isinstance(weights, dict) or form not in _COMPRESSED or weights.get("num_bits") != 8 or rotated:
            how = "with a transform_config" if rotated else f"as {form}"
            raise BaseModelMismatch(
                f"the base model is quantised by compressed-tensors {how}, which --dequantise does not read; it reads "
                f"{', '.join(_COMPRESSED)} in 8 bits",
                where=str(path),
                hint=_WAY_OUT,
            )
        dtypes |= _FLOAT8 if weights.get("type") == "float" else {"I8"}
        strategy = weights.get("strategy")
        block = weights.get("block_structure") if strategy == "block" else [1, weights.get("group_size")]
        blocks.add(_pair(block, path) if strategy in ("block", "group") else None)
    sizes = sorted(blocks - {None}, key=str)
    if len(sizes) > 1:
        raise BaseModelMismatch(
            f"the base model is quantised in blocks of several sizes: {sizes}", where=str(path), hint=_WAY_OUT
        )
    return Quantisation("compressed-tensors", "weight_scale", dtypes, sizes[0] if sizes else None)


def _pair(block: Any, path: Path) -> tuple[int, int]:
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise BaseModelMismatch(f"the base model's config has the block size {block!r}", where=str(path), hint=_WAY_OUT)
    return block[0], block[1]


def find_quantised(
    checkpoint: Checkpoint, quantisation: Quantisation | None
) -> tuple[dict[str, Quantised], frozenset[str]]:
    """Every quantised tensor by its name, and the names of those that are of no use beside them.

    Raises:
        BaseModelMismatch: naming a tensor whose numbers cannot be had.
    """
    if quantisation is None:
        return {}, frozenset()
    found: dict[str, Quantised] = {}
    unused = {name for name in checkpoint.tensors if name.rpartition(".")[2] in _UNUSED}
    if "U8" in quantisation.dtypes:
        found |= _find_four_bits(checkpoint)
        unused |= {name for quantised in found.values() for name in quantised.unused}
    for name, tensor in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight_zero_point":
            raise BaseModelMismatch(f"the base model's {module} is quantised around {name}", hint=_WAY_OUT)
        if last == quantisation.scale or name in unused or name in found or tensor.dtype in FLOATS:
            continue
        scales = checkpoint.tensors.get(f"{module}.{quantisation.scale}")
        if tensor.dtype not in quantisation.dtypes or last != "weight" or len(tensor.shape) != 2 or scales is None:
            if tensor.dtype in ("I64", "I32", "BOOL") and scales is None:
                continue  # a table of indices, which no format above stores weights as
            raise BaseModelMismatch(
                f"{name} of the base model's weights is stored as {tensor.dtype}, which stands for nothing known",
                hint=_WAY_OUT,
            )
        divisor = 127.0 if quantisation.scale == "SCB" else 1.0
        found[name] = Scaled(tensor, scales, _block_of(tensor, scales, quantisation.block), divisor)
        unused.add(scales.name)
    loose = sorted(n for n in checkpoint.tensors.keys() - unused if n.rpartition(".")[2] == quantisation.scale)
    if loose:
        raise BaseModelMismatch(f"{loose[0]} of the base model's weights scales nothing that is stored", hint=_WAY_OUT)
    return found, frozenset(unused)


def _block_of(tensor: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a block, of which there are as many as scales."""
    rows, columns = tensor.shape
    grid = _grid(scales.shape)
    fitting = [(rows, columns), (1, columns), *([] if block is None else [block])]
    sizes = [size for size in fitting if (-(-rows // size[0]), -(-columns // size[1])) == grid]
    if not sizes or scales.dtype not in _SCALES:
        raise BaseModelMismatch(
            f"{scales.name} of the base model's weights is {scales.dtype} {scales.shape}, which does not fit "
            f"{tensor.name} {tensor.shape}",
            hint=_WAY_OUT,
        )
    return sizes[0]


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of one scale, one for each row, or blocks."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return (shape[0], 1) if len(shape) == 1 else (1, 1) if not shape else (0, 0)
