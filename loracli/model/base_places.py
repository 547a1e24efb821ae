"""Where a base has what an adapter calls by another name: by the tables with which transformers renames a checkpoint's
tensors, as PEFT uses them for adapters (peft 0.21, utils/transformers_weight_conversion.py).

An adapter names modules as they were where it was trained: `language_model.model.layers.0` before transformers 4.52,
`block_sparse_moe.experts.3.w1` before version 5. Where no table knows a name, it may be that of the text model that the
base has inside, or of a model that has the base's text model inside; PEFT does not look for these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import BasePlace
from loracli.adapters.on_base import adapted_names, without_wrapper
from loracli.errors import BaseModelMismatch
from loracli.model.checkpoint import LoadingRules

MAX_NAME = 512  # longer ones are not tried: no model has them, and tables are patterns


class BaseNames:
    """The names of a base model, and what becomes of others.

    Args:
        skeleton: the model without numbers.
    """

    def __init__(self, skeleton: Any) -> None:
        self._rules = LoadingRules(skeleton)
        matrices = {name for name, tensor in skeleton.named_parameters(remove_duplicate=False) if tensor.dim() == 3}
        self._known = {name for name, _ in skeleton.named_modules(remove_duplicate=False)} | matrices
        self._inner = _text_model(skeleton)

    def by_tables(self, name: str, parameter: str) -> BasePlace | None:
        """The place of a module, or of a parameter with experts, by its own name or by transformers' tables.

        Args:
            name: the adapter's.
            parameter: one of its parameters, by the same naming.
        Raises:
            BaseModelMismatch: if the base makes the parameter of others in a way that updates cannot follow.
        """
        if name in self._known:
            return BasePlace(name)
        if len(parameter) > MAX_NAME:
            return None
        loaded = self._rules.loaded(parameter)
        if loaded.parts_of_experts is not None:
            part, parts = loaded.parts_of_experts
            return BasePlace(loaded.parameter, loaded.expert, part, parts) if loaded.parameter in self._known else None
        target = loaded.parameter.removesuffix(parameter.removeprefix(name))
        if target not in self._known or not self._rules.has(loaded.parameter):
            return None
        if loaded.computed:
            raise BaseModelMismatch(
                f"{name} is adapted, and the base model makes its {loaded.parameter} of several tensors",
                hint="train the adapter on the base model as transformers has it now",
            )
        return BasePlace(target)

    def places(self, adapter: LoraAdapter) -> dict[str, BasePlace]:
        """The places of all that the adapter says of the base; what is not found is left out.

        Raises:
            BaseModelMismatch: as `by_tables`.
        """
        wanted = adapted_names(adapter)
        found = {name: place for name, path in wanted.items() if (place := self.by_tables(name, path)) is not None}
        missing = [name for name in wanted if name not in found]
        for respelt in self._respellings() if missing else ():
            places = {
                name: place
                for name in missing
                if (place := self.by_tables(respelt(name), respelt(wanted[name]))) is not None
            }
            if len(places) == len(missing):
                return found | places
        return found

    def _respellings(self) -> list[Callable[[str], str]]:
        """Of names in a model around the base's text model, in the text model inside the base, and in that without its
        head."""
        respellings: list[Callable[[str], str]] = [without_wrapper]
        if self._inner is not None:
            path, prefix = self._inner
            respellings += [
                lambda name: path + name.removeprefix(prefix) if name.startswith(f"{prefix}.") else name,
                lambda name: f"{path}.{name}",
            ]
        return respellings


def _text_model(skeleton: Any) -> tuple[str, str] | None:
    """The path of the text model in the base, and the name that it has in its own causal language model."""
    decoder = skeleton.get_decoder()
    path = next((name for name, module in skeleton.named_modules() if module is decoder), "")
    prefix = getattr(decoder, "base_model_prefix", "")
    return (path, prefix) if path and prefix and path != prefix else None
