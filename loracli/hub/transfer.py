"""What a fetch will transfer, held against its ceilings and the free disk before the first byte; and the transfer.

From the cache of huggingface_hub if it can be, by one listing and a few downloads if not: files side by side, each
verified, of a few repositories at a time, and an end for all of them when one fails.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import HfApi, constants, hf_hub_download

from loracli._version import __version__
from loracli.errors import (
    HubUnreachable,
    IntegrityError,
    LoracatError,
    OutOfResources,
    OutputExists,
)
from loracli.hub.references import is_repo_id, is_revision
from loracli.hub.source import (
    BASE_CONFIG,
    COMMIT,
    Copy,
    FetchedFile,
    Listed,
    Listing,
    Source,
    blob_digest,
    has_digest,
    hub_errors,
    is_digest,
    verify,
)
from loracli.progress import Progress, amount_text
from loracli.system.files import CONFIG_FILE, PICKLE_FILE, README_FILE, REPLACE, remove_temporaries, write_atomically

_WORKERS = 4
_SECONDS_TO_STOP = 2.0  # for transfers to notice that they shall, and to remove what they have written

T = TypeVar("T")
R = TypeVar("R")


def _side_by_side(work: Callable[[T], R], items: Sequence[T], stopped: threading.Event) -> list[R]:
    """work(item) of each, in a few threads, in the order of the items; `stopped` is set by a failure, or by Ctrl-C."""
    if len(items) < 2:
        return [work(item) for item in items]
    waiting: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[int, R | BaseException]] = queue.SimpleQueue()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def run() -> None:
        with suppress(queue.Empty):
            while not stopped.is_set():
                number, item = waiting.get_nowait()
                try:
                    outcomes.put((number, work(item)))
                except BaseException as error:
                    outcomes.put((number, error))

    # Daemons: a pool's threads would keep the process alive for as long as a server that has stopped sending likes.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(len(items), _WORKERS))]
    results: dict[int, R] = {}
    try:
        for thread in threads:
            thread.start()
        while len(results) < len(items):
            number, outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            results[number] = outcome
    except BaseException:
        _stop(stopped)
        until = time.monotonic() + _SECONDS_TO_STOP
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise
    return [results[number] for number in range(len(items))]


def _stop(stopped: threading.Event) -> None:
    """Lets the transfers of other threads end at their next block."""
    stopped.set()
    with suppress(ImportError):  # not in every version; those transfers then end with their file
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]


def fetch(sources: Sequence[Source]) -> list[Copy]:
    """Plans all, sees whether there is room for all, and only then transfers; results in the order of the sources."""
    stopped = threading.Event()
    plans = _side_by_side(_prepare, sources, stopped)
    _check_room(plan for plan in plans if isinstance(plan, _Plan))
    return _side_by_side(partial(_carry_out, stopped=stopped), plans, stopped)


def _prepare(source: Source) -> Copy | _Plan:
    if source.revision is not None and not is_revision(source.revision):
        raise source.rejected(f"'{source.revision}' cannot be a branch, tag or commit")
    if source.pinned and (cached := _cached_copy(source, source.pinned)):
        return cached
    try:
        listing = _list_files(source)
    except HubUnreachable as error:
        return _copy_without_hub(source, error)
    return _make_plan(source, listing)


def _carry_out(plan: Copy | _Plan, stopped: threading.Event) -> Copy:
    if isinstance(plan, Copy):
        return plan
    source = plan.source
    if source.dry_run:
        return plan.copy()
    files = tuple(_take(plan, name, stopped) for name in plan.names)
    if source.local_dir is None:
        _remember(source, plan.listing.commit)
    return Copy(plan.folder, plan.listing.commit, files)


def _cached_copy(source: Source, commit: str, *, without_hub: bool = False) -> Copy | None:
    """The files of `commit` if the cache has them all, verified; None otherwise, or if the cache was not asked for.

    A cache without links does not know what a file should be; then the Hub is asked, if it can be.
    """
    if source.force or source.local_dir is not None:
        return None
    path = source.cached_folder(commit)
    found = {file.name: Listed(file.stat().st_size, blob_digest(file)) for file in path.glob("*") if file.is_file()}
    if not source.kind.is_whole(set(found)):
        return None
    names = source.kind.pick(source, Listing(commit, found))
    if source.recheck and not source.dry_run:
        unknown = [name for name in names if found[name].digest is None]
        if unknown and not without_hub:
            return None
        if unknown:
            source.progress.warn(f"{source.name}: the cache keeps no hash of {', '.join(unknown)}: not verified")
        with hub_errors(source):
            for name in names:
                verify(source, commit, name, found[name])
    return Copy(path, commit, tuple(FetchedFile(name, found[name].size_bytes or 0, cached=True) for name in names))


def _copy_without_hub(source: Source, error: HubUnreachable) -> Copy:
    """The copy that the revision last stood for, said aloud; the error itself if there is none."""
    commit = source.pinned
    if commit is None:
        with suppress(OSError, ValueError):  # not there, or no text
            commit = source.remembered.read_text(encoding="ascii").strip()
    if commit is None or not COMMIT.fullmatch(commit):
        raise error
    if (cached := _cached_copy(source, commit, without_hub=True)) is None:
        raise error
    reason = "offline" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
    source.progress.note(f"{reason}: using the cached copy of {source.name}, commit {commit}")
    return cached


def _list_files(source: Source) -> Listing:
    """Resolves the revision and lists the repository, in one request."""
    with hub_errors(source):
        info = _api(source).model_info(
            source.repo_id, revision=source.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    commit = source.pinned or info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise HubUnreachable("the Hub answers without a commit", where=source.name, hint="is HF_ENDPOINT a Hub?")
    _tell_new_name(source, info.id)
    files, adapter_folders = {}, []
    for sibling in info.siblings or []:
        folder, _, name = sibling.rfilename.rpartition("/")
        if folder == source.folder:
            large = sibling.lfs
            files[name] = Listed(large.size, large.sha256) if large else Listed(sibling.size, sibling.blob_id)
        if name == CONFIG_FILE and folder.isprintable():
            adapter_folders.append(folder)
    return Listing(commit, files, tuple(sorted(adapter_folders)))


def _tell_new_name(source: Source, name: str) -> None:
    """The Hub leads from a repository's old name to its new one until somebody else takes the old name."""
    if name.lower() != source.repo_id.lower() and is_repo_id(name):
        source.progress.warn(f"{source.repo_id} is now {name}: use that name, somebody else may take the old one")


