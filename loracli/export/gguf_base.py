"""How llama.cpp has the base model of an export, from the base's config: a GGUF adapter needs that, and nothing else of
an export does."""

from __future__ import annotations

from collections.abc import Sequence

from loracli.adapters.adapter import LoraAdapter, kernels_of
from loracli.errors import BaseModelMismatch, UsageError
from loracli.export.gguf_file import load_gguf
from loracli.export.llama_cpp import LlamaCppBase, llama_cpp_base
from loracli.model.base import WAY_OUT, plan_from_config
from loracli.progress import SILENT, Progress


def find_llama_cpp_base(
    base: str,
    adapters: Sequence[LoraAdapter],
    *,
    revision: str | None = None,
    config_sha256: str | None = None,
    progress: Progress = SILENT,
) -> LlamaCppBase:
    """How llama.cpp has a base model.

    Args:
        base: a local directory with a config.json, or a Hub id, of which only config.json is fetched.
        adapters: that are composed.
        revision: of a base on the Hub.
        config_sha256: that the config has to have, None for any.
        progress: told of a download.
    Raises:
        UsageError: if an adapter changes a convolution, or the gguf package is not installed; others as of
            `plan_from_config`.
        BaseModelMismatch: if the config is another one, or its architecture cannot be had.
    """
    convolution = next(iter(kernels_of(adapters)), None)
    if convolution is not None:
        raise UsageError(
            f"no GGUF can hold the update of {convolution}, a convolution: llama.cpp has LoRA on matrices alone",
            hint="leave --gguf out, and run the export with PEFT",
        )
    load_gguf()
    plan, found = plan_from_config(base, revision=revision, progress=progress)
    if config_sha256 not in (None, found):
        raise BaseModelMismatch(
            f"the config.json of {base} is not the config of the base that the recipe was fitted on", hint=WAY_OUT
        )
    return llama_cpp_base(type(plan.skeleton).__name__, plan.config)
