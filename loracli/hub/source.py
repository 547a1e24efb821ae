r"""One folder of one repository: how to get at it, what its bytes must be, and what its errors are to us. What the
server says in words is never repeated.

    large file    sha256(bytes)                               64 digits
    other file    sha1("blob " + len(bytes) + "\0" + bytes)   40 digits, git's hash of a blob

huggingface_hub itself compares sizes only. Its cache keeps each file as a link to a blob of that name, so that a
cached file can be verified without the Hub, too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from huggingface_hub import constants
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

from loracli.errors import (
    AccessDenied,
    AdapterNotFound,
    HubUnreachable,
    InputError,
    IntegrityError,
    LoracatError,
    OutOfResources,
)
from loracli.progress import SILENT, Progress
from loracli.system.files import CONFIG_FILE
from loracli.system.machine import DISK_FULL

COMMIT = re.compile(r"[0-9a-f]{40}")

BASE_CONFIG = "config.json"


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
class Kind:
    """What to take from a repository.

    Attributes:
        rejected: the error for a repository that cannot be had or is something else.
        pick: names to take from a listing, in the order of download; raises if the listing lacks what has to be there.
        is_whole: whether the names found in a cached folder are all that a listing could have asked for.
    """

    rejected: type[InputError]
    pick: Callable[[Source, Listing], list[str]]
    is_whole: Callable[[set[str]], bool]


class Copy(NamedTuple):
    path: Path
    commit: str
    files: tuple[FetchedFile, ...]


class Asking(TypedDict, total=False):
    """How the Hub is asked, and what becomes of the files.

    Keys:
        cache_dir: Hub cache to use instead of huggingface_hub's own.
        token: Hub token; by default the one of HF_TOKEN or of `hf auth login`.
        force: transfer what is there already, and replace files in a local directory.
        dry_run: transfer nothing, only tell what would be; nothing is verified.
        endpoint: address of the Hub; by default HF_ENDPOINT.
    """

    cache_dir: Path | None
    token: str | None
    force: bool
    dry_run: bool
    endpoint: str | None


class HubOptions(Asking, total=False):
    """The same, with who is told of it.

    Keys:
        progress: told the bytes of each file, and what is worth knowing; from several threads.
    """

    progress: Progress


@dataclass(frozen=True)
class Source:
    """One folder of one repository, and how to get at it.

    Attributes:
        max_bytes: the most that all of its files may have together; None for no ceiling.
        recheck: whether what is cached is hashed again; what is transferred always is.
        check_config: told the folder when a base's config is there and verified, before what comes after it.
        The others are those of `HubOptions` and `FetchOptions`.
    """

    kind: Kind
    repo_id: str = ""
    revision: str | None = None
    folder: str = ""
    text: str = ""
    cache_dir: Path | None = None
    local_dir: Path | None = None
    token: str | None = None
    force: bool = False
    dry_run: bool = False
    max_bytes: int | None = None
    recheck: bool = False
    endpoint: str | None = None
    check_config: Callable[[Path], object] | None = None
    progress: Progress = SILENT

    @property
    def name(self) -> str:
        return f"{self.repo_id}/{self.folder}" if self.folder else self.repo_id

    @property
    def pinned(self) -> str | None:
        return self.revision if self.revision and COMMIT.fullmatch(self.revision) else None

    @property
    def cached_repo(self) -> Path:
        cache = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser()
        return cache / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def remembered(self) -> Path:
        """Where the cache keeps the commit that the revision last stood for."""
        return self.cached_repo / "refs" / (self.revision or constants.DEFAULT_REVISION)

    def cached_folder(self, commit: str) -> Path:
        """Where the cache has the files of a commit."""
        return self.cached_repo / "snapshots" / commit / self.folder

    def destination(self, commit: str) -> Path:
        """Where the files of a commit are once they are fetched."""
        return self.local_dir / self.folder if self.local_dir is not None else self.cached_folder(commit)

    def rejected(self, what: str, hint: str | None = None) -> InputError:
        return self.kind.rejected(what, where=self.name, hint=hint)


class Listed(NamedTuple):
    """What the Hub says of a file; `digest` is the sha256 of a large one and git's blob hash of any other. Either is
    None where the Hub, or a cache without links, does not say."""

    size_bytes: int | None
    digest: str | None


@dataclass(frozen=True)
class Listing:
    """What the Hub says that a commit holds.

    Attributes:
        files: every file directly in the folder asked for, by name.
        adapter_folders: every folder of the repository that holds an adapter config and has a printable name.
    """

    commit: str
    files: dict[str, Listed]
    adapter_folders: tuple[str, ...] = ()


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# The base of all errors of the HTTP client (httpx or httpx2, by version), reached through a public name.
HttpError: type[Exception] = HfHubHTTPError.__mro__[1]


@contextmanager
def hub_errors(source: Source) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors, and its warnings, which quote the server, into our notes."""
    with without_server_words(source.progress):
        try:
            yield
        except (OSError, ValueError, RuntimeError, HttpError) as error:
            ours = _ours(error, source)
            if ours is None:
                raise
            raise ours from error


