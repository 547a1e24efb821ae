"""One module of an export: composed, cut if asked for, rounded once, and certified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loracli.algebra.concatenate import relative_error
from loracli.algebra.factors import Factors, core
from loracli.algebra.rounding import error_in_core, rounded_concatenation, rounding_error
from loracli.algebra.truncate import truncate, truncate_core, truncate_for
from loracli.errors import UsageError
from loracli.export.certificate import ModuleCertificate
from loracli.export.source import Source


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
    source: Source, name: str, dtype: torch.dtype, *, rank: int | None = None, moment: Tensor | None = None
) -> ModuleExport:
    """The factors of a module and their certificate.

    Args:
        source: the composition.
        name: of the module.
        dtype: of the output.
        rank: to cut to; None to write all there is.
        moment: G = E[z z^T] to cut by, z = A x with the composition's A; None to cut by |dW|_F.
    Raises:
        UsageError: if a value overflows `dtype`.
    """
    known = source.known_rank(name)
    weighted = source.weighted(name)
    if weighted is not None and rank is not None:
        # dW has no more rank than the shorter side of the module, however large the one asked for
        rank = min(rank, weighted[0][0].in_features, weighted[0][0].out_features)
    whole = rank is None or (known is not None and rank >= known)
    if weighted is not None and whole and all(update.bias is None for update in weighted[0]):
        written, error = rounded_concatenation(*weighted, dtype)
        kept = 1.0
    else:
        written, error, kept = _composed(source, name, dtype, rank, moment)
    if not written.is_finite():
        raise UsageError(f"{name} overflows {dtype}", hint="export with --dtype float32 or bfloat16")
    return ModuleExport(written, ModuleCertificate(name, written.rank, error, kept))


def _composed(
    source: Source, name: str, dtype: torch.dtype, rank: int | None, moment: Tensor | None
) -> tuple[Factors, float, float]:
    """Factors, relative error, kept energy of a module that is cut, or whose composition is no weighted sum."""
    composed = source.compose(name)
    exact, share = composed.factors, composed.kept_energy
    del composed
    if rank is None or min(rank, exact.in_features, exact.out_features) >= exact.rank:
        written, kept = exact.to(dtype), share
        error = rounding_error(written, exact) if exact.bias is None else relative_error(written, exact)
    elif exact.bias is not None:
        truncation = truncate(exact, rank) if moment is None else truncate_for(exact, rank, moment)
        written, kept = truncation.factors.to(dtype), share * truncation.kept_energy
        error = relative_error(written, exact)
    else:
        parts = core(exact)
        cut = None if moment is None else truncate_for(exact, rank, moment)
        del exact  # as large as what comes next
        truncation = cut or truncate_core(parts, rank)
        written, kept = truncation.factors.to(dtype), share * truncation.kept_energy
        error = error_in_core(written, parts)
    # What the method itself cut off is at right angles to what it kept.
    return written, math.sqrt(1 - share + share * error**2), kept
