"""A composition becomes one adapter directory.

Concatenated: A holds the ingredients' own values, w s or s and M are folded into B, rank R = sum r_i, exact up to one
rounding of B; trained factors are written as they are. Merged: the best approximation of a given rank, from the
factors. Written whole or not at all, the same bytes for the same inputs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.names import CONFIG_FILE, GGUF_FILE, PREFIX
from loracli.adapters.saved_modules import saved_modules
from loracli.adapters.tensor_file import open_tensor_file
from loracli.algebra.concatenate import pad_rank, relative_error
from loracli.algebra.factors import Factors
from loracli.algebra.truncate import truncate
from loracli.atomic import CERTIFICATE_FILE, check_free, whole_directory, write_file
from loracli.errors import IntegrityError, RecipeError, UsageError
from loracli.export.card import model_card
from loracli.export.certificate import Certificate, ModuleCertificate
from loracli.export.gguf_file import gguf_names, write_gguf
from loracli.export.ingredients import read_ingredients, recorded_policy
from loracli.export.llama_cpp import LlamaCppBase
from loracli.export.profile import PROFILES, Layout, choose_layout
from loracli.export.source import RecipeSource, Source
from loracli.progress import SILENT, Progress
from loracli.recipe import BaseModule, Recipe, load_recipe
from loracli.tensor_writer import write_tensors

OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TASK = "export"


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
        profile: `portable`, `peft` or `mlx`; None is portable where that is possible.
        gguf: how llama.cpp has the base, to write a GGUF file as well; None for none.
    """

    merge: bool = False
    rank: int | None = None
    dtype: str | None = None
    profile: str | None = None
    gguf: LlamaCppBase | None = None

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
    gguf: bool = False,
    base: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Writes the composition of a recipe as one PEFT adapter directory.

    Args:
        recipe: a recipe, or the file of one.
        output: the directory to make.
        merge, rank, dtype, profile: as in `ExportOptions`.
        adapters: where the ingredients are now, in the recipe's order; empty for where the recipe says.
        gguf: write a GGUF file as well.
        base: where the base's config.json is, for `gguf`; None for the recipe's base on the Hub or in its cache.
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
    if gguf:
        from loracli.export.gguf_base import find_llama_cpp_base

        found = find_llama_cpp_base(
            base or recipe.base.id,
            revision=recipe.base.commit,
            config_sha256=recipe.base.config_sha256,
            progress=progress,
        )
        options = dataclasses.replace(options, gguf=found)
    ingredients = read_ingredients(recipe, relocated=adapters, progress=progress)
    saved = saved_modules(recorded_policy(recipe), ingredients)
    source = RecipeSource(recipe, ingredients, saved)
    return write_export(source, Path(output), options, force=force, progress=progress)


def write_export(
    source: Source, output: Path, options: ExportOptions, *, force: bool = False, progress: Progress = SILENT
) -> Exported:
    """Writes a composition; what `export_adapter` and `export_method` have in common."""
    for ingredient in source.adapters:
        if ingredient.path.resolve().is_relative_to(output.resolve()):
            raise UsageError(
                f"{output} holds the ingredient {ingredient.reference}", hint="choose another name with -o"
            )
    plan = _Plan(source, options, progress)
    with whole_directory(output, force=force) as folder:
        certificate, size = plan.write(folder)
    return Exported(output, plan.layout, plan.dtype, plan.merged, certificate, size)


