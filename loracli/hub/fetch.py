"""The only room that reads from the Hub: adapters and base models by reference in, directories pinned to a commit out.

    Reference ── one request: commit, files, sizes, hashes ──> the few files wanted, by exact name ──> Fetched
                 none if the commit is given and cached        every byte verified

Every error of huggingface_hub and its HTTP client leaves this room as one of ours. What the server says in words is
never repeated: it is as untrusted as the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.errors import MalformedAdapter, UsageError
from loracli.hub.plan import (
    ADAPTER,
    ADAPTER_FILES,
    BASE,
    BASE_CONFIG_ALONE,
    MAX_SMALL_BYTES,
    PICKLED_ADAPTER,
    check_adapter,
    check_pickle,
)
from loracli.hub.references import URI_PREFIX, BaseClaim, Reference, agreed_base, parse_reference
from loracli.hub.source import FetchedFile, Source
from loracli.hub.transfer import fetch
from loracli.progress import SILENT, Progress
from loracli.system.files import CONFIG_FILE, PICKLE_FILE
from loracli.system.strict_json import StrictJsonError, parse_json

MAX_ADAPTER_BYTES = 8 << 30


@dataclass(frozen=True)
class Fetched:
    """An adapter on this machine.

    Attributes:
        reference: what was asked for.
        path: the directory that holds the files (after a dry run: that would hold them).
        commit: the 40 hexadecimal digits that pin a Hub repository; None for a local directory.
        files: the adapter's files, README first, weights last.
    """

    reference: Reference
    path: Path
    commit: str | None
    files: tuple[FetchedFile, ...]


@dataclass(frozen=True)
class FetchedBase:
    """A base model on this machine. The directory may hold more than `files`, if another program cached it."""

    repo_id: str
    path: Path
    commit: str
    files: tuple[FetchedFile, ...]


def fetch_adapter(
    reference: str | Reference,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_dir: Path | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_bytes: int = MAX_ADAPTER_BYTES,
    endpoint: str | None = None,
    from_pickle: bool = False,
    progress: Progress = SILENT,
) -> Fetched:
    """Brings an adapter's config, weights and README to this machine: `fetch_adapters` of one."""
    [fetched] = fetch_adapters(
        [reference],
        revision=revision,
        cache_dir=cache_dir,
        local_dir=local_dir,
        token=token,
        force=force,
        dry_run=dry_run,
        max_bytes=max_bytes,
        endpoint=endpoint,
        from_pickle=from_pickle,
        progress=progress,
    )
    return fetched


def fetch_adapters(
    references: Sequence[str | Reference],
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_dir: Path | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_bytes: int = MAX_ADAPTER_BYTES,
    endpoint: str | None = None,
    from_pickle: bool = False,
    progress: Progress = SILENT,
) -> tuple[Fetched, ...]:
    """Brings config, weights and README of adapters to this machine; local directories are checked and left alone.

    A revision is resolved once and everything is read from that commit. The sizes of all adapters are known, and held
    against the ceilings and the free disk, before the first is transferred; a few are then transferred side by side.
    Every byte, cached or new, is verified against the hash that the Hub lists. Without the Hub, the cached copy that
    the revision last stood for is used, and `progress` is told. A full commit that is cached takes no request at all.

    Args:
        references: each in any form that `parse_reference` reads.
        revision: branch, tag or commit, for references that name none.
        cache_dir: Hub cache to use instead of huggingface_hub's own.
        local_dir: put the files of one adapter there instead of into a cache, under the repository's folder structure.
        token: Hub token; by default the one of HF_TOKEN or of `hf auth login`.
        force: transfer what is there already, and replace files in `local_dir`.
        dry_run: transfer nothing, only tell what would be; nothing is verified.
        max_bytes: refuse an adapter with more in all its files. A config may have 1 MiB; a larger README is left out.
        endpoint: address of the Hub; by default HF_ENDPOINT.
        from_pickle: bring config and adapter_model.bin of adapters that have no safetensors; whoever opens that file
            has to know what it can do.
        progress: told the bytes of each file, and what is worth knowing; from several threads.
    Raises:
        AdapterNotFound: no such reference, repository, revision or folder, or no adapter in it.
        UnsupportedAdapter: the weights are there only as a pickle file, without `from_pickle`.
        AccessDenied, HubUnreachable: the Hub does not give the files.
        OutOfResources: a ceiling is exceeded, or the disk has no room.
        IntegrityError: a file is not the one that the Hub lists; it is removed.
        UsageError: options that exclude each other; OutputExists: other files are in `local_dir`.
    """
    if cache_dir is not None and local_dir is not None:
        raise UsageError("a cache directory and a local directory cannot be given together", hint="give one of the two")
    if local_dir is not None and len(references) > 1:
        raise UsageError("a local directory takes the files of one adapter", hint="fetch the others by themselves")
    token = checked_token(token)
    parsed = [_parse(reference, revision) for reference in references]
    sources = {
        number: Source(
            kind=PICKLED_ADAPTER if from_pickle else ADAPTER,
            repo_id=reference.repo_id,
            revision=reference.revision,
            folder=reference.subfolder or "",
            text=reference.text,
            cache_dir=cache_dir,
            local_dir=local_dir.expanduser() if local_dir else None,
            token=token,
            force=force,
            dry_run=dry_run,
            max_bytes=max_bytes,
            recheck=True,
            endpoint=endpoint,
            progress=progress,
        )
        for number, reference in enumerate(parsed)
        if reference.repo_id is not None
    }
    local = {
        n: _take_local(reference, local_dir, progress, from_pickle=from_pickle)
        for n, reference in enumerate(parsed)
        if n not in sources
    }
    copies = dict(zip(sources, fetch(list(sources.values())), strict=True))
    return tuple(
        local[n] if n in local else Fetched(reference, copies[n].path, copies[n].commit, copies[n].files)
        for n, reference in enumerate(parsed)
    )


