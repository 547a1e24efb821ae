"""`push_adapter`: an export that is what its record says becomes one commit on the Hub, compared with it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_token

from loracli._version import __version__
from loracli.arguments import check_declared
from loracli.errors import AccessDenied, HubUnreachable, InputError, UsageError, VerificationError
from loracli.hub.fetch import checked_token
from loracli.hub.references import is_repo_id, is_revision
from loracli.hub.source import COMMIT, LOG_IN
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.pushing.contents import Contents, LocalFile, no_hub_base, read_contents, refuse_model
from loracli.pushing.repository import Head, Repository
from loracli.system.display import count_text, repr_line
from loracli.system.files import EXPORTED_FILES
from loracli.verifying.findings import Verification
from loracli.verifying.verify import verify_directory

State = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class PushedFile:
    """A file of the export, and what it is to the branch that it is pushed to."""

    name: str
    size_bytes: int
    sha256: str
    state: State


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or after a dry run would be.

    Args:
        repo_id: the repository.
        revision: the branch.
        commit: that holds the files; None after a dry run that would commit something.
        url: of that commit on the Hub.
        pull_request: its address, None without one.
        committed: False where the branch held the same bytes already, and after a dry run.
        created: whether the repository was made, or would be.
        private: whether it is, None of one that would be made.
        files: of the export.
        left_there: files that the branch has by names of an export's and this export does not have: perhaps of older
            weights. A push removes nothing.
        left_out: what else is in the directory and was not uploaded.
        licence: whether the card states one.
        weights_edited: whether they were edited after the fit, so that the card has nothing of what it measured.
        verification: of the directory.
    """

    repo_id: str
    revision: str
    commit: str | None
    url: str | None
    pull_request: str | None
    committed: bool
    created: bool
    private: bool | None
    files: tuple[PushedFile, ...]
    left_there: tuple[str, ...]
    left_out: tuple[str, ...]
    licence: bool
    weights_edited: bool
    verification: Verification

    def __repr__(self) -> str:
        if self.commit is None:
            state = "a dry run"
        else:
            state = f"commit {self.commit[:12]}" if self.committed else f"there already, commit {self.commit[:12]}"
        asked = "" if self.pull_request is None else "a pull request"
        return repr_line(self, self.repo_id, self.revision, count_text(len(self.files), "file"), state, asked)


