"""The one document between fit and export: what was mixed, with which weights, and how it was found.

A recipe is JSON for people to read, diff and commit. It holds what changes the result and nothing of the machine: no
host, user, time, device or absolute path. Adapters are identified by the sha256 of their files; local directories are
kept relative to the recipe's own folder. A mixing too large to read is kept as tensors in a file beside it, by its
sha256, and so is what the records show of the activations.

Read back, every field of it is checked, and what contradicts itself is refused, all problems at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any

from loracli.adapters.kinds import MAX_EXPERTS, BaseModule
from loracli.adapters.names import leaf
from loracli.arguments import from_home
from loracli.errors import OutputExists, RecipeError, UsageError
from loracli.hub.references import URI_PREFIX, is_folder, is_hub_id, whole_model_hint
from loracli.recipe.record import (
    EDITED,
    INLINE_KINDS,
    MAX_MODULES,
    MAX_RECIPE_BYTES,
    FitCertificate,
    FitRecord,
    HeldOut,
    RecipeActivations,
    RecipeAdapter,
    RecipeBase,
    RecipeData,
    RecipeMixing,
    RecordedAdapters,
    Version,
    Word,
    activations_path,
    group_name,
    tensors_path,
)
from loracli.system.display import html_of, names_text, repr_line
from loracli.system.document import MAX_PROBLEMS, AtMost, added, decode, encode, schema_of
from loracli.system.escaping import shell_word
from loracli.system.files import CONFIG_FILE, OR_FORCE, TENSOR_FILES, read_regular, replaced_file, write_file
from loracli.system.near import did_you_mean, hints, near_path
from loracli.system.strict_json import StrictJsonError, parse_json

_FIRST_SCHEMA = 2  # that is still read
SCHEMA = 7
_MAX_FILES = 10_000  # of calibration data
OTHER_ROWS = ("base", "uniform", "sum", "fit")  # of the held-out table; no adapter goes by one of these names
CONTROL_ROWS = ("fresh-lora",)  # beside them; an adapter of an older recipe may


@dataclass(frozen=True)
class Recipe:
    """A recipe. `folder` is where local adapters are looked for from; it is not part of the document."""

    base: RecipeBase
    adapters: RecordedAdapters
    data: Annotated[tuple[RecipeData, ...], AtMost(_MAX_FILES)]
    fit: FitRecord
    mixing: RecipeMixing
    modules: Annotated[tuple[BaseModule, ...], AtMost(MAX_MODULES)]
    dtype: Word
    held_out: HeldOut
    versions: Annotated[dict[Word, Version], AtMost(100)]
    activations: RecipeActivations | None = added(3, None)
    folder: Path = field(default=Path(), compare=False)

    def __repr__(self) -> str:
        return repr_line(self, names_text(self.labels().values()), self.mixing.kind, _outcome(self.held_out_of_weights))

    def _repr_html_(self) -> str:
        return html_of(self)

    def weights_of(self, module: str) -> tuple[float | None, ...]:
        """One weight for each adapter at a module.

        Raises:
            UsageError: if the recipe has none there.
        """
        group = self.group_of(module)
        if group not in self.mixing.weights:
            hint = did_you_mean(module, [one.name for one in self.modules])
            if self.mixing.kind not in INLINE_KINDS:
                hint = f"the mixing {self.mixing.kind!r} has no weight for each module and adapter"
            raise UsageError(f"the recipe has no weights for {module[:200]!r}", hint=hint)
        return self.mixing.weights[group]

    def group_of(self, module: str) -> str:
        """The group whose weights a module takes."""
        return group_name(module, self.mixing.kind)

    @property
    def splits_data(self) -> bool:
        """Whether the held-out records are a share of the calibration files, and not of files of their own."""
        return self.held_out.name == ", ".join(data.source_name for data in self.data)

    @property
    def held_out_of_weights(self) -> HeldOut | None:
        """What held-out records say of the weights; None where these were edited after the fit that was measured."""
        return None if self.mixing.edited else self.held_out

    @property
    def certificate_of_weights(self) -> FitCertificate | None:
        """How close the weights stand to the optimum; None where there is none, or they were edited after the fit."""
        return None if self.mixing.edited else self.fit.certificate

    def labels(self) -> dict[str, str]:
        """What to call each adapter in front of people, by reference."""
        return labels_of(self.adapters, self.folder)

    def public(self) -> Recipe:
        """The recipe as it may be published: adapters by their labels, and no path of anybody's machine."""
        renamed = self._renamed(self.labels())
        return replace(renamed, adapters=tuple(without_paths(adapter) for adapter in renamed.adapters))

    def save(self, path: str | Path, *, force: bool = False, keep: bool = False) -> Path | None:
        """Writes the recipe, whole or not at all, and its tensors beside it; local adapters become relative to its
        folder. Activations whose moments are nowhere are left out.

        Args:
            path: of the recipe.
            force: replace what is there.
            keep: first copy what is replaced to `recipe.bak.json`, unless it is this very recipe; an earlier copy goes.
        Returns:
            where what was replaced is kept, None if nothing is.
        Raises:
            OutputExists: if a file is in the way and `force` is not set, or it is none to replace.
            UsageError: if the mixing has tensors and `path` does not end in `.json`.
            RecipeError, IntegrityError: if the moments beside the file that it was read from are not its own.
        """
        path = Path(from_home(path))
        mixing, moments = self.mixing, _moments_of(self.activations)
        check_recipe_path(path, force=force, kind=mixing.kind)
        written = self._moved_to(path.parent)
        beside: dict[Path, Mapping[str, Any]] = {}
        if mixing.kind not in INLINE_KINDS:
            from loracli.recipe.tensors import sidecar_sha256

            beside[tensors_path(path)] = mixing.tensors
            written = replace(written, mixing=replace(mixing, tensors_sha256=sidecar_sha256(mixing.tensors)))
        if moments:
            beside[activations_path(path)] = moments
        else:
            written = replace(written, activations=None)
        document = written.to_json().encode()
        kept = None
        if keep and path.is_file() and not _holds(path, document):
            from loracli.recipe.tensors import keep_replaced

            kept = keep_replaced(path)
        with replaced_file(path) as temporary:  # gets its name last
            write_file(temporary, document)
            for name, tensors in beside.items():
                from loracli.recipe.tensors import write_sidecar

                write_sidecar(name, tensors)
        for name in (activations_path(path), *((tensors_path(path),) if path.suffix == ".json" else ())):
            if force and name not in beside and name.exists():
                from loracli.recipe.tensors import remove_sidecar

                remove_sidecar(name)
        return kept

    def to_json(self) -> str:
        """The document, the same bytes for the same recipe."""
        document = {"loracat_recipe": schema_of(self, _FIRST_SCHEMA), **encode(self)}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def sha256(self) -> str:
        """Of the document."""
        return sha256(self.to_json().encode()).hexdigest()

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


