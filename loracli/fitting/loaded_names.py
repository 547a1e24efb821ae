"""Which parameter of the model a tensor of its checkpoint becomes, by transformers' own rules.

A checkpoint may leave out or add the prefix of the inner model (GPT-2's `h.0.attn.c_attn.weight` is the model's
`transformer.h.0.attn.c_attn.weight`), be renamed by a table, or be computed from several tensors, as fused experts are.
transformers applies its tables when it loads (`core_model_loading.rename_source_key`, 5.3 to 5.23); they are asked here
instead of guessed at, without reading a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LoadedNames:
    """Where the parameters of a model come from.

    Args:
        stored: names in the checkpoint that become a parameter as they are, by the parameter's name.
        computed: names in the checkpoint of the tensors that a parameter is made of, by the parameter's name.
    """

    stored: dict[str, tuple[str, ...]]
    computed: dict[str, tuple[str, ...]]


def loaded_names(skeleton: Any, names: Iterable[str]) -> LoadedNames:
    """How the tensors of these names load into a model without numbers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = {name: tensor for name, tensor in _every_parameter(skeleton)}
    stored: dict[str, tuple[str, ...]] = {}
    computed: dict[str, tuple[str, ...]] = {}
    for name in sorted(names):
        parameter, converter = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, own)
        found = stored if converter is None else computed
        found[parameter] = (*found.get(parameter, ()), name)
    return LoadedNames(stored, computed)


def tied_parameters(skeleton: nn.Module) -> dict[str, tuple[str, ...]]:
    """By name of each parameter, the names of all that are the same one, itself included."""
    groups: dict[int, list[str]] = {}
    for name, parameter in _every_parameter(skeleton):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(sorted(group)) for group in groups.values() for name in group}


def _every_parameter(skeleton: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return skeleton.named_parameters(remove_duplicate=False)
