"""The tensors of a recipe, in files beside it: `recipe.json` has `recipe.safetensors` for its mixing, where that is
tensors, and `recipe.json.activations.safetensors` for what the records show of the activations.

The recipe holds each file's sha256; the files' names follow from the recipe's. All are written before the recipe gets
its name, which makes it the commit point. Who is killed between the two renames leaves the old recipe beside new
tensors: it is then refused by its hash.

Of a mixing that is tensors there are one or two for each module:

    rank, core    <module>.mixing                     M (R, R) float64, in the basis of the files:  dW = B M A
    factors       <module>.lora_A, <module>.lora_B    (r, in), (out, r) float32, scaling 1:         dW = lora_B lora_A

with A = [A_1; ...; A_N] (R, in) and B = [s_1 B_1, ..., s_N B_N] (out, R) of the adapters that change the module, in the
recipe's order. `rank` and `core` differ in what was fitted, not in what is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.basis import projection
from loracli.algebra.factors import Factors, mix
from loracli.errors import IntegrityError, MalformedAdapter, OutputExists, RecipeError, UnsupportedAdapter
from loracli.recipe.record import (
    MAX_RECIPE_BYTES,
    TENSOR_PARTS,
    MixingKind,
    RecipeMixing,
    activations_path,
    kept_path,
    tensors_path,
)
from loracli.system.files import (
    ANOTHER_NAME,
    OR_FORCE,
    copy_file,
    file_sha256,
    flush,
    read_regular,
    replaced_file,
    translate_disk_errors,
)
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import TensorFile, file_parts, open_tensor_file, write_tensors

if TYPE_CHECKING:
    from loracli.recipe.recipe import Recipe
    from loracli.recipe.record import RecipeActivations


_PART_DTYPES = {"mixing": torch.float64, "lora_A": torch.float32, "lora_B": torch.float32}
METADATA = {"format": "loracat_recipe"}  # tells our file from a model or an adapter of the same name
MOMENT = "moment"
_WAY_OUT = "a recipe and its tensors belong together: restore both from the same fit, or fit again"


def sidecar_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the file that `write_sidecar` makes of these tensors."""
    digest = hashlib.sha256()
    for part in file_parts(*_layout(tensors), metadata=METADATA):
        digest.update(part)
    return digest.hexdigest()