@contextmanager
def without_server_words(progress: Progress = SILENT) -> Iterator[None]:
    """Until the last thread leaves, the client's warnings go to a `_Translator` alone."""
    with _lock:
        _inside.append(progress)
        if len(_inside) == 1 and _LOGGER.getEffectiveLevel() == logging.WARNING:  # anything else is somebody's wish
            _replaced.append((_LOGGER.handlers, _LOGGER.propagate))
            _LOGGER.handlers, _LOGGER.propagate = [_Translator()], False
    try:
        yield
    finally:
        with _lock:
            _inside.remove(progress)
            if not _inside and _replaced:
                _LOGGER.handlers, _LOGGER.propagate = _replaced.pop()


_LOGGER = logging.getLogger("huggingface_hub")
_lock = threading.Lock()
_inside: list[Progress] = []
_replaced: list[tuple[list[logging.Handler], bool]] = []


class _Translator(logging.Handler):
    """Says in our own words that the client waits or tries again; a user would wonder about the silence otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if limited := re.match(r"Rate limited\. Waiting (\d+)", message):
            note = f"the Hub limits the number of requests: waiting {limited[1]} s"
        elif "Trying to resume" in message:
            note = "the transfer broke off: going on with it"
        elif message.startswith("Retrying in"):
            note = "the Hub does not answer as it should: asking again"
        else:
            return
        for progress in _inside[-1:]:
            progress.note(note)


def _ours(error: BaseException, source: Source) -> LoracatError | None:
    """Our error for one of huggingface_hub's; None for a bug. Order matters: they inherit from each other freely."""
    name, url = source.name, f"{(source.endpoint or constants.ENDPOINT).rstrip('/')}/{source.repo_id}"
    match error:
        case OfflineModeIsEnabled():
            return HubUnreachable("offline, and not in the cache", where=name, hint="unset HF_HUB_OFFLINE to fetch it")
        case GatedRepoError():
            hint = f"accept its terms at {url}, then {LOG_IN}"
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
            return _ours_by_status(error.response.status_code, error.response.headers, source)
        case HFValidationError():
            return source.rejected(f"'{source.repo_id}' cannot be the name of a Hub repository")
        case LocalEntryNotFoundError() | ValueError() if isinstance(error.__cause__, (OSError, HttpError)):
            return _ours(error.__cause__, source)
        case UnicodeEncodeError():
            return AccessDenied("the token holds characters that no token has", where=name, hint=LOG_IN)
        case LocalEntryNotFoundError() | json.JSONDecodeError() | ConnectionError() | TimeoutError():
            return _unreachable(error, source)
        case OSError():
            return _ours_by_errno(error, source)
        case RuntimeError() if type(error) is RuntimeError:  # all that the transfer library written in Rust raises
            full = f"os error {errno.ENOSPC}" in str(error)
            return _ours_by_errno(OSError(errno.ENOSPC, ""), source) if full else _unreachable(error, source)
        case _:
            return _unreachable(error, source) if isinstance(error, HttpError) else None