def _take(plan: _Plan, name: str, stopped: threading.Event) -> FetchedFile:
    """Downloads one file unless it is there, and verifies it."""
    source, commit = plan.source, plan.listing.commit
    size = plan.size_of(name)
    bar = _bar_for(source, name, size, stopped)
    with hub_errors(source):
        place = Path(hf_hub_download(tqdm_class=cast(Any, bar), **_what(source, commit, name)))
        if place.parent.resolve() != plan.folder.resolve():
            place.unlink()
            what = f"the Hub answers with another commit of {name} than it was asked for"
            raise HubUnreachable(what, where=source.name, hint="is HF_ENDPOINT a Hub?")
        listed = plan.listing.files[name]
        verify(source, commit, name, listed if bar.used or source.recheck else listed._replace(digest=None))
    if name == BASE_CONFIG and source.check_config is not None:
        source.check_config(plan.folder)
    return FetchedFile(name, size, cached=not bar.used)


def _what(source: Source, commit: str, name: str) -> dict[str, Any]:
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
        "library_version": __version__,
    }


def _api(source: Source) -> HfApi:
    return HfApi(
        endpoint=source.endpoint,
        token=source.token,
        library_name="loracat",
        library_version=__version__,
    )


def _remember(source: Source, commit: str) -> None:
    """Writes down what the revision stood for, where huggingface_hub looks for it too; after the files, not before."""
    place = source.remembered
    with suppress(OSError, ValueError, LoracatError):  # a cache that can only be read is still a cache
        if source.pinned:
            return
        if place.is_file() and place.read_text(encoding="ascii") == commit:
            remove_temporaries(place.parent, place.name)
        else:
            write_atomically(place, commit.encode())


class _Stopped(Exception):
    """Ends the transfer of a thread because another one has failed."""


