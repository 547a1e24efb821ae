"""The adapters that a recipe or the record of an export names: found again, proven to be the same bytes, and with
everything else that it names on this machine.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from loracli.adapters.adapter import LoraAdapter, open_adapter
from loracli.adapters.kinds import BaseModule
from loracli.adapters.names import BasePlace
from loracli.adapters.on_base import adapted_names, by_base_names, older_places, read_places, recorded_places
from loracli.adapters.saved_modules import REFUSE
from loracli.errors import AdapterNotFound, IntegrityError, RecipeError, UsageError
from loracli.hub.fetch import MAX_ADAPTER_BYTES, Fetched, FetchedBase, fetch_adapter, fetch_adapters, fetch_base_of
from loracli.hub.references import BaseClaim, Named, Reference, is_folder, is_repo_id, is_revision, parse_reference
from loracli.hub.source import BASE_CONFIG, HubOptions
from loracli.progress import SILENT, Progress
from loracli.recipe.recipe import Recipe, adapter_problems, base_problems, decode_recipe, read_document
from loracli.recipe.record import RecipeAdapter, RecipeBase, RecordedAdapters
from loracli.system.document import decode, dtype_name
from loracli.system.files import CERTIFICATE_FILE, CONFIG_FILE, file_sha256
from loracli.system.machine import in_order, one_thread_each


def identity_of(adapter: LoraAdapter, reference: str) -> RecipeAdapter:
    """The adapter by the name it goes by there, with its origin and the sha256 of its files."""
    return RecipeAdapter(
        reference=reference,
        repo_id=adapter.source.repo_id,
        subfolder=adapter.source.subfolder,
        commit=adapter.commit,
        sha256=dict(adapter.sha256),
        rank=max(adapter.ranks),
        lora_alpha=adapter.config.lora_alpha,
        use_rslora=adapter.config.use_rslora,
        dtype=dtype_name(adapter.dtype),
        base_model=adapter.config.base_model,
        renamed=recorded_places(adapter.places) or None,
    )


_RECORD_SUFFIX = ".json"


@dataclass(frozen=True)
class Recorded:
    """The inputs of a composition.

    Args:
        adapters: the ingredients.
        base: the base model, and its commit if it came from the Hub.
        config_sha256: of the base's config, None where the record has none.
        folder: that local references are relative to.
    """

    adapters: tuple[RecipeAdapter, ...]
    base: BaseClaim
    config_sha256: str | None
    folder: Path


def is_record(name: str) -> bool:
    """Whether a name is that of a recipe or a record, and not of an adapter."""
    return name.endswith(_RECORD_SUFFIX) and "://" not in name


def read_record(path: Path) -> Recorded:
    """Reads a recipe, or the `loracat.json` of an export; the tensors of a mixing are not looked at.

    Raises:
        RecipeError: if it is neither, or damaged.
    """
    document, name = read_document(path), f"the recipe {path}"
    if isinstance(document, dict) and "loracat_recipe" not in document:
        if "recipe" in document:
            document = document["recipe"]
        elif "adapters" in document:
            return _read_method(document, path)
    recipe = decode_recipe(document, name, path.parent)
    return Recorded(
        recipe.adapters, BaseClaim(recipe.base.id, recipe.base.commit), recipe.base.config_sha256, path.parent
    )


def fitted_base(export: Any) -> RecipeBase | None:
    """The base that the recipe of an export was fitted on; None of anything else, or where its record tells none.

    An export is used without its record, so a record that cannot be read is no error here.
    """
    path = Path(export) / CERTIFICATE_FILE if isinstance(export, (str, Path)) else None
    if path is None or not path.is_file():
        return None
    try:
        document = read_document(path)
        recipe = document.get("recipe") if isinstance(document, dict) else None
        return decode_recipe(recipe, "its recipe", Path()).base
    except RecipeError:
        return None


def _read_method(document: dict[str, object], path: Path) -> Recorded:
    problems: list[str] = []
    adapters = decode(RecordedAdapters, document["adapters"], "adapters", problems)
    base = decode(dict[str, str | None], document.get("base"), "base", problems)
    if not problems:
        problems += [problem for adapter in adapters for problem in adapter_problems(adapter)]
        problems += [] if base.get("id") is None else base_problems(str(base["id"]), base.get("commit"))
    if problems:
        raise RecipeError(f"the record {path} is damaged", problems=tuple(problems))
    return Recorded(adapters, BaseClaim(base.get("id"), base.get("commit")), None, path.parent)


def _recorded_reference(recorded: RecipeAdapter, folder: Path) -> Reference:
    """Where an adapter is to be found; `folder` is where local references are relative to.

    Raises:
        RecipeError: if its repository, commit or subfolder cannot be one.
        AdapterNotFound: if a local directory is not there.
    """
    if recorded.repo_id is not None:
        commit, subfolder = recorded.commit, recorded.subfolder
        fits = is_repo_id(recorded.repo_id) and (commit is None or is_revision(commit))
        if not fits or not (subfolder is None or is_folder(subfolder)):
            raise RecipeError(f"the recipe's adapter {recorded.reference} has no possible place on the Hub")
        return Reference(recorded.reference, repo_id=recorded.repo_id, revision=commit, subfolder=subfolder)
    path = folder / recorded.reference
    if not (path / CONFIG_FILE).is_file():
        raise AdapterNotFound(
            f"the recipe's adapter {recorded.reference} is not at {path}",
            hint="put it there, or name all adapters where they are now, in the recipe's order, with --adapters; "
            "`loracat fetch` takes them in the recipe's place",
        )
    return Reference(recorded.reference, path=path)


def _check_hashes(recorded: RecipeAdapter, sha256: Mapping[str, str], path: Path) -> None:
    """Raises IntegrityError unless the files have the recorded hashes.

    Args:
        recorded: what they were.
        sha256: what they are, by name.
        path: of their directory.
    """
    for name, wanted in recorded.sha256.items():
        if sha256.get(name) != wanted:
            raise IntegrityError(
                f"{name} of the adapter {recorded.reference} is not the file that the weights were fitted for",
                where=str(path / name),
                hint="restore the original file, or fit again; other adapters are composed with --weights or --method",
            )


def read_ingredients(
    recipe: Recipe, *, relocated: Sequence[Named] = (), progress: Progress = SILENT
) -> tuple[LoraAdapter, ...]:
    """Opens the adapters of a recipe, in its order; `loaded()` of one brings its factors into memory.

    Args:
        recipe: names them.
        relocated: references to use instead, one for each, where the directories have moved.
        progress: told of downloads.
    Raises:
        IntegrityError: if a file is not the one that the weights were fitted for.
        UsageError: if there are not as many in `relocated` as in the recipe, or in another order.
    """
    read = read_recorded(recipe.adapters, recipe.folder, relocated=relocated, progress=progress)
    return tuple(
        by_names_of(recipe.modules, adapter, recorded) for adapter, recorded in zip(read, recipe.adapters, strict=True)
    )


def by_names_of(modules: Sequence[BaseModule], adapter: LoraAdapter, recorded: RecipeAdapter) -> LoraAdapter:
    """The adapter by the names of a table of the base, as a fit or an export took it.

    Args:
        modules: of the base.
        adapter: as it was read.
        recorded: what was kept of it.
    """
    table = {module.name: module for module in modules}
    if recorded.renamed is None:
        return by_base_names(adapter, older_places(adapter, table), table)
    names = adapted_names(adapter)
    plain = {name: BasePlace(name) for name in names}
    return by_base_names(adapter, plain | read_places(recorded.renamed, names), table)


def read_recorded(
    recorded: Sequence[RecipeAdapter],
    folder: Path,
    *,
    relocated: Sequence[Named] = (),
    progress: Progress = SILENT,
) -> tuple[LoraAdapter, ...]:
    """As `read_ingredients`, of the adapters themselves; `folder` is where local references are relative to."""
    if relocated and len(relocated) != len(recorded):
        raise UsageError(
            f"the recipe has {len(recorded)} adapters and {len(relocated)} were given",
            hint="give them all in the recipe's order, and a recipe's name before --adapters: "
            + ", ".join(a.reference for a in recorded),
        )
    found = [
        fetch_adapter(relocated[number] if relocated else _recorded_reference(wanted, folder), progress=progress)
        for number, wanted in enumerate(recorded)
    ]
    with one_thread_each() as threads:
        result = tuple(in_order(open_adapter, found, workers=threads))
    if relocated:
        _check_order(recorded, result, relocated)
    for wanted, adapter in zip(recorded, result, strict=True):
        _check_hashes(wanted, adapter.sha256, adapter.path)
        for warning in adapter.warnings:
            progress.warn(warning)
    return result


def _check_order(recorded: Sequence[RecipeAdapter], read: Sequence[LoraAdapter], given: Sequence[Named]) -> None:
    """Raises UsageError if all the recorded adapters were given, in another order than the recorded one."""
    hashes = [dict(adapter.sha256) for adapter in read]
    wanted = [dict(adapter.sha256) for adapter in recorded]
    if hashes != wanted and all(hashes.count(one) == wanted.count(one) for one in wanted):
        right = [os.fspath(given[hashes.index(one)]) for one in wanted]
        raise UsageError(
            "--adapters names the ingredients in another order than the recipe's",
            hint=f"give them as --adapters {shlex.join(right)}",
        )


def recorded_policy(recipe: Recipe) -> str:
    """What the recipe says of modules that its adapters saved whole; recipes of older versions have none."""
    return str(recipe.fit.settings.get("modules_to_save", REFUSE))


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
    **options: Unpack[HubOptions],
) -> FetchedAll:
    """Fetches adapters, and what recipes name: adapters at their commits, with the sha256 that are recorded.

    Args:
        names: references of adapters; files of recipes, or `loracat.json` of exports.
        revision: branch, tag or commit, for references that name none.
        with_base: the base model too, which all have to agree on.
        local_dir: for the files of one adapter.
        max_bytes: of an adapter.
        options: how the Hub is asked, see `loracli.hub.source.HubOptions`.
    Raises:
        RecipeError: if a recipe cannot be read.
        IntegrityError: if a file is not the one that a recipe records, or the one that the Hub lists.
        IncompatibleAdapters: with `with_base`, if no base is named, or more than one.
        UsageError: if a local directory is given for more than one adapter, or a revision for a recipe.
        LoracatError: as `fetch_adapters`.
    """
    dry_run = options.get("dry_run", False)
    records = {name: read_record(Path(name)) for name in names if is_record(name)}
    if records and revision is not None:
        raise UsageError("a recipe has its own commits", where=next(iter(records)), hint="leave --revision out")
    wanted: list[tuple[RecipeAdapter | None, Reference]] = []
    for name in names:
        if name in records:
            wanted += [(one, _recorded_reference(one, records[name].folder)) for one in records[name].adapters]
        else:
            wanted.append((None, parse_reference(name, revision=revision)))
    if local_dir is not None and with_base:
        raise UsageError("a local directory takes the files of one adapter", hint="fetch the base without it")
    references = [reference for _, reference in wanted]
    adapters = fetch_adapters(references, local_dir=local_dir, max_bytes=max_bytes, **options)
    for (recorded, _), fetched in zip(wanted, adapters, strict=True):
        if recorded is not None and not dry_run:
            _check_hashes(recorded, {f.name: file_sha256(fetched.path / f.name) for f in fetched.files}, fetched.path)
    if not with_base:
        return FetchedAll(adapters, None)
    named = [fetched for (recorded, _), fetched in zip(wanted, adapters, strict=True) if recorded is None]
    claims = {name: record.base for name, record in records.items()}
    base = fetch_base_of(named, claims=claims, recheck=True, **options)
    for name, record in records.items():
        if not dry_run:
            _check_base(name, record, base)
    return FetchedAll(adapters, base)


def _check_base(name: str, record: Recorded, base: FetchedBase) -> None:
    config = base.path / BASE_CONFIG
    if record.config_sha256 not in (None, file_sha256(config)):
        what = f"{BASE_CONFIG} of the base model {base.repo_id} is not the one that {name} records"
        raise IntegrityError(what, where=str(config), hint="the weights were fitted on another base model")
