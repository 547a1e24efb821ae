"""The only file that talks to the Hub: adapters and base models by reference in, directories pinned to a commit out.

    Reference ── one request: commit, files, sizes ──> the few files wanted, by exact name ──> Fetched
                 none if the commit is given and cached

Every error of huggingface_hub and its HTTP client leaves this file as one of ours. What the server says in words is
never repeated: it is as untrusted as the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

import loracli
from loracli.adapters.references import CONFIG_NAME, URI_PREFIX, Reference, is_revision, parse_reference
from loracli.errors import (
    AccessDenied,
    AdapterNotFound,
    HubUnreachable,
    IncompatibleAdapters,
    InputError,
    IntegrityError,
    LoracatError,
    MalformedAdapter,
    OutOfResources,
    OutputExists,
    UnsupportedAdapter,
    UsageError,
)
from loracli.progress import SILENT, Progress
from loracli.strict_json import StrictJsonError, parse_json

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
# In the order of download: whoever finds the weights in the cache knows that the rest came before them.
ADAPTER_FILES = ("README.md", CONFIG_NAME, WEIGHTS_NAME)

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

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# The base of all errors of the HTTP client (httpx or httpx2, by version), reached through a public name.
_HttpError: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class FetchedFile:
    """One file of an adapter or a base model.

    Attributes:
        name: its name inside the fetched directory.
        size_bytes: its size.
        cached: it was there already; nothing was, or has to be, transferred.
    """

    name: str
    size_bytes: int
    cached: bool


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


@dataclass(frozen=True)
class FetchedBase:
    """A base model on this machine. The directory may hold more than `files`, if another program cached it."""

    repo_id: str
    path: Path
    commit: str
    files: tuple[FetchedFile, ...]


def fetch_adapter(
    reference: str | Reference,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_dir: Path | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    progress: Progress = SILENT,
) -> Fetched:
    """Brings an adapter's config, weights and README to this machine; a local directory is checked and left as it is.

    The revision is resolved once and everything is read from that commit. Without the Hub, the cached copy that the
    revision last stood for is used, and `progress` is told. A full commit that is cached takes no request at all.

    Args:
        reference: any form that `parse_reference` reads.
        revision: branch, tag or commit, if the reference names none.
        cache_dir: Hub cache to use instead of huggingface_hub's own.
        local_dir: put plain files there instead of into a cache, under the repository's folder structure.
        token: Hub token; by default the one of HF_TOKEN or of `hf auth login`.
        force: transfer what is there already, and replace files in `local_dir`.
        dry_run: transfer nothing, only tell what would be.
        endpoint: address of the Hub; by default HF_ENDPOINT.
        progress: told the bytes of each file, and what is worth knowing.
    Raises:
        AdapterNotFound: no such reference, repository, revision or folder, or no adapter in it.
        UnsupportedAdapter: the weights are there only as a pickle file.
        AccessDenied, HubUnreachable, IntegrityError, OutOfResources: the Hub or the disk does not give the files.
        UsageError: options that exclude each other; OutputExists: other files are in `local_dir`.
    """
    if cache_dir is not None and local_dir is not None:
        raise UsageError("a cache directory and a local directory exclude each other", hint="give one of the two")
    if isinstance(reference, str):
        reference = parse_reference(reference, revision=revision)
    elif revision is not None:
        reference = parse_reference(reference.text, revision=revision)
    if reference.repo_id is None:
        return _take_local(reference, local_dir, progress)
    source = _Source(
        kind=_ADAPTER,
        repo_id=reference.repo_id,
        revision=reference.revision,
        folder=reference.subfolder or "",
        text=reference.text,
        cache_dir=cache_dir,
        local_dir=local_dir.expanduser() if local_dir else None,
        token=_checked_token(token),
        force=force,
        dry_run=dry_run,
        endpoint=endpoint,
        progress=progress,
    )
    copy = _fetch(source)
    return Fetched(reference, copy.path, copy.commit, copy.files)


def fetch_base(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    progress: Progress = SILENT,
) -> FetchedBase:
    """Brings a base model to this machine: config, tokenizer, chat template and safetensors of the top level.

    Never code, pickle or GGUF files. Arguments as for `fetch_adapter`.

    Raises:
        InputError: no such repository or revision, no safetensors in it, or it is an adapter itself.
        AccessDenied, HubUnreachable, IntegrityError, OutOfResources: the Hub or the disk does not give the files.
    """
    source = _Source(
        kind=_BASE,
        repo_id=repo_id,
        revision=revision,
        folder="",
        text=repo_id,
        cache_dir=cache_dir,
        local_dir=None,
        token=_checked_token(token),
        force=force,
        dry_run=dry_run,
        endpoint=endpoint,
        progress=progress,
    )
    copy = _fetch(source)
    return FetchedBase(repo_id, copy.path, copy.commit, copy.files)


def fetch_base_of(adapters: Sequence[Fetched], **options: Any) -> FetchedBase:
    """Brings the base model that all of these fetched adapters name; `options` as for `fetch_base`.

    Raises:
        IncompatibleAdapters: they name different base models or revisions of one, none, or a path on somebody's disk.
        UsageError: an adapter's config is not on this machine, after a dry run.
        MalformedAdapter: an adapter's config is damaged.
    """
    claims = {adapter.reference.text: _base_claim(adapter) for adapter in adapters}
    bases = {base for base, _ in claims.values() if base}
    revisions = {revision for _, revision in claims.values() if revision}
    if not bases:
        raise IncompatibleAdapters("no adapter names its base model", hint="leave --with-base out")
    if len(bases) > 1 or len(revisions) > 1:
        named = ", ".join(f"{text} names {'@'.join(filter(None, claim))}" for text, claim in claims.items() if claim[0])
        raise IncompatibleAdapters(f"the adapters name different base models: {named}", hint="fetch them one by one")
    repo_id = bases.pop()
    if Path(repo_id).is_absolute() or repo_id.startswith((".", "~")) or Path(repo_id).is_dir():
        raise IncompatibleAdapters(f"the base model {repo_id} is a local path", hint="there is nothing to fetch")
    return fetch_base(repo_id, revision=next(iter(revisions), None), **options)


def _base_claim(adapter: Fetched) -> tuple[str, str]:
    """Base model and revision that an adapter's config names; empty for what it does not name."""
    path = adapter.path / CONFIG_NAME
    try:
        with path.open("rb") as file:
            config = parse_json(file.read(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        hint = "fetch the adapter first, then the base"
        raise UsageError("the base is not known before the config is here", where=str(path), hint=hint) from None
    except StrictJsonError as error:
        raise MalformedAdapter(str(error), where=str(path)) from None
    fields = config if isinstance(config, dict) else {}
    named = fields.get("base_model_name_or_path"), fields.get("revision")
    if not all(value is None or (isinstance(value, str) and value.isprintable()) for value in named):
        raise MalformedAdapter("the base model's name is no printable text", where=str(path))
    return named[0] or "", named[1] or ""


# One way for both: from the cache if it can be, by one listing and a few downloads if not.


@dataclass(frozen=True)
class _Kind:
    """What to take from a repository.

    Attributes:
        rejected: the error for a repository that cannot be had or is something else.
        pick: names to take from a listing, in the order of download; raises if the listing lacks what has to be there.
        is_whole: whether the names found in a cached folder are all that a listing could have asked for.
    """

    rejected: type[InputError]
    pick: Callable[[_Source, _Listing], list[str]]
    is_whole: Callable[[set[str]], bool]


class _Copy(NamedTuple):
    path: Path
    commit: str
    files: tuple[FetchedFile, ...]


@dataclass(frozen=True)
class _Source:
    """One folder of one repository, and how to get at it."""

    kind: _Kind
    repo_id: str
    revision: str | None
    folder: str
    text: str
    cache_dir: Path | None
    local_dir: Path | None
    token: str | None
    force: bool
    dry_run: bool
    endpoint: str | None
    progress: Progress

    @property
    def name(self) -> str:
        return f"{self.repo_id}/{self.folder}" if self.folder else self.repo_id

    @property
    def pinned(self) -> str | None:
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    @property
    def cached_repo(self) -> Path:
        cache = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser()
        return cache / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def remembered(self) -> Path:
        """Where the cache keeps the commit that the revision last stood for."""
        return self.cached_repo / "refs" / (self.revision or constants.DEFAULT_REVISION)

    def rejected(self, what: str, hint: str | None = None) -> InputError:
        return self.kind.rejected(what, where=self.name, hint=hint)


class _Listed(NamedTuple):
    """What the Hub says of a file; `digest` is the sha256 of a large one and git's blob hash of any other."""

    size_bytes: int | None
    digest: str | None = None


@dataclass(frozen=True)
class _Listing:
    """What the Hub says that a commit holds.

    Attributes:
        files: every file directly in the folder asked for, by name.
        adapter_folders: every folder of the repository that holds an adapter config and has a printable name.
    """

    commit: str
    files: dict[str, _Listed]
    adapter_folders: tuple[str, ...] = ()


def _fetch(source: _Source) -> _Copy:
    if source.revision is not None and not is_revision(source.revision):
        raise source.rejected(f"'{source.revision}' cannot be a branch, tag or commit")
    if source.pinned and (cached := _cached_copy(source, source.pinned)):
        return cached
    try:
        listing = _list_files(source)
    except HubUnreachable as error:
        return _copy_without_hub(source, error)
    names = source.kind.pick(source, listing)
    if source.local_dir is not None and not source.force:
        _refuse_to_overwrite(source, source.local_dir, listing, names)
    places, files = zip(*(_take(source, listing, name) for name in names), strict=True)
    if source.local_dir is None and not source.dry_run:
        _remember(source, listing.commit)
    return _Copy(places[0].parent, listing.commit, files)


def _cached_copy(source: _Source, commit: str) -> _Copy | None:
    """The files of `commit` if the cache has them all; None otherwise, or if the cache is not what was asked for."""
    if source.force or source.local_dir is not None:
        return None
    path = source.cached_repo / "snapshots" / commit / source.folder
    sizes = {file.name: file.stat().st_size for file in path.glob("*") if file.is_file()}
    if not source.kind.is_whole(set(sizes)):
        return None
    names = source.kind.pick(source, _Listing(commit, {name: _Listed(size) for name, size in sizes.items()}))
    return _Copy(path, commit, tuple(FetchedFile(name, sizes[name], cached=True) for name in names))


def _copy_without_hub(source: _Source, error: HubUnreachable) -> _Copy:
    """The copy that the revision last stood for, said aloud; the error itself if there is none."""
    commit = source.pinned
    if commit is None:
        with suppress(OSError):
            commit = source.remembered.read_text(encoding="ascii").strip()
    if commit is None or not _COMMIT.fullmatch(commit) or (cached := _cached_copy(source, commit)) is None:
        raise error
    reason = "offline" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
    source.progress.note(f"{reason}: using the cached copy of {source.name}, commit {commit}")
    return cached


def _list_files(source: _Source) -> _Listing:
    """Resolves the revision and lists the repository, in one request."""
    with _hub_errors(source):
        info = _api(source).model_info(
            source.repo_id, revision=source.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    commit = source.pinned or info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise HubUnreachable("the Hub answers without a commit", where=source.name, hint="is HF_ENDPOINT a Hub?")
    files, adapter_folders = {}, []
    for sibling in info.siblings or []:
        folder, _, name = sibling.rfilename.rpartition("/")
        if folder == source.folder:
            large = sibling.lfs
            files[name] = _Listed(large.size, large.sha256) if large else _Listed(sibling.size, sibling.blob_id)
        if name == CONFIG_NAME and folder.isprintable():
            adapter_folders.append(folder)
    return _Listing(commit, files, tuple(sorted(adapter_folders)))


def _take(source: _Source, listing: _Listing, name: str) -> tuple[Path, FetchedFile]:
    """Downloads one file unless it is there; in a dry run, only asks."""
    if source.dry_run:
        place, size, cached = _ask(source, listing, name)
        return place, FetchedFile(name, size, cached)
    bar = _bar_for(source.progress, f"{source.name}/{name}")
    with _hub_errors(source):
        place = Path(hf_hub_download(tqdm_class=cast(Any, bar), **_what(source, listing.commit, name)))
        size = place.stat().st_size
    listed = listing.files[name].size_bytes
    if listed is not None and listed != size:
        what = f"{name} has {size} bytes, the Hub lists {listed}"
        raise IntegrityError(what, where=source.name, hint="--force fetches it again")
    return place, FetchedFile(name, size, cached=not bar.used)


def _ask(source: _Source, listing: _Listing, name: str) -> tuple[Path, int, bool]:
    """Where the file would be, its size, and whether it is there."""
    if source.local_dir is not None and not (place := source.local_dir / source.folder / name).exists():
        return place, listing.files[name].size_bytes or 0, False  # asking would already create the directory
    with _hub_errors(source):
        info = hf_hub_download(dry_run=True, **_what(source, listing.commit, name))
    return Path(info.local_path), info.file_size or 0, not info.will_download


def _what(source: _Source, commit: str, name: str) -> dict[str, Any]:
    return {
        "repo_id": source.repo_id,
        "filename": name,
        "subfolder": source.folder or None,
        "revision": commit,
        "cache_dir": source.cache_dir,
        "local_dir": source.local_dir,
        "force_download": source.force,
        "token": source.token,
        "endpoint": source.endpoint,
        "library_name": "loracat",
        "library_version": loracli.__version__,
    }


def _api(source: _Source) -> HfApi:
    return HfApi(
        endpoint=source.endpoint,
        token=source.token,
        library_name="loracat",
        library_version=loracli.__version__,
    )


def _refuse_to_overwrite(source: _Source, local_dir: Path, listing: _Listing, names: Iterable[str]) -> None:
    for name in names:
        place = local_dir / source.folder / name
        if place.exists() and not (place.is_file() and _has_digest(listing.files[name].digest, place)):
            raise OutputExists("another version of the file is there", where=str(place), hint="--force replaces it")


def _has_digest(digest: str | None, place: Path) -> bool:
    """Whether the file has this digest, of whichever kind it is."""
    with place.open("rb") as file:
        if digest is not None and len(digest) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
        blob = hashlib.sha1(b"blob %d\0" % place.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: blob).hexdigest() == digest


def _remember(source: _Source, commit: str) -> None:
    """Writes down what the revision stood for, where huggingface_hub looks for it too; after the files, not before."""
    place = source.remembered
    with suppress(OSError):  # a cache that can only be read is still a cache
        if source.pinned or (place.is_file() and place.read_text(encoding="ascii") == commit):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.tmp")
        draft.write_text(commit, encoding="ascii")
        os.replace(draft, place)


# What an adapter is, what a base model is.


def _take_local(reference: Reference, local_dir: Path | None, progress: Progress) -> Fetched:
    """A local directory, once it is seen to hold what an adapter needs."""
    assert reference.path is not None
    if local_dir is not None:
        raise UsageError("a local directory is used where it is", where=reference.text, hint="leave --local-dir out")
    if reference.shadows_hub:
        progress.note(f"{reference.text} is a directory here; for the Hub's, write {URI_PREFIX}{reference.text}")
    present = [name for name in (*ADAPTER_FILES, PICKLE_NAME) if (reference.path / name).is_file()]
    _check_adapter(present, reference.text)
    files = [FetchedFile(name, (reference.path / name).stat().st_size, cached=True) for name in present]
    return Fetched(reference, reference.path, None, tuple(file for file in files if file.name in ADAPTER_FILES))


def _pick_adapter_files(source: _Source, listing: _Listing) -> list[str]:
    if source.folder and not listing.files:
        raise source.rejected(f"the repository has no folder '{source.folder}'", hint=_other_folders(source, listing))
    _check_adapter(listing.files, source.name, hint=_other_folders(source, listing))
    return [name for name in ADAPTER_FILES if name in listing.files]


def _check_adapter(names: Iterable[str], where: str, hint: str | None = None) -> None:
    present = set(names)
    if CONFIG_NAME not in present:
        if hint is None and BASE_CONFIG in present:
            hint = "it looks like a whole model; an adapter is what PEFT's save_pretrained writes"
        raise AdapterNotFound(f"no {CONFIG_NAME} in it", where=where, hint=hint)
    if WEIGHTS_NAME in present:
        return
    if PICKLE_NAME in present:
        raise UnsupportedAdapter(
            f"its weights are only in {PICKLE_NAME}, a pickle file, which can run code when it is opened",
            where=where,
            hint=f"only {WEIGHTS_NAME} is read: ask the author for it, or load and save the adapter once with PEFT",
        )
    raise AdapterNotFound(f"no {WEIGHTS_NAME} in it", where=where, hint=hint)


def _other_folders(source: _Source, listing: _Listing) -> str | None:
    at = f"@{source.revision}" if source.revision else ""
    named = [f"{URI_PREFIX}{source.repo_id}{at}/{f}".rstrip("/") for f in listing.adapter_folders if f != source.folder]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"the repository has adapters at {', '.join(named[:5])}{more}" if named else None


def _is_whole_adapter(names: set[str]) -> bool:
    return {CONFIG_NAME, WEIGHTS_NAME} <= names


def _pick_base_files(source: _Source, listing: _Listing) -> list[str]:
    names = listing.files
    if CONFIG_NAME in names:
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


def _is_whole_base(names: set[str]) -> bool:
    """Config, a tokenizer, and the one weights file or every numbered shard."""
    if BASE_CONFIG not in names or names.isdisjoint(BASE_TOKENIZERS):
        return False
    shards = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name)) and _SHARD.fullmatch(name)]
    return BASE_WEIGHTS in names or (bool(shards) and all(int(shard[1]) == len(shards) for shard in shards))


