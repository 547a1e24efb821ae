"""The weights of a base model, read from its safetensors one tensor at a time, without loading the model.

A model's parameter goes by three names in the files that people publish: its own, its own without the model's prefix
(`h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`), or, if it is tied, that of the parameter that it
is tied to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loracli.adapters.tensor_file import DTYPES, open_regular
from loracli.errors import BaseModelMismatch, MalformedAdapter
from loracli.strict_json import StrictJsonError, parse_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20


class BaseWeights:
    """Reads a base model's parameters by name."""

    def __init__(self, folder: Path, *, prefix: str = "", tied: Mapping[str, str] | None = None) -> None:
        """Finds the files.

        Args:
            folder: with one safetensors file, or several and their index.
            prefix: transformers' `base_model_prefix`, which files may leave out.
            tied: name of a tied parameter -> name of the one that it is tied to.
        Raises:
            BaseModelMismatch: if there are no safetensors, or the index is damaged.
        """
        self._folder, self._prefix, self._tied = folder, prefix, dict(tied or {})
        self._files = _files_of(folder)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def tied(self, name: str) -> str | None:
        """Another parameter that is the same tensor, None if there is none."""
        others = {target: name for name, target in self._tied.items()}
        return self._tied.get(name) or others.get(name)

    def read(self, name: str) -> Tensor:
        """The parameter, in the dtype it is stored in.

        Raises:
            BaseModelMismatch: if the files lack it, it is no floating point tensor of 16 bits or more, or it holds an
                infinite value or NaN.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise BaseModelMismatch(
                f"the base model has no tensor {name!r} in its files",
                where=str(self._folder),
                hint="save the base once with transformers' save_pretrained, which gives its tensors their own names",
            )
        path = self._folder / self._files[stored]
        with _open(path) as file:
            dtype = file.get_slice(stored).get_dtype()
            if dtype not in DTYPES:
                raise BaseModelMismatch(
                    f"the base model's {name!r} has dtype {dtype}",
                    where=str(path),
                    hint="give the unquantised model with --base",
                )
            tensor: Tensor = file.get_tensor(stored)
        if not torch.isfinite(tensor).all():
            raise BaseModelMismatch(f"the base model's {name!r} holds infinite or undefined values", where=str(path))
        return tensor

    def _stored_name(self, name: str) -> str | None:
        for wanted in filter(None, (name, self._tied.get(name))):
            bare = wanted.removeprefix(f"{self._prefix}.")
            for candidate in (wanted, bare, f"{self._prefix}.{wanted}"):
                if candidate in self._files:
                    return candidate
        return None


def _files_of(folder: Path) -> dict[str, str]:
    """File name by tensor name."""
    if (folder / WEIGHTS_FILE).is_file():
        with _open(folder / WEIGHTS_FILE) as file:
            return dict.fromkeys(file.keys(), WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise BaseModelMismatch(
            f"the base model has neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            where=str(folder),
            hint="save it once with transformers' save_pretrained",
        )
    where = str(folder / INDEX_FILE)
    try:
        with open_regular(folder / INDEX_FILE) as file:
            index = parse_json(file.read(MAX_INDEX_BYTES))
    except (StrictJsonError, MalformedAdapter) as error:
        raise BaseModelMismatch(f"the index is damaged: {error}", where=where) from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(_is_shard(file) for file in names.values()):
        raise BaseModelMismatch("weight_map does not name safetensors files of this folder", where=where)
    return names


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set('/\\:\0"')


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file, opened without a memory map."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BaseModelMismatch(f"cannot be read: {error}", where=str(path)) from None
