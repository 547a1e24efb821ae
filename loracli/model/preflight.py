"""Whether a fit will fit: the memory that it needs, known before any weight is loaded, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.kinds import kind_of
from loracli.errors import OutOfResources
from loracli.model.base import BasePlan
from loracli.model.loss import CHUNK_BYTES
from loracli.model.placement import decoder_layers
from loracli.progress import amount_text

_HEADROOM = 0.9  # of the memory that is free: estimates err, and allocators leave gaps
_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, at the worst moment of a micro-batch.

    Args:
        weights: of the base model; of a sharded one this process's share, the layers in use, and the head.
        adapters: all factors, stacked, in the base's dtype.
        activations: what a micro-batch keeps for its backward pass.
        checkpointed: the same with activation checkpointing; None if the model's layers cannot be run again.
        head: logits of a chunk of positions, and the gradient of what reaches the head.
    """

    weights: int
    adapters: int
    activations: int
    checkpointed: int | None
    head: int

    @property
    def total(self) -> int:
        """Bytes in all, without checkpointing."""
        return self.fixed + self.activations

    @property
    def total_checkpointed(self) -> int:
        """Bytes in all, with checkpointing where that is possible."""
        return self.fixed + (self.activations if self.checkpointed is None else self.checkpointed)

    @property
    def fixed(self) -> int:
        """Bytes of all but activations."""
        return self.weights + self.adapters + self.head


@dataclass(frozen=True)
class MemoryDecision:
    """What to do with an estimate.

    Args:
        checkpointing: whether the layers should be run again in the backward pass.
        note: one line for the user.
        tight: whether memory may run out all the same, so that the note is a warning.
    """

    checkpointing: bool
    note: str
    tight: bool = False


def estimate_memory(
    plan: BasePlan,
    adapters: Sequence[LoraAdapter],
    *,
    batch_tokens: int,
    max_length: int,
    shards: int = 1,
    factors: bool = False,
) -> MemoryEstimate:
    """The memory of a fit, from the config and the adapters alone.

    With T tokens in a micro-batch of records of t tokens, s bytes a number, width d, h heads of size e, an inner width
    m of the MLP, and R ranks over all adapters and modules of a layer, a layer keeps

        T (3 * 4 d  +  4 s h e  +  3 s m  +  s R)  bytes:

    what the norms keep in float32; q, k, v and the attention's output; gate, up and their product; and z = A x.
    Attention that is not fused keeps 8 h T t more. With checkpointing a layer keeps its input, s T d, and one layer at
    a time all of it. Layers below the lowest adapted one keep nothing. Where experts are adapted, the update of gate
    and up stands beside them for a moment, 2 s T m. On models of ten kinds and of several proportions this was within
    a factor of 1.5 of what is kept; an MLP without a gate keeps less than that.

    Args:
        plan: from `plan_base`.
        adapters: that will be attached.
        batch_tokens: T; a longer record stands alone.
        max_length: t.
        shards: over how many processes the base's weights are shared out.
        factors: whether the factors themselves will be trained: their inputs are kept, s T (in + R) a module, and of
            every number eight copies in float32 (theta, its start, Adam's moments, the average, and the gradient
            beside its sum in float64).
    """
    s, config = plan.dtype.itemsize, plan.skeleton.config.get_text_config()
    vocabulary, width = plan.skeleton.get_input_embeddings().weight.shape
    layers = decoder_layers(plan.skeleton)
    tokens = max(batch_tokens, max_length)
    graphs = _layers_with_graph(plan.skeleton, layers, adapters) if layers else _setting(config, "num_hidden_layers")
    layer = _kept_by_layer(config, width, tokens, max_length, s)
    updates = [module.factors for adapter in adapters for module in adapter.modules.values()]
    numbers = sum(f.lora_A.numel() + f.lora_B.numel() for f in updates)
    of_adapters = round(tokens * s * sum(_rank_rows(plan.skeleton, adapter) for adapter in adapters))
    if factors:
        inner = {name: m.factors.in_features for adapter in adapters for name, m in adapter.modules.items()}
        of_adapters += tokens * s * sum(inner.values())
    inputs = graphs * tokens * s * width
    experts = any(kind_of(modules[0]).of_experts for adapter in adapters for modules in adapter.targets.values())
    moment = 2 * s * tokens * _inner_width(config, width) if experts else 0
    return MemoryEstimate(
        weights=s * _weights(plan.skeleton, layers, shards) - _saved_by_bits(plan, s),
        adapters=numbers * (s + (8 * _FLOAT32 if factors else 0)),
        activations=graphs * layer + of_adapters + moment,
        checkpointed=inputs + layer + of_adapters // max(graphs, 1) + moment if layers else None,
        head=_head(config, vocabulary, width, tokens, s),
    )


