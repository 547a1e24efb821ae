"""Matrices of the base that adapters carry along: they have to be the base's own.

PEFT writes the whole embedding or head beside its factors where `save_embedding_layers` says so or the vocabulary was
resized. A copy changes nothing, and no composition has it; another matrix is a change that no adapter can carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import Checkpoint, loaded_names, tied_parameters
from loracli.system.tensor_file import FLOATS


def check_base_copies(adapters: Sequence[LoraAdapter], weight_of: Callable[[str], Tensor]) -> None:
    """Holds every copy against the weight of its module.

    Args:
        adapters: that may carry copies.
        weight_of: a module's weight in the base, on the CPU, by the module's name.
    Raises:
        BaseModelMismatch: if one differs, by adapter and module.
    """
    for adapter in adapters:
        for name in adapter.base_copies:
            copy, own = adapter.read_base_copy(name), weight_of(name)
            if copy.shape != own.shape or not torch.equal(copy.to(own.dtype), own):
                raise BaseModelMismatch(
                    f"{adapter.reference} carries its own matrix for {name}, and it differs from the base model's",
                    hint="the adapter was trained with a changed embedding, which an adapter cannot carry",
                )


def stored_weights(checkpoint: Checkpoint, skeleton: Any) -> Callable[[str], Tensor]:
    """The weight of a module by its name, read from the base's files.

    Args:
        checkpoint: of the base.
        skeleton: its model without numbers.
    """
    names, tied = loaded_names(skeleton, checkpoint.tensors), tied_parameters(skeleton)

    def weight_of(module: str) -> Tensor:
        """Raises BaseModelMismatch if it is not stored as one tensor of floating point numbers."""
        parameter = f"{module}.weight"
        stored = [name for member in tied.get(parameter, (parameter,)) for name in names.stored.get(member, ())]
        tensor = checkpoint.tensors[stored[0]] if stored else None
        if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise BaseModelMismatch(
                f"an adapter carries its own matrix for {module}, and the base model's files have none of floating "
                "point numbers to compare it with",
                hint="give the unquantised model with --base",
            )
        with checkpoint.open(tensor) as rows:
            return rows.read(0, tensor.shape[0])

    return weight_of