@dataclass(frozen=True)
class PushRequest:
    """What is pushed, and where to.

    Args:
        directory: that `export_adapter` wrote.
        repo_id: `org/name`; made if it is not there.
        private: make it a private one; refused if it exists and is public.
        revision: the branch, made if it is not there; None for the default branch.
        create_pr: open a pull request for that branch instead of committing to it.
        message: of the commit; None says that loracat made the adapter.
        edited_card: push a README.md that was changed after the export wrote it.
    """

    directory: str | Path
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    edited_card: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type."""
        check_declared(self)


@takes_bar
def push_adapter(
    request: PushRequest,
    *,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    progress: Progress | Bar = SILENT,
) -> Pushed:
    """Uploads an exported adapter in one commit, and compares what the Hub then holds with the files here.

    The directory is verified first, as `verify_directory` does it; whatever is refused for what it holds is refused
    without a token. The commit is made on top of the one that was looked at: if somebody else has pushed since, it is
    refused and nothing is changed. The same bytes are not committed twice.

    Args:
        request: what is pushed, and where to.
        dry_run: change nothing on the Hub, only tell what would be.
        token: Hub token with write access; by default the one of HF_TOKEN or of `hf auth login`.
        endpoint: address of the Hub; by default HF_ENDPOINT.
        progress: told the bytes of each file.
    Raises:
        VerificationError: if the directory, or what the Hub holds after the commit, is not what it should be.
        IntegrityError: if the record is damaged or a file changes meanwhile.
        InputError: if the directory is no export of an adapter, or something in it must not be published.
        UsageError: if options contradict each other or the repository's visibility.
        AccessDenied, HubUnreachable: if the Hub does not take it; nothing is committed then.
    """
    progress = drawn(progress)
    directory, repo_id = Path(request.directory), request.repo_id
    _check_options(request)
    token = checked_token(token) or get_token()
    refuse_model(directory)
    verification = verify_directory(directory, edited_card=request.edited_card, progress=progress)
    contents = read_contents(directory, secrets=() if token is None else (token,), edited_card=request.edited_card)
    if token is None:
        raise AccessDenied(
            "the files are in order, but a push needs a Hub token with write access", where=repo_id, hint=LOG_IN
        )
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("offline, and a push needs the Hub", where=repo_id, hint="unset HF_HUB_OFFLINE")
    repository = Repository(repo_id, request.revision or constants.DEFAULT_REVISION, token, endpoint)
    head = repository.look()
    _check_target(request, repository, head)
    if not repository.shows(contents.base_id):
        raise no_hub_base(contents.base_id, directory)
    planned = _plan(repository, head, contents, verification)
    if dry_run:
        there = head is not None and head.is_there
        return planned if there else replace(planned, commit=None, url=None)
    if head is None:
        head = _create(repository, private=request.private)
    if not head.is_there:
        repository.create_branch(head.commit)
    if planned.commit is not None:
        return planned
    states = {file.name: file.state for file in planned.files}
    made = repository.commit(
        [file for file in contents.files if states[file.name] != "same"],
        message=request.message or f"Upload a LoRA adapter made with loracat {__version__}",
        parent=head.commit,
        create_pr=request.create_pr,
        progress=progress,
    )
    _check_commit(repository, made.commit, contents.files)
    number = made.pull_request
    return replace(
        planned,
        commit=made.commit,
        url=_commit_url(repository, made.commit),
        pull_request=None if number is None else f"{repository.url}/discussions/{number}",
        committed=True,
        private=head.private,
    )


def _check_options(request: PushRequest) -> None:
    repo_id, revision, message = request.repo_id, request.revision, request.message
    if not is_repo_id(repo_id):
        raise UsageError(f"'{repo_id}' is not the name of a Hub repository", hint="write org/name, or YOU/name")
    if revision is not None and not is_revision(revision):
        raise UsageError(f"'{revision}' cannot be a branch")
    if revision is not None and COMMIT.fullmatch(revision):
        raise UsageError("--revision is a commit, and a push adds one to a branch", hint="give the branch's name")
    if message is not None and not message.strip():
        raise UsageError("the commit message is empty", hint="leave --message out, or say something")


def _check_target(request: PushRequest, repository: Repository, head: Head | None) -> None:
    if head is None and request.create_pr:
        raise InputError(
            "there is no such repository to open a pull request in", where=repository.id, hint="check the spelling"
        )
    if head is None:
        return
    if request.create_pr and not head.is_there:
        raise InputError(f"there is no branch '{repository.branch}' for a pull request", where=repository.id)
    if request.private and not head.private:
        raise UsageError(
            f"--private makes new repositories private, and {repository.id} is there and public",
            hint=f"make it private at {repository.url}/settings, or leave --private out",
        )


def _plan(repository: Repository, head: Head | None, contents: Contents, verification: Verification) -> Pushed:
    """What there is to do; `commit` is where all is as it should be already, None if there is something to commit."""
    there = {} if head is None else head.files
    files = tuple(PushedFile(f.name, f.size_bytes, f.sha256, _state(f, head)) for f in contents.files)
    own = {file.name for file in files}
    same = all(file.state == "same" for file in files)
    commit = head.commit if head is not None and same else None
    return Pushed(
        repo_id=repository.id,
        revision=repository.branch,
        commit=commit,
        url=None if commit is None else _commit_url(repository, commit),
        pull_request=None,
        committed=False,
        created=head is None,
        private=head.private if head is not None else None,
        files=files,
        left_there=tuple(sorted(EXPORTED_FILES & there.keys() - own)),
        left_out=contents.left_out,
        licence=contents.licence,
        weights_edited=contents.weights_edited,
        verification=verification,
    )


def _state(file: LocalFile, head: Head | None) -> State:
    if head is None or file.name not in head.files:
        return "new"
    return "same" if file.is_listed_as(head.files[file.name]) else "changed"


def _create(repository: Repository, *, private: bool) -> Head:
    repository.create(private=private)
    head = repository.look()
    if head is None:
        raise AccessDenied("the new repository is not shown to this token", where=repository.id, hint=LOG_IN)
    if private and not head.private:
        raise AccessDenied("the Hub has made the repository public; nothing was uploaded", where=repository.id)
    return head


def _check_commit(repository: Repository, commit: str, files: Sequence[LocalFile]) -> None:
    """Raises VerificationError if the commit does not hold these files."""
    there = repository.look_at(commit).files
    problems = [
        f"{file.name} {'has other bytes' if file.name in there else 'is not there'}"
        for file in files
        if not file.is_listed_as(there.get(file.name))
    ]
    if problems:
        raise VerificationError(
            f"commit {commit} of {repository.id} does not hold what was pushed",
            problems=tuple(problems),
            hint=f"see {_commit_url(repository, commit)}; does a .gitignore there leave the file out?",
        )


def _commit_url(repository: Repository, commit: str) -> str:
    return f"{repository.url}/commit/{commit}"
