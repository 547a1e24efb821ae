"""An adapter for llama.cpp and what is built on it: one GGUF file, written with the gguf package.

    general.type adapter, adapter.type lora, general.architecture, adapter.lora.alpha
    <name>.lora_a    (r, in), of token_embd its transpose      <name>.lora_b    (out, r), rows in llama.cpp's order

The form is that of llama.cpp's convert_lora_to_gguf.py. src/llama-adapter.cpp takes alpha / rank of the tensor as the
scale, and 1 for alpha 0: so alpha is the rank where all modules have one, and 0 where they do not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.errors import UsageError
from loracli.export.llama_cpp import LlamaCppBase
from loracli.export.place import Place
from loracli.recipe.recipe import BaseModule
from loracli.system.tensor_file import TensorFile, open_tensor_file

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load_gguf() -> Any:
    """The gguf package.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("--gguf needs the package gguf", hint="pip install 'loracat[gguf]'") from None
    return gguf


def gguf_names(base: LlamaCppBase, modules: Mapping[str, BaseModule]) -> dict[str, str]:
    """GGUF's names of modules, `blk.0.attn_q.weight`.

    Raises:
        UsageError: if the architecture has no tensor of the kind, or cannot hold the update of one.
    """
    gguf = load_gguf()
    base.check(modules)
    number = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture.name)
    table = gguf.get_tensor_name_map(number, base.layers)
    found = {name: table.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in modules}
    unknown = sorted(name for name, known in found.items() if known is None)
    if unknown:
        raise UsageError(
            f"no GGUF can hold the update of {unknown[0]}: {base.architecture.name} has no tensor of that name",
            hint="leave --gguf out, or leave that module out of the adapters",
        )
    return found


def write_gguf(
    path: Path, base: LlamaCppBase, names: Mapping[str, str], source: Path, places: Mapping[str, Place]
) -> str:
    """Writes the factors of an exported file as a new GGUF file and flushes it to the disk, one tensor at a time.

    Args:
        path: must not exist.
        base: how llama.cpp has the base model.
        names: GGUF's, of every module.
        source: the exported safetensors file.
        places: what is where in it.
    Returns:
        the sha256 of the file.
    """
    gguf = load_gguf()
    file = open_tensor_file(source)
    ranks = {place.factor_shape[0] for place in places.values() if place.side == "A"}
    writer = gguf.GGUFWriter(None, base.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    order = sorted(places, key=lambda name: (names[places[name].module], places[name].side))
    for name in order:
        place, dtype = places[name], file.dtypes[name]
        shape = place.factor_shape[::-1] if _flipped(place, names) else place.factor_shape
        raw = gguf.GGMLQuantizationType[_NAMES[dtype]]
        size = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.empty(0, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().dtype
        writer.add_tensor_info(f"{names[place.module]}.lora_{place.side.lower()}", shape, bits, size, raw_dtype=raw)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _read(file, order):
            place = places[name]
            factor = place.factor_of(tensor)
            if place.side == "B":
                factor = base.lora_b(place.module, factor)
            elif _flipped(place, names):
                factor = factor.T
            _write(writer, factor)
        writer.flush()
    finally:
        writer.close()
    return _flush(path)


def _read(file: TensorFile, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors one by one; what goes wrong with writing them is none of the reader's errors."""
    with file.reader() as reader:
        for name in names:
            yield name, reader.read(name)


def _flipped(place: Place, names: Mapping[str, str]) -> bool:
    """llama.cpp looks tokens up in lora_a of the embedding, so a token is a row there."""
    return place.side == "A" and names[place.module] == "token_embd.weight"


def _write(writer: Any, factor: Tensor) -> None:
    bits = factor.contiguous().view(torch.int16 if factor.dtype.itemsize == 2 else torch.int32)
    try:
        writer.write_tensor_data(bits.numpy())
    except OSError as error:
        if error.errno is None:  # numpy says how much it could write, not why
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _flush(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
