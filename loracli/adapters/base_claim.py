"""Which base model adapters name. A claim, not a fact: shapes are checked when the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loracli.errors import IncompatibleAdapters


@dataclass(frozen=True)
class BaseClaim:
    """What one adapter's config names; None for what it does not name."""

    base_model: str | None
    revision: str | None


def agreed_base(claims: Mapping[str, BaseClaim], *, way_out: str) -> BaseClaim:
    """The one base model, and revision if any, that all adapters which name one agree on.

    Args:
        claims: by the adapter's reference.
        way_out: what the user can do, for the error.
    Raises:
        IncompatibleAdapters: if they name different models or revisions, none, or a path, which only their author has.
    """
    named = {text: claim for text, claim in claims.items() if claim.base_model}
    models = {claim.base_model for claim in named.values()}
    revisions = {claim.revision for claim in named.values() if claim.revision}
    if not models:
        raise IncompatibleAdapters("no adapter names its base model", hint=way_out)
    if len(models) > 1 or len(revisions) > 1:
        said = ", ".join(
            f"{text} names {'@'.join(filter(None, (claim.base_model, claim.revision)))}"
            for text, claim in named.items()
        )
        raise IncompatibleAdapters(f"the adapters name different base models: {said}", hint=way_out)
    model = models.pop()
    if model is None or is_path(model):
        raise IncompatibleAdapters(
            f"the adapters name the base model {model}, a path on their author's machine", hint=way_out
        )
    return BaseClaim(model, next(iter(revisions), None))


def is_path(name: str) -> bool:
    """Whether a base model's name can only be a directory, never a Hub id."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name
