"""The adapters that a recipe names, found again and proven to be the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.hub import Fetched, fetch_adapter
from loracli.adapters.references import Reference
from loracli.errors import AdapterNotFound, IntegrityError, UsageError
from loracli.progress import SILENT, Progress
from loracli.recipe import Recipe, RecipeAdapter


def read_ingredients(
    recipe: Recipe, *, relocated: Sequence[str] = (), progress: Progress = SILENT
) -> tuple[LoraAdapter, ...]:
    """Reads the adapters of a recipe, in its order.

    Args:
        recipe: names them.
        relocated: references to use instead, one for each, where the directories have moved.
        progress: told of downloads.
    Raises:
        IntegrityError: if a file is not the one that the weights were fitted for.
        UsageError: if there are not as many in `relocated` as in the recipe.
    """
    return read_recorded(recipe.adapters, recipe.folder, relocated=relocated, progress=progress)


def read_recorded(
    recorded: Sequence[RecipeAdapter], folder: Path, *, relocated: Sequence[str] = (), progress: Progress = SILENT
) -> tuple[LoraAdapter, ...]:
    """As `read_ingredients`, of the adapters themselves; `folder` is where local references are relative to."""
    if relocated and len(relocated) != len(recorded):
        raise UsageError(
            f"the recipe has {len(recorded)} adapters and {len(relocated)} were given",
            hint="give them all in the recipe's order, and a recipe's name before --adapters: "
            + ", ".join(a.reference for a in recorded),
        )
    result = []
    for number, wanted in enumerate(recorded):
        if relocated:
            adapter = read_adapter(fetch_adapter(relocated[number], progress=progress))
        else:
            adapter = read_adapter(_find(folder, wanted, progress))
        _check_hashes(wanted, adapter)
        result.append(adapter)
    return tuple(result)


def _find(folder: Path, wanted: RecipeAdapter, progress: Progress) -> Fetched:
    if wanted.repo_id is not None:
        reference = Reference(
            wanted.reference, repo_id=wanted.repo_id, revision=wanted.commit, subfolder=wanted.subfolder
        )
        return fetch_adapter(reference, progress=progress)
    path = folder / wanted.reference
    if not (path / "adapter_config.json").is_file():
        raise AdapterNotFound(
            f"the recipe's adapter {wanted.reference} is not at {path}",
            hint="if it has moved, name all adapters in the recipe's order: loracat export --adapters ...",
        )
    return fetch_adapter(Reference(wanted.reference, path=Path(path)), progress=progress)


def _check_hashes(wanted: RecipeAdapter, adapter: LoraAdapter) -> None:
    for name, recorded in wanted.sha256.items():
        if adapter.sha256.get(name) != recorded:
            raise IntegrityError(
                f"{name} of the adapter {wanted.reference} is not the file that the weights were fitted for",
                where=str(adapter.path / name),
                hint="restore the original file, or fit again",
            )
