"""What the files beside a base model's weights may not decide: which code is run, and which other files are read.

A base that an adapter names is a stranger's, and transformers does much of what its JSON files say. What names code is
not followed: it is taken out of the config before a model is made of it. What names another file, or makes a small file
cost without limit, is refused by name. Code itself (`auto_map`, `custom_generate`) is off in every call to transformers
besides, with `trust_remote_code=False`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loracli.errors import BaseModelMismatch, InputError, MalformedAdapter
from loracli.system.files import CONFIG_FILE
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import open_regular

CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
MAX_BYTES = 16 << 20
MAX_LAYERS = 4096  # and experts of one, and labels: each becomes a Python object, whatever the size of the file
MAX_TOKEN = (1 << 32) - 1  # of a tokenizer

# Taken out of the config, at every depth: transformers' own defaults hold.
IGNORED: dict[str, str] = {
    "auto_map": "classes in files of the repository",
    "custom_generate": "a folder of code, or a repository of it",
    "custom_pipelines": "classes in files of the repository",
    "trust_remote_code": "permission to run them",
    "code_revision": "a commit of code",
    "use_kernels": "kernels that are downloaded and run",
    "kernel_config": "kernels that are downloaded and run",
    "attn_implementation": "a kernel, as org/name",
    "_attn_implementation": "a kernel, as org/name",
    "_attn_implementation_internal": "a kernel, as org/name",
    "experts_implementation": "a kernel, as org/name",
    "_experts_implementation": "a kernel, as org/name",
    "_experts_implementation_internal": "a kernel, as org/name",
}
# Refused unless empty, at every depth.
REFUSED: dict[str, dict[str, str]] = {
    CONFIG: {
        "configuration_files": "names other files to read in its place",
        "transformers_weights": "names another file for the weights",
        "use_pretrained_backbone": "names another model to download",
        "checkpoint_path": "names another file for the weights",
        "pretrained_cfg": "names another model to download",
        "pretrained_cfg_overlay": "names another model to download",
    },
    TOKENIZER: {
        "fast_tokenizer_files": "names other files to read",
        "init_inputs": "names arguments of the tokenizer's class",
    },
    GENERATION: {},
}
_NESTED = frozenset({"quantization_config", "compression_config"})  # at the top they have an error of their own
_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:", "file:")
_COUNTS = re.compile(
    r"(?:\w+_)?(?:layers|depths?)|num_labels|(?:num|n)_(?:\w+_)?(?:layers?|experts|blocks|stages|codebooks|groups)"
)
# transformers hands every entry of that file to the tokenizer's class, where many a name has a meaning.
_TOKEN_NAMES = re.compile(r"\w+_token|(?:additional|extra)_special_tokens")
_TOKEN_FLAGS = frozenset({"lstrip", "rstrip", "normalized", "single_word", "special"})
_NEVER_OPENED = frozenset({"special_tokens_map_file", "added_tokens_file", "tokenizer_config_file"})


def check_base_files(folder: Path, name: str) -> None:
    """Refuses a base with a JSON file beside its weights that must not be followed.

    Args:
        folder: of the base.
        name: what errors call it.
    Raises:
        InputError: if it is an adapter too, which transformers would load along.
        BaseModelMismatch: naming the file and the key; or if a file is no JSON object within limits.
    """
    if os.path.lexists(folder / CONFIG_FILE):
        raise InputError(
            f"the base model {name} is an adapter: it holds {CONFIG_FILE}", hint="name the model that it was trained on"
        )
    for file in (*REFUSED, SPECIAL_TOKENS, ADDED_TOKENS):
        if not os.path.lexists(folder / file):
            continue
        fields = _read(folder / file)
        if file in REFUSED:
            found = ((key, _problem(file, path, key, value, folder)) for path, key, value in _entries(fields))
        else:
            found = ((key, _token_problem(file, key, value)) for key, value in fields.items())
        for key, reason in found:
            if reason is not None:
                raise BaseModelMismatch(
                    f"{file} of the base model {name} {reason}",
                    where=str(folder / file),
                    hint=f"give a copy of the model without {key} with --base, if you trust it",
                )


def neutralise(config: Any) -> Any:
    """transformers' config without what names code, in its own parts too; it is changed, and returned."""
    from transformers import PreTrainedConfig

    rest: list[Any] = [config]
    while rest:
        part = rest.pop()
        if isinstance(part, list):
            rest.extend(part)
            continue
        fields = vars(part) if isinstance(part, PreTrainedConfig) else part
        if not isinstance(fields, dict):
            continue
        for key in IGNORED.keys() & fields.keys():
            if isinstance(part, PreTrainedConfig) and key.endswith("_internal"):
                fields[key] = None  # which transformers reads, and settles by itself
            else:
                del fields[key]
        rest.extend(fields.values())
    return config


