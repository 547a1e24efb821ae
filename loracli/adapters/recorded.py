"""What a recipe, or the record of an export, names: where it is to be found, and whether it is the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loracli.errors import AdapterNotFound, IntegrityError, RecipeError
from loracli.hub.references import BaseClaim, Reference, is_folder, is_repo_id, is_revision
from loracli.recipe import RecipeAdapter
from loracli.recipe_reading import decode_recipe, read_document
from loracli.system.document import decode
from loracli.system.files import CONFIG_FILE

RECORD_SUFFIX = ".json"


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
    return name.endswith(RECORD_SUFFIX) and "://" not in name


def read_recorded(path: Path) -> Recorded:
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


def _read_method(document: dict[str, object], path: Path) -> Recorded:
    problems: list[str] = []
    adapters = decode(tuple[RecipeAdapter, ...], document["adapters"], "adapters", problems)
    base = decode(dict[str, str | None], document.get("base"), "base", problems)
    if problems:
        raise RecipeError(f"the record {path} is damaged", problems=tuple(problems))
    return Recorded(adapters, BaseClaim(base.get("id"), base.get("commit")), None, path.parent)


def recorded_reference(recorded: RecipeAdapter, folder: Path) -> Reference:
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
            hint="put it there, or name all adapters where they are now: with --adapters, in the recipe's order; to "
            "fetch, by themselves",
        )
    return Reference(recorded.reference, path=path)


def check_hashes(recorded: RecipeAdapter, sha256: Mapping[str, str], path: Path) -> None:
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
                hint="restore the original file, or fit again",
            )
