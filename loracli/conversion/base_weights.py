"""The weights of a base model by the names of its parameters, read one at a time, without loading the model.

A model's parameter goes by three names in the files that people publish: its own, its own without the model's prefix
(`h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`), or, if it is tied, that of the parameter that it
is tied to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import StoredTensor, read_checkpoint
from loracli.system.tensor_file import DTYPES


class BaseWeights:
    """Reads a base model's parameters by name."""

    def __init__(self, folder: Path, *, prefix: str = "", tied: Mapping[str, str] | None = None) -> None:
        """Reads the headers of the files.

        Args:
            folder: with one safetensors file, or several and their index.
            prefix: transformers' `base_model_prefix`, which files may leave out.
            tied: name of a tied parameter -> name of the one that it is tied to.
        Raises:
            BaseModelMismatch: if there are no safetensors, or they or the index are damaged.
        """
        self._prefix, self._tied = prefix, dict(tied or {})
        self._checkpoint = read_checkpoint(folder)

    def __contains__(self, name: str) -> bool:
        return self._stored(name) is not None

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
        stored = self._stored(name)
        if stored is None:
            raise BaseModelMismatch(
                f"the base model has no tensor {name!r} in its files",
                where=str(self._checkpoint.folder),
                hint="save the base once with transformers' save_pretrained, which gives its tensors their own names",
            )
        path = self._checkpoint.folder / stored.shard
        if stored.dtype not in DTYPES:
            raise BaseModelMismatch(
                f"the base model's {name!r} has dtype {stored.dtype}",
                where=str(path),
                hint="give the unquantised model with --base",
            )
        tensor = self._checkpoint.read(stored).view(DTYPES[stored.dtype]).view(stored.shape)
        if not torch.isfinite(tensor).all():
            raise BaseModelMismatch(f"the base model's {name!r} holds infinite or undefined values", where=str(path))
        return tensor

    def _stored(self, name: str) -> StoredTensor | None:
        tensors = self._checkpoint.tensors
        for wanted in filter(None, (name, self._tied.get(name))):
            bare = wanted.removeprefix(f"{self._prefix}.")
            for candidate in (wanted, bare, f"{self._prefix}.{wanted}"):
                if candidate in tensors:
                    return tensors[candidate]
        return None
