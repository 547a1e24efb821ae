"""One repository on the Hub as a push sees it: what its branch holds, and one commit on top of that."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import loracli
from loracli.errors import HubUnreachable, IntegrityError
from loracli.hub.source import COMMIT, Listed
from loracli.progress import Progress
from loracli.pushing.contents import LocalFile
from loracli.pushing.failures import push_errors


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
        return HfApi(
            endpoint=self.endpoint, token=self.token, library_name="loracat", library_version=loracli.__version__
        )

    def look(self) -> Head | None:
        """What the branch holds, in one request or two; None if there is no such repository, or none to be seen."""
        with push_errors(self.id):
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
        with push_errors(self.id):
            return self._head(commit)

    def shows(self, model: str) -> bool:
        """Whether the Hub shows this token a model of that name."""
        with push_errors(model):
            try:
                self._api.model_info(model, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except GatedRepoError:
                return True
            except (RepositoryNotFoundError, HFValidationError):
                return False
        return True

    def create(self, *, private: bool) -> None:
        """Makes the repository; without `private` as visible as its owner has new ones."""
        with push_errors(self.id, creating=True):
            self._api.create_repo(self.id, private=private or None)

    def create_branch(self, commit: str) -> None:
        """Makes the branch, at a commit of the default branch."""
        with push_errors(self.id):
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
        with push_errors(self.id), ExitStack() as opened:
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
