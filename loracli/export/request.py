"""What is to be exported and how, and which of it does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from loracli.adapters.claims import checked_task
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import Method, MethodOptions
from loracli.arguments import check_declared
from loracli.calibration.records import DataPaths
from loracli.composition.composition import DEFAULTS, takes
from loracli.composition.weights import Weights, check_numbers
from loracli.errors import UsageError
from loracli.export.layout import PROFILES
from loracli.hub.references import Named, whole_model_hint
from loracli.model.placement import Placement, has_float64, resolve_device
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import MIXING_KINDS
from loracli.system.near import did_you_mean

OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportRequest:
    """What is composed: a recipe, adapters with weights by hand, or by a method adapters or the ingredients of a
    recipe; and how it is written.

    A method whose own result has full rank is cut to `rank`: to the sum of the ranks if that is None, with `merge` to
    the largest ingredient rank.

    Args:
        recipe: a recipe, or the file of one; with a method its ingredients alone are used.
        adapters: with a recipe where its ingredients are now, in its order, and empty for where it says; without one
            what the weights or the method compose.
        weights: one number for each adapter, a file with a table for each, or the tables, see
            `loracli.composition.weights`; None with a recipe or a method.
        method: of `loracat compare`, None for weights, or the recipe's own mixing.
        method_options: of the method, without a rank, which is `rank` here.
        modules_to_save: without a recipe's own mixing `average`, `pick:NAME` or `refuse`; None is what the recipe says,
            and `refuse` without one.
        task_type: likewise PEFT's name of the export's task; None for the one that the adapters agree on.
        merge: compress instead of concatenating.
        rank: of the result with `merge`, or of a method that cuts its result; None is the largest ingredient rank with
            `merge` unless one of the next three is set, and what the method says otherwise.
        tolerance: with `merge`, the smallest rank with which no module has a larger |dW - dW'|_F / |dW|_F.
        energy: with `merge`, the smallest ranks that keep this share of |dW|_F^2 over all modules.
        budget: with `merge`, the ranks that keep most in a tensor file of at most so many bytes.
        activation_aware: with `merge` and a rank, not with a method: cut what calibration records show least of.
        refit: with `merge`, fit the k x k core of every cut module; not of a method that merges the factors.
        dtype: float32, float16 or bfloat16; None is the widest of the ingredients' dtypes, and float32 for trained
            factors.
        profile: `portable`, `peft` or `mlx`; None is portable where that is possible.
        gguf: write a GGUF file as well.
        fit_data: calibration JSONL, for a method that searches for weights, or, as `FILE@ADAPTER`, for one that goes by
            each adapter's own; for `activation_aware` in the place of what the fit left beside the recipe, and for
            `refit`; the base model is loaded for that.
        data: calibration JSONL for `refit`, of which a share is held out to score the result on; with `fit_data`, which
            is calibrated on then, all of it is.
        base: a Hub id or directory of the base model that a method, `fit_data`, `data` and `gguf` need; None for what
            recipe or adapters name.
        base_revision: of a base on the Hub.
        placement: where and how the base model runs that `fit_data` and `data` need; cuts and methods are computed on
            its device too, where that is not `auto`.
        scored: what is written is for `loss_of_export`, so that adapters which cannot be scored are refused before.
    """

    recipe: Recipe | str | Path | None = None
    adapters: Sequence[Named] = ()
    weights: Weights | None = None
    method: str | None = None
    method_options: MethodOptions = DEFAULTS
    modules_to_save: str | None = None
    task_type: str | None = None
    merge: bool = False
    rank: int | None = None
    tolerance: float | None = None
    energy: float | None = None
    budget: int | None = None
    activation_aware: bool = False
    refit: bool = False
    dtype: str | None = None
    profile: str | None = None
    gguf: bool = False
    fit_data: DataPaths | None = None
    data: DataPaths | None = None
    base: Named | None = None
    base_revision: str | None = None
    placement: Placement = Placement()  # noqa: RUF009  # frozen
    scored: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type."""
        check_declared(self)
        check_declared(self.method_options)

    @property
    def runs_base(self) -> bool:
        """Whether the base model is loaded."""
        return self.data is not None or self.fit_data is not None or self.refit or self.scored

    @property
    def rank_rule(self) -> dict[str, float | int]:
        """What ranks are chosen by, by the name of its option; empty where the rank is given."""
        rules = {"tolerance": self.tolerance, "energy": self.energy, "budget": self.budget}
        return {name: value for name, value in rules.items() if value is not None}


