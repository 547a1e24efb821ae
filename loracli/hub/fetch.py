"""The only room that reads from the Hub: adapters and base models by reference in, directories pinned to a commit out.

    Reference ── one request: commit, files, sizes, hashes ──> the few files wanted, by exact name ──> Fetched
                 none if the commit is given and cached        every byte verified

Every error of huggingface_hub and its HTTP client leaves this room as one of ours. What the server says in words is
never repeated: it is as untrusted as the files.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from loracli.errors import (
    AccessDenied,
    AdapterNotFound,
    HubUnreachable,
    InputError,
    MalformedAdapter,
    UnsupportedAdapter,
    UsageError,
)
from loracli.hub.references import URI_PREFIX, BaseClaim, Named, Reference, agreed_base, near_adapter, parse_reference
from loracli.hub.source import BASE_CONFIG, Asking, FetchedFile, HubOptions, Kind, Listing, Source
from loracli.hub.transfer import MAX_SMALL_BYTES, fetch
from loracli.progress import SILENT, Bar, Progress, amount_text, drawn, takes_bar
from loracli.system.display import count_text, names_text, repr_line
from loracli.system.files import CONFIG_FILE, MLX_TENSOR_FILE, PICKLE_FILE, README_FILE, TENSOR_FILE, TENSOR_FILES
from loracli.system.near import hints
from loracli.system.strict_json import read_object

MAX_ADAPTER_BYTES = 8 << 30

# In the order of download: whoever finds the weights in the cache knows that the rest came before them.
_ADAPTER_FILES = (README_FILE, CONFIG_FILE, *TENSOR_FILES)
_BASE_WEIGHTS = "model.safetensors"
BASE_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_BASE_FILES = (
    BASE_CONFIG,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    *BASE_TOKENIZERS,
    f"{_BASE_WEIGHTS}.index.json",
)
_SHARD = re.compile(r"(?!consolidated)[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")  # consolidated*: the weights once more
_NUMBERED_SHARD = re.compile(r".+-\d+-of-(\d+)\.safetensors")
_PICKLE = re.compile(r".+\.(bin|pt|pth|pkl|ckpt)")


@dataclass(frozen=True)
class Fetched:
    """An adapter on this machine.

    Attributes:
        reference: what was asked for.
        path: the directory that holds the files (after a dry run: that would hold them).
        commit: the 40 hexadecimal digits that pin a Hub repository; None for a local directory.
        files: the adapter's files, README first, weights last.
    """

    reference: Reference
    path: Path
    commit: str | None
    files: tuple[FetchedFile, ...]

    def __repr__(self) -> str:
        commit = "" if self.commit is None else f"commit {self.commit[:12]}"
        size = amount_text(sum(file.size_bytes for file in self.files), "B")
        return repr_line(self, names_text([self.reference.label]), commit, count_text(len(self.files), "file"), size)


@dataclass(frozen=True)
class FetchedBase:
    """A base model on this machine. The directory may hold more than `files`, if another program cached it."""

    repo_id: str
    path: Path
    commit: str
    files: tuple[FetchedFile, ...]


class AdapterAsking(Asking, total=False):
    """The same for adapters.

    Keys:
        local_dir: put the files of one adapter there instead of into a cache, under the repository's folder structure.
        max_bytes: refuse an adapter with more in all its files, by default 8 GiB. A config may have 1 MiB; a larger
            README is left out.
    """

    local_dir: Path | None
    max_bytes: int


class FetchOptions(HubOptions, AdapterAsking, total=False):
    """Everything that can be said where adapters are fetched."""


@takes_bar
def fetch_adapter(
    reference: str | os.PathLike[str] | Reference,
    *,
    revision: str | None = None,
    from_pickle: bool = False,
    progress: Progress | Bar = SILENT,
    **options: Unpack[AdapterAsking],
) -> Fetched:
    """Brings an adapter's config, weights and README to this machine: `fetch_adapters` of one."""
    told = drawn(progress)
    [fetched] = fetch_adapters([reference], revision=revision, from_pickle=from_pickle, progress=told, **options)
    return fetched


