"""Which files make an adapter, and which a base model; everything else in a repository is left there."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loracli.adapters.hub.source import Kind, Listing, Source
from loracli.adapters.references import URI_PREFIX
from loracli.errors import AdapterNotFound, InputError, UnsupportedAdapter
from loracli.system.files import CONFIG_FILE, MLX_TENSOR_FILE, README_FILE, TENSOR_FILE, TENSOR_FILES

PICKLE_NAME = "adapter_model.bin"
# In the order of download: whoever finds the weights in the cache knows that the rest came before them.
ADAPTER_FILES = (README_FILE, CONFIG_FILE, *TENSOR_FILES)

BASE_CONFIG = "config.json"
BASE_WEIGHTS = "model.safetensors"
BASE_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
BASE_FILES = (
    BASE_CONFIG,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    *BASE_TOKENIZERS,
    f"{BASE_WEIGHTS}.index.json",
)
_SHARD = re.compile(r"(?!consolidated)[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")  # consolidated*: the weights once more
_NUMBERED_SHARD = re.compile(r".+-\d+-of-(\d+)\.safetensors")
_PICKLE = re.compile(r".+\.(bin|pt|pth|pkl|ckpt)")


def _pick_adapter_files(source: Source, listing: Listing) -> list[str]:
    if source.folder and not listing.files:
        raise source.rejected(f"the repository has no folder '{source.folder}'", hint=_other_folders(source, listing))
    check_adapter(listing.files, source.name, hint=_other_folders(source, listing))
    spare = {MLX_TENSOR_FILE} if TENSOR_FILE in listing.files else set()
    return [name for name in ADAPTER_FILES if name in listing.files and name not in spare]


def check_adapter(names: Iterable[str], where: str, hint: str | None = None) -> None:
    present = set(names)
    if CONFIG_FILE not in present:
        if hint is None and BASE_CONFIG in present:
            hint = "it looks like a whole model; an adapter is what PEFT's save_pretrained writes"
        raise AdapterNotFound(f"no {CONFIG_FILE} in it", where=where, hint=hint)
    if not present.isdisjoint(TENSOR_FILES):
        return
    if PICKLE_NAME in present:
        raise UnsupportedAdapter(
            f"its weights are only in {PICKLE_NAME}, a pickle file, which can run code when it is opened",
            where=where,
            hint=f"only {TENSOR_FILE} is read: ask the author for it, or load and save the adapter once with PEFT",
        )
    raise AdapterNotFound(f"no {TENSOR_FILE} in it", where=where, hint=hint)


def _other_folders(source: Source, listing: Listing) -> str | None:
    at = f"@{source.revision}" if source.revision else ""
    named = [f"{URI_PREFIX}{source.repo_id}{at}/{f}".rstrip("/") for f in listing.adapter_folders if f != source.folder]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"the repository has adapters at {', '.join(named[:5])}{more}" if named else None


def _is_whole_adapter(names: set[str]) -> bool:
    return CONFIG_FILE in names and not names.isdisjoint(TENSOR_FILES)


def _pick_base_files(source: Source, listing: Listing) -> list[str]:
    names = listing.files
    if CONFIG_FILE in names:
        raise source.rejected("this is an adapter, not a base model", hint="name the model that it was trained on")
    # As transformers chooses: one file if there is one, else the shards.
    weights = [BASE_WEIGHTS] if BASE_WEIGHTS in names else sorted(name for name in names if _SHARD.fullmatch(name))
    if BASE_CONFIG not in names:
        raise source.rejected(f"no {BASE_CONFIG} in it", hint="a base model is a transformers model repository")
    if not weights:
        found = next((name for name in names if _PICKLE.fullmatch(name)), None)
        what = f"its weights are pickle files ({found})" if found else "no weights in it"
        raise source.rejected(f"{what}; only safetensors are read", hint="look for a converted copy or a pull request")
    return [name for name in BASE_FILES if name in names] + weights


def _pick_base_config(source: Source, listing: Listing) -> list[str]:
    if BASE_CONFIG not in listing.files:
        raise source.rejected(f"no {BASE_CONFIG} in it", hint="a base model is a transformers model repository")
    return [BASE_CONFIG]


def _is_whole_base(names: set[str]) -> bool:
    """Config, a tokenizer, and the one weights file or every numbered shard."""
    if BASE_CONFIG not in names or names.isdisjoint(BASE_TOKENIZERS):
        return False
    shards = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name)) and _SHARD.fullmatch(name)]
    return BASE_WEIGHTS in names or (bool(shards) and all(int(shard[1]) == len(shards) for shard in shards))


ADAPTER = Kind(AdapterNotFound, _pick_adapter_files, _is_whole_adapter)
BASE = Kind(InputError, _pick_base_files, _is_whole_base)
BASE_CONFIG_ALONE = Kind(InputError, _pick_base_config, lambda names: BASE_CONFIG in names)
