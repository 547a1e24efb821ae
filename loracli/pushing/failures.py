"""What huggingface_hub raises while something is pushed, as errors of ours. The server's words are never repeated."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public by its documentation alone
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from loracli.errors import AccessDenied, HubUnreachable, InputError, LoracatError, OutOfResources
from loracli.hub.source import LOG_IN, HttpError, without_server_words
from loracli.system.machine import says_memory_ran_out

AGAIN = "run the same command again: a commit appears whole or not at all, and what is there is not sent twice"


@contextmanager
def push_errors(repo_id: str, *, creating: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors, and keeps it from drawing bars of its own; `creating` is about
    the repository itself."""
    try:
        with without_server_words(), _silently():
            yield
    except (OSError, ValueError, RuntimeError, HttpError) as error:
        raise _ours(error, repo_id, creating) from error


@contextmanager
def _silently() -> Iterator[None]:
    """Without bars, and without warnings: those quote what the Hub remarks on a card's metadata."""
    disabled = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        try:
            yield
        finally:
            if not disabled:
                enable_progress_bars()


def _ours(error: BaseException, repo_id: str, creating: bool) -> LoracatError:
    """Our error for one of huggingface_hub's. Order matters: they inherit from each other freely."""
    match error:
        case _ if says_memory_ran_out(error):
            return OutOfResources("memory ran out", where=repo_id, hint="end other programs, then push again")
        case OfflineModeIsEnabled():
            return HubUnreachable("offline, and a push needs the Hub", where=repo_id, hint="unset HF_HUB_OFFLINE")
        case GatedRepoError():
            return AccessDenied("the repository is gated and this account has no access", where=repo_id, hint=LOG_IN)
        case DisabledRepoError():
            return InputError("the Hub has disabled the repository", where=repo_id)
        case RevisionNotFoundError():
            return InputError("the Hub has no such revision", where=repo_id, hint="give a branch with --revision")
        case RepositoryNotFoundError() if not creating:
            return AccessDenied("the Hub shows no such repository to this token", where=repo_id, hint=LOG_IN)
        case HfHubHTTPError():
            return _ours_by_status(error.response.status_code, repo_id, creating)
        case HFValidationError():
            return InputError(f"'{repo_id}' cannot be the name of a Hub repository")
        case UnicodeEncodeError():
            return AccessDenied("the token holds characters that no token has", where=repo_id, hint=LOG_IN)
        case ValueError() if isinstance(error.__cause__, BadRequestError):
            hint = "put right what stands between the dashes at the head of README.md"
            return InputError("the Hub rejects the metadata of the card", where=repo_id, hint=hint)
        case RuntimeError() | ValueError() if isinstance(error.__cause__, (OSError, HttpError)):
            # Of one large file: storage refuses or breaks off, whatever the status.
            return _unreachable(error.__cause__, repo_id)
        case json.JSONDecodeError() | ConnectionError() | TimeoutError():
            return _unreachable(error, repo_id)
        case OSError():
            return LoracatError(f"a file cannot be read: {error.strerror or type(error).__name__}", where=repo_id)
        case _:
            # The client says ValueError or RuntimeError to an answer that is none of a Hub's.
            return _unreachable(error, repo_id)


def _ours_by_status(status: int, repo_id: str, creating: bool) -> LoracatError:
    owner = repo_id.partition("/")[0]
    if status == 401:
        return AccessDenied("the Hub does not accept the token (401)", where=repo_id, hint=f"is it valid? {LOG_IN}")
    if status == 409 and creating:
        what = "it is there already, and was not shown to this token before (409)"
        return AccessDenied(
            what, where=repo_id, hint=f"try again; if it stays so, {LOG_IN}, as someone who may read it"
        )
    if status == 403:
        what = f"this account or token may not {'create it' if creating else 'write to it'} (403)"
        hint = f"is {owner} you, or an organisation that you write for? the token needs write access: {LOG_IN}"
        return AccessDenied(what, where=repo_id, hint=hint)
    if status == 404 and creating:
        return InputError(f"the Hub has no user or organisation '{owner}'", where=repo_id, hint="check the spelling")
    if status == 412:
        hint = "look at what is there now, then push again"
        return LoracatError("somebody else has pushed there since; nothing was changed", where=repo_id, hint=hint)
    if status == 429:
        hint = f"wait some minutes; {LOG_IN}, for a higher limit"
        return HubUnreachable("the Hub limits the number of requests (429)", where=repo_id, hint=hint)
    if 400 <= status < 500:
        return InputError(f"the Hub refuses it ({status})", where=repo_id, hint="is --revision the name of a branch?")
    return HubUnreachable(f"the Hub fails ({status})", where=repo_id, hint=AGAIN)


def _unreachable(error: BaseException | None, repo_id: str) -> HubUnreachable:
    what = f"the Hub does not answer, or breaks off ({type(error).__name__})"
    return HubUnreachable(what, where=repo_id, hint=AGAIN)