def _problem(file: str, path: str, key: str, value: Any, folder: Path) -> str | None:
    """What an entry says that is not followed; None if it may be there."""
    if value in (None, False, "", [], {}):
        return None
    refused = REFUSED[file]
    if key in refused and not (key == "transformers_weights" and value == "model.safetensors"):
        return f"{refused[key]}: {path}"
    if file == CONFIG:
        if key in _NESTED and path != key:
            return f"says that a part of it is quantised: {path}"
        count = _count(key, value)
        if count > MAX_LAYERS:
            return f"has {path} = {count}, and more than {MAX_LAYERS} are not taken"
        if isinstance(value, str) and value.startswith(_ELSEWHERE):
            return f"names another model to download: {path}"
    if key == "auto_map" and not isinstance(value, (dict, list)):
        return f"has no map of classes: {path}"
    if file == TOKENIZER:
        if key.endswith("_kwargs") and isinstance(value, dict) and any(isinstance(v, str) for v in value.values()):
            return f"names arguments of another library: {path}"
        if key.endswith("_file") and key not in _NEVER_OPENED and _leads_out(value, folder):
            return f"names a file outside of its folder: {path}"
    return None


def _count(key: str, value: Any) -> int:
    """How many layers, experts or the like an entry makes; 0 if it is about something else."""
    if key == "attention_types" and isinstance(value, list):  # of GPT-Neo: each kind as often as the number beside it
        pairs = (item for item in value if isinstance(item, list) and len(item) > 1)
        return sum(
            len(kinds) * max(times, 0)
            for kinds, times, *_ in pairs
            if isinstance(kinds, (str, list, dict)) and isinstance(times, int)
        )
    if not isinstance(value, (int, list)) or not _COUNTS.fullmatch(key):
        return 0
    if isinstance(value, int):
        return value
    counts = [item for item in value if isinstance(item, int)]
    # depths are those of stages, one after another; layers are also listed by their places
    return sum(max(count, 0) for count in counts) if key.endswith(("depth", "depths")) else max(counts, default=0)


def _token_problem(file: str, key: str, value: Any) -> str | None:
    """What an entry of a list of tokens says that is not followed; None if it may be there."""
    if file == ADDED_TOKENS:
        if type(value) is int and 0 <= value <= MAX_TOKEN:
            return None
        return f"has an entry that is not a token with its number: {key}"
    if not _TOKEN_NAMES.fullmatch(key):
        return f"has an entry that is not a special token: {key}"
    several = key.endswith("_tokens")
    if several and isinstance(value, dict) and "content" not in value:
        value = list(value.values())  # by the names of a model's own
    tokens = value if several and isinstance(value, list) else [value]
    return None if all(map(_is_token, tokens)) else f"has an entry that is not a token: {key}"


def _is_token(value: Any) -> bool:
    if isinstance(value, dict):  # tokenizers' AddedToken
        flags = value.keys() - {"content", "__type"}
        return (
            isinstance(value.get("content"), str)
            and value.get("__type", "AddedToken") == "AddedToken"
            and flags <= _TOKEN_FLAGS
            and all(isinstance(value[flag], bool) for flag in flags)
        )
    return value is None or isinstance(value, str)


def _leads_out(value: Any, folder: Path) -> bool:
    """Whether there is a file of that name and it is not the base's own; what is not there, cannot be read."""
    if not isinstance(value, str) or "\0" in value or not os.path.exists(value):
        return False
    own = folder / os.path.basename(value)
    return not (own.exists() and os.path.samefile(own, value))


def _entries(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Every entry of every object in it: its place, its key, its value."""
    rest: list[tuple[str, Any]] = [("", document)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, list):
            rest.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                place = f"{path}.{key}" if path else key
                yield place, key, item
                rest.append((place, item))


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            data: bytes = file.read(MAX_BYTES + 1)
        fields = parse_json(data) if len(data) <= MAX_BYTES else None
    except MalformedAdapter as error:
        raise BaseModelMismatch(f"the base model's {path.name} cannot be read: {error.what}", where=str(path)) from None
    except StrictJsonError as error:
        raise BaseModelMismatch(f"the base model's {path.name} is {error}", where=str(path)) from None
    if not isinstance(fields, dict):
        raise BaseModelMismatch(f"the base model's {path.name} is not a JSON object of at most 16 MiB", where=str(path))
    return fields
