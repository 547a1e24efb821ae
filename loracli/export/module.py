"""One module of an export: composed, cut if asked for, rounded once, and certified."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracli.algebra.factors import Factors, Grams, relative_error
from loracli.algebra.rounding import error_by_grams, rounded_concatenation, rounding_error
from loracli.algebra.truncate import Truncation, truncate, truncate_for
from loracli.composition.card import ModuleCertificate
from loracli.composition.composition import Composition
from loracli.errors import UsageError


@dataclass(frozen=True)
class ModuleExport:
    """A module as it is written, before padding.

    Args:
        factors: in the output's dtype, scaling 1.
        certificate: how exact they are.
    """

    factors: Factors
    certificate: ModuleCertificate


def module_export(
    composition: Composition,
    name: str,
    dtype: torch.dtype,
    *,
    rank: int | None = None,
    moment: Tensor | None = None,
    refit: Tensor | None = None,
) -> ModuleExport:
    """The factors of a module and their certificate.

    Args:
        composition: the composition.
        name: of the module.
        dtype: of the output.
        rank: to cut to; None to write all there is.
        moment: G = E[z z^T] to cut by, z = A x with the composition's A; None to cut by |dW|_F.
        refit: M (k, k) between the factors of the cut, None for the cut itself.
    Raises:
        UsageError: if a value overflows `dtype`.
    """
    known = composition.known_rank(name)
    weighted = composition.weighted(name)
    if weighted is not None and rank is not None:
        # dW has no more rank than the shorter side of the module, however large the one asked for
        rank = min(rank, weighted[0][0].in_features, weighted[0][0].out_features)
    whole = rank is None or (known is not None and rank >= known)
    if rank is not None and refit is not None:
        written, error, kept = _refitted(composition, name, dtype, rank, moment, refit)
    elif weighted is not None and whole and all(update.bias is None for update in weighted[0]):
        written, error = rounded_concatenation(*weighted, dtype)
        kept = 1.0
    else:
        written, error, kept = _composed(composition, name, dtype, rank, moment)
    # An entry that is infinite or NaN makes the error so: where it is finite, no second look is needed.
    if not (math.isfinite(error) or written.is_finite()):
        raise UsageError(f"{name} overflows {dtype}", hint="export with --dtype float32 or bfloat16")
    return ModuleExport(written, ModuleCertificate(name, written.rank, error, kept))


def cut_module(composition: Composition, name: str, rank: int, moment: Tensor | None) -> Truncation:
    """The update of a module cut to at most `rank`, sqrt(S) on both sides, in float64: what a refit starts from.

    Args:
        composition, name, rank, moment: as in `module_export`.
    """
    found = _cut(composition.compose(name).factors.on(composition.device), rank, moment)
    return replace(found, factors=found.factors.on("cpu"))


def _cut(exact: Factors, rank: int, moment: Tensor | None, grams: Grams | None = None) -> Truncation:
    return truncate(exact, rank, grams) if moment is None else truncate_for(exact, rank, moment.to(exact.device))


def _refitted(
    composition: Composition, name: str, dtype: torch.dtype, rank: int, moment: Tensor | None, refit: Tensor
) -> tuple[Factors, float, float]:
    """Factors, relative error, kept energy of B' M A'; the energy is what the cut kept, the error that of the whole."""
    exact = composition.compose(name).factors.on(composition.device)
    cut = _cut(exact, rank, moment)
    refit = refit.to(exact.device)
    written = refitted_factors(cut.factors, refit).to(dtype)
    return written.on("cpu"), relative_error(written, exact), cut.kept_energy


def refitted_factors(cut: Factors, refit: Tensor) -> Factors:
    """B' M A' as it is written: A' as it is, M in B alone."""
    return Factors(cut.lora_A, cut.lora_B @ refit)


def _composed(
    composition: Composition, name: str, dtype: torch.dtype, rank: int | None, moment: Tensor | None
) -> tuple[Factors, float, float]:
    """Factors, relative error, kept energy of a module that is cut, or whose composition is no weighted sum."""
    composed = composition.compose(name)
    exact, share = composed.factors, composed.kept_energy
    del composed
    if rank is None or min(rank, exact.in_features, exact.out_features) >= exact.rank:
        written, kept = exact.to(dtype), share
        error = rounding_error(written, exact) if exact.bias is None else relative_error(written, exact)
    else:
        exact = exact.on(composition.device)
        grams = Grams.of(exact)
        truncation = _cut(exact, rank, moment, grams)
        written, kept = truncation.factors.to(dtype), share * truncation.kept_energy
        error = error_by_grams(written, exact, grams) if exact.bias is None else relative_error(written, exact)
        written = written.on("cpu")
    # What the method itself cut off is at right angles to what it kept.
    return written, math.sqrt(1 - share + share * error**2), kept
