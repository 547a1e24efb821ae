"""A composition becomes one adapter directory.

Concatenated: A holds the ingredients' own values, w s or s and M are folded into B, rank R = sum r_i, exact up to one
rounding of B; trained factors are written as they are. Merged: the best approximation of a given rank, from the
factors. Written whole or not at all, the same bytes for the same inputs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.names import CONFIG_FILE, TENSOR_FILE, format_tensor_name, parse_tensor_name
from loracli.adapters.tensor_file import open_tensor_file
from loracli.algebra.concatenate import pad_rank
from loracli.algebra.factors import Factors
from loracli.atomic import CERTIFICATE_FILE, check_free, whole_directory, write_file
from loracli.errors import IntegrityError, RecipeError, UsageError
from loracli.export.ahead import in_order, one_thread_each
from loracli.export.card import model_card
from loracli.export.certificate import Certificate, ModuleCertificate
from loracli.export.ingredients import read_ingredients
from loracli.export.module import ModuleExport, module_export
from loracli.export.profile import PROFILES, Layout, choose_layout
from loracli.export.source import RecipeSource, Source
from loracli.progress import SILENT, Progress
from loracli.recipe import BaseModule, Recipe, load_recipe
from loracli.tensor_writer import write_tensors

OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TASK = "export"
MOST_WORKERS = 4  # modules that are worked on at once; each is held in float64 while it is compressed


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: the directory.
        layout: profile, ranks and targets.
        dtype: of the tensors.
        merged: whether it was compressed.
        certificate: exactness per module.
        size_bytes: of the tensor file.
    """

    path: Path
    layout: Layout
    dtype: torch.dtype
    merged: bool
    certificate: Certificate
    size_bytes: int


@dataclass(frozen=True)
class ExportOptions:
    """How a composition is written.

    Args:
        merge: compress to `rank` instead of concatenating.
        rank: of the result with `merge`, or of a method that cuts its result; None is the largest ingredient rank with
            `merge`, and what the method says otherwise.
        dtype: float32, float16 or bfloat16; None is the widest of the ingredients' dtypes, and float32 for trained
            factors.
        profile: `portable` or `peft`; None is portable where that is possible.
    """

    merge: bool = False
    rank: int | None = None
    dtype: str | None = None
    profile: str | None = None

    def check(self, *, cuts: bool = False) -> None:
        """Raises UsageError for options that contradict each other or are out of their range."""
        if self.rank is not None and not (self.merge or cuts):
            raise UsageError("--rank is for --merge; a concatenation has the sum of the ranks", hint="add --merge")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank} is below 1")
        if self.dtype is not None and self.dtype not in OUTPUT_DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of {', '.join(OUTPUT_DTYPES)}")
        if self.profile is not None and self.profile not in PROFILES:
            raise UsageError(f"--profile {self.profile} is not one of {', '.join(PROFILES)}")