def _moments_of(activations: RecipeActivations | None) -> Mapping[str, Any]:
    """Those of a recipe, in memory or beside the file that it was read from; none where they are gone."""
    if activations is None or activations.moments or activations.recipe is None:
        return {} if activations is None else activations.moments
    if not activations_path(activations.recipe).exists():
        return {}
    from loracli.recipe.tensors import read_moments

    return read_moments(activations.recipe, activations)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a regular file has these bytes."""
    try:
        return read_regular(path, len(data)) == data
    except OSError:
        return False


def _outcome(table: HeldOut | None) -> str:
    """`better by 0.94 nats`, each scored token, than the best ingredient; otherwise the verdict with its difference."""
    if table is None:
        return EDITED
    fitted = next((row for row in table.rows if row.name == "fit"), None)
    if fitted is None:  # of a recipe that was made by hand
        return ""
    if table.verdict == "better":
        return f"better by {-fitted.difference:.2g} nats"
    return f"{table.verdict}: {fitted.difference:+.2g} nats"


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
    rows = (((row,), "") for row in (*OTHER_ROWS, *CONTROL_ROWS))
    ordered = sorted([*((own, text) for text, own in names.items()), *rows])
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
    return f"./{relative}" if relative in (*OTHER_ROWS, *CONTROL_ROWS) else relative


def check_recipe_path(path: Path, *, force: bool, kind: str = "module") -> None:
    """Refuses a path that a recipe with a mixing of this kind cannot be written to.

    Raises:
        OutputExists: if `path`, or the file beside it that tensors would go to, is taken and `force` is not set, or is
            none that could be replaced.
        UsageError: if the kind may need such a file and `path` does not end in `.json`.
    """
    if path.is_dir():
        raise OutputExists(f"{path} is a directory", hint="name a file in it")
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", hint=OR_FORCE)
    if kind not in INLINE_KINDS and path.suffix != ".json":
        raise UsageError(
            f"{path} does not end in .json, and this mixing keeps its tensors in a file named after the recipe",
            hint=f"name it {path}.json",
        )
    for name in (activations_path(path), *(() if kind in INLINE_KINDS else (tensors_path(path),))):
        if os.path.lexists(name):
            from loracli.recipe.tensors import check_sidecar_path

            check_sidecar_path(name, path, force=force)


def files_beside(recipe: Recipe, path: Path) -> list[Path]:
    """What stands beside the recipe when it is saved at this path."""
    tensors = [] if recipe.mixing.kind in INLINE_KINDS else [tensors_path(path)]
    return [*tensors, *([activations_path(path)] if _moments_of(recipe.activations) else [])]


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


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe, and its tensors if its mixing has any.

    Raises:
        RecipeError: if it cannot be read, naming every problem at once.
        IntegrityError: if the tensors beside it are not those it was written with.
    """
    path = Path(from_home(path))
    result = decode_recipe(read_document(path), f"the recipe {path}", path.parent)
    if result.activations is not None:
        result = replace(result, activations=replace(result.activations, recipe=path))
    if result.mixing.kind in INLINE_KINDS:
        return result
    from loracli.recipe.tensors import read_sidecar

    return replace(result, mixing=replace(result.mixing, tensors=read_sidecar(path, result)))


