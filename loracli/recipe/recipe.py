"""The one document between fit and export: what was mixed, with which weights, and how it was found.

A recipe is JSON for people to read, diff and commit. It holds what changes the result and nothing of the machine: no
host, user, time, device or absolute path. Adapters are identified by the sha256 of their files; local directories are
kept relative to the recipe's own folder. A mixing too large to read is kept as tensors in a file beside it, by its
sha256, and so is what the records show of the activations.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from loracli.adapters.base_module import BaseModule, RecipePlace
from loracli.adapters.names import leaf
from loracli.adapters.other_bases import OtherBase, other_bases
from loracli.errors import OutputExists, UsageError
from loracli.hub.references import REPO_ID, BaseClaim, is_hub_id, is_repo_id
from loracli.recipe.mixing import (
    INLINE_KINDS,
    MAX_MODULES,
    RecipeActivations,
    RecipeMixing,
    Sha256,
    activations_path,
    group_name,
    tensors_path,
)
from loracli.recipe.record import FitRecord
from loracli.system.document import AtMost, Matches, added, encode, schema_of
from loracli.system.files import TENSOR_FILES, replaced_file, write_file

FIRST_SCHEMA = 2  # that is still read
SCHEMA = 4
FINGERPRINT = 12  # digits of a record's sha256 that are kept: two of a million records agree by chance once in 500

MAX_ADAPTERS = 1000
MAX_FILES = 10_000  # of calibration data
MAX_TASKS = 100_000

Commit = Annotated[str, Matches(re.compile(r"[0-9a-f]{40}"), "a commit, 40 hexadecimal digits")]
RepoId = Annotated[str, Matches(REPO_ID, "a repository on the Hub, org/name")]
AdapterReference = Annotated[str, Matches(re.compile(r"[^\0]{1,4096}"), "a name of 1 to 4096 characters")]
Version = Annotated[str, Matches(re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,99}"), "a version")]
Word = Annotated[str, Matches(re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]{0,99}"), "a name of letters, digits, ., _ and -")]


OTHER_ROWS = ("base", "uniform", "sum", "fit")  # of the held-out table; no adapter goes by one of these names


@dataclass(frozen=True)
class RecipeBase:
    """The base model: `id` is the name an export carries; `commit` is None for a local directory."""

    id: Annotated[str, Matches(re.compile(r"[^\0]{1,255}"), "a name of 1 to 255 characters")]
    commit: Commit | None
    config_sha256: Sha256

    @property
    def claim(self) -> BaseClaim | None:
        """What to fetch where the user names no base; None for a local directory, which only the user knows."""
        return None if self.commit is None else BaseClaim(self.id, self.commit)


@dataclass(frozen=True)
class RecipeAdapter:
    """One ingredient.

    Args:
        reference: as asked for, or the directory relative to the recipe's folder.
        repo_id: of a Hub adapter, None for a local directory.
        subfolder: within the repository, or None.
        commit: the pinned commit, None for a local directory.
        sha256: of each file, by name.
        rank: the largest rank of a module.
        lora_alpha: from its config.
        use_rslora: from its config.
        dtype: of its factors.
        base_model: the base model it names, or None.
        renamed: what the base calls otherwise than the adapter, by the adapter's name; None for nothing.
    """

    reference: AdapterReference
    repo_id: RepoId | None
    subfolder: str | None
    commit: Commit | None
    sha256: Annotated[dict[Word, Sha256], AtMost(10)]
    rank: int
    lora_alpha: float
    use_rslora: bool
    dtype: Word
    base_model: str | None
    renamed: dict[str, RecipePlace] | None = added(4, None)

    @property
    def weights_sha256(self) -> str:
        """Of the file that holds the factors."""
        return next(self.sha256[name] for name in TENSOR_FILES if name in self.sha256)


RecordedAdapters = Annotated[tuple[RecipeAdapter, ...], AtMost(MAX_ADAPTERS)]


def is_named(base_id: str, adapters: Sequence[RecipeAdapter]) -> bool:
    """Whether a base goes by a name that it can be loaded by, a Hub id or what an adapter names; else it is that of a
    directory."""
    named = any(adapter.base_model == base_id for adapter in adapters)
    return is_repo_id(base_id) or (named and is_hub_id(base_id))


def other_bases_of(base_id: str, adapters: Sequence[RecipeAdapter]) -> tuple[OtherBase, ...]:
    """The adapters that name another base than the one they are composed for."""
    claims = {adapter.reference: adapter.base_model for adapter in adapters}
    return other_bases(base_id, claims, directory=not is_named(base_id, adapters))


@dataclass(frozen=True)
class RecipeData:
    """One calibration file.

    Args:
        name: of the file, without its folder.
        sha256: of its bytes.
        shape: of its records, as it was read.
        weight: how many times each of its scored tokens counts.
        records: in the training part.
        scored_tokens: in them, whatever the weight.
        skipped: bad lines that were left out.
        skipped_lines: the numbers of the first of them.
        dropped: records of the file that have nothing scored within the longest length.
        cut: records of the file that were cut at the longest length, the dropped ones included.
        template_sha256: of the chat template that rendered it, None where none did.
        unread: keys of its records that were not read.
        record_sha256: the first 12 digits of the sha256 of each training record's content, end to end, so that a later
            comparison can tell a record that was fitted on.
    """

    name: str
    sha256: Sha256
    shape: Word
    weight: float
    records: int
    scored_tokens: int
    skipped: int
    skipped_lines: tuple[int, ...]
    dropped: int
    cut: int
    template_sha256: Sha256 | None
    record_sha256: Annotated[str, Matches(re.compile(r"[0-9a-f]*"), "hexadecimal digits")]
    unread: tuple[str, ...] = added(4, ())

    def fingerprints(self) -> set[str]:
        """What `record_sha256` holds."""
        return {self.record_sha256[i : i + FINGERPRINT] for i in range(0, len(self.record_sha256), FINGERPRINT)}


@dataclass(frozen=True)
class HeldOutRow:
    """One line of the held-out table.

    Args:
        name: `base`, an adapter's reference, `uniform`, `sum`, or `fit`.
        nats_per_token: total nats over total scored tokens.
        difference: to the best ingredient in nats per token; negative is better.
        interval: 95 % bootstrap interval of the difference over records, low and high.
        worse_records: share of the records on which it costs more than the best ingredient.
    """

    name: str
    nats_per_token: float
    difference: float
    interval: tuple[float, float]
    worse_records: float


@dataclass(frozen=True)
class HeldOutTask:
    """The held-out records of one task: `nats_per_token` by the name of the row."""

    task: str
    records: int
    scored_tokens: int
    nats_per_token: dict[str, float]


@dataclass(frozen=True)
class HeldOut:
    """What held-out records say, read once at the end.

    Args:
        name: of the files they came from, each with its weight where it has one.
        records: how many.
        scored_tokens: in them, whatever the weights.
        best_ingredient: the adapter with the lowest loss on them.
        rows: the table.
        tasks: one for each task that the records name.
        verdict: `better`, `not better`, or `too few records`.
    """

    name: str
    records: int
    scored_tokens: int
    best_ingredient: str
    rows: tuple[HeldOutRow, ...]
    tasks: Annotated[tuple[HeldOutTask, ...], AtMost(MAX_TASKS)]
    verdict: Literal["better", "not better", "too few records"]

    def row(self, name: str) -> HeldOutRow:
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Recipe:
    """A recipe. `folder` is where local adapters are looked for from; it is not part of the document."""

    base: RecipeBase
    adapters: RecordedAdapters
    data: Annotated[tuple[RecipeData, ...], AtMost(MAX_FILES)]
    fit: FitRecord
    mixing: RecipeMixing
    modules: Annotated[tuple[BaseModule, ...], AtMost(MAX_MODULES)]
    dtype: Word
    held_out: HeldOut
    versions: Annotated[dict[Word, Version], AtMost(100)]
    activations: RecipeActivations | None = added(3, None)
    folder: Path = field(default=Path(), compare=False)

    def weights_of(self, module: str) -> tuple[float | None, ...]:
        """One weight for each adapter at a module."""
        return self.mixing.weights[self.group_of(module)]

    def group_of(self, module: str) -> str:
        """The group whose weights a module takes."""
        return group_name(module, self.mixing.kind)

    def labels(self) -> dict[str, str]:
        """What to call each adapter in front of people, by reference."""
        return labels_of(self.adapters, self.folder)

    def public(self) -> Recipe:
        """The recipe as it may be published: adapters by their labels, and no path of anybody's machine."""
        renamed = self._renamed(self.labels())
        return replace(renamed, adapters=tuple(without_paths(adapter) for adapter in renamed.adapters))

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes the recipe, whole or not at all, and its tensors beside it; local adapters become relative to its
        folder. Activations whose moments were not read are left out.

        Raises:
            OutputExists: if a file is in the way and `force` is not set, or it is none to replace.
            UsageError: if the mixing has tensors and `path` does not end in `.json`.
        """
        path = Path(path)
        mixing, activations = self.mixing, self.activations
        check_recipe_path(path, force=force, kind=mixing.kind)
        written = self._moved_to(path.parent)
        beside: dict[Path, Mapping[str, Any]] = {}
        if mixing.kind not in INLINE_KINDS:
            from loracli.recipe.tensors import sidecar_sha256

            beside[tensors_path(path)] = mixing.tensors
            written = replace(written, mixing=replace(mixing, tensors_sha256=sidecar_sha256(mixing.tensors)))
        if activations is not None and activations.moments:
            beside[activations_path(path)] = activations.moments
        else:
            written = replace(written, activations=None)
        with replaced_file(path) as temporary:  # gets its name last
            write_file(temporary, written.to_json().encode())
            for name, tensors in beside.items():
                from loracli.recipe.tensors import write_sidecar

                write_sidecar(name, tensors)
        for name in (activations_path(path), *((tensors_path(path),) if path.suffix == ".json" else ())):
            if force and name not in beside and name.exists():
                from loracli.recipe.tensors import remove_sidecar

                remove_sidecar(name)

    def to_json(self) -> str:
        """The document, the same bytes for the same recipe."""
        document = {"loracat_recipe": schema_of(self, FIRST_SCHEMA), **encode(self)}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def _moved_to(self, folder: Path) -> Recipe:
        names = {a.reference: self._reference_from(folder, a) for a in self.adapters}
        return replace(self._renamed(names), folder=folder)

    def _renamed(self, names: dict[str, str]) -> Recipe:
        return replace(
            self,
            adapters=tuple(replace(a, reference=names[a.reference]) for a in self.adapters),
            held_out=replace(
                self.held_out,
                best_ingredient=names[self.held_out.best_ingredient],
                rows=tuple(replace(row, name=names.get(row.name, row.name)) for row in self.held_out.rows),
                tasks=tuple(
                    replace(task, nats_per_token={names.get(n, n): loss for n, loss in task.nats_per_token.items()})
                    for task in self.held_out.tasks
                ),
            ),
        )

    def _reference_from(self, folder: Path, adapter: RecipeAdapter) -> str:
        if adapter.repo_id is not None:
            return adapter.reference
        return local_reference(self.folder / adapter.reference, folder)


def without_paths(adapter: RecipeAdapter) -> RecipeAdapter:
    """The adapter without the name of its base model where that is no Hub id but, say, a directory of its author."""
    named = adapter.base_model
    return adapter if named is None or is_hub_id(named) else replace(adapter, base_model=None)


def labels_of(adapters: Sequence[RecipeAdapter], folder: Path) -> dict[str, str]:
    """What to call each adapter in front of people, by reference.

    A Hub adapter keeps its reference; a local directory goes by as many of its last names as tell it from the others
    and from the other rows of a table, so that no path of a machine is shown.

    Args:
        adapters: of one composition.
        folder: that local references are relative to.
    """
    names = {
        a.reference: tuple(reversed((folder / a.reference).resolve().parts[1:])) for a in adapters if a.repo_id is None
    }
    labels = {a.reference: a.reference for a in adapters}
    # Sorted by their last names, what a directory shares with any other one it shares with one of its neighbours.
    ordered = sorted([*((own, text) for text, own in names.items()), *(((row,), "") for row in OTHER_ROWS)])
    shared = [0, *(_shared(first, second) for (first, _), (second, _) in pairwise(ordered)), 0]
    for place, (own, reference) in enumerate(ordered):
        if reference:
            count = min(1 + max(shared[place], shared[place + 1]), len(own))
            labels[reference] = "/".join(reversed(own[:count]))
    return labels


def _shared(first: Sequence[str], second: Sequence[str]) -> int:
    """How many names two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def local_reference(directory: Path, folder: Path) -> str:
    """How a recipe in `folder` names a local directory: relative, and like no other row of its table."""
    relative = Path(os.path.relpath(directory, folder)).as_posix()
    return f"./{relative}" if relative in OTHER_ROWS else relative