def _parse(reference: str | Reference, revision: str | None) -> Reference:
    if isinstance(reference, str):
        return parse_reference(reference, revision=revision)
    return reference if revision is None else parse_reference(reference.text, revision=revision)


def fetch_base(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    config_alone: bool = False,
    recheck: bool = False,
    endpoint: str | None = None,
    progress: Progress = SILENT,
) -> FetchedBase:
    """Brings a base model to this machine: config, tokenizer, chat template and safetensors of the top level.

    Never code, pickle or GGUF files. Arguments as for `fetch_adapters`, and there is no ceiling but the free disk; with
    `config_alone` its config.json and no more. What is transferred is verified; what is cached, and may take minutes
    to hash, with `recheck`.

    Raises:
        InputError: no such repository or revision, no safetensors in it, or it is an adapter itself.
        AccessDenied, HubUnreachable, IntegrityError, OutOfResources: the Hub or the disk does not give the files.
    """
    source = Source(
        kind=BASE_CONFIG_ALONE if config_alone else BASE,
        repo_id=repo_id,
        revision=revision,
        folder="",
        text=repo_id,
        cache_dir=cache_dir,
        local_dir=None,
        token=checked_token(token),
        force=force,
        dry_run=dry_run,
        max_bytes=None,
        recheck=recheck,
        endpoint=endpoint,
        progress=progress,
    )
    [copy] = fetch([source])
    return FetchedBase(repo_id, copy.path, copy.commit, copy.files)


def fetch_base_of(
    adapters: Sequence[Fetched], *, claims: Mapping[str, BaseClaim] | None = None, **options: Any
) -> FetchedBase:
    """Brings the base model that all of these fetched adapters, and further claims, name; `options` as for
    `fetch_base`.

    Raises:
        IncompatibleAdapters: they name different base models or revisions of one, none, or a path on somebody's disk.
        UsageError: an adapter's config is not on this machine, after a dry run.
        MalformedAdapter: an adapter's config is damaged.
    """
    named = {adapter.reference.text: _base_claim(adapter) for adapter in adapters}
    agreed = agreed_base({**(claims or {}), **named}, way_out="leave --with-base out, or fetch the adapters one by one")
    return fetch_base(str(agreed.base_model), revision=agreed.revision, **options)


def _base_claim(adapter: Fetched) -> BaseClaim:
    """What a fetched adapter's config names."""
    path = adapter.path / CONFIG_FILE
    try:
        with path.open("rb") as file:
            config = parse_json(file.read(MAX_SMALL_BYTES))
    except FileNotFoundError:
        hint = "fetch the adapter first, then the base"
        raise UsageError("the base is not known before the config is here", where=str(path), hint=hint) from None
    except StrictJsonError as error:
        raise MalformedAdapter(str(error), where=str(path)) from None
    fields = config if isinstance(config, dict) else {}
    named = fields.get("base_model_name_or_path"), fields.get("revision")
    if not all(value is None or (isinstance(value, str) and value.isprintable()) for value in named):
        raise MalformedAdapter("the base model's name is not printable text", where=str(path))
    return BaseClaim(named[0] or None, named[1] or None)


def _take_local(reference: Reference, local_dir: Path | None, progress: Progress, *, from_pickle: bool) -> Fetched:
    """A local directory, once it is seen to hold what an adapter needs."""
    assert reference.path is not None
    if local_dir is not None:
        raise UsageError("a local directory is used where it is", where=reference.text, hint="leave --local-dir out")
    if reference.shadows_hub:
        progress.note(f"{reference.text} is a directory here; for the Hub's, write {URI_PREFIX}{reference.text}")
    present = [name for name in (*ADAPTER_FILES, PICKLE_FILE) if (reference.path / name).is_file()]
    if from_pickle:
        check_pickle(present, reference.text)
    else:
        check_adapter(present, reference.text, text=reference.text)
    files = [FetchedFile(name, (reference.path / name).stat().st_size, cached=True) for name in present]
    taken = (CONFIG_FILE, PICKLE_FILE) if from_pickle else ADAPTER_FILES
    return Fetched(reference, reference.path, None, tuple(file for file in files if file.name in taken))


def checked_token(token: str | None) -> str | None:
    """None for no token, so that `--token "$UNSET"` means the login; the HTTP client would quote a malformed one."""
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("the token holds characters that no token has", hint="copy it again from the Hub's settings")
    return token or None
