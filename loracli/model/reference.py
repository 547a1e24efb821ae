"""A base model as it is found: which one is meant, where it is, and what it may not decide.

A base that an adapter names is a stranger's, and transformers does much of what the JSON files beside its weights say:
which code is run, and which other files are read. What names code is not followed: it is taken out of the config before
a model is made of it. What names another file, or makes a small file cost without limit, is refused by name. Code
itself (`auto_map`, `custom_generate`) is off in every call to transformers besides, with `trust_remote_code=False`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter, kernels_of
from loracli.adapters.claims import hub_name, other_bases, say_other_bases, way_out_of
from loracli.errors import (
    AccessDenied,
    BaseModelMismatch,
    HubUnreachable,
    InputError,
    IntegrityError,
    LoracatError,
    UnsupportedAdapter,
    UsageError,
)
from loracli.hub.fetch import fetch_base
from loracli.hub.references import (
    URI_PREFIX,
    BaseClaim,
    Named,
    agreed_base,
    distinct_bases,
    is_hub_id,
    is_revision,
    not_on_the_hub,
)
from loracli.model.quantisation import Quantisation, read_quantisation
from loracli.progress import SILENT, Progress
from loracli.recipe.record import RecipeBase
from loracli.system.files import CONFIG_FILE, file_sha256
from loracli.system.near import hints, holding, near_path
from loracli.system.strict_json import read_object

WAY_OUT = "give a directory that holds the base's config.json with --base, or its Hub id"


@dataclass(frozen=True)
class BaseReference:
    """Which base model, before it is loaded.

    Args:
        id: the name that an export will carry: a Hub id where there is one.
        path: the directory with config, tokenizer and safetensors.
        commit: of the Hub repository, None for a local directory.
    """

    id: str
    path: Path
    commit: str | None


def find_base(
    adapters: Sequence[LoraAdapter],
    base: Named | BaseClaim | None,
    *,
    revision: str | None = None,
    check: Callable[[BaseReference], object] = lambda base: None,
    progress: Progress = SILENT,
) -> BaseReference:
    """The base model to use: `base`, or what all adapters agree on, fetched from the Hub unless it is a local
    directory.

    Args:
        adapters: that are run in it.
        base: text that the user named; what a recipe or a record claims; None for what the adapters claim.
        revision: that the user named, for a base on the Hub.
        check: called once its config.json is there and before its weights need be; whoever will run it has
            `session.runs_here` look whether that can be.
        progress: told of a download.
    Raises:
        LoracatError: as `check`.
        IncompatibleAdapters: if no base is given and the adapters name none, or what is no name on the Hub.
        UnsupportedAdapter: if an adapter changes a convolution.
        InputError, UsageError: as `locate_base`.
    """
    _refuse_convolutions(adapters)
    stated = {adapter.reference: adapter.config.base_model for adapter in adapters}
    claims = distinct_bases(stated.values())
    if base is None:
        base = agreed_base(
            {a.reference: BaseClaim(a.config.base_model, a.config.base_revision) for a in adapters},
            way_out=way_out_of(stated).hint if len(claims) > 1 else "give the base with --base",
        )
    place = locate_base(base, revision=revision)
    if isinstance(place, Path):
        name = hub_name(place.resolve().name, stated.values()) or place.resolve().name
        taken_for = f", taken for {name}, which the adapters name; shapes are checked" if name in claims else ""
        progress.note(f"base model: the local directory {base}{taken_for if name != base else ''}")
        others = other_bases(place.resolve().name, stated, directory=True, saved_as=_saved_as(place))
        say_other_bases(str(base), others, progress)
        found = BaseReference(name, place, None)
        check(found)
        return found
    name = str(place.base_model)
    say_other_bases(name, other_bases(name, stated), progress)
    try:
        fetched = fetch_base(
            name,
            revision=place.revision,
            check_config=lambda folder: check(BaseReference(name, folder, None)),
            progress=progress,
        )
    except (AccessDenied, HubUnreachable, InputError) as error:
        refuse_mistyped(base, error)
        if not isinstance(error, AccessDenied):
            error.hint = "; ".join(filter(None, [error.hint, "or give a local copy of the model with --base"]))
        raise
    return BaseReference(name, fetched.path, fetched.commit)


def stored_quantisation(name: str, folder: Path, quantise: str | None = None) -> Quantisation | None:
    """How the base in a folder is stored, None in full precision; and whether it can be made what `quantise` says.

    Raises:
        BaseModelMismatch, UsageError: as `read_quantisation`, or if there is no config that can be read.
    """
    fields = _read(folder / CONFIG)
    found = read_quantisation(fields, name, quantise=quantise)
    part = next((path for path, key, value in _entries(fields) if key in _NESTED and path != key and value), None)
    if part is not None:
        raise BaseModelMismatch(
            f"{CONFIG} of the base model {name} says that a part of it is quantised: {part}",
            hint="give the unquantised model with --base",
        )
    return found if found is None or found.stored else None


def check_config(reference: BaseReference, recorded: RecipeBase, name: str, progress: Progress) -> None:
    """Says where the config of a base is not the one that weights were fitted on.

    Args:
        reference: of the base.
        recorded: of the fit.
        name: of what was fitted.
        progress: told of it.
    Raises:
        IntegrityError: if it should be the very same, of the recorded commit.
    """
    if file_sha256(reference.path / CONFIG) == recorded.config_sha256:
        return
    said = f"{CONFIG} of {reference.id} is not the one that {name} was fitted on"
    if reference.commit is not None and (reference.id, reference.commit) == (recorded.id, recorded.commit):
        raise IntegrityError(said, where=str(reference.path))
    progress.warn(f"{said}; only shapes are checked")


def refuse_mistyped(base: Named | BaseClaim, error: LoracatError) -> None:
    """Raises InputError if a directory was meant, as far as the disk can tell: the user named what no organisation
    stands before, and a base model lies here whose name is near. `error` is what the Hub had to say."""
    near = near_path(base, holding(CONFIG)) if isinstance(base, str) and "/" not in base else None
    if near is not None:
        raise InputError(
            f"no directory {base} is here, and it does not come from the Hub: {error}", hint=near
        ) from error


def _saved_as(folder: Path) -> str | None:
    """The Hub id that older versions of transformers kept in the config of what they saved, None without one."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # said when it is loaded
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and "/" in name and is_hub_id(name) else None