def check_recipe_path(path: Path, *, force: bool, kind: str = "module") -> None:
    """Refuses a path that a recipe with a mixing of this kind cannot be written to.

    Raises:
        OutputExists: if `path`, or the file beside it that tensors would go to, is taken and `force` is not set, or is
            none that could be replaced.
        UsageError: if the kind may need such a file and `path` does not end in `.json`.
    """
    if path.is_dir():
        raise OutputExists(f"{path} is a directory", hint="name a file with -o")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", hint="choose another name with -o, or replace it with --force")
    if kind not in INLINE_KINDS and path.suffix != ".json":
        raise UsageError(
            f"{path} does not end in .json, and this mixing keeps its tensors in a file named after the recipe",
            hint=f"-o {path}.json",
        )
    for name in (activations_path(path), *(() if kind in INLINE_KINDS else (tensors_path(path),))):
        if os.path.lexists(name):
            from loracli.recipe.tensors import check_sidecar_path

            check_sidecar_path(name, path, force=force)


def files_beside(recipe: Recipe, path: Path) -> list[Path]:
    """What stands beside the recipe when it is saved at this path."""
    tensors = [] if recipe.mixing.kind in INLINE_KINDS else [tensors_path(path)]
    moments = recipe.activations is not None and recipe.activations.moments
    return [*tensors, *([activations_path(path)] if moments else [])]


def weights_by_leaf(recipe: Recipe) -> dict[str, list[tuple[float, float, float] | None]]:
    """By last name of the modules: mean, lowest and highest weight of each adapter; None where it changes nothing
    there."""
    by_leaf: dict[str, list[tuple[float | None, ...]]] = {}
    for group, weights in recipe.mixing.weights.items():
        label = group if recipe.mixing.kind in ("adapter", "layer") else leaf(group)
        by_leaf.setdefault(label, []).append(weights)
    return {label: [_spread(column) for column in zip(*rows, strict=True)] for label, rows in by_leaf.items()}


def _spread(column: tuple[float | None, ...]) -> tuple[float, float, float] | None:
    present = [weight for weight in column if weight is not None]
    return (sum(present) / len(present), min(present), max(present)) if present else None
