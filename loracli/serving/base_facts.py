"""What rules need to know of a base model, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loracli.model.base import expert_shape, kind_and_shape, plan_from_config
from loracli.progress import SILENT, Progress


@dataclass(frozen=True)
class BaseFacts:
    """A base model.

    Args:
        id: as it was named.
        model_class: transformers' class of it, `LlamaForCausalLM`.
        layers: number of decoder layers.
        tied: whether the head is the embedding.
        modules: (out, in) of every linear layer and of one expert of a parameter, and (dim, vocabulary) of every
            embedding, by path.
    """

    id: str
    model_class: str
    layers: int
    tied: bool
    modules: Mapping[str, tuple[int, int]]


def read_base_facts(base: str, *, progress: Progress = SILENT) -> BaseFacts:
    """Of a local directory or a Hub id; errors as of `plan_from_config`."""
    plan, _ = plan_from_config(base, progress=progress)
    modules = {}
    for name, module in plan.skeleton.named_modules():
        kind, in_features, out_features = kind_and_shape(module)
        if kind != "other":
            modules[name] = (out_features, in_features)
    for name, _ in plan.skeleton.named_parameters():
        if (shape := expert_shape(plan.skeleton, name)) is not None:
            modules[name] = (shape[2], shape[1])
    return BaseFacts(
        id=base,
        model_class=type(plan.skeleton).__name__,
        layers=int(plan.config.get_text_config().num_hidden_layers),
        tied=bool(plan.config.tie_word_embeddings),
        modules=modules,
    )