def check(request: ExportRequest) -> Method | None:
    """The method that composes, None for a recipe's own mixing.

    Raises:
        UsageError: for what contradicts each other or is out of its range, with the way out.
    """
    if request.method_options.rank is not None:
        raise UsageError(
            "the rank in MethodOptions is for a comparison, and not that of an export",
            hint=f"give it as ExportRequest(..., rank={request.method_options.rank})",
        )
    method = None if request.method is None else find_method(request.method, request.method_options)
    if request.task_type is not None and method is not None:
        checked_task(request.task_type)
    _refuse_first(_refusals(request, method))
    check_numbers(request.weights, len(request.adapters))
    device = request.placement.device
    if device != "auto" and not request.runs_base and not has_float64(resolve_device(device)):
        raise UsageError(
            f"--device {device} has no float64, which cuts and methods are computed in",
            hint="leave it out: they are then computed on the CPU",
        )
    return method


def _computes(request: ExportRequest, method: Method | None) -> bool:
    """Whether there is a cut, or a method that makes updates of updates: what a device is of use for without a base."""
    return request.merge or (method is not None and (method.merge or method.regress) is not None)


def check_form(request: ExportRequest) -> None:
    """Raises UsageError for a rank, error, energy, dtype or profile that cannot be, whatever is composed, and for
    weights of nothing."""
    _refuse_first((*_of_weights(request), *_out_of_range(request)))
    check_numbers(request.weights, len(request.adapters))


# Whether something is to be refused, what is wrong with it, and the way out.
_Refusals = tuple[tuple[bool, str, str | None], ...]
_MERGE = "merge too: --merge, in Python merge=True"


def _refuse_first(refusals: _Refusals) -> None:
    for applies, sentence, hint in refusals:
        if applies:
            raise UsageError(sentence, hint=hint)


def _out_of_range(request: ExportRequest) -> _Refusals:
    rank, tolerance, energy = request.rank, request.tolerance, request.energy
    return (
        (
            tolerance is not None and not 0 <= tolerance < 1,
            f"--tolerance {tolerance} is not at least 0 and below 1",
            None,
        ),
        (
            energy is not None and not 0 < energy <= 1,
            f"--energy {energy} is not above 0 and at most 1",
            f"of {energy:g} % give {energy / 100:g}" if energy is not None and 1 < energy <= 100 else None,
        ),
        (rank is not None and rank < 1, f"--rank {rank} is below 1", None),
        (
            request.dtype not in (None, *OUTPUT_DTYPES),
            f"--dtype {request.dtype} is not one of {', '.join(OUTPUT_DTYPES)}",
            did_you_mean(request.dtype or "", OUTPUT_DTYPES),
        ),
        (
            request.profile not in (None, *PROFILES),
            f"--profile {request.profile} is not one of {', '.join(PROFILES)}",
            did_you_mean(request.profile or "", PROFILES),
        ),
    )


