"""What `inspect` tells of adapters: facts for a table or a JSON document, from the files alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter, kernels_of, read_adapter
from loracli.adapters.compatibility import Overlap, overlaps_of, problems_of
from loracli.adapters.names import leaf
from loracli.algebra.factors import inner_product
from loracli.hub.fetch import fetch_adapter
from loracli.progress import SILENT, Progress


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter.

    Args:
        reference: as it was typed.
        commit: pinned commit, None for a local directory.
        base_model: the base it names, or None.
        ranks: that occur, ascending; of a grouped convolution that of a group.
        scaling: lowest and highest s of a module.
        lora_alpha: from the config.
        use_rslora: from the config.
        leaves: last names of the adapted modules.
        modules: how many are adapted; the experts of a parameter count as one, and so do the groups of a convolution.
        parameters: in all factors.
        dtype: the widest of the factors.
        norm: |dW|_F over all modules.
        lora_bias: whether its lora_B have biases.
        modules_to_save: modules that it replaces as a whole.
        convolutions: that are among the modules.
    """

    reference: str
    commit: str | None
    base_model: str | None
    ranks: tuple[int, ...]
    scaling: tuple[float, float]
    lora_alpha: float
    use_rslora: bool
    leaves: tuple[str, ...]
    modules: int
    parameters: int
    dtype: str
    norm: float
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    convolutions: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Adapters side by side: each alone, each pair's overlap, and every reason why they cannot be composed."""

    adapters: tuple[AdapterSummary, ...]
    overlaps: tuple[Overlap, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return {
            "adapters": [dataclasses.asdict(adapter) for adapter in self.adapters],
            "overlaps": [dataclasses.asdict(overlap) for overlap in self.overlaps],
            "composable": not self.problems,
            "problems": list(self.problems),
        }


def inspect_adapters(
    references: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Inspection:
    """Reads adapters and says what they are and whether they fit each other.

    Raises:
        MalformedAdapter, UnsupportedAdapter: as `read_adapter`, for the first adapter that cannot be read.
    """
    adapters = [
        read_adapter(fetch_adapter(r, revision=revision, cache_dir=cache_dir, token=token, progress=progress))
        for r in references
    ]
    problems = problems_of(adapters)
    return Inspection(
        adapters=tuple(_summary(adapter) for adapter in adapters),
        overlaps=tuple(overlaps_of(adapters)),
        problems=tuple(problems),
    )


def _summary(adapter: LoraAdapter) -> AdapterSummary:
    factors = [module.factors for module in adapter.modules.values()]
    scaling = [f.scaling for f in factors]
    return AdapterSummary(
        reference=adapter.reference,
        commit=adapter.commit,
        base_model=adapter.config.base_model,
        ranks=adapter.ranks,
        scaling=(min(scaling), max(scaling)),
        lora_alpha=adapter.config.lora_alpha,
        use_rslora=adapter.config.use_rslora,
        leaves=tuple(sorted({leaf(name) for name in adapter.modules})),
        modules=len(adapter.targets),
        parameters=sum(f.lora_A.numel() + f.lora_B.numel() for f in factors),
        dtype=str(adapter.dtype).removeprefix("torch."),
        norm=sum(inner_product(f, f) for f in factors) ** 0.5,
        lora_bias=adapter.config.lora_bias,
        modules_to_save=tuple(adapter.saved),
        convolutions=tuple(kernels_of([adapter])),
    )