def _ours_by_status(status: int, headers: Mapping[str, str], source: Source) -> LoracatError:
    if status in (401, 403):
        return AccessDenied(
            f"the Hub denies access ({status})", where=source.name, hint=f"is the token valid? {LOG_IN}"
        )
    if status == 404:
        return source.rejected("the Hub does not have it (404)", hint=_hint_missing(source))
    if status == 429:
        told = re.search(r";\s*t=([0-9]{1,6})\b", headers.get("RateLimit", "")) or re.fullmatch(
            r"([0-9]{1,6})", headers.get("Retry-After", "")
        )
        hint = f"wait {f'{told[1]} s' if told else 'some minutes'}; {LOG_IN}, for a higher limit"
        return HubUnreachable("the Hub limits the number of requests (429)", where=source.name, hint=hint)
    return HubUnreachable(
        f"the Hub fails ({status})", where=source.name, hint="try again later; complete files are kept"
    )


def _ours_by_errno(error: OSError, source: Source) -> LoracatError:
    if error.errno in DISK_FULL:
        hint = "free some space, or name another place with --cache-dir"
        return OutOfResources("the disk is full", where=source.name, hint=hint)
    if error.errno is None and "Consistency check failed" in str(error):
        hint = "fetch it again; if that does not help, the file on the Hub is damaged"
        return IntegrityError("a file came with another size than announced", where=source.name, hint=hint)
    reason = error.strerror or "the download failed"
    return LoracatError(f"{reason}: {error.filename}" if error.filename else reason, where=source.name)


def _unreachable(error: BaseException, source: Source) -> HubUnreachable:
    what = f"the Hub does not answer, or breaks off ({type(error).__name__})"
    hint = "check the connection and HF_ENDPOINT; complete files are kept, and a cached commit needs no Hub"
    return HubUnreachable(what, where=source.name, hint=hint)


def _hint_missing(source: Source) -> str:
    if source.kind.rejected is AdapterNotFound and os.path.isdir(source.text):
        return f"the directory {source.text} is here, but holds no {CONFIG_FILE}"
    return f"check the spelling; if it is private, {LOG_IN}"


_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BLOCK_BYTES = 4 << 20


def verify(source: Source, commit: str, name: str, listed: Listed) -> None:
    """Raises IntegrityError if a fetched file is not the listed one; it is removed then, to come anew the next time."""
    place = source.destination(commit) / name
    size = place.stat().st_size
    if listed.size_bytes is not None and size != listed.size_bytes:
        found = f"has {size} bytes, not {listed.size_bytes}"
    elif listed.digest is None or has_digest(place, listed.digest, source.progress, f"{source.name}/{name}"):
        return
    else:
        found = f"does not have the {'sha256' if len(listed.digest) == 64 else 'git hash'} {listed.digest}"
    left = _discard(place)
    if source.local_dir is not None:  # a damaged copy in the cache would be copied again
        cached = source.cached_folder(commit) / name
        if cached.exists() and not (listed.digest and has_digest(cached, listed.digest)):
            left += _discard(cached)
    done = f"remove {' and '.join(map(str, left))}" if left else "it is removed"
    raise IntegrityError(
        f"{name} is not the file that the Hub lists: it {found}",
        where=source.name,
        hint=f"{done}; fetch again, and if it comes like this again, the Hub or the connection alters it",
    )


def has_digest(place: Path, digest: str, progress: Progress = SILENT, task: str = "") -> bool:
    """Whether the file has this digest, of whichever kind it is."""
    size = place.stat().st_size
    hasher = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    shown, task = size > _BLOCK_BYTES, f"{task} (verifying)"
    if shown:
        progress.begin(task, size, "B")
    with place.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
            if shown:
                progress.advance(task, len(block))
    if shown:
        progress.finish(task)
    return hasher.hexdigest() == digest


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def blob_digest(place: Path) -> str | None:
    """The digest that a cached file has by the name of its blob; None in a cache without links."""
    blob = _blob_of(place)
    return blob.name if blob is not None and is_digest(blob.name) else None


def _blob_of(place: Path) -> Path | None:
    return place.parent / os.readlink(place) if place.is_symlink() else None


def _discard(place: Path) -> list[Path]:
    """Removes a file, and the blob behind it unless that is sound by its own name; what could not be removed."""
    doomed, blob = [place], _blob_of(place)
    if blob is not None and not has_digest(blob, blob.name):
        doomed += [blob, blob.resolve()]  # the blob may be a link, too, into a store that repositories share
    left = []
    for path in doomed:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            left.append(path)
    return left
