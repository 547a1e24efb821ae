"""One repository on the Hub as a push sees it: what its branch holds, and one commit on top of that. What
huggingface_hub raises meanwhile leaves as errors of ours; the server's words are never repeated.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, constants
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

from loracli._version import __version__
from loracli.errors import AccessDenied, HubUnreachable, InputError, IntegrityError, LoracatError, OutOfResources
from loracli.hub.source import COMMIT, LOG_IN, HttpError, Listed, without_server_words
from loracli.progress import Progress
from loracli.pushing.contents import LocalFile
from loracli.system.machine import says_memory_ran_out

_AGAIN = "run the same command again: a commit appears whole or not at all, and what is there is not sent twice"


@contextmanager
def _push_errors(repo_id: str, *, creating: bool = False) -> Iterator[None]:
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
    return HubUnreachable(f"the Hub fails ({status})", where=repo_id, hint=_AGAIN)


def _unreachable(error: BaseException | None, repo_id: str) -> HubUnreachable:
    what = f"the Hub does not answer, or breaks off ({type(error).__name__})"
    return HubUnreachable(what, where=repo_id, hint=_AGAIN)


class Head(NamedTuple):
    """What a branch holds.

    Args:
        commit: that it stands at.
        private: whether the repository is.
        files: of the repository, by path.
        is_there: False for a branch that is still to be made; the rest is then that of the default branch.
    """

    commit: str
    private: bool
    files: dict[str, Listed]
    is_there: bool = True


class Committed(NamedTuple):
    """A commit, and the number of the pull request that it is in."""

    commit: str
    pull_request: int | None


@dataclass(frozen=True)
class Repository:
    """A repository, one branch of it, and how to get at them."""

    id: str
    branch: str
    token: str = field(repr=False)
    endpoint: str | None = None

    @property
    def url(self) -> str:
        return f"{(self.endpoint or constants.ENDPOINT).rstrip('/')}/{self.id}"

    @property
    def _api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="loracat", library_version=__version__)

    def look(self) -> Head | None:
        """What the branch holds, in one request or two; None if there is no such repository, or none to be seen."""
        with _push_errors(self.id):
            try:
                return self._head(self.branch)
            except GatedRepoError:  # a RepositoryNotFoundError, too
                raise
            except RepositoryNotFoundError:
                return None
            except RevisionNotFoundError:
                return self._head(constants.DEFAULT_REVISION)._replace(is_there=False)

    def look_at(self, commit: str) -> Head:
        """What a commit holds."""
        with _push_errors(self.id):
            return self._head(commit)

    def shows(self, model: str) -> bool:
        """Whether the Hub shows this token a model of that name."""
        with _push_errors(model):
            try:
                self._api.model_info(model, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except GatedRepoError:
                return True
            except (RepositoryNotFoundError, HFValidationError):
                return False
        return True

    def create(self, *, private: bool) -> None:
        """Makes the repository; without `private` as visible as its owner has new ones."""
        with _push_errors(self.id, creating=True):
            self._api.create_repo(self.id, private=private or None)

    def create_branch(self, commit: str) -> None:
        """Makes the branch, at a commit of the default branch."""
        with _push_errors(self.id):
            self._api.create_branch(self.id, branch=self.branch, revision=commit)

    def commit(
        self,
        files: Sequence[LocalFile],
        *,
        message: str,
        parent: str,
        create_pr: bool,
        progress: Progress,
    ) -> Committed:
        """Uploads files and adds them in one commit, on top of `parent` or not at all.

        The files are handed over open, not by their paths: so it is seen how far they are, they have to be the bytes
        that were looked at, and a large one goes by HTTP, which is what huggingface_hub sends open files by.

        Args:
            files: to add or to replace.
            message: of the commit, its first line the summary.
            parent: the commit that the branch has to stand at.
            create_pr: open a pull request instead.
            progress: told the bytes of each file.
        Raises:
            IntegrityError: if a file is not what it was.
            LoracatError: of the kind that fits, if the Hub does not take it; nothing is committed then.
        """
        summary, _, description = message.strip().partition("\n")
        with _push_errors(self.id), ExitStack() as opened:
            additions: list[CommitOperationAdd] = []
            for file in files:
                reader = opened.enter_context(_Reader(file, progress))
                addition = CommitOperationAdd(file.name, reader)
                if addition.upload_info.sha256.hex() != file.sha256:
                    raise IntegrityError(f"{file.name} has changed since it was verified", where=str(file.path.parent))
                additions.append(addition)
                progress.begin(reader.task, file.size_bytes, "B")
                reader.sending = True
                self._api.preupload_lfs_files(
                    self.id, [addition], revision=self.branch, create_pr=create_pr, free_memory=False
                )
                progress.finish(reader.task)
            info = self._api.create_commit(
                self.id,
                additions,
                commit_message=summary,
                commit_description=description.strip(),
                revision=self.branch,
                parent_commit=parent,
                create_pr=create_pr,
            )
            if not COMMIT.fullmatch(info.oid):
                raise HubUnreachable("the Hub answers without a commit", where=self.id, hint="is HF_ENDPOINT a Hub?")
            return Committed(info.oid, info.pr_num)

    def _head(self, revision: str) -> Head:
        info = self._api.model_info(
            self.id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        if not COMMIT.fullmatch(info.sha or ""):
            raise HubUnreachable("the Hub answers without a commit", where=self.id, hint="is HF_ENDPOINT a Hub?")
        files = {}
        for sibling in info.siblings or []:
            large = sibling.lfs
            files[sibling.rfilename] = (
                Listed(large.size, large.sha256) if large else Listed(sibling.size, sibling.blob_id)
            )
        return Head(str(info.sha), bool(info.private), files)


class _Reader(io.BufferedReader):
    """A file that tells how far it has been read, while it is sent; what is sent again is not counted twice."""

    def __init__(self, file: LocalFile, progress: Progress) -> None:
        super().__init__(io.FileIO(file.path))
        self.task = file.name
        self.sending = False
        self._progress = progress
        self._sent = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.sending and (place := self.tell()) > self._sent:
            self._progress.advance(self.task, place - self._sent)
            self._sent = place
        return data