_ADAPTER = _Kind(AdapterNotFound, _pick_adapter_files, _is_whole_adapter)
_BASE = _Kind(InputError, _pick_base_files, _is_whole_base)


# Progress.


class _Bar:
    """Stands where huggingface_hub expects a tqdm class, draws nothing, and hands the bytes on."""

    progress: Progress
    task: str
    used = False

    def __init__(self, *args: Any, total: int | None = None, **kwargs: Any) -> None:
        type(self).used = True
        self.progress.begin(self.task, total, "B")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, amount: float | None = 1) -> None:
        self.progress.advance(self.task, int(amount or 0))

    def close(self) -> None:
        self.progress.finish(self.task)

    def update_transfer(self, amount: int) -> None:
        """Bytes on the wire, where storage is deduplicated: not the file's bytes, which `update` counts."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass


def _bar_for(progress: Progress, task: str) -> type[_Bar]:
    return type("_FileBar", (_Bar,), {"progress": progress, "task": task})


# Errors.


@contextmanager
def _hub_errors(source: _Source) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors; keeps its warnings, which quote the server, off the screen."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:  # anything else is somebody's wish
        logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, RuntimeError, _HttpError) as error:
        ours = _ours(error, source)
        if ours is None:
            raise
        raise ours from error
    finally:
        logger.setLevel(level)


def _ours(error: BaseException, source: _Source) -> LoracatError | None:
    """Our error for one of huggingface_hub's; None for a bug. Order matters: they inherit from each other freely."""
    name, url = source.name, f"{(source.endpoint or constants.ENDPOINT).rstrip('/')}/{source.repo_id}"
    match error:
        case OfflineModeIsEnabled():
            return HubUnreachable("offline, and not in the cache", where=name, hint="unset HF_HUB_OFFLINE to fetch it")
        case GatedRepoError():
            hint = f"accept its terms at {url}, then {_LOG_IN}"
            return AccessDenied("the repository is gated and this account has no access", where=name, hint=hint)
        case RepositoryNotFoundError():
            return source.rejected("no such repository on the Hub, or a private one", hint=_hint_missing(source))
        case RevisionNotFoundError():
            return source.rejected(f"no revision '{source.revision}'", hint=f"see the branches and tags at {url}")
        case RemoteEntryNotFoundError():
            return source.rejected("a file that the Hub lists is not there", hint=f"see {url}")
        case DisabledRepoError():
            return source.rejected("the Hub has disabled the repository", hint=f"see {url}")
        case FileMetadataError():
            return HubUnreachable("the Hub answers without file metadata", where=name, hint="is HF_ENDPOINT a Hub?")
        case HfHubHTTPError():
            return _ours_by_status(error.response.status_code, source)
        case HFValidationError():
            return source.rejected(f"'{source.repo_id}' cannot be the name of a Hub repository")
        case LocalEntryNotFoundError() | ValueError() if isinstance(error.__cause__, (OSError, _HttpError)):
            return _ours(error.__cause__, source)
        case UnicodeEncodeError():
            return AccessDenied("the token holds characters that no token has", where=name, hint=_LOG_IN)
        case LocalEntryNotFoundError() | json.JSONDecodeError() | ConnectionError() | TimeoutError():
            return _unreachable(error, source)
        case OSError():
            return _ours_by_errno(error, source)
        case RuntimeError() if type(error) is RuntimeError:  # all that the transfer library written in Rust raises
            full = f"os error {errno.ENOSPC}" in str(error)
            return _ours_by_errno(OSError(errno.ENOSPC, ""), source) if full else _unreachable(error, source)
        case _:
            return _unreachable(error, source) if isinstance(error, _HttpError) else None


