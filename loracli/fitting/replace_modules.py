"""The base model with modules that adapters saved whole in the place of its own."""

from __future__ import annotations

from torch import nn

from loracli.adapters.saved_modules import SavedModules
from loracli.errors import BaseModelMismatch


def replace_modules(model: nn.Module, saved: SavedModules | None) -> None:
    """Gives the model the saved parameters, each rounded once to the dtype of its own, which they replace for good.

    A parameter that was tied to another, as a head to the embeddings, is tied no longer: PEFT wraps a copy too.

    Args:
        model: whole on this process.
        saved: what replaces it, None for nothing.
    Raises:
        BaseModelMismatch: if the model has no such parameter, or in another shape.
    """
    if saved is None:
        return
    _check_saved(model, saved)
    for path in saved.sources:
        module, _, name = path.rpartition(".")
        own = model.get_parameter(path)
        replaced = saved.read(path).to(own.device, own.dtype)
        setattr(model.get_submodule(module), name, nn.Parameter(replaced, requires_grad=False))


def _check_saved(model: nn.Module, saved: SavedModules) -> None:
    for path, shape in saved.shapes.items():
        try:
            own = tuple(model.get_parameter(path).shape)
        except AttributeError:
            raise BaseModelMismatch(
                f"an adapter saved {path}, which the base model does not have",
                hint="the adapter was trained on another model or model class; check --base",
            ) from None
        if own != shape:
            raise BaseModelMismatch(
                f"an adapter saved {path} in the shape {shape}; the base model has {own}",
                hint="if its vocabulary was resized for training, give the resized model with --base",
            )
