"""Kinds of modules, and the base model's modules as a recipe and an export name them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from loracli.system.document import Matches, added

ModuleKind = Literal["linear", "conv1d", "embedding", "parameter", "experts", "convolution", "other"]
MAX_EXPERTS = 1 << 14  # of a parameter; for each there is an update, if only of zeros


@dataclass(frozen=True)
class BaseModule:
    """A module of the base model that a targeted leaf name matches; `other` kinds cannot carry an adapter.

    The kind `experts` is a parameter with a matrix for each expert; the sizes are those of one, as its factors have
    them, and `experts` is how many there are (0 in recipes before schema 4). `parameter` is a module of another class
    with a matrix as its weight, as a mixture's router is.
    """

    name: Annotated[str, Matches(re.compile(r"[\w.-]{1,1000}"), "the name of a module")]
    kind: ModuleKind
    in_features: int
    out_features: int
    experts: int = added(4, 0)
