"""What huggingface_hub and its HTTP client raise, as errors of ours. The server's own words are never repeated."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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

from loracli.adapters.hub.source import Source
from loracli.errors import AccessDenied, AdapterNotFound, HubUnreachable, IntegrityError, LoracatError, OutOfResources
from loracli.progress import SILENT, Progress
from loracli.system.files import CONFIG_FILE
from loracli.system.machine import DISK_FULL

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