def decide_memory(
    estimate: MemoryEstimate, available: int | None, plan: BasePlan, *, processes: int = 1, sharded: bool = False
) -> MemoryDecision:
    """Whether layers should be run again, by the estimate; an unknown amount of memory is enough for anything.

    Args:
        estimate: of one process.
        available: bytes that are free on its device, None where nothing tells.
        plan: that the estimate was made from.
        processes: how many take their memory from there, as all of a machine do on its CPU.
        sharded: the estimate is of a sharded base.
    Raises:
        OutOfResources: if the weights alone need more.
    """
    plain, least = (amount_text(total, "B") for total in (estimate.total, estimate.total_checkpointed))
    if available is None:
        return MemoryDecision(False, f"memory: about {plain}")
    room = available // processes
    each = f" for each of {processes} processes" if processes > 1 else ""
    free = f"{amount_text(room, 'B')} free on {plan.device}{each}"
    if estimate.weights + estimate.adapters > room:
        needed = amount_text(estimate.weights + estimate.adapters, "B")
        raise OutOfResources(
            f"the weights of {plan.reference.id} and the adapters take {needed}, and there are {free}",
            hint=f"try {' or '.join(_ways_out(plan, sharded))}",
        )
    if estimate.total <= _HEADROOM * room:
        return MemoryDecision(False, f"memory: about {plain}, with {free}")
    recompute = estimate.checkpointed is not None
    how = "; layers are run again in the backward pass, which takes half as long again" if recompute else ""
    if estimate.total_checkpointed <= _HEADROOM * room:
        return MemoryDecision(True, f"memory: about {least} instead of {plain}, with {free}{how}")
    ways = ["a smaller --batch-tokens", "a smaller --max-length", *_ways_out(plan, sharded)]
    note = f"memory may run out: about {least}, with {free}{how}; try {' or '.join(ways)}"
    return MemoryDecision(recompute, note, tight=True)


def _kept_by_layer(config: Any, width: int, tokens: int, length: int, s: int) -> int:
    """Bytes that a layer without adapters keeps for its backward pass."""
    heads = _setting(config, "num_attention_heads") or 1  # a model without attention
    size = _setting(config, "head_dim") or width // heads
    kept = tokens * (3 * _FLOAT32 * width + 4 * s * heads * size + 3 * s * _inner_width(config, width))
    if config._attn_implementation == "eager":
        kept += 2 * _FLOAT32 * heads * tokens * length
    return kept


def _inner_width(config: Any, width: int) -> int:
    """Of the MLP; of a mixture, what the experts of one token have together."""
    names = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    dense = next((value for name in names if (value := _setting(config, name))), 4 * width)
    return (_setting(config, "moe_intermediate_size") or dense) * max(_setting(config, "num_experts_per_tok"), 1)


def _rank_rows(skeleton: Any, adapter: LoraAdapter) -> float:
    """Rank rows that a token meets in all modules; of a parameter with experts those of the experts that it is sent
    to."""
    config = skeleton.config.get_text_config()
    each = max(_setting(config, "num_experts_per_tok"), 1)
    return sum(
        sum(m.factors.rank for m in modules)
        * (min(each / len(modules), 1.0) if kind_of(modules[0]).of_experts else 1.0)
        for modules in adapter.targets.values()
    )


def _setting(config: Any, name: str) -> int:
    """A number of the config, the largest one where layers differ; 0 if there is none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' word for a setting that differs between layers
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((number for number in values if isinstance(number, int)), default=0)


def _layers_with_graph(skeleton: Any, layers: Sequence[Any], adapters: Sequence[LoraAdapter]) -> int:
    """How many layers take part in the gradient: from the lowest adapted one up."""
    place = {id(layer): index for index, layer in enumerate(layers)}
    prefixes = {name + ".": place[id(module)] for name, module in skeleton.named_modules() if id(module) in place}
    lowest = len(layers)
    for module in (module for adapter in adapters for module in adapter.modules.values()):
        if module.kind == "embedding":
            return len(layers)
        owner = next((index for prefix, index in prefixes.items() if module.name.startswith(prefix)), len(layers))
        lowest = min(lowest, owner)
    return len(layers) - lowest


def _weights(skeleton: Any, layers: Sequence[Any], shards: int) -> int:
    """Numbers on one device. A sharded model has its share, the layer that runs, the next one, and the head whole."""
    total = _numbers_of(skeleton)
    if shards == 1:
        return total
    largest = max((_numbers_of(layer) for layer in layers), default=0)
    return total // shards + 2 * largest + _numbers_of(skeleton.get_output_embeddings())


def _saved_by_bits(plan: BasePlan, s: int) -> int:
    """Bytes that quantised layers do not take; the largest of them is there in full while it computes."""
    if plan.quantisation is None:
        return 0
    head, skipped = plan.skeleton.get_output_embeddings(), plan.quantisation.skipped or ()
    numbers = [
        module.weight.numel()
        for name, module in plan.skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not any(part in name for part in skipped)
    ]
    return round((s - plan.quantisation.bytes_a_number) * sum(numbers)) - s * max(numbers, default=0)


def _numbers_of(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _head(config: Any, vocabulary: int, width: int, tokens: int, s: int) -> int:
    """Bytes at the head if every token is scored: of a chunk of logits, unless the model acts on them itself."""
    acting = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    whole = any(getattr(config, name, None) not in (None, 1.0) for name in acting)
    rows = tokens if whole else min(tokens, max(1, CHUNK_BYTES // (_FLOAT32 * vocabulary)))
    # The logits, their softmax and its logarithm in float32 or better; in a narrower dtype once more, before and after.
    a_logit = 2 * max(s, _FLOAT32) + (2 * s if s < _FLOAT32 else 0)
    return rows * vocabulary * a_logit + 2 * tokens * width * s


def _ways_out(plan: BasePlan, sharded: bool) -> list[str]:
    """What makes the weights smaller on a device."""
    narrower = ["--dtype bfloat16"] if plan.dtype.itemsize > 2 else []
    fewer_bits = [] if sharded or plan.quantisation is not None else ["--quantise nf4"]
    spread = [] if sharded else ["--device-map auto on several CUDA devices"]
    return narrower + fewer_bits + spread or ["more processes"]
