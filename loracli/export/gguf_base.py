"""The base model's config, which a GGUF adapter needs and nothing else of an export does: found without any weight."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from loracli.adapters.base_claim import is_path
from loracli.adapters.hub import fetch_base_config
from loracli.errors import BaseModelMismatch, HubUnreachable, InputError, UsageError
from loracli.export.gguf_file import load_gguf
from loracli.export.llama_cpp import LlamaCppBase, llama_cpp_base
from loracli.fitting.base import BaseReference, plan_base
from loracli.progress import SILENT, Progress


def find_llama_cpp_base(
    base: str,
    *,
    revision: str | None = None,
    config_sha256: str | None = None,
    progress: Progress = SILENT,
) -> LlamaCppBase:
    """How llama.cpp has a base model.

    Args:
        base: a local directory with a config.json, or a Hub id, of which only config.json is fetched.
        revision: of a base on the Hub.
        config_sha256: that the config has to have, None for any.
        progress: told of a download.
    Raises:
        UsageError: if the gguf package is not installed, or there is no such directory.
        BaseModelMismatch: if the config is another one, or its architecture cannot be had.
        InputError, HubUnreachable: if the Hub does not give the config.
    """
    load_gguf()
    way_out = "give a directory that holds the base's config.json with --base"
    local = Path(base).expanduser()
    if local.is_dir():
        path = local
    elif is_path(base):
        raise UsageError(f"the base model {base} is no directory")
    else:
        try:
            path = fetch_base_config(base, revision=revision, progress=progress).path
        except (HubUnreachable, InputError) as error:
            error.hint = "; ".join(filter(None, [error.hint, way_out]))
            raise
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"the base model {base} has no config.json", hint=way_out)
    if config_sha256 not in (None, sha256(file.read_bytes()).hexdigest()):
        raise BaseModelMismatch(f"{file} is not the config of the base that the recipe was fitted on", hint=way_out)
    plan = plan_base(BaseReference(base, path, None), device="cpu")
    return llama_cpp_base(type(plan.skeleton).__name__, plan.config)