def check_recipe_there(recipe: Recipe | str | Path | None) -> None:
    """Raises RecipeError for the file of a recipe that is not there, which is said before an output that is."""
    if isinstance(recipe, (str, Path)) and not os.path.lexists(recipe):
        load_recipe(recipe)


def _way_out(path: Path) -> str | None:
    return hints(near_path(path, _maybe_recipe), "`loracat fit` writes one; name it if it is elsewhere")


def _maybe_recipe(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


def read_document(path: Path) -> Any:
    """The JSON of a recipe's file.

    Raises:
        RecipeError: if it cannot be read.
    """
    try:
        data = read_regular(path, MAX_RECIPE_BYTES)
    except OSError as error:
        if os.path.isfile(path / CONFIG_FILE):
            word = shell_word(str(path))
            raise RecipeError(
                f"{path} is an adapter, and a recipe is read here",
                hint=f"name adapters with --adapters, as in --adapters {word}; `loracat inspect {word}` shows it",
            ) from None
        if (hint := whole_model_hint(path)) is not None:
            raise RecipeError(f"{path} is a whole model, and a recipe is read here", hint=hint) from None
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}",
            hint=_way_out(path),
        ) from None
    try:
        return parse_json(data)
    except StrictJsonError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from None


def decode_recipe(fields: Any, name: str, folder: Path) -> Recipe:
    """A recipe from its JSON, without the tensors of its mixing; `name` is what errors call it.

    Raises:
        RecipeError: naming every problem at once.
    """
    if not isinstance(fields, dict) or "loracat_recipe" not in fields:
        raise RecipeError(f"{name} is not a recipe of loracat")
    fields = dict(fields)
    schema = fields.pop("loracat_recipe")
    if type(schema) is not int or not _FIRST_SCHEMA <= schema <= SCHEMA:
        raise RecipeError(
            f"{name} has the schema {repr(schema)[:60]}; this version reads {_FIRST_SCHEMA} to {SCHEMA}",
            hint=_schema_hint(schema),
        )
    problems: list[str] = []
    recipe = decode(Recipe, fields, "", problems)
    if not problems and schema != (least := schema_of(recipe, _FIRST_SCHEMA)):
        problems.append(f"loracat_recipe: expected {least} for these fields, got {schema}")
    if not problems:
        problems = list(islice(_contradictions(recipe), MAX_PROBLEMS))
    if problems:
        raise RecipeError(f"{name} is damaged", problems=tuple(problems))
    result: Recipe = replace(recipe, folder=folder)
    return result


def _schema_hint(schema: object) -> str | None:
    if type(schema) is not int or schema < 1:
        return None
    if schema > SCHEMA:
        return "it was written by a newer loracat: upgrade"
    return "it was written by an older loracat: fit again"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    yield from _of_mixing(recipe)
    yield from base_problems(recipe.base.id, recipe.base.commit)
    for name in ("adapters", "data"):
        if not getattr(recipe, name):
            yield f"{name}: empty"
    taken = set(OTHER_ROWS)
    for index, adapter in enumerate(recipe.adapters):
        if adapter.reference in taken:
            yield f"adapters[{index}].reference: {adapter.reference!r} names another row of the table"
        taken.add(adapter.reference)
        yield from (f"adapters[{index}].{problem}" for problem in adapter_problems(adapter))
    for index, module in enumerate(recipe.modules):
        if not 0 <= module.experts <= MAX_EXPERTS:
            yield f"modules[{index}].experts: expected 0 to {MAX_EXPERTS}, got {module.experts}"
    yield from _of_table(recipe, taken)


def base_problems(base_id: str, commit: str | None) -> Iterator[str]:
    """What a record says of a base that no base can be."""
    if commit is not None and not is_hub_id(base_id):
        yield f"base.id: {base_id!r} has a commit and is not a repository on the Hub"
    if not base_id.isprintable():
        yield f"base.id: {base_id!r} has a character that no name has"