def fetch_adapters(
    references: Sequence[Named | Reference],
    *,
    revision: str | None = None,
    from_pickle: bool = False,
    **options: Unpack[FetchOptions],
) -> tuple[Fetched, ...]:
    """Brings config, weights and README of adapters to this machine; local directories are checked and left alone.

    A revision is resolved once and everything is read from that commit. The sizes of all adapters are known, and held
    against the ceilings and the free disk, before the first is transferred; a few are then transferred side by side.
    Every byte, cached or new, is verified against the hash that the Hub lists. Without the Hub, the cached copy that
    the revision last stood for is used, and `progress` is told. A full commit that is cached takes no request at all.

    Args:
        references: each in any form that `parse_reference` reads.
        revision: branch, tag or commit, for references that name none.
        from_pickle: bring config and adapter_model.bin of adapters that have no safetensors; whoever opens that file
            has to know what it can do.
        options: how the Hub is asked and where the files go, see `FetchOptions`.
    Raises:
        AdapterNotFound: no such reference, repository, revision or folder, or no adapter in it.
        UnsupportedAdapter: the weights are there only as a pickle file, without `from_pickle`.
        AccessDenied, HubUnreachable: the Hub does not give the files.
        OutOfResources: a ceiling is exceeded, or the disk has no room.
        IntegrityError: a file is not the one that the Hub lists; it is removed.
        UsageError: options that exclude each other; OutputExists: other files are in `local_dir`.
    """
    options.setdefault("max_bytes", MAX_ADAPTER_BYTES)
    hub = _at_the_hub(Source(_PICKLED_ADAPTER if from_pickle else _ADAPTER, recheck=True, **options))
    if hub.local_dir is not None and len(references) > 1:
        raise UsageError("a local directory takes the files of one adapter", hint="fetch the others by themselves")
    parsed = [_parse(reference, revision) for reference in references]
    sources = {
        number: replace(
            hub,
            repo_id=reference.repo_id,
            revision=reference.revision,
            folder=reference.subfolder or "",
            text=reference.text,
        )
        for number, reference in enumerate(parsed)
        if reference.repo_id is not None
    }
    local = {
        n: _take_local(reference, hub, from_pickle=from_pickle)
        for n, reference in enumerate(parsed)
        if n not in sources
    }
    try:
        copies = dict(zip(sources, fetch(list(sources.values())), strict=True))
    except (AdapterNotFound, HubUnreachable, AccessDenied) as error:  # a directory's name may have been mistyped
        near = [near_adapter(source.text) for source in sources.values() if not source.text.startswith(URI_PREFIX)]
        error.hint = hints(*near, error.hint)
        raise
    return tuple(
        local[n] if n in local else Fetched(reference, copies[n].path, copies[n].commit, copies[n].files)
        for n, reference in enumerate(parsed)
    )


def _at_the_hub(source: Source) -> Source:
    """The source with a token and a local directory as they are used.

    Raises:
        UsageError: if the options exclude each other, or the token cannot be one.
    """
    if source.cache_dir is not None and source.local_dir is not None:
        raise UsageError("a cache directory and a local directory cannot be given together", hint="give one of the two")
    local_dir = source.local_dir.expanduser() if source.local_dir else None
    return replace(source, local_dir=local_dir, token=checked_token(source.token))


def _parse(reference: Named | Reference, revision: str | None) -> Reference:
    if not isinstance(reference, Reference):
        return parse_reference(reference, revision=revision)
    return reference if revision is None else parse_reference(reference.text, revision=revision)


def fetch_base(
    repo_id: str,
    *,
    revision: str | None = None,
    config_alone: bool = False,
    recheck: bool = False,
    check_config: Callable[[Path], object] | None = None,
    **options: Unpack[HubOptions],
) -> FetchedBase:
    """Brings a base model to this machine: config, tokenizer, chat template and safetensors of the top level.

    Never code, pickle or GGUF files. There is no ceiling but the free disk; with `config_alone` its config.json and no
    more, and what `check_config` raises of the folder with it is raised before the rest is transferred. What is
    transferred is verified; what is cached, and may take minutes to hash, with `recheck`. The options are
    those of `loracli.hub.source.HubOptions`.

    Raises:
        InputError: no such repository or revision, no safetensors in it, or it is an adapter itself.
        AccessDenied, HubUnreachable, IntegrityError, OutOfResources: the Hub or the disk does not give the files.
    """
    kind = _BASE_CONFIG_ALONE if config_alone else _BASE
    source = Source(kind, repo_id, revision, text=repo_id, recheck=recheck, check_config=check_config, **options)
    [copy] = fetch([_at_the_hub(source)])
    return FetchedBase(repo_id, copy.path, copy.commit, copy.files)


