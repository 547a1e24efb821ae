"""What can be folded into a base: a recipe, an adapter directory, or adapters with weights or a method; and the base
that it is meant for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.claims import agreed_task, check_language_models
from loracli.adapters.kinds import BaseModule
from loracli.adapters.names import target_of
from loracli.adapters.saved_modules import PICK, REFUSE, saved_modules, settled_policy
from loracli.algebra.methods.method import Method
from loracli.arguments import check_declared
from loracli.composition.base_table import BaseTable
from loracli.composition.composition import Composition, from_method, from_recipe, from_weights
from loracli.composition.weights import Weights, weights_of_modules
from loracli.errors import BaseModelMismatch, UsageError
from loracli.export.method import read_to_compose
from loracli.export.request import find_method
from loracli.fitting.reach import named, taken_text, warn_untried, weights_read
from loracli.fusing.plan import FusionPlan, plan_fusion
from loracli.fusing.quantised import Quantisation
from loracli.fusing.workplace import read_config
from loracli.hub.references import Named
from loracli.model.attach import check_saved
from loracli.model.base import BasePlan, plan_base
from loracli.model.checkpoint import Checkpoint
from loracli.model.modules import base_modules, check_shapes, named_as
from loracli.model.reference import BaseReference, check_config, find_base
from loracli.progress import SILENT, Progress
from loracli.recipe.ingredients import fitted_base, read_ingredients, recorded_policy
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.recipe.record import EDITED
from loracli.system.files import CONFIG_FILE


@dataclass(frozen=True)
class FuseRequest:
    """What is folded into which base, and how.

    Args:
        recipe: a recipe, its file, or an adapter's directory; None with `adapters` and `weights` or `method`.
        adapters: with a recipe where its ingredients are now; else what is composed.
        weights: by hand, as in `ExportRequest`; None for the recipe's own mixing, or a method.
        method: to compose by, None for the recipe's own mixing, or weights.
        modules_to_save: with weights or a method `average`, `pick:NAME` or `refuse`; None is what the recipe says, and
            `refuse` without one. An adapter by itself has its own.
        base: a Hub id or directory, None for the recorded one, or what the adapters name.
        base_revision: of a base on the Hub.
        dtype: of the floating point tensors of the result; None leaves each as it is in the base.
        dequantise: compute the weights of a quantised base; None for `dtype` is bfloat16 then.
    """

    recipe: str | Path | Recipe | None = None
    adapters: Sequence[Named] = ()
    weights: Weights | None = None
    method: str | None = None
    modules_to_save: str | None = None
    base: Named | None = None
    base_revision: str | None = None
    dtype: str | None = None
    dequantise: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type."""
        check_declared(self)


def compose_on_base(request: FuseRequest, *, progress: Progress = SILENT) -> tuple[BasePlan, Composition]:
    """The base that a composition is meant for, without its weights; and the composition by the base's names.

    Args:
        request: what is composed, on which base.
        progress: told of downloads.
    Raises:
        UsageError: if these do not go together, the method has to be fitted or cuts its result, or the recipe was
            fitted on a local directory and no base is given.
        UnsupportedAdapter: if adapters saved modules whole and nothing says which of them the composition has, or they
            are not for causal language models.
        IncompatibleAdapters: if they are for different tasks.
        IntegrityError: if the base at the recorded commit is not the one that was recorded.
        BaseModelMismatch: if the adapters do not fit it, or it is quantised and need not be.
    """
    base, dequantise = request.base, request.dequantise
    read, loaded, found, policy = _read_ingredients(request, progress)
    recorded = None if loaded is None else loaded.base
    if base is None and recorded is not None and recorded.claim is None:
        raise UsageError(f"the recipe was fitted on a local copy of {recorded.id}", hint="name it with --base")
    asked = base or (None if recorded is None else recorded.claim)
    reference = find_base(read, asked, revision=request.base_revision, progress=progress)
    if not dequantise and read_config(reference.path).get("quantization_config") is not None:
        raise BaseModelMismatch(
            f"the base model {reference.id} is quantised",
            hint="give the unquantised model with --base, or compute its weights with --dequantise",
        )
    plan = plan_base(reference, dequantised=dequantise)
    fitted = recorded or fitted_base(request.recipe)
    if fitted is not None:
        check_config(plan.reference, fitted, "the recipe", progress)
    read = named_as(plan.skeleton, read)
    check_shapes(plan.skeleton, read)
    saved = saved_modules(policy, read, progress=progress)
    table = BaseTable(plan.reference.id, ())
    if request.weights is not None:
        return plan, from_weights(weights_of_modules(request.weights, read), read, table, saved=saved)
    if found is None:
        assert loaded is not None
        if loaded.mixing.edited:
            progress.note(f"{EDITED}: what it measured is left out of the card")
        return plan, from_recipe(loaded, read, saved)
    return plan, from_method(found, read, table, saved=saved)


