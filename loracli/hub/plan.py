"""What a fetch takes of a repository, and what that will transfer.

What a fetch will transfer, held against its ceilings and the free disk before the first byte.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loracli.errors import (
    AdapterNotFound,
    HubUnreachable,
    InputError,
    OutOfResources,
    OutputExists,
    UnsupportedAdapter,
    UsageError,
)
from loracli.hub.references import URI_PREFIX
from loracli.hub.source import Copy, FetchedFile, Kind, Listing, Source, has_digest, is_digest
from loracli.progress import amount_text
from loracli.system.files import CONFIG_FILE, MLX_TENSOR_FILE, PICKLE_FILE, README_FILE, TENSOR_FILE, TENSOR_FILES

# In the order of download: whoever finds the weights in the cache knows that the rest came before them.
ADAPTER_FILES = (README_FILE, CONFIG_FILE, *TENSOR_FILES)

BASE_CONFIG = "config.json"
_BASE_WEIGHTS = "model.safetensors"
_BASE_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_BASE_FILES = (
    BASE_CONFIG,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    *_BASE_TOKENIZERS,
    f"{_BASE_WEIGHTS}.index.json",
)
_SHARD = re.compile(r"(?!consolidated)[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")  # consolidated*: the weights once more
_NUMBERED_SHARD = re.compile(r".+-\d+-of-(\d+)\.safetensors")
_PICKLE = re.compile(r".+\.(bin|pt|pth|pkl|ckpt)")


def _pick_adapter_files(source: Source, listing: Listing) -> list[str]:
    if source.folder and not listing.files:
        raise source.rejected(f"the repository has no folder '{source.folder}'", hint=_other_folders(source, listing))
    check_adapter(listing.files, source.name, hint=_other_folders(source, listing), text=_as_typed(source))
    spare = {MLX_TENSOR_FILE} if TENSOR_FILE in listing.files else set()
    return [name for name in ADAPTER_FILES if name in listing.files and name not in spare]


def _pick_pickle_files(source: Source, listing: Listing) -> list[str]:
    if PICKLE_FILE not in listing.files or CONFIG_FILE not in listing.files:
        _pick_adapter_files(source, listing)
    check_pickle(listing.files, source.name)
    return [CONFIG_FILE, PICKLE_FILE]


def check_pickle(names: Iterable[str], where: str) -> None:
    """Raises UsageError if the weights are there without a pickle, AdapterNotFound if there are none."""
    present = set(names)
    found = next((name for name in TENSOR_FILES if name in present), None)
    if found is not None:
        raise UsageError(f"it has {found}, which needs no --from-pickle", where=where, hint="leave --from-pickle out")
    if PICKLE_FILE not in present:
        raise AdapterNotFound(f"no {PICKLE_FILE} in it", where=where)


def from_pickle_hint(text: str) -> str:
    """The way out for an adapter that has only a pickle file, by the reference that it goes by."""
    command = shlex.join(["loracat", "convert", text, "--from-pickle"])
    return f"only {TENSOR_FILE} is read; to make one of its tensors, in a process of its own: {command}"


def check_adapter(names: Iterable[str], where: str, hint: str | None = None, *, text: str) -> None:
    """Raises AdapterNotFound or UnsupportedAdapter for a folder without what an adapter needs; `text` is how it was
    named."""
    present = set(names)
    if CONFIG_FILE not in present:
        if hint is None and BASE_CONFIG in present:
            hint = "it looks like a whole model; an adapter is what PEFT's save_pretrained writes"
        raise AdapterNotFound(f"no {CONFIG_FILE} in it", where=where, hint=hint)
    if not present.isdisjoint(TENSOR_FILES):
        return
    if PICKLE_FILE in present:
        raise UnsupportedAdapter(
            f"its weights are only in {PICKLE_FILE}, a pickle file, which can run code when it is opened",
            where=where,
            hint=from_pickle_hint(text),
        )
    raise AdapterNotFound(f"no {TENSOR_FILE} in it", where=where, hint=hint)


def _as_typed(source: Source) -> str:
    """A reference to the folder at the revision, which may have been given beside it."""
    at = f"@{source.revision}" if source.revision else ""
    plain = f"{source.repo_id}{at}"
    return f"{URI_PREFIX}{plain}/{source.folder}" if source.folder else plain


def _other_folders(source: Source, listing: Listing) -> str | None:
    at = f"@{source.revision}" if source.revision else ""
    named = [f"{URI_PREFIX}{source.repo_id}{at}/{f}".rstrip("/") for f in listing.adapter_folders if f != source.folder]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"the repository has adapters at {', '.join(named[:5])}{more}" if named else None


def _is_whole_adapter(names: set[str]) -> bool:
    return CONFIG_FILE in names and not names.isdisjoint(TENSOR_FILES)


def _pick_base_files(source: Source, listing: Listing) -> list[str]:
    names = listing.files
    if CONFIG_FILE in names:
        raise source.rejected("this is an adapter, not a base model", hint="name the model that it was trained on")
    # As transformers chooses: one file if there is one, else the shards.
    weights = [_BASE_WEIGHTS] if _BASE_WEIGHTS in names else sorted(name for name in names if _SHARD.fullmatch(name))
    if BASE_CONFIG not in names:
        raise source.rejected(f"no {BASE_CONFIG} in it", hint="a base model is a transformers model repository")
    if not weights:
        found = next((name for name in names if _PICKLE.fullmatch(name)), None)
        what = f"its weights are pickle files ({found})" if found else "no weights in it"
        raise source.rejected(f"{what}; only safetensors are read", hint="look for a converted copy or a pull request")
    return [name for name in _BASE_FILES if name in names] + weights


def _pick_base_config(source: Source, listing: Listing) -> list[str]:
    if BASE_CONFIG not in listing.files:
        raise source.rejected(f"no {BASE_CONFIG} in it", hint="a base model is a transformers model repository")
    return [BASE_CONFIG]


def _is_whole_base(names: set[str]) -> bool:
    """Config, a tokenizer, and the one weights file or every numbered shard."""
    if BASE_CONFIG not in names or names.isdisjoint(_BASE_TOKENIZERS):
        return False
    shards = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name)) and _SHARD.fullmatch(name)]
    return _BASE_WEIGHTS in names or (bool(shards) and all(int(shard[1]) == len(shards) for shard in shards))


def _is_whole_pickle(names: set[str]) -> bool:
    return {CONFIG_FILE, PICKLE_FILE} <= names


ADAPTER = Kind(AdapterNotFound, _pick_adapter_files, _is_whole_adapter)
PICKLED_ADAPTER = Kind(AdapterNotFound, _pick_pickle_files, _is_whole_pickle)
BASE = Kind(InputError, _pick_base_files, _is_whole_base)
BASE_CONFIG_ALONE = Kind(InputError, _pick_base_config, lambda names: BASE_CONFIG in names)


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
            hint="download it by itself, and name the directory"
            if PICKLE_FILE in plan.names
            else f"if it is worth that much: loracat fetch --max-size {total}",
        )


def _refuse_to_overwrite(plan: Plan) -> None:
    for name in plan.names:
        place, digest = plan.folder / name, plan.listing.files[name].digest
        if place.exists() and not (place.is_file() and digest and has_digest(place, digest)):
            raise OutputExists("another version of the file is there", where=str(place), hint="--force replaces it")
