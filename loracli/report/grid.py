"""The mixing weights of a recipe as a grid for each adapter, layer by module: what a map of them is drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loracli.adapters.names import layer, leaf
from loracli.recipe.recipe import Recipe

_LEAST_SPAN = 0.25  # of a weight from uniform: a smaller range is not blown up
_MOST_EMPTY = 20  # places of a map for each module: names that share neither layer nor kind would make it endless
NO_MAP = "the modules' names share too few layers and kinds for a map"
_OUTSIDE = "-"  # the row of modules that belong to no layer


@dataclass(frozen=True)
class Cell:
    """A module's weight of one adapter, and its standard error where it is known."""

    module: str
    weight: float
    error: float | None


@dataclass(frozen=True)
class Grid:
    """The weights of one adapter.

    Args:
        rows: paths of the layers, in order, what is outside of any last.
        columns: the rest of the modules' paths.
        cells: by row and column, of the modules that the adapter changes.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]


def grids(recipe: Recipe) -> dict[str, Grid]:
    """A grid for each adapter, by its label, all with the same rows and columns; none where they would be empty nearly
    everywhere."""
    modules = [module.name for module in recipe.modules if _has_weights(recipe, module.name)]
    rows = tuple(sorted({_row(name) for name in modules}, key=_order))
    columns = tuple(dict.fromkeys(_column(name) for name in modules))
    if len(rows) * len(columns) > _MOST_EMPTY * max(len(modules), 50):
        return {}
    found = {}
    for index, label in enumerate(recipe.labels().values()):
        cells = {}
        for name in modules:
            weight = recipe.weights_of(name)[index]
            if weight is not None:
                cells[_row(name), _column(name)] = Cell(name, weight, _error(recipe, name, index))
        found[label] = Grid(rows, columns, cells)
    return found


def span_of(found: Mapping[str, Grid], uniform: float) -> float:
    """The largest distance of a weight from uniform: full colour."""
    return max([_LEAST_SPAN, *(abs(c.weight - uniform) for grid in found.values() for c in grid.cells.values())])


def described(cell: Cell) -> str:
    """`model.layers.0.self_attn.q_proj: 0.512 ± 0.031`."""
    error = "" if cell.error is None else f" ± {cell.error:.3f}"
    return f"{cell.module}: {cell.weight:.3f}{error}"


def numbers(recipe: Recipe) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the same weights as a table."""
    labels = list(recipe.labels().values())
    rows = []
    for module in recipe.modules:
        if _has_weights(recipe, module.name):
            weights = recipe.weights_of(module.name)
            errors = [_error(recipe, module.name, index) for index in range(len(labels))]
            rows.append([module.name, *(_said(w, e) for w, e in zip(weights, errors, strict=True))])
    return ["module", *labels], rows


def _said(weight: float | None, error: float | None) -> str:
    if weight is None:
        return "-"
    return f"{weight:.4f}" + ("" if error is None else f" ± {error:.3f}")


def _has_weights(recipe: Recipe, module: str) -> bool:
    """A module that only pads an export has none."""
    return any(weight is not None for weight in recipe.mixing.weights.get(recipe.group_of(module), ()))


def _error(recipe: Recipe, module: str, index: int) -> float | None:
    certificate = recipe.certificate_of_weights
    if certificate is None:
        return None
    errors: Sequence[float | None] | None = certificate.standard_errors.get(recipe.group_of(module))
    return None if errors is None else errors[index]


def short_names(columns: Sequence[str]) -> list[str]:
    """The last name of each column, or the whole where two have the same."""
    last = [leaf(column) for column in columns]
    counts = Counter(last)
    return [name if counts[name] == 1 else column for name, column in zip(last, columns, strict=True)]


def layer_numbers(rows: Sequence[str]) -> list[str]:
    """The number of each layer, or the whole path where there are several kinds of layers."""
    kinds = {row.rpartition(".")[0] for row in rows if row != _OUTSIDE}
    return [row.rpartition(".")[2] if len(kinds) <= 1 else row for row in rows]


def _row(module: str) -> str:
    path = layer(module)
    return _OUTSIDE if path == module else path


def _column(module: str) -> str:
    path = layer(module)
    return leaf(module) if path == module else module[len(path) + 1 :]


def _order(row: str) -> tuple[bool, str, int]:
    kind, _, number = row.rpartition(".")
    return (row == _OUTSIDE, kind, int(number) if number.isdecimal() and len(number) < 10 else 0)
