"""Which modules PEFT puts LoRA on, by the fields of a config. Its rule (`check_target_module_exists` in tuners_utils.py
of peft 0.21):

    target_modules        a list: a module is named whole, whatever its layer, or by an end of its name behind a dot;
                          a text: a regular expression for the whole name
    layers_to_transform   what is named by an end lies in one of these layers
    layers_pattern        whose number follows one of these names; without it, the first number behind two components
    exclude_modules       takes out what it names, by the same rule as target_modules
    modules_to_save       takes out what lies in a module that it names

With `ensure_weight_tying` a module that is tied to a targeted embedding gets the embedding's factors transposed,
whatever the fields say of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loracli.adapters.patterns import ModulePatterns, PatternError

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of the two factors of a module
_Named = frozenset[str] | ModulePatterns[bool]
_MOST = 256  # names in modules_to_save and in layers_pattern; each is held against every module


@dataclass(frozen=True)
class Targets:
    """Those of one config; a field that says nothing is None or empty.

    Args:
        modules: `target_modules`.
        layers: `layers_to_transform`.
        layers_patterns: `layers_pattern`.
        excluded: `exclude_modules`.
        saved: `modules_to_save`.
        unread: why not all can be told; None where it can.
    """

    modules: _Named | None = None
    layers: frozenset[int] = frozenset()
    layers_patterns: tuple[str, ...] = ()
    excluded: _Named = frozenset()
    saved: frozenset[str] = frozenset()
    unread: str | None = None

    def obstacle(self, module: str) -> str | None:
        """Why PEFT leaves a module alone, to be said before its name; None if it does not, or it cannot be told."""
        if _names(self.excluded, module):
            return "exclude_modules names"
        if any(f".{saved}." in f".{module}." for saved in self.saved):
            return "modules_to_save names what holds"
        if self.modules is None:
            return None
        if not _names(self.modules, module):
            return "target_modules does not name"
        whole = not isinstance(self.modules, frozenset) or module in self.modules
        if self.layers and not whole and self._layer(module) not in self.layers:
            return "layers_to_transform leaves out"
        return None

    def _layer(self, module: str) -> int | None:
        words = module.split(".")
        if not self.layers_patterns:
            return next((int(word) for word in words[2:-1] if word.isdecimal()), None)
        for pattern in self.layers_patterns:
            before = pattern.split(".")
            for end in range(len(before), len(words) - 1):
                if words[end].isdecimal() and words[end - len(before) : end] == before:
                    return int(words[end])
        return None


def read_targets(fields: Mapping[str, Any]) -> Targets:
    """Those of the fields of an `adapter_config.json`, which may be any."""
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
    layers = [layers] if type(layers) is int else layers if isinstance(layers, list) else []
    patterns = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
    patterns = tuple(pattern for pattern in patterns if isinstance(pattern, str) and pattern)
    saved = fields.get("modules_to_save")
    saved = saved if isinstance(saved, list) else []
    unread = None
    if max(len(saved), len(patterns)) > _MOST:
        saved, layers, unread = [], [], f"modules_to_save or layers_pattern has more than {_MOST} names"
    if layers and not all(pattern.replace(".", "").replace("_", "").isalnum() for pattern in patterns):
        layers, unread = [], "layers_pattern is a regular expression of a stranger, which is not run"
    named: dict[str, _Named | None] = {}
    for field in ("target_modules", "exclude_modules"):
        try:
            named[field] = _named(fields.get(field))
        except PatternError:
            named[field], unread = None, f"{field} is a regular expression of a stranger, which is not run"
    return Targets(
        modules=named["target_modules"],
        layers=frozenset(layer for layer in layers if type(layer) is int),
        layers_patterns=patterns,
        excluded=named["exclude_modules"] or frozenset(),
        saved=frozenset(name for name in saved if isinstance(name, str)),
        unread=unread,
    )


def _named(value: object) -> _Named | None:
    """Raises PatternError for a regular expression that is not read; None where all may be meant."""
    if isinstance(value, list):
        return frozenset(name for name in value if isinstance(name, str))
    if isinstance(value, str) and value and value.lower() not in ("all", "all-linear"):
        return ModulePatterns({f"^(?:{value})$": True})
    return None


def _names(named: _Named, module: str) -> bool:
    if isinstance(named, ModulePatterns):
        return named.get(module, False)
    return any(module.split(".", start)[-1] in named for start in range(module.count(".") + 1))


def tied_modules(embeddings: Mapping[str, Shapes], others: Mapping[str, Shapes]) -> dict[str, str]:
    """Which of the other modules may be tied to which embedding: their factors A and B have the shapes of its B and A,
    transposed."""
    owners = {(b[::-1], a[::-1]): name for name, (a, b) in embeddings.items()}
    return {name: owners[shapes] for name, shapes in others.items() if shapes in owners}
