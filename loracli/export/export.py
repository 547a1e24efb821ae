"""A recipe becomes one adapter directory.

Concatenated: A holds the ingredients' own values, w s or s and M are folded into B, rank R = sum r_i, exact up to one
rounding of B; trained factors are written as they are. Merged: the best approximation of a given rank, from the
factors. Written whole or not at all, the same bytes for the same inputs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import CONFIG_FILE, TENSOR_FILE, format_tensor_name, parse_tensor_name
from loracli.adapters.tensor_file import open_tensor_file
from loracli.algebra.concatenate import pad_rank, relative_error
from loracli.algebra.factors import Factors
from loracli.algebra.truncate import truncate
from loracli.atomic import CERTIFICATE_FILE, check_free, whole_directory, write_file
from loracli.errors import IntegrityError, RecipeError, UsageError
from loracli.export.card import model_card
from loracli.export.certificate import Certificate, ModuleCertificate
from loracli.export.compose import compose_module, composed_dtype, composed_modules, composed_rank
from loracli.export.ingredients import read_ingredients
from loracli.export.profile import PROFILES, Layout, ProfileName, choose_layout
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
        merge: compress to `rank` instead of concatenating.
        rank: of the result with `merge`; None is the largest ingredient rank.
        adapters: where the ingredients are now, in the recipe's order; empty for where the recipe says.
        dtype: float32, float16 or bfloat16; None is the widest of the ingredients' dtypes, and float32 for
            trained factors.
        profile: `portable` or `peft`; None is portable where that is possible.
        force: replace an existing adapter directory.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        IntegrityError: if an ingredient is not the file that the weights were fitted for, or what was written reads
            back otherwise.
        UsageError: if options contradict each other, or the profile cannot be had.
    """
    output = Path(output)
    _check_options(merge, rank, dtype, profile)
    check_free(output, force=force)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    ingredients = read_ingredients(recipe, relocated=adapters, progress=progress)
    for ingredient in ingredients:
        if ingredient.path.resolve().is_relative_to(output.resolve()):
            raise UsageError(
                f"{output} holds the ingredient {ingredient.reference}", hint="choose another name with -o"
            )
    resolved = OUTPUT_DTYPES[dtype] if dtype else composed_dtype(recipe, ingredients)
    options = "".join(f" --{name} {value}" for name, value in (("dtype", dtype), ("profile", profile)) if value)
    plan = _Plan(recipe, ingredients, resolved, merge, rank, profile, options)  # type: ignore[arg-type]
    with whole_directory(output, force=force) as folder:
        certificate, size = plan.write(folder, progress)
    return Exported(output, plan.layout, resolved, merge, certificate, size)


def _check_options(merge: bool, rank: int | None, dtype: str | None, profile: str | None) -> None:
    if rank is not None and not merge:
        raise UsageError("--rank is for --merge; a concatenation has the sum of the ranks", hint="add --merge")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} is below 1")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(OUTPUT_DTYPES)}")
    if profile is not None and profile not in PROFILES:
        raise UsageError(f"--profile {profile} is not one of {', '.join(PROFILES)}")


class _Plan:
    """One export: what is computed for each module, and where it goes."""

    def __init__(
        self,
        recipe: Recipe,
        adapters: tuple[LoraAdapter, ...],
        dtype: torch.dtype,
        merge: bool,
        rank: int | None,
        profile: ProfileName | None,
        options: str,
    ) -> None:
        self._recipe, self._adapters, self._dtype, self._merge = recipe, adapters, dtype, merge
        self._options = options
        self._table: dict[str, BaseModule] = {module.name: module for module in recipe.modules}
        self._rank = rank or max(max(adapter.ranks) for adapter in adapters)
        ranks = {name: self._rank_of(name) for name in composed_modules(recipe, adapters)}
        missing = sorted(ranks.keys() - self._table.keys())
        if missing:
            raise RecipeError(f"the recipe's table of base modules lacks {missing[0]}, which an adapter changes")
        uniform = self._rank if merge and rank is not None else None
        self.layout = choose_layout(recipe, ranks, profile, rank=uniform)
        self._composed = ranks

    def _rank_of(self, name: str) -> int:
        total = composed_rank(self._recipe, self._adapters, name)
        if not self._merge:
            return total
        factors = next(a.modules[name].factors for a in self._adapters if name in a.modules)
        return min(self._rank, total, factors.in_features, factors.out_features)

    def write(self, folder: Path, progress: Progress) -> tuple[Certificate, int]:
        progress.begin(TASK, len(self.layout.ranks), "modules")
        certificates: list[ModuleCertificate] = []
        factors: dict[str, Factors] = {}  # of the module being written

        def tensor(name: str) -> Tensor:
            parsed = parse_tensor_name(name, where=TENSOR_FILE)
            if parsed.module not in factors:
                factors.clear()
                factors[parsed.module] = self._factors(parsed.module, certificates)
                progress.advance(TASK, 1)
            both = factors[parsed.module]
            return both.lora_A if parsed.part.endswith("A") else both.lora_B

        path = folder / TENSOR_FILE
        write_tensors(path, self._shapes(), self._dtype, tensor)
        certificate = Certificate(tuple(certificates), self._read_back(path))
        config = self.layout.config(self._recipe, self._table)
        write_file(folder / CONFIG_FILE, _json(config))
        write_file(folder / CERTIFICATE_FILE, _json(self._document(certificate)))
        card = model_card(self._recipe.public(), self.layout, certificate, merged=self._merge, command=self._command())
        write_file(folder / "README.md", card.encode())
        progress.finish(TASK)
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

    def _factors(self, name: str, certificates: list[ModuleCertificate]) -> Factors:
        """The module's factors as they go into the file; its certificate goes into the list."""
        rank, module = self.layout.ranks[name], self._table[name]
        if name not in self._composed:  # a module that only pads the layout
            zeros = Factors(torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank))
            return zeros.to(self._dtype)
        exact = compose_module(self._recipe.mixing, self._adapters, name)
        chosen, kept = exact, 1.0
        if self._merge:
            truncation = truncate(exact, self._rank)
            chosen, kept = truncation.factors, truncation.kept_energy
        written = chosen.to(self._dtype)
        if not (torch.isfinite(written.lora_A).all() and torch.isfinite(written.lora_B).all()):
            raise UsageError(f"{name} overflows {self._dtype}", hint="export with --dtype float32 or bfloat16")
        certificates.append(ModuleCertificate(name, chosen.rank, relative_error(written, exact), kept))
        return pad_rank(written, rank)

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
            "recipe": json.loads(self._recipe.public().to_json()),
            "recipe_sha256": sha256(self._recipe.to_json().encode()).hexdigest(),
            "export": {
                "profile": self.layout.profile,
                "merged": self._merge,
                "rank": self.layout.rank,
                "dtype": str(self._dtype).removeprefix("torch."),
            },
            "certificate": {
                "sha256": {TENSOR_FILE: certificate.sha256},
                "largest_relative_error": certificate.largest_error,
                "modules": [dataclasses.asdict(module) for module in certificate.modules],
            },
        }

    def _command(self) -> str:
        return "loracat export" + (f" --merge --rank {self._rank}" if self._merge else "") + self._options


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
