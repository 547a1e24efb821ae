"""From the cache if it can be, by one listing and a few downloads if not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, constants, hf_hub_download

import loracli
from loracli.adapters.hub.failures import hub_errors
from loracli.adapters.hub.source import COMMIT, Copy, FetchedFile, Listed, Listing, Source
from loracli.adapters.names import CONFIG_FILE
from loracli.adapters.references import is_revision
from loracli.atomic import remove_temporaries, write_atomically
from loracli.errors import HubUnreachable, IntegrityError, LoracatError, OutputExists
from loracli.progress import Progress


def fetch(source: Source) -> Copy:
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
    return Copy(places[0].parent, listing.commit, files)


def _cached_copy(source: Source, commit: str) -> Copy | None:
    """The files of `commit` if the cache has them all; None otherwise, or if the cache is not what was asked for."""
    if source.force or source.local_dir is not None:
        return None
    path = source.cached_repo / "snapshots" / commit / source.folder
    sizes = {file.name: file.stat().st_size for file in path.glob("*") if file.is_file()}
    if not source.kind.is_whole(set(sizes)):
        return None
    names = source.kind.pick(source, Listing(commit, {name: Listed(size) for name, size in sizes.items()}))
    return Copy(path, commit, tuple(FetchedFile(name, sizes[name], cached=True) for name in names))


def _copy_without_hub(source: Source, error: HubUnreachable) -> Copy:
    """The copy that the revision last stood for, said aloud; the error itself if there is none."""
    commit = source.pinned
    if commit is None:
        with suppress(OSError):
            commit = source.remembered.read_text(encoding="ascii").strip()
    if commit is None or not COMMIT.fullmatch(commit) or (cached := _cached_copy(source, commit)) is None:
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
    files, adapter_folders = {}, []
    for sibling in info.siblings or []:
        folder, _, name = sibling.rfilename.rpartition("/")
        if folder == source.folder:
            large = sibling.lfs
            files[name] = Listed(large.size, large.sha256) if large else Listed(sibling.size, sibling.blob_id)
        if name == CONFIG_FILE and folder.isprintable():
            adapter_folders.append(folder)
    return Listing(commit, files, tuple(sorted(adapter_folders)))


def _take(source: Source, listing: Listing, name: str) -> tuple[Path, FetchedFile]:
    """Downloads one file unless it is there; in a dry run, only asks."""
    if source.dry_run:
        place, size, cached = _ask(source, listing, name)
        return place, FetchedFile(name, size, cached)
    bar = _bar_for(source.progress, f"{source.name}/{name}")
    with hub_errors(source):
        place = Path(hf_hub_download(tqdm_class=cast(Any, bar), **_what(source, listing.commit, name)))
        size = place.stat().st_size
    listed = listing.files[name].size_bytes
    if listed is not None and listed != size:
        what = f"{name} has {size} bytes, the Hub lists {listed}"
        raise IntegrityError(what, where=source.name, hint="--force fetches it again")
    return place, FetchedFile(name, size, cached=not bar.used)


def _ask(source: Source, listing: Listing, name: str) -> tuple[Path, int, bool]:
    """Where the file would be, its size, and whether it is there."""
    if source.local_dir is not None and not (place := source.local_dir / source.folder / name).exists():
        return place, listing.files[name].size_bytes or 0, False  # asking would already create the directory
    with hub_errors(source):
        info = hf_hub_download(dry_run=True, **_what(source, listing.commit, name))
    return Path(info.local_path), info.file_size or 0, not info.will_download


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
        "library_version": loracli.__version__,
    }


def _api(source: Source) -> HfApi:
    return HfApi(
        endpoint=source.endpoint,
        token=source.token,
        library_name="loracat",
        library_version=loracli.__version__,
    )


def _refuse_to_overwrite(source: Source, local_dir: Path, listing: Listing, names: Iterable[str]) -> None:
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


def _remember(source: Source, commit: str) -> None:
    """Writes down what the revision stood for, where huggingface_hub looks for it too; after the files, not before."""
    place = source.remembered
    with suppress(OSError, LoracatError):  # a cache that can only be read is still a cache
        if source.pinned:
            return
        if place.is_file() and place.read_text(encoding="ascii") == commit:
            remove_temporaries(place.parent, place.name)
        else:
            write_atomically(place, commit.encode())


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
