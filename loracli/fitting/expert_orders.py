"""What records say of adapters that leave the order of their experts' factors open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.on_base import open_orders, read_otherwise
from loracli.calibration.batches import plan_batches
from loracli.calibration.render import Example
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from loracli.progress import Progress

RECORDS = 64  # enough to tell an adapter from its scrambled experts


def say_likelier_orders(
    model: Any, adapters: Sequence[LoraAdapter], examples: Sequence[Example], *, batch_tokens: int, progress: Progress
) -> None:
    """Warns, of each adapter with an open order, which of its readings the records like better.

    Args:
        model: the base, without adapters.
        adapters: that fit it.
        examples: records; the first of them are run.
        batch_tokens: of a batch.
        progress: told.
    """
    for adapter in adapters:
        for order in open_orders(adapter):
            taken, other = (
                _nats_per_token(model, reading, examples[:RECORDS], batch_tokens)
                for reading in (adapter, read_otherwise(adapter, order))
            )
            value = order.taken if taken <= other else order.other
            progress.warn(
                f'{adapter.reference} alone costs {taken:.4f} nats per token read with "{order.field}": '
                f'"{order.taken}", as it is, and {other:.4f} with "{order.other}": "{value}" is likelier; write it '
                "into its adapter_config.json"
            )


def _nats_per_token(model: Any, adapter: LoraAdapter, examples: Sequence[Example], batch_tokens: int) -> float:
    batches = plan_batches(examples, batch_tokens=batch_tokens)
    with torch.no_grad(), attach(model, [adapter], tuple(sorted(adapter.targets))) as attached:
        attached.set_weights(torch.ones(len(attached.modules), 1, dtype=attached.precision))
        objective = make_objective(attached, batches[0])
        nats = sum(float(objective.nats(batch).double().sum()) for batch in batches)
    counted = sum(len(batch.labels) if batch.weights is None else float(batch.weights.sum()) for batch in batches)
    return nats / counted
