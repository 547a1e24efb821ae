"""The tensors of a recipe, in the file beside it: `recipe.json` has `recipe.safetensors`.

The recipe holds the file's sha256; the file's name follows from the recipe's. Both are written before either gets its
name, the tensors first and the recipe last, which makes it the commit point. Who is killed between the two renames
leaves the old recipe beside new tensors: it is then refused by its hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loracli.adapters.tensor_file import TensorFile, open_regular, open_tensor_file
from loracli.atomic import flush_directory, replaced_file, translate_disk_errors
from loracli.errors import IntegrityError, MalformedAdapter, OutputExists, RecipeError, UnsupportedAdapter, UsageError
from loracli.recipe import TENSOR_PARTS, tensors_path
from loracli.tensor_writer import file_parts, write_tensors

if TYPE_CHECKING:
    from loracli.recipe import Recipe

PART_DTYPES = {"mixing": torch.float64, "lora_A": torch.float32, "lora_B": torch.float32}
METADATA = {"format": "loracat_recipe"}  # tells our file from a model or an adapter of the same name
_WAY_OUT = "a recipe and its tensors belong together: restore both from the same fit, or fit again"


def sidecar_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the file that `write_sidecar` makes of these tensors."""
    digest = hashlib.sha256()
    for part in file_parts(*_layout(tensors), metadata=METADATA):
        digest.update(part)
    return digest.hexdigest()


def write_sidecar(recipe: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors of the recipe at this path, whole or not at all; replaces what is there."""
    with replaced_file(tensors_path(recipe)) as temporary:
        write_tensors(temporary, *_layout(tensors), metadata=METADATA)


def check_sidecar_path(recipe: Path, *, force: bool) -> None:
    """Refuses a recipe's path where its tensors would meet a file that is not to be replaced.

    Raises:
        UsageError: if the path does not end in `.json`, so that two recipes could share one file of tensors.
        OutputExists: if the file is there and `force` is not set, or if it holds something else than a recipe's
            tensors: a model's or an adapter's weights are never replaced.
    """
    if recipe.suffix != ".json":
        raise UsageError(
            f"{recipe} does not end in .json, and this mixing keeps its tensors in a file named after the recipe",
            hint=f"-o {recipe}.json",
        )
    path = tensors_path(recipe)
    if not os.path.lexists(path):
        return
    if not is_sidecar(path):
        raise OutputExists(
            f"{path}, where the tensors of {recipe.name} belong, holds something else", hint="choose another -o"
        )
    if not force:
        raise OutputExists(f"{path} exists", hint="choose another name with -o, or replace it with --force")


def remove_sidecar(recipe: Path) -> None:
    """Removes the tensors of an earlier recipe at this path; what is not a recipe's stays."""
    path = tensors_path(recipe)
    if recipe.suffix == ".json" and is_sidecar(path):
        with translate_disk_errors(path):
            path.unlink()
            flush_directory(path.parent)


def is_sidecar(path: Path) -> bool:
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
    sidecar = tensors_path(path)
    if not os.path.lexists(sidecar):
        raise RecipeError(f"the recipe {path} lacks its tensors: {sidecar} does not exist", hint=_WAY_OUT)
    try:
        with open_regular(sidecar) as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != recipe.mixing.tensors_sha256:
            raise IntegrityError(f"{sidecar} is not the file that {path} was written with", hint=_WAY_OUT)
        file = open_tensor_file(sidecar)
        problems = tuple(_problems(file, recipe))
        if problems:
            raise RecipeError(f"the tensors {sidecar} do not fit the recipe {path}", problems=problems)
        with file.reader() as reader:
            return {name: reader.read(name) for name in sorted(file.shapes)}
    except (MalformedAdapter, UnsupportedAdapter) as error:
        raise RecipeError(f"the recipe's tensors {sidecar} cannot be used: {error.what}", hint=_WAY_OUT) from None


def _layout(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[int, ...]], torch.dtype, Callable[[str], Tensor]]:
    """What the tensor writer wants to know; the tensors of a mixing have one dtype."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, tensors[min(tensors)].dtype, tensors.__getitem__


def _problems(file: TensorFile, recipe: Recipe) -> Iterable[str]:
    """Every tensor that is missing, unknown, or of another dtype or shape than the recipe wants."""
    mixing = recipe.mixing
    wanted = {f"{module}.{part}" for module in mixing.weights for part in TENSOR_PARTS[mixing.kind]}
    yield from (f"{name}: missing" for name in sorted(wanted - file.shapes.keys()))
    yield from (f"{name}: unknown" for name in sorted(file.shapes.keys() - wanted))
    for name in sorted(wanted & file.shapes.keys()):
        dtype = PART_DTYPES[name.rpartition(".")[2]]
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
