"""Adapters that stock PEFT makes and trains for a few steps, with the weights that its own model then computes with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny import BASE_ID, logits


@dataclass(frozen=True)
class Trained:
    """An adapter directory, what the live model says, and what it changed in the base, dense in float64."""

    path: Path
    logits: Tensor
    changes: dict[str, Tensor]


def train(
    folder: Path,
    base: Path,
    *,
    targets: Sequence[str] = ("q_proj", "v_proj", "down_proj"),
    prepare: Any = None,
    initial: str | None = None,
    dtype: torch.dtype = torch.float32,
    rate: float = 0.02,
    **config: Any,
) -> Trained:
    """Trains with Adam on random tokens.

    Args:
        prepare: called with model and config before the adapter is put on, as CorDA wants it.
        initial: the folder inside `folder` that the untrained adapter is saved to, as PEFT's examples do.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    fields = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's advice on Conv1D and on such initialisations
        lora = LoraConfig(**fields)
        if prepare is not None:
            prepare(model, lora)
        peft_model = get_peft_model(model, lora)
        peft_model.peft_config["default"].base_model_name_or_path = BASE_ID
        if initial is not None:
            _save(peft_model, folder / initial, init_lora_weights=True)
        optimiser = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], rate)
        for step in range(6):
            ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(step))
            peft_model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        peft_model.eval()
        said = logits(peft_model)
        _save(peft_model, folder)
        merged = peft_model.merge_and_unload()
    changes = {
        name.removesuffix(".weight"): p.detach().double() - before[name]
        for name, p in merged.named_parameters()
        if not torch.equal(p.detach().double(), before[name])
    }
    return Trained(folder, said, changes)


def _save(model: Any, folder: Path, **config: Any) -> None:
    kept = {name: getattr(model.peft_config["default"], name) for name in config}
    for name, value in config.items():
        setattr(model.peft_config["default"], name, value)
    model.save_pretrained(folder, save_embedding_layers=False)
    for name, value in kept.items():
        setattr(model.peft_config["default"], name, value)


def reload(base: Path, adapter: Path) -> Any:
    """What stock PEFT makes of an adapter directory on the untouched base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PeftModel.from_pretrained(model, str(adapter)).eval()