def _refusals(request: ExportRequest, method: Method | None) -> _Refusals:
    hand, merge, refit = request.weights is not None, request.merge, request.refit
    recipe = method is None and not hand
    searches, cuts = method is not None and method.search is not None, method is not None and method.cuts
    regresses = method is not None and method.regress is not None
    fitted, data, based = request.fit_data is not None, request.data is not None, request.base or request.base_revision
    rank, rule = request.rank, request.rank_rule
    given = [*(() if rank is None else ("rank",)), *rule]
    base = "--base" if request.base else "--base-revision"
    computes = _computes(request, method)
    unused = replace(request.placement, device="auto") if computes else request.placement
    return (
        *_of_weights(request),
        (
            recipe and request.recipe is None,
            "nothing to export",
            "name a recipe, or adapters with weights or a method",
        ),
        (
            recipe and request.modules_to_save is not None,
            "--modules-to-save was settled when the recipe was fitted",
            "leave it out, or fit again with it",
        ),
        (
            recipe and request.task_type is not None,
            "--task-type is for --weights and --method: a recipe is of a causal language model",
            "leave it out",
        ),
        (
            method is None and request.method_options != DEFAULTS,
            "--density, --scale and --seed are for a method",
            "leave them out: weights have no options" if hand else "name it with --method",
        ),
        (
            recipe and bool(based) and not (data or fitted or refit or request.gguf),
            f"{base} has no use here: no base model is read",
            f"give it with --weights, --method, --data, --fit-data or --gguf, or leave {base} out",
        ),
        (
            unused != Placement() and not request.runs_base,
            f"--base-dtype,{'' if computes else ' --device,'} --device-map and --quantise have no use here: no base "
            "model is loaded",
            "give them with --data or --fit-data, --device with --merge too, or leave them out",
        ),
        (method is not None and request.activation_aware, "--activation-aware is for a recipe", "leave out --method"),
        (
            rank is not None and not (merge or cuts),
            "a rank is for a merge; a concatenation has the sum of the ranks",
            _MERGE,
        ),
        (len(given) > 1, f"{' and '.join(given)} cannot both decide on the rank", "give one of them"),
        (
            bool(rule) and not merge,
            f"{' '.join(given)} is for a merge; a concatenation has the sum of the ranks",
            _MERGE,
        ),
        (
            request.activation_aware and (not merge or bool(rule)),
            "--activation-aware is for --merge to a rank",
            "add --merge, and --rank K if need be",
        ),
        *_out_of_range(request),
        (
            hand and request.activation_aware and not fitted,
            "--activation-aware has no activations to go by",
            "give calibration records with --fit-data FILE",
        ),
        (
            method is None and fitted and not (request.activation_aware or refit),
            "--fit-data has no use here",
            "give it with --activation-aware or --refit",
        ),
        (refit and not merge, "a refit is for a merge; a concatenation is exact already", _MERGE),
        (refit and not (fitted or data), "--refit needs calibration records", "give them with --data FILE"),
        (data and not refit, "records to refit on have no use without --refit", "add --refit"),
        (searches and not fitted, f"{request.method} has to be fitted", "give --fit-data"),
        (
            regresses and not fitted,
            f"{request.method} goes by each adapter's own records",
            "give them with --fit-data FILE@ADAPTER, a file for each",
        ),
        (
            method is not None and fitted and not (searches or regresses or refit),
            f"{request.method} needs no calibration records",
            "leave out --fit-data",
        ),
    )


def _of_weights(request: ExportRequest) -> _Refusals:
    """Of weights by hand: what else says what is composed, and what they are of."""
    hand = request.weights is not None
    recipe = request.recipe if isinstance(request.recipe, (str, Path)) else "recipe.json"
    given = "a recipe" if not isinstance(request.recipe, (str, Path)) else f"{recipe} is taken for a recipe, which"
    folder = isinstance(request.recipe, (str, Path)) and Path(request.recipe).is_dir()
    return (
        (
            hand and folder,
            f"--weights is for --adapters, and {recipe} stands in the place of a recipe",
            whole_model_hint(recipe) or f"name adapters behind the option: --adapters {recipe}",
        ),
        (hand and request.method is not None, "--weights and --method both say how adapters are composed", "give one"),
        (
            hand and request.recipe is not None,
            f"--weights is for --adapters: {given} has its own weights",
            f"edit them in a file: loracat show --weights {recipe} > weights.toml, whose first line says how it is "
            "exported",
        ),
        (hand and not request.adapters, "--weights without adapters", "name them: --adapters ./math ./code"),
    )


def find_method(name: str, options: MethodOptions = DEFAULTS) -> Method:
    """The method of a name, which takes every option that is set.

    Raises:
        UsageError: if there is no such method, an option is out of its range, the method does not take it, or it needs
            a package that is not installed.
    """
    options.check()
    if name not in METHODS:
        fitted = (*MIXING_KINDS, "auto", "paper")
        hint = f"fit it: loracat fit --mixing {name}, then export the recipe" if name in fitted else None
        hint = "a fit is exported as its recipe: loracat export recipe.json" if name == "fit" else hint
        hint = hint or did_you_mean(name, METHODS)
        raise UsageError(f"--method {name} is not one of {', '.join(METHODS)}", hint=hint)
    method = METHODS[name]
    for option in fields(options):
        if getattr(options, option.name) != option.default and option.name not in takes(method):
            can = ", ".join(f"--{word}" for word in sorted(takes(method)))
            raise UsageError(f"{name} takes no --{option.name}", hint=f"it takes {can}" if can else None)
    method.check_installed()
    return method
