"""A base model as far as its config tells: found without any weight."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from loracli.adapters.base_claim import is_path
from loracli.adapters.hub import fetch_base
from loracli.errors import HubUnreachable, InputError, UsageError
from loracli.fitting.base import BasePlan, BaseReference, plan_base
from loracli.progress import SILENT, Progress

WAY_OUT = "give a directory that holds the base's config.json with --base"


def plan_from_config(base: str, *, revision: str | None = None, progress: Progress = SILENT) -> tuple[BasePlan, str]:
    """The plan of a base model, and the sha256 of its config.

    Args:
        base: a local directory with a config.json, or a Hub id, of which only config.json is fetched.
        revision: of a base on the Hub.
        progress: told of a download.
    Raises:
        UsageError: if there is no such directory.
        BaseModelMismatch: if transformers knows no such causal language model.
        InputError, HubUnreachable: if the Hub does not give the config.
    """
    local = Path(base).expanduser()
    if local.is_dir():
        path = local
    elif is_path(base):
        raise UsageError(f"the base model {base} is no directory", hint=WAY_OUT)
    else:
        try:
            path = fetch_base(base, revision=revision, config_alone=True, progress=progress).path
        except (HubUnreachable, InputError) as error:
            error.hint = "; ".join(filter(None, [error.hint, WAY_OUT]))
            raise
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"the base model {base} has no config.json", hint=WAY_OUT)
    plan = plan_base(BaseReference(base, path, None), device="cpu")
    return plan, sha256(file.read_bytes()).hexdigest()
