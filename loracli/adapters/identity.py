"""What a recipe and an export keep of an adapter, so that it can be found again and proven to be the same."""

from __future__ import annotations

from loracli.adapters.adapter import LoraAdapter
from loracli.recipe import RecipeAdapter


def identity_of(adapter: LoraAdapter, reference: str) -> RecipeAdapter:
    """The adapter by the name it goes by there, with its origin and the sha256 of its files."""
    return RecipeAdapter(
        reference=reference,
        repo_id=adapter.source.repo_id,
        subfolder=adapter.source.subfolder,
        commit=adapter.commit,
        sha256=dict(adapter.sha256),
        rank=max(adapter.ranks),
        lora_alpha=adapter.config.lora_alpha,
        use_rslora=adapter.config.use_rslora,
        dtype=str(adapter.dtype).removeprefix("torch."),
        base_model=adapter.config.base_model,
    )
