"""Whether a file holds the bytes that the Hub lists, and the removal of one that does not.

    large file    sha256(bytes)                               64 digits
    other file    sha1("blob " + len(bytes) + "\\0" + bytes)   40 digits, git's hash of a blob

huggingface_hub itself compares sizes only. Its cache keeps each file as a link to a blob of that name, so that a
cached file can be verified without the Hub, too.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from loracli.adapters.hub.source import Listed, Source
from loracli.errors import IntegrityError
from loracli.progress import SILENT, Progress

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