class _Plan:
    """One export: what is computed for each module, and where it goes.

    A module whose rank is not known beforehand is composed at once and held in the output's dtype.
    """

    def __init__(self, source: Source, options: ExportOptions, progress: Progress) -> None:
        self._source, self._options, self._progress = source, options, progress
        self.dtype = OUTPUT_DTYPES[options.dtype] if options.dtype else source.dtype
        self._table: dict[str, BaseModule] = {module.name: module for module in source.table}
        self._rank = options.rank or max(max(adapter.ranks) for adapter in source.adapters)
        self._held: dict[str, tuple[Factors, ModuleCertificate]] = {}
        names = source.names()
        missing = sorted(set(names) - self._table.keys())
        if missing:
            raise RecipeError(f"the recipe's table of base modules lacks {missing[0]}, which an adapter changes")
        progress.begin(TASK, len(names), "modules")
        self._ranks = {name: self._rank_of(name) for name in names}
        uniform = self._rank if options.merge and options.rank is not None else None
        biased = next((adapter.reference for adapter in source.adapters if adapter.config.lora_bias), None)
        self.layout = choose_layout(
            source.table,
            self._ranks,
            options.profile,  # type: ignore[arg-type]
            rank=uniform,
            lora_bias=biased,
            saved=() if source.saved is None else source.saved.modules,
        )
        self._hashes: dict[str, str] = {}  # of files beside the tensors
        if options.gguf is not None:
            if self.layout.lora_bias or self.layout.modules_to_save:
                kept = "lora_bias" if self.layout.lora_bias else "modules_to_save"
                raise UsageError(f"a GGUF adapter cannot hold the {kept} of this composition", hint="leave out --gguf")
            self._gguf_names = gguf_names(options.gguf, {name: self._table[name] for name in self.layout.ranks})

    @property
    def merged(self) -> bool:
        """Whether something was cut off."""
        return self._options.merge or any(made.kept_energy < 1 for _, made in self._held.values())

    def _rank_of(self, name: str) -> int:
        total = self._source.known_rank(name)
        if total is None:
            self._held[name] = self._compose(name)
            return self._held[name][1].rank
        if not self._options.merge:
            return total
        module = self._table[name]
        return min(self._rank, total, module.in_features, module.out_features)

    def _compose(self, name: str) -> tuple[Factors, ModuleCertificate]:
        """The module's factors in the output's dtype, unpadded, and how exact they are."""
        self._progress.advance(TASK, 1)
        composed = self._source.compose(name)
        chosen, kept = composed.factors, composed.kept_energy
        # dW has no more rank than the shorter side of the module, however large the one asked for.
        rank = min(self._rank, chosen.in_features, chosen.out_features)
        if self._options.merge and rank < chosen.rank:
            truncation = truncate(chosen, rank)
            chosen, kept = truncation.factors, kept * truncation.kept_energy
        written = chosen.to(self.dtype)
        if not all(torch.isfinite(t).all() for t in (written.lora_A, written.lora_B, written.bias) if t is not None):
            raise UsageError(f"{name} overflows {self.dtype}", hint="export with --dtype float32 or bfloat16")
        # What the method itself cut off is at right angles to what it kept.
        share = composed.kept_energy
        error = math.sqrt(1 - share + share * relative_error(written, composed.factors) ** 2)
        return written, ModuleCertificate(name, chosen.rank, error, kept)

    def write(self, folder: Path) -> tuple[Certificate, int]:
        certificates: list[ModuleCertificate] = []
        factors: dict[str, Factors] = {}  # of the module being written
        places = self.layout.places(self._table)

        def tensor(name: str) -> Tensor:
            if name in self._whole:
                return self._saved_parameter(self._whole[name])
            place = places[name]
            if place.module not in factors:
                factors.clear()
                factors[place.module] = self._factors(place.module, certificates)
            return place.tensor_of(factors[place.module])

        path = folder / self.layout.tensor_file
        write_tensors(path, self._shapes(), self.dtype, tensor)
        certificate = Certificate(tuple(certificates), self._read_back(path))
        if self._options.gguf is not None:
            self._hashes[GGUF_FILE] = write_gguf(
                folder / GGUF_FILE, self._options.gguf, self._gguf_names, path, self.layout.places(self._table)
            )
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
        shapes: dict[str, tuple[int, ...]] = {n: place.shape for n, place in self.layout.places(self._table).items()}
        saved = self._source.saved
        return shapes if saved is None else shapes | {n: saved.shapes[path] for n, path in self._whole.items()}

    @property
    def _whole(self) -> dict[str, str]:
        """Names in the file of the parameters that replace the base's, with their paths in it."""
        return {} if self._source.saved is None else {PREFIX + path: path for path in self._source.saved.sources}

    def _saved_parameter(self, path: str) -> Tensor:
        assert self._source.saved is not None
        written = self._source.saved.read(path).to(self.dtype)
        if not bool(torch.isfinite(written).all()):
            raise UsageError(f"{path} overflows {self.dtype}", hint="export with --dtype float32 or bfloat16")
        return written

    def _factors(self, name: str, certificates: list[ModuleCertificate]) -> Factors:
        """The module's factors as they go into the file; its certificate goes into the list."""
        rank, module = self.layout.ranks[name], self._table[name]
        if name not in self._ranks:  # a module that only pads the layout
            zeros = Factors(torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank))
            return zeros.to(self.dtype)
        written, certificate = self._held[name] if name in self._held else self._compose(name)
        certificates.append(certificate)
        return pad_rank(written, rank)

    def _read_back(self, path: Path) -> str:
        """The sha256 of the file, after the safetensors library has read every tensor of it in the planned shape."""
        shapes = self._shapes()
        file = open_tensor_file(path, any_shape=lambda name: len(shapes.get(name, ())) != 2)
        with file.reader() as reader:
            found = {name: tuple(reader.read(name).shape) for name in file.shapes}
        if found != shapes:
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
                "sha256": {self.layout.tensor_file: certificate.sha256, **self._hashes},
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
        words += [] if chosen.gguf is None else [" --gguf"]
        return "".join(words)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
