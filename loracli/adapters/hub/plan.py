"""What a fetch will transfer, held against its ceilings and the free disk before the first byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loracli.adapters.hub.contents import BASE_CONFIG
from loracli.adapters.hub.digests import has_digest, is_digest
from loracli.adapters.hub.source import Copy, FetchedFile, Listing, Source
from loracli.errors import HubUnreachable, OutOfResources, OutputExists
from loracli.progress import amount_text
from loracli.system.files import CONFIG_FILE, README_FILE

MAX_SMALL_BYTES = 1 << 20  # of a config or a README; whoever writes them may be anybody
_CONFIGS = (CONFIG_FILE, BASE_CONFIG)


@dataclass(frozen=True)
class Plan:
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


def make_plan(source: Source, listing: Listing) -> Plan:
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
    plan = Plan(source, listing, tuple(names))
    if README_FILE in names and plan.size_of(README_FILE) > MAX_SMALL_BYTES:
        much = amount_text(plan.size_of(README_FILE), "B")
        source.progress.warn(
            f"{source.name}: {README_FILE} has {much} and is left out, and so is the licence that it states"
        )
        plan = Plan(source, listing, tuple(name for name in names if name != README_FILE))
    _check_ceilings(plan)
    if source.local_dir is not None and not source.force:
        _refuse_to_overwrite(plan)
    return plan


def check_room(plans: Iterable[Plan]) -> None:
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


def _check_ceilings(plan: Plan) -> None:
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
            hint=f"if it is worth that much: loracat fetch --max-size {total}",
        )


def _refuse_to_overwrite(plan: Plan) -> None:
    for name in plan.names:
        place, digest = plan.folder / name, plan.listing.files[name].digest
        if place.exists() and not (place.is_file() and digest and has_digest(place, digest)):
            raise OutputExists("another version of the file is there", where=str(place), hint="--force replaces it")
