"""What a shell may complete an argument to. Runs at a keystroke: no torch, no network, nothing read but names."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import typer

from loracli.system.files import CONFIG_FILE

CACHED = "models--"  # what the name of a model's folder in a Hub cache begins with


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Adapters in the folder that is being typed, and those in the Hub cache.

    What can only be a path is left to the shell.
    """
    if incomplete.startswith((".", "/", "~")):
        return []
    return [*_local(incomplete), *_cached(ctx.params.get("cache_dir"))]


def complete_mixing() -> list[str]:
    """What `--mixing` takes."""
    from loracli.recipe.recipe import MIXING_KINDS

    return [*MIXING_KINDS, "auto"]


def _local(incomplete: str) -> list[tuple[str, str]]:
    pattern = os.path.join(glob.escape(os.path.dirname(incomplete)), "*", CONFIG_FILE)
    return [(os.path.dirname(path), "a directory") for path in sorted(glob.glob(pattern))]


def _cached(cache_dir: Path | None) -> list[tuple[str, str]]:
    """Repositories of which any snapshot is an adapter."""
    if cache_dir is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        cache_dir = Path(HF_HUB_CACHE)
    folder = glob.escape(str(cache_dir))
    found = glob.glob(os.path.join(folder, f"{CACHED}*", "snapshots", "*", CONFIG_FILE))
    names = {Path(path).parents[2].name.removeprefix(CACHED).replace("--", "/") for path in found}
    return [(name, "in the Hub cache") for name in sorted(names)]
