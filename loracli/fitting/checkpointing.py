"""Activation checkpointing: each decoder layer keeps its input only, and runs a second time in the backward pass.

Costs one more forward (3 units a token instead of 2) and keeps T x hidden numbers a layer. transformers has a switch
for the same, but it works in training mode alone, where dropout is on too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from loracli.errors import UsageError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can be run again, in order: the outermost ones of the class that transformers gives them; none
    for the few models that do without it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in decoder_layers(child)]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Makes every decoder layer recompute itself in the backward pass, and undoes it at the end.

    The gradients are the same to the bit. Layers that take part in no gradient, those below the lowest adapted one,
    keep nothing, as without. Between a forward and its backward pass nothing may change: neither the mixing weights nor
    the hooks, for the second run would see the change.

    Args:
        model: frozen, in evaluation mode, and with whatever acts inside its layers attached before or after.
    Raises:
        UsageError: if the model has no such layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UsageError(
            f"activation checkpointing is not possible with {type(model).__name__}: transformers does not mark its "
            "layers",
            hint="leave it out, and give a smaller --batch-tokens or --max-length",
        )
    # Not `__call__`: what hooks do around a layer, such as gathering a sharded layer's weights, is done once a pass.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _recomputed(layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


def _recomputed(forward: Any) -> Any:
    # There is no dropout whose random numbers would have to be drawn again.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