def locate_base(base: Named | BaseClaim, *, revision: str | None = None) -> Path | BaseClaim:
    """The local directory of a base model, or its name on the Hub with the revision that is wanted.

    Args:
        base: text is what the user named: a directory if there is one, else a Hub id, and with `hf://` always a Hub id.
            A path is a directory. A claim is somebody else's word, and never looked for on the disk.
        revision: that the user named; None for the claim's own.
    Raises:
        InputError: if it is neither a directory of a base model nor a name on the Hub.
        UsageError: if a revision is asked of a directory, which has none, or it cannot be one.
    """
    if revision is not None and not is_revision(revision):
        raise UsageError(f"--base-revision {revision} cannot be a branch, tag or commit")
    if isinstance(base, str) and base.startswith(URI_PREFIX):
        base = BaseClaim(base.removeprefix(URI_PREFIX), None)
    elif not isinstance(base, BaseClaim):
        local = _directory(base, revision)
        if local is not None:
            return local
        base = BaseClaim(str(base), None)
    if (reason := not_on_the_hub(base)) is not None:
        raise InputError(f"no base model can be had: there is {reason}", hint=WAY_OUT)
    return BaseClaim(base.base_model, revision or base.revision)


def _directory(named: Named, revision: str | None) -> Path | None:
    """The directory that the user named; None for a name on the Hub."""
    base = os.fspath(named)
    local = Path(base).expanduser()
    if not local.is_dir():
        if not isinstance(named, str) or not is_hub_id(base) or local.is_file():
            raise InputError(
                f"the base model {base} is not a directory", hint=hints(near_path(base, holding(CONFIG)), WAY_OUT)
            )
        return None
    if revision is not None:
        raise UsageError(
            f"the base model {base} is a local directory, which has no revision {revision}",
            hint=f"to use the directory give --base {base} without --base-revision"
            + (f"; for the Hub's, --base {URI_PREFIX}{base}" if is_hub_id(base) else ""),
        )
    if not (local / "config.json").is_file():
        raise InputError(f"the base model {base} has no config.json", hint=WAY_OUT)
    check_base_files(local, base)
    if not local.resolve().name.isprintable():  # it may become the id that a recipe keeps, which is one line of text
        raise InputError(f"the directory {base} has a name with control characters", hint="rename it")
    return local


def _refuse_convolutions(adapters: Sequence[LoraAdapter]) -> None:
    for adapter in adapters:
        for name in kernels_of([adapter]):
            raise UnsupportedAdapter(
                f"{adapter.reference} changes the convolution {name}, and only linear layers, embeddings and experts "
                "are run in a base model",
                hint="compose it from the files alone: loracat export --method NAME --adapters ..., without --base",
            )


CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
_MAX_BYTES = 16 << 20
_MAX_LAYERS = 4096  # and experts of one, and labels: each becomes a Python object, whatever the size of the file
_MAX_TOKEN = (1 << 32) - 1  # of a tokenizer

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
        if count > _MAX_LAYERS:
            return f"has {path} = {count}, and more than {_MAX_LAYERS} are not taken"
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
        if type(value) is int and 0 <= value <= _MAX_TOKEN:
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
    return read_object(
        path,
        _MAX_BYTES,
        lambda reason: BaseModelMismatch(f"the base model's {path.name} cannot be read: {reason}", where=str(path)),
    )