def write_sidecar(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of tensors of a recipe, whole or not at all; replaces what is there."""
    with replaced_file(path) as temporary:
        write_tensors(temporary, *_layout(tensors), metadata=METADATA)


def check_sidecar_path(path: Path, recipe: Path, *, force: bool) -> None:
    """Refuses a recipe's path where its tensors would meet this file, which is there and is not to be replaced.

    Raises:
        OutputExists: if `force` is not set, or the file holds something else than a recipe's tensors: a model's or an
            adapter's weights are never replaced.
    """
    if not _is_sidecar(path):
        raise OutputExists(
            f"{path}, where the tensors of {recipe.name} belong, holds something else", hint=ANOTHER_NAME
        )
    if not force:
        raise OutputExists(f"{path} exists", hint=OR_FORCE)


def remove_sidecar(path: Path) -> None:
    """Removes the tensors of an earlier recipe; what is not a recipe's stays."""
    if _is_sidecar(path):
        with translate_disk_errors(path):
            path.unlink()
            flush(path.parent)


def keep_replaced(path: Path) -> Path:
    """Copies a recipe and its tensors to where `kept_path` says, so that the copy can be read like any recipe.

    What was kept there before goes first and the recipe is copied last: who is stopped in between leaves no recipe with
    the tensors of another, and the one at `path` is untouched. A copy that is there already stays as it is: the tensors
    beside `path` may be those of the next recipe, if writing that was cut short.

    Args:
        path: of a regular file; one that is not a recipe is copied by itself.
    Returns:
        the place of the copy.
    Raises:
        OutputExists: as `check_kept_path`.
        LoracatError, OutOfResources: if the disk does not take it.
    """
    check_kept_path(path)
    kept = kept_path(path)
    if os.path.lexists(kept) and file_sha256(kept) == file_sha256(path):
        return kept
    with translate_disk_errors(kept):
        kept.unlink(missing_ok=True)
        flush(kept.parent)
    for own, copy in zip(_sidecars(path), _sidecars(kept), strict=True):
        remove_sidecar(copy)
        if _is_sidecar(own):
            _copy(own, copy)
    _copy(path, kept)
    return kept


def check_kept_path(path: Path) -> None:
    """Refuses to replace a recipe where something else than an earlier recipe stands in the place of its copy.

    Raises:
        OutputExists: if so.
    """
    kept = kept_path(path)
    if os.path.lexists(kept) and not _is_recipe(kept):
        raise OutputExists(
            f"{kept}, where {path.name} is kept before it is replaced, is not a recipe",
            hint=f"move it, or {ANOTHER_NAME}",
        )
    for copy in _sidecars(kept):
        if os.path.lexists(copy):
            check_sidecar_path(copy, kept, force=True)


def _sidecars(recipe: Path) -> list[Path]:
    """Where the tensors of a recipe at this path may be."""
    return [activations_path(recipe), *([tensors_path(recipe)] if recipe.suffix == ".json" else [])]


def _copy(path: Path, copy: Path) -> None:
    with replaced_file(copy) as temporary:
        copy_file(path, temporary)


def _is_recipe(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        content = parse_json(read_regular(path, MAX_RECIPE_BYTES))
    except (OSError, StrictJsonError):
        return False
    return isinstance(content, dict) and "loracat_recipe" in content


def _is_sidecar(path: Path) -> bool:
    """Whether this is a regular file that `write_sidecar` wrote."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return bool(file.metadata() == METADATA)
    except (SafetensorError, OSError):
        return False


def read_sidecar(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of the recipe that was read from `path`, checked against it.

    Raises:
        IntegrityError: if the file is not the one that the recipe was written with.
        RecipeError: if it is missing, damaged, or does not fit the recipe.
    """
    return _read(tensors_path(path), path, recipe.mixing.tensors_sha256, lambda file: _problems(file, recipe), _WAY_OUT)


def read_moments(path: Path, activations: RecipeActivations) -> dict[str, Tensor]:
    """`<module>.moment` (R, R) of each module, of the recipe that was read from `path`.

    Raises:
        IntegrityError: if the file is not the one that the recipe was written with.
        RecipeError: if it is missing or damaged.
    """

    def problems(file: TensorFile) -> Iterable[str]:
        for name, (rows, columns) in sorted(file.shapes.items()):
            if name.rpartition(".")[2] != MOMENT or rows != columns or file.dtypes[name] != torch.float32:
                yield f"{name}: no second moment"

    way_out = "give calibration records with --fit-data"
    return _read(activations_path(path), path, activations.sha256, problems, way_out)


def _read(
    path: Path,
    recipe: Path,
    sha256: str | None,
    problems_of: Callable[[TensorFile], Iterable[str]],
    way_out: str,
) -> dict[str, Tensor]:
    """The tensors of a file beside a recipe, if it has this sha256 and no problems."""
    if not os.path.lexists(path):
        raise RecipeError(f"the recipe {recipe} lacks its tensors: {path} does not exist", hint=way_out)
    try:
        if file_sha256(path) != sha256:
            raise IntegrityError(f"{path} is not the file that {recipe} was written with", hint=way_out)
        file = open_tensor_file(path)
        problems = tuple(problems_of(file))
        if problems:
            raise RecipeError(f"the tensors {path} do not fit the recipe {recipe}", problems=problems)
        with file.reader() as reader:
            return {name: reader.read(name) for name in sorted(file.shapes)}
    except (MalformedAdapter, UnsupportedAdapter) as error:
        raise RecipeError(f"the recipe's tensors {path} cannot be used: {error.what}", hint=way_out) from None


def _layout(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[int, ...]], torch.dtype, Callable[[str], Tensor]]:
    """What the tensor writer wants to know; the tensors of a file have one dtype."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, tensors[min(tensors)].dtype, tensors.__getitem__


def _problems(file: TensorFile, recipe: Recipe) -> Iterable[str]:
    """Every tensor that is missing, unknown, or of another dtype or shape than the recipe wants."""
    mixing = recipe.mixing
    wanted = {f"{module}.{part}" for module in mixing.weights for part in TENSOR_PARTS[mixing.kind]}
    yield from (f"{name}: missing" for name in sorted(wanted - file.shapes.keys()))
    yield from (f"{name}: unknown" for name in sorted(file.shapes.keys() - wanted))
    for name in sorted(wanted & file.shapes.keys()):
        dtype = _PART_DTYPES[name.rpartition(".")[2]]
        if file.dtypes[name] != dtype:
            yield f"{name}: expected {dtype}, got {file.dtypes[name]}".replace("torch.", "")
    if wanted == file.shapes.keys():
        yield from _shape_problems(file, recipe)


def _shape_problems(file: TensorFile, recipe: Recipe) -> Iterable[str]:
    if recipe.mixing.kind != "factors":
        most = sum(adapter.rank for adapter in recipe.adapters)
        for name, (rows, columns) in sorted(file.shapes.items()):
            if rows != columns or rows > most:
                yield f"{name}: expected a square matrix of at most {most} rows, got {(rows, columns)}"
        return
    table = {module.name: module for module in recipe.modules}
    for name in recipe.mixing.weights:
        (rank, in_features), (out_features, columns) = file.shapes[f"{name}.lora_A"], file.shapes[f"{name}.lora_B"]
        if rank != columns:
            yield f"{name}: lora_A has rank {rank} and lora_B {columns}"
        if name in table and (in_features, out_features) != (table[name].in_features, table[name].out_features):
            yield (
                f"{name}: expected a change of {table[name].out_features} x {table[name].in_features}, "
                f"got {out_features} x {in_features}"
            )


def tensor_mixing(
    kind: MixingKind, tensors: Mapping[str, Tensor], adapters: Sequence[LoraAdapter], *, numbers: int
) -> RecipeMixing:
    """The mixing for a recipe, with its projection on the adapters as `weights`.

    Args:
        kind: `rank`, `core` or `factors`.
        tensors: by name, of every module that an adapter changes and no other; in any dtype and on any device, rounded
            once to the dtype they are kept in.
        adapters: N adapters in the recipe's order.
        numbers: how many were fitted.
    Raises:
        RecipeError: if a tensor is missing or its shape does not fit the adapters.
        ValueError: if there is a tensor of another name.
    """
    modules = sorted({name for adapter in adapters for name in adapter.modules})
    unknown = tensors.keys() - {f"{module}.{part}" for module in modules for part in TENSOR_PARTS[kind]}
    if unknown:
        raise ValueError(f"{min(unknown)} is not a tensor of a {kind} mixing of these adapters")
    kept = {
        name: tensor.detach().to("cpu", _PART_DTYPES[name.rpartition(".")[2]]).contiguous()
        for name, tensor in sorted(tensors.items())
    }
    weights = {}
    for module in modules:
        updates = [adapter.modules[module].factors if module in adapter.modules else None for adapter in adapters]
        present = [update for update in updates if update is not None]
        weights[module] = projection(composed_update(kind, kept, module, present), updates)
    return RecipeMixing(kind, weights, numbers, sidecar_sha256(kept), kept)


def composed_update(
    kind: MixingKind, tensors: Mapping[str, Tensor], module: str, updates: Sequence[Factors]
) -> Factors:
    """The update of one module in float64, scaling 1; with `rank` and `core` its lora_A is A as the files have it.

    Args:
        kind: `rank`, `core` or `factors`.
        tensors: of the mixing, by name.
        module: its name.
        updates: of the adapters that change it, at least one.
    Raises:
        RecipeError: if a tensor is missing or its shape does not fit the updates.
    """
    names = [f"{module}.{part}" for part in TENSOR_PARTS[kind]]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RecipeError(f"the recipe has no tensor {missing[0]}")
    rank = sum(update.rank for update in updates)
    found = [tuple(tensors[name].shape) for name in names]
    if kind == "factors":
        rank = found[0][0]
        expected = [(rank, updates[0].in_features), (updates[0].out_features, rank)]
    else:
        expected = [(rank, rank)]
    for name, shape, wanted in zip(names, found, expected, strict=True):
        if shape != wanted:
            raise RecipeError(f"the recipe's tensor {name} has the shape {shape}; the adapters need {wanted}")
    if kind == "factors":
        lora_A, lora_B = (tensors[name].double() for name in names)
        return Factors(lora_A, lora_B)
    return mix(updates, tensors[names[0]])