def fetch_base_of(
    adapters: Sequence[Fetched],
    *,
    claims: Mapping[str, BaseClaim] | None = None,
    recheck: bool = False,
    **options: Unpack[HubOptions],
) -> FetchedBase:
    """Brings the base model that all of these fetched adapters, and further claims, name, as `fetch_base`.

    Raises:
        IncompatibleAdapters: they name different base models or revisions of one, none, or a path on somebody's disk.
        UsageError: an adapter's config is not on this machine, after a dry run.
        MalformedAdapter: an adapter's config is damaged.
    """
    named = {adapter.reference.text: _base_claim(adapter) for adapter in adapters}
    agreed = agreed_base({**(claims or {}), **named}, way_out="leave --with-base out, or fetch the adapters one by one")
    return fetch_base(str(agreed.base_model), revision=agreed.revision, recheck=recheck, **options)


def _base_claim(adapter: Fetched) -> BaseClaim:
    """What a fetched adapter's config names."""
    path = adapter.path / CONFIG_FILE
    if not path.exists():
        hint = "fetch the adapter first, then the base"
        raise UsageError("the base is not known before the config is here", where=str(path), hint=hint)
    fields = read_object(path, MAX_SMALL_BYTES)
    named = fields.get("base_model_name_or_path", fields.get("model")), fields.get("revision")  # mlx-lm writes `model`
    if not all(value is None or (isinstance(value, str) and value.isprintable()) for value in named):
        raise MalformedAdapter("the base model's name is not printable text", where=str(path))
    return BaseClaim(named[0] or None, named[1] or None)


def _take_local(reference: Reference, hub: Source, *, from_pickle: bool) -> Fetched:
    """A local directory, once it is seen to hold what an adapter needs; `hub` is what was asked for others."""
    assert reference.path is not None
    if hub.local_dir is not None:
        raise UsageError("a local directory is used where it is", where=reference.text, hint="leave --local-dir out")
    if reference.shadows_hub:
        hub.progress.note(f"{reference.text} is a directory here; for the Hub's, write {URI_PREFIX}{reference.text}")
    present = [name for name in (*_ADAPTER_FILES, PICKLE_FILE) if (reference.path / name).is_file()]
    if from_pickle:
        _check_pickle(present, reference.text)
    else:
        _check_adapter(present, reference.text, text=reference.text)
    files = [FetchedFile(name, (reference.path / name).stat().st_size, cached=True) for name in present]
    taken = (CONFIG_FILE, PICKLE_FILE) if from_pickle else _ADAPTER_FILES
    return Fetched(reference, reference.path, None, tuple(file for file in files if file.name in taken))


def checked_token(token: str | None) -> str | None:
    """None for no token, so that `--token "$UNSET"` means the login; the HTTP client would quote a malformed one."""
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("the token holds characters that no token has", hint="copy it again from the Hub's settings")
    return token or None


def _pick_adapter_files(source: Source, listing: Listing) -> list[str]:
    if source.folder and not listing.files:
        raise source.rejected(f"the repository has no folder '{source.folder}'", hint=_other_folders(source, listing))
    _check_adapter(listing.files, source.name, hint=_other_folders(source, listing), text=_as_typed(source))
    spare = {MLX_TENSOR_FILE} if TENSOR_FILE in listing.files else set()
    return [name for name in _ADAPTER_FILES if name in listing.files and name not in spare]


def _pick_pickle_files(source: Source, listing: Listing) -> list[str]:
    if PICKLE_FILE not in listing.files or CONFIG_FILE not in listing.files:
        _pick_adapter_files(source, listing)
    _check_pickle(listing.files, source.name)
    return [CONFIG_FILE, PICKLE_FILE]


