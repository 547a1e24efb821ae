"""One folder of one repository and how to get at it; what the Hub lists there; what was taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from loracli.errors import InputError
from loracli.progress import Progress

COMMIT = re.compile(r"[0-9a-f]{40}")


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


@dataclass(frozen=True)
class Source:
    """One folder of one repository, and how to get at it.

    Attributes:
        max_bytes: the most that all of its files may have together; None for no ceiling.
        recheck: whether what is cached is hashed again; what is transferred always is.
        The others are as for `fetch_adapters`.
    """

    kind: Kind
    repo_id: str
    revision: str | None
    folder: str
    text: str
    cache_dir: Path | None
    local_dir: Path | None
    token: str | None
    force: bool
    dry_run: bool
    max_bytes: int | None
    recheck: bool
    endpoint: str | None
    progress: Progress

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
