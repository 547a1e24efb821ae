"""The mixing of every module, as a recipe keeps it: the kinds there are, and what is numbers and what tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from loracli.adapters.names import layer, target_of
from loracli.system.document import AtMost, Matches, added

MAX_MODULES = 200_000  # as many as tensors in a file
Sha256 = Annotated[str, Matches(re.compile(r"[0-9a-f]{64}"), "a sha256, 64 hexadecimal digits")]
MixingKind = Literal["adapter", "layer", "module", "rank", "core", "factors"]
MIXING_KINDS: tuple[MixingKind, ...] = get_args(MixingKind)
INLINE_KINDS: tuple[MixingKind, ...] = ("adapter", "layer", "module")  # their numbers stand in the recipe itself
# The other kinds are tensors: `<module>.<part>` for each module and each of these parts.
TENSOR_PARTS: dict[MixingKind, tuple[str, ...]] = {
    "rank": ("mixing",),
    "core": ("mixing",),
    "factors": ("lora_A", "lora_B"),
}
EVERY_MODULE = "*"  # the one group of the mixing `adapter`


def group_name(module: str, kind: MixingKind) -> str:
    """The group whose weights `module` takes: every module together, those of its decoder layer, or itself; the experts
    of a parameter have one weight, and so have the groups of a convolution."""
    if kind == "adapter":
        return EVERY_MODULE
    return layer(module) if kind == "layer" else target_of(module)


@dataclass(frozen=True)
class RecipeMixing:
    """The mixing of every module.

        dW_l = B_l M_l A_l    A_l = [A_1; ...; A_N] (R, in), B_l = [s_1 B_1, ..., s_N B_N] (out, R)

    Args:
        kind: how free M_l is: `adapter`, `layer` and `module` have one weight for each adapter, blockdiag(w_i I);
            `rank` one for each singular direction of an adapter; `core` a full M_l; `factors` has trained A_l and B_l
            themselves. The last three are tensors: `loracli.recipe.tensors` makes this object of them.
        weights: by group, one for each adapter in order, null where the adapter changes nothing there. With tensors a
            summary by module: the weights of the adapters that come closest to the composition.
        numbers: how many numbers were fitted.
        tensors_sha256: of the file with the tensors, None without.
        tensors: by name, float64 M_l (R, R), or float32 lora_A (r, in) and lora_B (out, r); not part of the document.
        unreached: modules that the base called for no training record; a weight of theirs alone is the start's.
        bypassed: of those, the ones whose weight the base reads without calling the layer: their update acts neither in
            the fit nor in PEFT, but would in a weight that it is merged into.
    """

    kind: MixingKind
    weights: Annotated[dict[str, tuple[float | None, ...]], AtMost(MAX_MODULES)]
    numbers: int
    tensors_sha256: Sha256 | None = None
    tensors: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    unreached: tuple[str, ...] = added(4, ())
    bypassed: tuple[str, ...] = added(4, ())


@dataclass(frozen=True)
class RecipeActivations:
    """What calibration records show of the input x of every module: G = E[z z^T], z = A x, over their tokens.

    Args:
        records: how many of the training records.
        tokens: in them.
        sha256: of the file with G, which is beside the recipe.
        moments: `<module>.moment`, G (R, R) in float32, with A (R, in) as in the mixing's tensors: the adapters' own,
            stacked, or the trained one. Not part of the document; empty until they are read.
    """

    records: int
    tokens: int
    sha256: Sha256
    moments: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def tensors_path(recipe: Path) -> Path:
    """The file of the tensors of the recipe at this path."""
    return recipe.with_suffix(".safetensors")


def activations_path(recipe: Path) -> Path:
    """The file of the second moments of the recipe at this path."""
    return recipe.with_name(f"{recipe.name}.activations.safetensors")