class _Bar:
    """Stands where huggingface_hub expects a tqdm class, draws nothing, and hands the bytes on.

    It also ends a transfer that was stopped, and one that sends more than was listed, which the client would write to
    the disk to its end: a small compressed answer can become a very large file.
    """

    source: Source
    name: str
    size: int
    stopped: threading.Event
    used = False

    def __init__(self, *args: Any, total: int | None = None, **kwargs: Any) -> None:
        type(self).used = True
        self.task = f"{self.source.name}/{self.name}"
        self.received = 0
        self.thread = threading.get_ident()
        self.progress: Progress = self.source.progress
        self.progress.begin(self.task, total, "B")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, amount: float | None = 1) -> None:
        self.received += int(amount or 0)
        self.progress.advance(self.task, int(amount or 0))
        if threading.get_ident() != self.thread:
            return  # of the transfer library written in Rust, which checks what it writes
        if self.stopped.is_set():
            raise _Stopped
        if self.received > self.size:
            what = f"more bytes of {self.name} come than the {self.size} that the Hub lists"
            raise IntegrityError(what, where=self.source.name, hint="nothing of it is kept; try again later")

    def close(self) -> None:
        self.progress.finish(self.task)

    def update_transfer(self, amount: int) -> None:
        """Bytes on the wire, where storage is deduplicated: not the file's bytes, which `update` counts."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass


def _bar_for(source: Source, name: str, size: int, stopped: threading.Event) -> type[_Bar]:
    return type("_FileBar", (_Bar,), {"source": source, "name": name, "size": size, "stopped": stopped})


MAX_SMALL_BYTES = 1 << 20  # of a config or a README; whoever writes them may be anybody
_CONFIGS = (CONFIG_FILE, BASE_CONFIG)


@dataclass(frozen=True)
class _Plan:
    """One repository's part of a fetch: the files of a commit, in the order of download."""

    source: Source
    listing: Listing
    names: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.source.destination(self.listing.commit)

    def size_of(self, name: str) -> int:
        size = self.listing.files[name].size_bytes
        assert size is not None
        return size

    def is_here(self, name: str) -> bool:
        """Whether nothing has to be transferred: the file is there, or in the cache under this commit or another."""
        cached = self.source.cached_folder(self.listing.commit) / name
        places = {self.folder / name, cached}
        if self.source.local_dir is None:
            places.add(self._blob(name))
        return not self.source.force and any(self._is_like(place, name) for place in places)

    def bytes_to_write(self, name: str) -> int:
        """How much room the file takes at its destination, beyond what is there."""
        if self.source.local_dir is None:
            return 0 if self.is_here(name) else self.size_of(name)
        return 0 if self._is_like(self.folder / name, name) and not self.source.force else self.size_of(name)

    def copy(self) -> Copy:
        """What will be there."""
        files = tuple(FetchedFile(name, self.size_of(name), self.is_here(name)) for name in self.names)
        return Copy(self.folder, self.listing.commit, files)

    def _blob(self, name: str) -> Path:
        return self.source.cached_repo / "blobs" / str(self.listing.files[name].digest)

    def _is_like(self, place: Path, name: str) -> bool:
        return place.is_file() and place.stat().st_size == self.size_of(name)


def _make_plan(source: Source, listing: Listing) -> _Plan:
    """Chooses the files, and refuses what is too large or would replace other files in a local directory.

    Raises:
        HubUnreachable: if a size or a digest is not listed, without which nothing could be verified.
        OutOfResources: if a config, or everything together, is larger than its ceiling.
        OutputExists: if another version of a file is in the local directory.
    """
    names = source.kind.pick(source, listing)
    for name in names:
        size, digest = listing.files[name]
        if size is None or digest is None or not is_digest(digest):
            what = f"the Hub lists {name} without size or hash"
            raise HubUnreachable(what, where=source.name, hint="is HF_ENDPOINT a Hub?")
    plan = _Plan(source, listing, tuple(names))
    if README_FILE in names and plan.size_of(README_FILE) > MAX_SMALL_BYTES:
        much = amount_text(plan.size_of(README_FILE), "B")
        source.progress.warn(
            f"{source.name}: {README_FILE} has {much} and is left out, and so is the licence that it states"
        )
        plan = _Plan(source, listing, tuple(name for name in names if name != README_FILE))
    _check_ceilings(plan)
    if source.local_dir is not None and not source.force:
        _refuse_to_overwrite(plan)
    return plan


def _check_room(plans: Iterable[_Plan]) -> None:
    """Raises OutOfResources unless the disk has room for all that these plans write, to one cache or directory."""
    needed: dict[Path, int] = {}  # by place: two references may name one file
    for plan in plans:
        needed |= {plan.folder / name: plan.bytes_to_write(name) for name in plan.names}
    total = sum(needed.values())
    if not total:
        return
    place = next(iter(needed))
    disk = next(folder for folder in place.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if total > free:
        raise OutOfResources(
            f"the files need {total} bytes ({amount_text(total, 'B')}) and {free} are free ({amount_text(free, 'B')})",
            where=str(disk),
            hint="free some space, or name a place on another disk: --cache-dir, --local-dir, or HF_HOME",
        )


def _check_ceilings(plan: _Plan) -> None:
    source = plan.source
    for name in plan.names:
        if name in _CONFIGS and plan.size_of(name) > MAX_SMALL_BYTES:
            raise OutOfResources(
                f"{name} has {plan.size_of(name)} bytes, and at most {MAX_SMALL_BYTES} are read",
                where=source.name,
                hint="no config is that large: ask its author, or take another one",
            )
    total = sum(plan.size_of(name) for name in plan.names)
    is_here = all(plan.is_here(name) for name in plan.names)
    if source.max_bytes is not None and total > source.max_bytes and not is_here:
        raise OutOfResources(
            f"its files have {total} bytes ({amount_text(total, 'B')}), and at most {source.max_bytes} are allowed "
            f"({amount_text(source.max_bytes, 'B')})",
            where=source.name,
            hint="download it by itself, and name the directory"
            if PICKLE_FILE in plan.names
            else f"if it is worth that much: loracat fetch --max-size {total}",
        )


def _refuse_to_overwrite(plan: _Plan) -> None:
    for name in plan.names:
        place, digest = plan.folder / name, plan.listing.files[name].digest
        if place.exists() and not (place.is_file() and digest and has_digest(place, digest)):
            raise OutputExists(
                "another version of the file is there",
                where=str(place),
                hint=REPLACE,
            )