def adapter_problems(adapter: RecipeAdapter) -> Iterator[str]:
    """What a record says of an adapter that no adapter can be."""
    if CONFIG_FILE not in adapter.sha256:
        yield f"sha256: lacks {CONFIG_FILE}"
    if adapter.sha256.keys().isdisjoint(TENSOR_FILES):
        yield f"sha256: lacks {' or '.join(TENSOR_FILES)}"
    if (adapter.repo_id is None) != (adapter.commit is None):
        yield "commit: one that has a repo_id has a commit, and no other"
    if adapter.subfolder is not None and (adapter.repo_id is None or not is_folder(adapter.subfolder)):
        yield f"subfolder: {adapter.subfolder!r} is not a folder of a repository"
    if adapter.repo_id is not None:
        named = adapter.reference.removeprefix(URI_PREFIX).removeprefix("models/")
        if not named.startswith(adapter.repo_id) or named[len(adapter.repo_id) :][:1] not in ("", "@", "/"):
            yield f"reference: {adapter.reference!r} does not name the repository {adapter.repo_id}"
    for name, place in (adapter.renamed or {}).items():
        if not 0 <= place.part < place.parts:
            yield f"renamed[{name!r}]: part {place.part} of {place.parts}"


def _of_table(recipe: Recipe, known: set[str]) -> Iterator[str]:
    """Of the held-out table, and of the numbers of records; `known` are the names that its rows may have."""
    table = recipe.held_out
    counts = [(f"data[{index}]", data.records) for index, data in enumerate(recipe.data)]
    for name, records in (*counts, ("held_out", table.records)):
        if not 0 <= records < 1 << 53:
            yield f"{name}.records: expected a number of records, got {str(records)[:40]}"
    if table.best_ingredient not in known - set(OTHER_ROWS):
        yield f"held_out.best_ingredient: {table.best_ingredient!r} is none of the adapters"
    rows: set[str] = set()
    for index, row in enumerate(table.rows):
        if row.name not in known or row.name in rows:
            what = "a second row of that name" if row.name in rows else f"none of the adapters, {', '.join(OTHER_ROWS)}"
            yield f"held_out.rows[{index}].name: {row.name!r} is {what}"
        rows.add(row.name)
    if "fit" not in rows:
        yield "held_out.rows: no row 'fit'"
    elif table.best_ingredient in known and table.best_ingredient not in rows:
        yield f"held_out.rows: no row {table.best_ingredient!r}, the best adapter"
    if table.parts < 0 or table.parts == 1 or table.parts > table.records:
        yield f"held_out.parts: expected 0, or 2 to {table.records}, got {table.parts}"
    for index, control in enumerate(table.controls):
        if control.row.name not in CONTROL_ROWS:
            yield f"held_out.controls[{index}].row.name: expected {CONTROL_ROWS[0]!r}, got {control.row.name[:60]!r}"
    if table.verdict == "no better than a fresh LoRA" and not table.controls:
        yield "held_out.controls: expected the one that the verdict is about"
    for index, task in enumerate(table.tasks):
        if task.nats_per_token.keys() != rows:
            yield f"held_out.tasks[{index}].nats_per_token: not the names of held_out.rows"


def _of_mixing(recipe: Recipe) -> Iterator[str]:
    """Of the weights, and of what is said of each by the place of its adapter."""
    mixing, adapters, certificate = recipe.mixing, len(recipe.adapters), recipe.fit.certificate
    for group, weights in mixing.weights.items():
        if len(weights) != adapters:
            yield f"mixing.weights[{group!r}]: {len(weights)} weights for {adapters} adapters"
    if any(not 0 <= place < adapters for place in recipe.fit.dropped):
        yield f"fit.dropped: expected places of the {adapters} adapters, from 0"
    if mixing.numbers < 1:
        yield f"mixing.numbers: expected at least 1, got {mixing.numbers}"
    if not set(mixing.bypassed) <= set(mixing.unreached):
        yield "mixing.bypassed: not all of them are in mixing.unreached"
    if (mixing.tensors_sha256 is None) != (mixing.kind in INLINE_KINDS):
        expected = "null" if mixing.kind in INLINE_KINDS else "the sha256 of its tensors"
        yield f"mixing.tensors_sha256: expected {expected} with the kind {mixing.kind!r}"
    if mixing.weights_sha256 is not None and mixing.kind not in INLINE_KINDS:
        yield f"mixing.weights_sha256: expected null with the kind {mixing.kind!r}"
    if certificate is not None:
        for group, errors in certificate.standard_errors.items():
            if len(errors) != adapters:
                yield f"fit.certificate.standard_errors[{group!r}]: {len(errors)} for {adapters} adapters"
        for group, places in certificate.extrapolated.items():
            if any(not 0 <= place < adapters for place in places):
                yield f"fit.certificate.extrapolated[{group!r}]: not places of the {adapters} adapters"
