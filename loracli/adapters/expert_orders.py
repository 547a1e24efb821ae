"""Adapters whose files leave open in which order the factors of experts lie.

Two orders have the same shapes, so a wrong one is read without a word: the norm of every update stays, and each expert
gets what was trained for others. unsloth kept lora_B expert after expert until September 2026, and says which only
since then. PEFT before 0.20 had lora_A and lora_B the other way round, which shows where a matrix is not square; PEFT
before 0.18 does not say its version. What is open is read as PEFT reads it, warned of, and tried where there are
records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loracli.adapters.adapter import LoraAdapter, LoraModule
from loracli.adapters.experts import GROUPED_BY_EXPERT, RANK_MAJOR, TurnedExpert
from loracli.algebra.factors import Factors
from loracli.algebra.packing import join_experts, split_experts
from loracli.progress import Progress


@dataclass(frozen=True)
class OpenOrder:
    """What a config does not say.

    Args:
        field: that would say it.
        taken: its value for the order that is taken.
        other: for the other one.
        why: that other one may be meant.
    """

    field: str
    taken: str
    other: str
    why: str


def open_orders(adapter: LoraAdapter) -> tuple[OpenOrder, ...]:
    """What is open of an adapter; nothing without experts that are kept in parameters."""
    config, found = adapter.config, []
    kept = [modules for modules in adapter.targets.values() if modules[0].kind == "experts"]
    if not kept or not config.target_parameters:
        return ()
    several = any(len(modules) > 1 and modules[0].factors.rank > 1 for modules in kept)
    if config.made_by_unsloth and config.lora_B_layout is None and several:
        why = "unsloth wrote it, and until September 2026 kept lora_B expert after expert"
        found.append(OpenOrder("lora_B_layout", RANK_MAJOR, GROUPED_BY_EXPERT, why))
    square = any(modules[0].factors.in_features == modules[0].factors.out_features for modules in kept)
    if config.peft_version is None and square:
        why = "PEFT before 0.20 kept lora_A and lora_B the other way round, which a square matrix does not show"
        found.append(OpenOrder("peft_version", "0.20.0", "0.17.0", why))
    return tuple(found)


def warn_of_open_orders(adapters: Sequence[LoraAdapter], progress: Progress) -> None:
    """Names each adapter with what is open, how it is read, and what to write into its config."""
    for adapter in adapters:
        for order in open_orders(adapter):
            progress.warn(
                f"{adapter.reference}: {order.why}; its experts are read as PEFT reads them. If that is wrong, write "
                f'"{order.field}": "{order.other}" into its adapter_config.json, else "{order.taken}"'
            )


def read_otherwise(adapter: LoraAdapter, order: OpenOrder) -> LoraAdapter:
    """The adapter by the other order, as the base names it."""
    modules = dict(adapter.modules)
    for updates in adapter.targets.values():
        first = updates[0].factors
        if updates[0].kind != "experts":
            continue
        if order.field == "lora_B_layout":
            modules |= _grouped(updates)
        elif first.in_features == first.out_features:
            modules |= {m.name: replace(m, factors=TurnedExpert(m.factors)) for m in updates}
    return replace(adapter, modules=modules)


def _grouped(updates: Sequence[LoraModule]) -> dict[str, LoraModule]:
    """The experts of a parameter whose lora_B was read rank after rank, read expert after expert."""
    turned = isinstance(updates[0].factors, TurnedExpert)
    stored = [m.factors.stored if isinstance(m.factors, TurnedExpert) else m.factors for m in updates]
    whole = join_experts(stored, stored[0].rank)
    parts_A, parts_B = split_experts(whole.lora_A, whole.lora_B, len(updates), by_expert=True)
    found = {}
    for m, lora_A, lora_B in zip(updates, torch.unbind(parts_A), torch.unbind(parts_B), strict=True):
        factors = Factors(lora_A, lora_B, m.factors.scaling)
        found[m.name] = replace(m, factors=TurnedExpert(factors) if turned else factors)
    return found