def _ours_by_status(status: int, source: _Source) -> LoracatError:
    if status in (401, 403):
        return AccessDenied(
            f"the Hub denies access ({status})", where=source.name, hint=f"is the token valid? {_LOG_IN}"
        )
    if status == 404:
        return source.rejected("the Hub does not have it (404)", hint=_hint_missing(source))
    if status == 429:
        hint = f"wait some minutes; {_LOG_IN}, for a higher limit"
        return HubUnreachable("the Hub limits the number of requests (429)", where=source.name, hint=hint)
    return HubUnreachable(
        f"the Hub fails ({status})", where=source.name, hint="try again later; complete files are kept"
    )


def _ours_by_errno(error: OSError, source: _Source) -> LoracatError:
    if error.errno in _DISK_FULL:
        hint = "free some space, or name another place with --cache-dir"
        return OutOfResources("the disk is full", where=source.name, hint=hint)
    if error.errno is None and "Consistency check failed" in str(error):
        hint = "fetch it again; if that does not help, the file on the Hub is damaged"
        return IntegrityError("a file came with another size than announced", where=source.name, hint=hint)
    reason = error.strerror or "the download failed"
    return LoracatError(f"{reason}: {error.filename}" if error.filename else reason, where=source.name)


def _unreachable(error: BaseException, source: _Source) -> HubUnreachable:
    what = f"the Hub does not answer, or breaks off ({type(error).__name__})"
    hint = "check the connection and HF_ENDPOINT; complete files are kept, and a cached commit needs no Hub"
    return HubUnreachable(what, where=source.name, hint=hint)


def _hint_missing(source: _Source) -> str:
    if source.kind is _ADAPTER and os.path.isdir(source.text):
        return f"the directory {source.text} is here, but holds no {CONFIG_NAME}"
    return f"check the spelling; if it is private, {_LOG_IN}"


def _checked_token(token: str | None) -> str | None:
    """None for no token, so that `--token "$UNSET"` means the login; the HTTP client would quote a malformed one."""
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("the token holds characters that no token has", hint="copy it again from the Hub's settings")
    return token or None
