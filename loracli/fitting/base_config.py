"""A base model as far as its config tells: found without any weight."""

from __future__ import annotations

from hashlib import sha256

from loracli.errors import HubUnreachable, InputError
from loracli.fitting.base import WAY_OUT, BasePlan, BaseReference, base_directory, plan_base
from loracli.hub.fetch import fetch_base
from loracli.progress import SILENT, Progress


def plan_from_config(base: str, *, revision: str | None = None, progress: Progress = SILENT) -> tuple[BasePlan, str]:
    """The plan of a base model, and the sha256 of its config.

    Args:
        base: a local directory with a config.json, or a Hub id, of which only config.json is fetched.
        revision: of a base on the Hub.
        progress: told of a download.
    Raises:
        InputError, UsageError: as `base_directory`.
        BaseModelMismatch: if transformers knows no such causal language model.
        InputError, HubUnreachable: if the Hub does not give the config.
    """
    path = base_directory(base, revision=revision)
    if path is None:
        try:
            path = fetch_base(base, revision=revision, config_alone=True, progress=progress).path
        except (HubUnreachable, InputError) as error:
            error.hint = "; ".join(filter(None, [error.hint, WAY_OUT]))
            raise
    plan = plan_base(BaseReference(base, path, None), device="cpu")
    return plan, sha256((path / "config.json").read_bytes()).hexdigest()