def export_adapter(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    rank: int | None = None,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    profile: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Writes the composition of a recipe as one PEFT adapter directory.

    Args:
        recipe: a recipe, or the file of one.
        output: the directory to make.
        merge, rank, dtype, profile: as in `ExportOptions`.
        adapters: where the ingredients are now, in the recipe's order; empty for where the recipe says.
        force: replace an existing adapter directory.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        IntegrityError: if an ingredient is not the file that the weights were fitted for, or what was written reads
            back otherwise.
        UsageError: if options contradict each other, or the profile cannot be had.
    """
    options = ExportOptions(merge, rank, dtype, profile)
    options.check()
    check_free(Path(output), force=force)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    ingredients = read_ingredients(recipe, relocated=adapters, progress=progress)
    return write_export(RecipeSource(recipe, ingredients), Path(output), options, force=force, progress=progress)


def write_export(
    source: Source, output: Path, options: ExportOptions, *, force: bool = False, progress: Progress = SILENT
) -> Exported:
    """Writes a composition; what `export_adapter` and `export_method` have in common."""
    for ingredient in source.adapters:
        if ingredient.path.resolve().is_relative_to(output.resolve()):
            raise UsageError(
                f"{output} holds the ingredient {ingredient.reference}", hint="choose another name with -o"
            )
    with one_thread_each() as threads:
        plan = _Plan(source, options, progress, workers=min(threads, MOST_WORKERS))
        with whole_directory(output, force=force) as folder:
            certificate, size = plan.write(folder)
    return Exported(output, plan.layout, plan.dtype, plan.merged, certificate, size)


class _Plan:
    """One export: what is computed for each module, and where it goes.

    A module whose rank is not known beforehand is composed at once and held in the output's dtype.
    """

    def __init__(self, source: Source, options: ExportOptions, progress: Progress, *, workers: int) -> None:
        self._source, self._options, self._progress, self._workers = source, options, progress, workers
        self.dtype = OUTPUT_DTYPES[options.dtype] if options.dtype else source.dtype
        self._table: dict[str, BaseModule] = {module.name: module for module in source.table}
        self._rank = options.rank or max(max(adapter.ranks) for adapter in source.adapters)
        self._held: dict[str, ModuleExport] = {}
        names = source.names()
        missing = sorted(set(names) - self._table.keys())
        if missing:
            raise RecipeError(f"the recipe's table of base modules lacks {missing[0]}, which an adapter changes")
        progress.begin(TASK, len(names), "modules")
        self._ranks = {name: self._rank_of(name) for name in names}
        uniform = self._rank if options.merge and options.rank is not None else None
        self.layout = choose_layout(source.table, self._ranks, options.profile, rank=uniform)  # type: ignore[arg-type]

    @property
    def merged(self) -> bool:
        """Whether something was cut off."""
        return self._options.merge or any(made.certificate.kept_energy < 1 for made in self._held.values())

    def _rank_of(self, name: str) -> int:
        total = self._source.known_rank(name)
        if total is None:
            self._held[name] = self._export(name)
            self._progress.advance(TASK, 1)
            return self._held[name].factors.rank
        if not self._options.merge:
            return total
        module = self._table[name]
        return min(self._rank, total, module.in_features, module.out_features)

    def _export(self, name: str) -> ModuleExport:
        return module_export(self._source, name, self.dtype, rank=self._rank if self._options.merge else None)

    def write(self, folder: Path) -> tuple[Certificate, int]:
        certificates: list[ModuleCertificate] = []
        factors: dict[str, Factors] = {}  # of the module being written
        made = in_order(self._module, sorted(self.layout.ranks), workers=self._workers)

        def tensor(name: str) -> Tensor:
            parsed = parse_tensor_name(name, where=TENSOR_FILE)
            if parsed.module not in factors:
                factors.clear()
                factors[parsed.module] = self._written(next(made), certificates)
            both = factors[parsed.module]
            return both.lora_A if parsed.part.endswith("A") else both.lora_B

        path = folder / TENSOR_FILE
        write_tensors(path, self._shapes(), self.dtype, tensor)
        certificate = Certificate(tuple(certificates), self._read_back(path))
        config = self.layout.config(self._source.base_id, self._table)
        write_file(folder / CONFIG_FILE, _json(config))
        write_file(folder / CERTIFICATE_FILE, _json(self._document(certificate)))
        card = model_card(
            self._source.card(), self.layout, certificate, merged=self.merged, options=self._repeated_options()
        )
        write_file(folder / "README.md", card.encode())
        self._progress.finish(TASK)
        return certificate, path.stat().st_size

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rank in self.layout.ranks.items():
            module = self._table[name]
            embedding = module.kind == "embedding"
            shapes[format_tensor_name(name, "lora_embedding_A" if embedding else "lora_A")] = (rank, module.in_features)
            shapes[format_tensor_name(name, "lora_embedding_B" if embedding else "lora_B")] = (
                module.out_features,
                rank,
            )
        return shapes

    def _module(self, name: str) -> tuple[Factors, ModuleCertificate | None]:
        """The module's factors as they go into the file, and its certificate; None where it only pads the layout."""
        rank, module = self.layout.ranks[name], self._table[name]
        if name not in self._ranks:
            zeros = Factors(torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank))
            return zeros.to(self.dtype), None
        made = self._held[name] if name in self._held else self._export(name)
        return pad_rank(made.factors, rank), made.certificate

    def _written(
        self, made: tuple[Factors, ModuleCertificate | None], certificates: list[ModuleCertificate]
    ) -> Factors:
        factors, certificate = made
        if certificate is not None:
            certificates.append(certificate)
            if certificate.name not in self._held:
                self._progress.advance(TASK, 1)
        return factors

    def _read_back(self, path: Path) -> str:
        """The sha256 of the file, after the safetensors library has read every tensor of it in the planned shape."""
        file = open_tensor_file(path)
        with file.reader() as reader:
            found = {name: tuple(reader.read(name).shape) for name in file.shapes}
        if found != self._shapes():
            raise IntegrityError(f"{path.name} reads back with other shapes than were written")
        return file.sha256

    def _document(self, certificate: Certificate) -> dict[str, Any]:
        return {
            **self._source.document(),
            "export": {
                "profile": self.layout.profile,
                "merged": self.merged,
                "rank": self.layout.rank,
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "certificate": {
                "sha256": {TENSOR_FILE: certificate.sha256},
                "largest_relative_error": certificate.largest_error,
                "modules": [dataclasses.asdict(module) for module in certificate.modules],
            },
        }

    def _repeated_options(self) -> str:
        chosen = self._options
        words = [" --merge"] if chosen.merge else []
        rank = self._rank if chosen.merge else chosen.rank
        for name, value in (("rank", rank), ("dtype", chosen.dtype), ("profile", chosen.profile)):
            words += [] if value is None else [f" --{name} {value}"]
        return "".join(words)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
