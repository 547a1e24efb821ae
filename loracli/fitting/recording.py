"""From what a search found to the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter
from loracli.algebra.basis import canonical_stack, mixing_in_file_basis
from loracli.fitting.inputs import FitInputs
from loracli.fitting.level import Solution
from loracli.fitting.mixing import DiagonalMixing, FactorMixing
from loracli.fitting.reach import Reach
from loracli.model.base import BaseModel
from loracli.model.modules import base_modules
from loracli.recipe.ingredients import identity_of
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import (
    FitCertificate,
    FitRecord,
    HeldOut,
    RecipeActivations,
    RecipeBase,
    RecipeData,
    RecipeMixing,
    weights_digest,
)
from loracli.recipe.tensors import tensor_mixing
from loracli.system.document import dtype_name


def make_recipe(
    inputs: FitInputs,
    base: BaseModel,
    data: tuple[RecipeData, ...],
    found: Solution,
    table: HeldOut,
    training_loss: float | None,
    certificate: FitCertificate | None,
    activations: RecipeActivations | None,
    *,
    passes: float,
    reach: Reach,
    halvings: int,
    folds: int,
) -> Recipe:
    """The recipe of a fit.

    Args:
        inputs: of the fit.
        base: the loaded base model.
        data: the calibration files, with their counts.
        found: by the search.
        table: on the held-out records.
        training_loss: nats per token on all training records, None if not finite.
        certificate: of the weights, None if there is none.
        activations: what the records show of them, None if that is not kept.
        passes: that were used.
        reach: which modules the records did not reach.
        halvings: of micro-batches.
        folds: that were chosen with, 0 for none.
    """
    record = FitRecord(
        recipe="paper" if inputs.settings.paper else "cat",
        settings=inputs.settings.recorded(),
        criterion="nats per token" if inputs.settings.metric is None else inputs.settings.metric.name,
        rungs=found.rungs,
        stages=found.stages,
        folds=folds,
        refitted=found.refitted,
        passes=round(passes, 2),
        largest_move=_largest_move(found),
        training_nats_per_token=training_loss,
        certificate=certificate,
        halvings=halvings,
        stopped=found.stopped,
    )
    return Recipe(
        base=RecipeBase(base.reference.id, base.reference.commit, base.config_sha256),
        adapters=tuple(
            identity_of(adapter, reference)
            for adapter, reference in zip(inputs.adapters, inputs.references, strict=True)
        ),
        data=data,
        fit=record,
        mixing=replace(
            recipe_mixing(inputs.adapters, inputs.layout.modules, found),
            unreached=reach.unreached,
            bypassed=reach.bypassed,
        ),
        modules=base_modules(base.model, inputs.adapters),
        dtype=dtype_name(base.dtype),
        held_out=table,
        versions={"loracat": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        activations=activations,
        folder=inputs.folder,
    )


def _largest_move(found: Solution) -> float:
    mixing = found.mixing
    if isinstance(mixing, DiagonalMixing):
        return float((mixing.weights(found.theta) - mixing.weights(found.anchor)).abs().max())
    return float((found.theta - found.anchor).abs().max())


def recipe_mixing(adapters: Sequence[LoraAdapter], modules: Sequence[str], found: Solution) -> RecipeMixing:
    """The mixing as the files' factors take it: what was fitted in the canonical basis is brought back from there."""
    mixing = found.mixing
    if isinstance(mixing, DiagonalMixing) and mixing.kind != "rank":
        weights = mixing.by_group(mixing.weights(found.theta))
        return RecipeMixing(mixing.kind, weights, mixing.numbers, weights_sha256=weights_digest(weights))
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(mixing, FactorMixing):
        for module, (lora_A, lora_B) in zip(modules, mixing.factors(found.theta), strict=True):
            tensors |= {f"{module}.lora_A": lora_A, f"{module}.lora_B": lora_B}
    else:
        for module, matrix in zip(modules, mixing.matrices(found.theta), strict=True):
            updates = [adapter.modules[module].factors for adapter in adapters if module in adapter.modules]
            tensors[f"{module}.mixing"] = mixing_in_file_basis(canonical_stack(updates), matrix)
    return tensor_mixing(mixing.kind, tensors, adapters, numbers=mixing.numbers)
