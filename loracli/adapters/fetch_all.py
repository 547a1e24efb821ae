"""References and recipes in, everything that they name on this machine out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.recorded import Recorded, check_hashes, is_record, read_recorded, recorded_reference
from loracli.errors import IntegrityError, UsageError
from loracli.hub.fetch import MAX_ADAPTER_BYTES, Fetched, FetchedBase, fetch_adapters, fetch_base_of
from loracli.hub.plan import BASE_CONFIG
from loracli.hub.references import Reference, parse_reference
from loracli.recipe import RecipeAdapter
from loracli.system.tensor_file import file_sha256


@dataclass(frozen=True)
class FetchedAll:
    """Adapters in the order of the names, those of a recipe in its own order, and the base if it was asked for."""

    adapters: tuple[Fetched, ...]
    base: FetchedBase | None


def fetch_all(
    names: Sequence[str],
    *,
    revision: str | None = None,
    with_base: bool = False,
    local_dir: Path | None = None,
    max_bytes: int = MAX_ADAPTER_BYTES,
    dry_run: bool = False,
    **options: Any,
) -> FetchedAll:
    """Fetches adapters, and what recipes name: adapters at their commits, with the sha256 that are recorded.

    Args:
        names: references of adapters; files of recipes, or `loracat.json` of exports.
        revision: branch, tag or commit, for references that name none.
        with_base: the base model too, which all have to agree on.
        local_dir: for the files of one adapter.
        max_bytes: of an adapter.
        dry_run: transfer and verify nothing.
        options: as of `fetch_adapters` and `fetch_base`.
    Raises:
        RecipeError: if a recipe cannot be read.
        IntegrityError: if a file is not the one that a recipe records, or the one that the Hub lists.
        IncompatibleAdapters: with `with_base`, if no base is named, or more than one.
        UsageError: if a local directory is given for more than one adapter, or a revision for a recipe.
        LoracatError: as `fetch_adapters`.
    """
    records = {name: read_recorded(Path(name)) for name in names if is_record(name)}
    if records and revision is not None:
        raise UsageError("a recipe has its own commits", where=next(iter(records)), hint="leave --revision out")
    wanted: list[tuple[RecipeAdapter | None, Reference]] = []
    for name in names:
        if name in records:
            wanted += [(one, recorded_reference(one, records[name].folder)) for one in records[name].adapters]
        else:
            wanted.append((None, parse_reference(name, revision=revision)))
    if local_dir is not None and with_base:
        raise UsageError("a local directory takes the files of one adapter", hint="fetch the base without it")
    references = [reference for _, reference in wanted]
    adapters = fetch_adapters(references, local_dir=local_dir, max_bytes=max_bytes, dry_run=dry_run, **options)
    for (recorded, _), fetched in zip(wanted, adapters, strict=True):
        if recorded is not None and not dry_run:
            check_hashes(recorded, {f.name: file_sha256(fetched.path / f.name) for f in fetched.files}, fetched.path)
    if not with_base:
        return FetchedAll(adapters, None)
    named = [fetched for (recorded, _), fetched in zip(wanted, adapters, strict=True) if recorded is None]
    claims = {name: record.base for name, record in records.items()}
    base = fetch_base_of(named, claims=claims, recheck=True, dry_run=dry_run, **options)
    for name, record in records.items():
        if not dry_run:
            _check_base(name, record, base)
    return FetchedAll(adapters, base)


def _check_base(name: str, record: Recorded, base: FetchedBase) -> None:
    config = base.path / BASE_CONFIG
    if record.config_sha256 not in (None, file_sha256(config)):
        what = f"{BASE_CONFIG} of the base model {base.repo_id} is not the one that {name} records"
        raise IntegrityError(what, where=str(config), hint="the weights were fitted on another base model")