def _read_ingredients(
    request: FuseRequest, progress: Progress
) -> tuple[tuple[LoraAdapter, ...], Recipe | None, Method | None, str]:
    """The ingredients, the recipe that names them, the method in the place of its mixing, and the policy for modules
    that adapters saved whole."""
    recipe, adapters, method = request.recipe, request.adapters, request.method
    modules_to_save, weighed = request.modules_to_save, request.weights is not None
    alone = isinstance(recipe, (str, Path)) and (Path(recipe) / CONFIG_FILE).is_file()
    if modules_to_save is not None and (alone or (method is None and not weighed)):
        raise UsageError(
            "--modules-to-save goes with --weights or --method: an adapter by itself has its own modules, and a recipe "
            "those that it was fitted with",
            hint="leave it out",
        )
    if alone:
        if adapters or method:
            raise UsageError(f"{recipe} is an adapter: it goes without --adapters and --method")
        recipe, adapters, method = None, [str(recipe)], "sum"
    if method is None and not weighed:
        if recipe is None:
            raise UsageError(
                "nothing to fuse",
                hint="name a recipe, an adapter's directory, or adapters with weights or a method",
            )
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        ingredients = read_ingredients(loaded, relocated=adapters, progress=progress)
        _refuse_biases(ingredients)
        return ingredients, loaded, None, recorded_policy(loaded)
    found = None if method is None else find_method(method)
    if found is not None and (found.needs_records or found.cuts):
        data = " --fit-data FILE" if found.search else " --fit-data FILE@ADAPTER ..." if found.regress else ""
        cuts = "cuts its result, and only an export says how far"
        raise UsageError(
            f"{method} {'has to be fitted' if found.search else 'goes by records' if found.regress else cuts}",
            hint=f"loracat export --method {method}{data}, then fuse the directory that it writes",
        )
    read, given = read_to_compose(adapters, recipe, base_given=request.base is not None, progress=progress)
    _refuse_biases(read)
    agreed_task(read)
    check_language_models(
        read, "loracat fuse", way_out="merge it with PEFT: merge_and_unload of the model that it is loaded on"
    )
    policy = modules_to_save or (REFUSE if given is None else recorded_policy(given))
    if alone and read[0].saved:
        policy = f"{PICK}#1"
    policy = settled_policy(policy, read, [adapter.reference for adapter in read])
    return read, given, found, policy


def _refuse_biases(adapters: Sequence[LoraAdapter]) -> None:
    for adapter in adapters:
        if adapter.config.lora_bias:
            raise UsageError(
                f"{adapter.reference} has lora_bias, which is not an update of a weight and cannot be folded in",
                hint="serve it as an adapter: loracat export --profile peft",
            )


def bypassed_modules(reference: BaseReference, composition: Composition, progress: Progress) -> tuple[str, ...]:
    """Changed modules whose weight the base reads without calling the layer: there the update acts neither in a fit nor
    in PEFT, so that a model with it would not be the one that was measured.

    Args:
        reference: of the base.
        composition: with those that the fit of a recipe saw too.
        progress: told where one matrix is used in two ways, and if the base's forward could not be tried.
    """
    targets = {target_of(name) for name in composition.names()}
    read = weights_read(reference)
    unknown = "if it does, the fused model has updates that the fit and PEFT ignore"
    warn_untried(read, reference.id, unknown, progress)
    shared = sorted(targets & read.shared)
    if shared:
        progress.warn(
            f"{reference.id} also reads the weight of {named(shared)} besides calling the layer; the fused model has "
            "the update in both, PEFT and the fit in the layer alone"
        )
    seen = composition.base.bypassed if composition.fitted else ()  # what its own record says is tried here
    return tuple(sorted(targets & read.bypassed.union(seen)))


def _changed_modules(plan: BasePlan, composition: Composition, bypassed: Sequence[str]) -> list[BaseModule]:
    """The modules that the composition changes, as the base has them, without those that are bypassed.

    Raises:
        BaseModelMismatch: if one is no linear layer, embedding or parameter with experts, or none is left.
    """
    table = {module.name: module for module in base_modules(plan.skeleton, composition.adapters)}
    names = [name for name in dict.fromkeys(map(target_of, composition.names())) if name not in bypassed]
    if not names and composition.saved is None:
        raise BaseModelMismatch(
            f"{taken_text(plan.reference.id, bypassed)}, so PEFT ignores all of this composition, and the fused model "
            "would be the base",
            hint="take adapters of layers that the model calls",
        )
    for name in names:
        if name not in table or table[name].kind == "other":
            raise BaseModelMismatch(
                f"the update of {name} cannot be folded in: it is not a linear layer, embedding or experts",
                hint="serve it as an adapter: loracat export",
            )
    return [table[name] for name in names]


def planned_fusion(
    checkpoint: Checkpoint,
    base: BasePlan,
    composition: Composition,
    dtype: torch.dtype | None,
    quantisation: Quantisation | None,
    *,
    bypassed: Sequence[str],
) -> FusionPlan:
    """Where everything of a composition goes in the base's files.

    Args:
        checkpoint, base: the base.
        composition: what is folded in.
        dtype, quantisation: as for `plan_fusion`.
        bypassed: modules whose update is left out.
    Raises:
        BaseModelMismatch: as `plan_fusion`, `changed_modules` and `check_saved`.
    """
    if composition.saved is not None:
        check_saved(base.skeleton, composition.saved)
    modules = _changed_modules(base, composition, bypassed)
    replaced = () if composition.saved is None else composition.saved.sources
    return plan_fusion(checkpoint, base.skeleton, modules, dtype, quantisation, replaced)