def _check_pickle(names: Iterable[str], where: str) -> None:
    """Raises UsageError if the weights are there without a pickle, AdapterNotFound if there are none."""
    present = set(names)
    found = next((name for name in TENSOR_FILES if name in present), None)
    if found is not None:
        raise UsageError(f"it has {found}, which needs no --from-pickle", where=where, hint="leave --from-pickle out")
    if PICKLE_FILE not in present:
        raise AdapterNotFound(f"no {PICKLE_FILE} in it", where=where)


def from_pickle_hint(text: str) -> str:
    """The way out for an adapter that has only a pickle file, by the reference that it goes by."""
    command = shlex.join(["loracat", "convert", text, "--from-pickle"])
    return f"only {TENSOR_FILE} is read; to make one of its tensors, in a process of its own: {command}"


def _check_adapter(names: Iterable[str], where: str, hint: str | None = None, *, text: str) -> None:
    """Raises AdapterNotFound or UnsupportedAdapter for a folder without what an adapter needs; `text` is how it was
    named."""
    present = set(names)
    if CONFIG_FILE not in present:
        if hint is None and BASE_CONFIG in present:
            raise AdapterNotFound(
                f"this is a whole model, not an adapter: it has {BASE_CONFIG} and no {CONFIG_FILE}",
                where=where,
                hint=f"as the base of adapters: {shlex.join(['--base', text])}; of what an adapter names as its base, "
                "--with-base of `loracat fetch` brings the files",
            )
        raise AdapterNotFound(f"no {CONFIG_FILE} in it", where=where, hint=hint)
    if not present.isdisjoint(TENSOR_FILES):
        return
    if PICKLE_FILE in present:
        raise UnsupportedAdapter(
            f"its weights are only in {PICKLE_FILE}, a pickle file, which can run code when it is opened",
            where=where,
            hint=from_pickle_hint(text),
        )
    raise AdapterNotFound(f"no {TENSOR_FILE} in it", where=where, hint=hint)


def _as_typed(source: Source) -> str:
    """A reference to the folder at the revision, which may have been given beside it."""
    at = f"@{source.revision}" if source.revision else ""
    plain = f"{source.repo_id}{at}"
    return f"{URI_PREFIX}{plain}/{source.folder}" if source.folder else plain


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
    weights = [_BASE_WEIGHTS] if _BASE_WEIGHTS in names else sorted(name for name in names if _SHARD.fullmatch(name))
    if BASE_CONFIG not in names:
        raise source.rejected(f"no {BASE_CONFIG} in it", hint="a base model is a transformers model repository")
    if not weights:
        found = next((name for name in names if _PICKLE.fullmatch(name)), None)
        what = f"its weights are pickle files ({found})" if found else "no weights in it"
        raise source.rejected(f"{what}; only safetensors are read", hint="look for a converted copy or a pull request")
    return [name for name in _BASE_FILES if name in names] + weights


def _pick_base_config(source: Source, listing: Listing) -> list[str]:
    if BASE_CONFIG not in listing.files:
        raise source.rejected(f"no {BASE_CONFIG} in it", hint="a base model is a transformers model repository")
    return [BASE_CONFIG]


def _is_whole_base(names: set[str]) -> bool:
    """Config, a tokenizer, and the one weights file or every numbered shard."""
    if BASE_CONFIG not in names or names.isdisjoint(BASE_TOKENIZERS):
        return False
    shards = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name)) and _SHARD.fullmatch(name)]
    return _BASE_WEIGHTS in names or (bool(shards) and all(int(shard[1]) == len(shards) for shard in shards))


def _is_whole_pickle(names: set[str]) -> bool:
    return {CONFIG_FILE, PICKLE_FILE} <= names


_ADAPTER = Kind(AdapterNotFound, _pick_adapter_files, _is_whole_adapter)
_PICKLED_ADAPTER = Kind(AdapterNotFound, _pick_pickle_files, _is_whole_pickle)
_BASE = Kind(InputError, _pick_base_files, _is_whole_base)
_BASE_CONFIG_ALONE = Kind(InputError, _pick_base_config, lambda names: BASE_CONFIG in names)
