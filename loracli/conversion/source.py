"""What a conversion exports: the update of each module, from the adapter's tensors and the base's weight of it, and
the rank it gets: a given one, or the smallest whose relative error is within a tolerance.

    |dW - dW_k|_F / |dW|_F = sqrt(1 - kept_energy)

DoRA: the direction of W + dV is trained as a LoRA, the length of each of its rows as a number.

    W' = D (W + dV),  D = diag(m / |W + dV|_row),  dV = s B A          dW = W' - W = (D - I) W + D dV

Liu et al., arXiv 2402.09353, equation 5; PEFT 0.21 (tuners/lora/dora.py) takes the norm over the input dimension, one
row for each output, and so does this. D dV has the rank of dV, and (D - I) W that of W: the whole has full rank, and a
LoRA can only come close to it.

We differ from PEFT in the arithmetic alone: float64, where PEFT takes the norm in the dtype of the activations.

What an initialisation took from the base's weight is computed again from that weight.

    W_res = W - s B_0 A_0        the model of the training is W_res + s B A, so dW = s B A - s B_0 A_0

PiSSA (Meng et al., arXiv 2404.02948, equations 2 to 4): s B_0 A_0 is the best approximation of rank r of W (out, in).
OLoRA (Bueyuekakyuez, arXiv 2406.01775, algorithm 1): with the QR of W, s B_0 A_0 = s Q_r R_r, which is s times the
projection of W on the span of its first r columns.

Both products are one matrix whatever signs or bases a library picks for the factors, so they can be computed in another
way than PEFT 0.21 (tuners/lora/layer.py: pissa_init, olora_init) computes them in float32: here from the leading
singular vectors alone and from the QR of r columns, in float64. How far two float32 computations may be apart is the
`uncertainty`. PiSSA's randomised form (`pissa_niter_*`), CorDA and LoRA-GA depend on random numbers or on data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loracli._version import __version__
from loracli.adapters.adapter import LoraModule
from loracli.adapters.claims import agreed_licence, agreed_task, stated_licences
from loracli.adapters.kinds import KINDS, ModuleKind
from loracli.algebra.factors import Factors, concatenate, inner_product, norm
from loracli.algebra.methods.method import Merged
from loracli.algebra.truncate import Truncation, best_approximation, leading_left, truncate
from loracli.composition.base_table import BaseTable
from loracli.composition.card import CardText, Repeat, adapter_table, adapter_words, base_words, other_base_lines
from loracli.composition.composition import Composition, published_identities
from loracli.conversion.read import BaseWeights, Convertible
from loracli.errors import BaseModelMismatch, UnsupportedAdapter, UsageError
from loracli.recipe.record import RecipeAdapter, is_named
from loracli.system.document import encode
from loracli.system.escaping import markdown_code


def _dora_update(weight: Tensor, direction: Factors, magnitude: Tensor) -> Tensor:
    """dW (out, in) in float64, dense.

    Args:
        weight: W (out, in); of an embedding, out is the width and in the vocabulary.
        direction: dV.
        magnitude: m (out,).
    Raises:
        ValueError: if a row of W + dV is zero, so that it has no direction.
    """
    # In place: a head of 128,000 words is gigabytes in float64, and one of these is enough.
    result = weight.to(torch.float64, copy=True)
    result.addmm_(direction.lora_B.double(), direction.lora_A.double(), alpha=direction.scaling)
    lengths = torch.linalg.vector_norm(result, dim=1)
    if not lengths.all():
        raise ValueError("a row of the weight is zero, and has no direction")
    result *= (magnitude.double() / lengths)[:, None]
    return result.sub_(weight)


_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Initial:
    """s B_0 A_0.

    Args:
        factors: lora_A (r, in), lora_B (out, r), float64, with the scaling.
        uncertainty: about how far, in the Frobenius norm, PEFT's float32 result may be from it.
    """

    factors: Factors
    uncertainty: float


def _initial_update(kind: str, weight: Tensor, rank: int, scaling: float) -> _Initial | None:
    """What the initialisation `kind` took from W (out, in); None if that cannot be computed again.

    Raises:
        ValueError: if W has no such rank.
    """
    if rank > min(weight.shape):
        raise ValueError(f"the weight is {tuple(weight.shape)} and has no rank {rank}")
    if kind == "pissa":
        return _pissa(weight.double(), rank)
    if kind == "olora":
        return _olora(weight.double(), rank, scaling)
    return None


def _pissa(weight: Tensor, rank: int) -> _Initial:
    wide = weight.shape[0] <= weight.shape[1]
    smaller = weight if wide else weight.T
    values, vectors = leading_left(smaller, min(rank + 1, smaller.shape[0]))
    leading = vectors[:, :rank]
    factors = Factors(leading.T @ weight, leading) if wide else Factors(leading.T, weight @ leading)
    error = _EPS * float(values[0]) * math.sqrt(rank)
    if rank == smaller.shape[0]:
        return _Initial(factors, error)
    # Wedin: an error E of W turns the leading space by |E| / gap, and moves W_r by that times the values at the edge.
    last, after = float(values[rank - 1]), float(values[rank])
    return _Initial(factors, error * (1 + (last + after) / (last - after)) if last > after else float("inf"))


def _olora(weight: Tensor, rank: int, scaling: float) -> _Initial:
    q, r = torch.linalg.qr(weight[:, :rank])
    singular = torch.linalg.svdvals(r)
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")
    factors = Factors(q.T @ weight, q, scaling)
    return _Initial(factors, _EPS * condition * float(torch.linalg.matrix_norm(weight)) * abs(scaling))


@dataclass(frozen=True)
class Cut:
    """What is asked of every module. Neither a rank nor a tolerance asks for all that there is.

    Args:
        rank: at most this, whatever the error.
        tolerance: the largest relative error, whatever the rank, unless `most` is set.
        most: the largest rank that may be spent on the tolerance.
    """

    rank: int | None = None
    tolerance: float | None = None
    most: int | None = None


def _cut_factors(factors: Factors, cut: Cut) -> Truncation:
    """Of an update that is known by its factors; without rank and tolerance nothing is lost.

    Not a concatenation: where factors cancel, as s B A - s B_0 A_0 does, each would be rounded on the scale of what
    cancels. With sqrt(S) on both sides the rounding is on the scale of what is left.
    """
    whole = truncate(factors, cut.rank or factors.rank)
    return whole if cut.rank else _smallest(whole, cut)


def _cut_matrix(matrix: Tensor, cut: Cut, start: int) -> Truncation:
    """Of a dense dW (out, in) in float64.

    Args:
        matrix: dW.
        cut: has a rank or a tolerance.
        start: the rank to try first with a tolerance.
    Returns:
        With a tolerance that `most` does not allow, the approximation of rank `most`: its energy tells.
    """
    if cut.rank is not None:
        return best_approximation(matrix, cut.rank)
    assert cut.tolerance is not None
    limit = min(*matrix.shape, cut.most or max(matrix.shape))
    rank = min(start, limit)
    while True:
        found = best_approximation(matrix, rank)
        if _error(found) <= cut.tolerance or rank == limit:
            return _smallest(found, cut)
        rank = min(2 * rank, limit)


def _smallest(found: Truncation, cut: Cut) -> Truncation:
    """The same, without the directions that the tolerance does not need."""
    if cut.tolerance is None or found.kept_energy <= 0.0:
        return found
    energy = found.factors.lora_A.square().sum(dim=1).square()  # S^2, as sqrt(S) stands on both sides
    total = float(energy.sum()) / found.kept_energy
    if total == 0.0:
        return found
    kept = (energy.cumsum(0) / total).clamp(max=1.0)
    errors = (1.0 - kept).clamp(min=0.0).sqrt()
    enough = int((errors > cut.tolerance).sum()) + 1
    if enough >= found.factors.rank:
        return found
    factors = Factors(found.factors.lora_A[:enough], found.factors.lora_B[:, :enough])
    return Truncation(factors, float(kept[enough - 1]))


def _error(found: Truncation) -> float:
    return math.sqrt(1.0 - found.kept_energy)


_MOST_UNCERTAIN = 0.05  # of |dW|, that an initialisation computed again may be off
_TRIED_FIRST = 2  # times the adapter's rank


class Tally:
    """What is found out about the modules, one after the other.

    Attributes:
        sizes: |dW|_F by module.
        lost: |dW - dW_k|_F by module, before the rounding to the output's dtype.
        uncertainty: the largest, as a share of a module's |dW|_F.
        alike: <s B A, s B_0 A_0>, |s B A|^2, |s B_0 A_0|^2 by module, where something was taken from the base.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}
        self.lost: dict[str, float] = {}
        self.uncertainty = 0.0
        self.alike: dict[str, tuple[float, float, float]] = {}

    def cosine(self) -> float:
        """<s B A, s B_0 A_0> / (|s B A|_F |s B_0 A_0|_F) over all modules; 1 where one of the two is 0."""
        both, trained, began = (math.fsum(column) for column in zip(*self.alike.values(), strict=True))
        return both / math.sqrt(trained * began) if trained * began > 0 else 1.0

    def error(self) -> float:
        """|dW - dW_k|_F / |dW|_F over all modules."""
        size = math.hypot(*self.sizes.values())
        return math.hypot(*self.lost.values()) / size if size else 0.0


@dataclass(frozen=True)
class Conversion:
    """An adapter that is converted, and what it takes.

    Args:
        read: the adapter, its magnitudes, and what it was before its training.
        base: what is known of the base model.
        base_commit: of the base's repository, None for a directory or where the base is not read.
        weights: the base's, None where they are not needed.
        cut: what rank or error was asked for.
        asked: whether it was the user who asked.
        tally: is filled as the modules are converted.
    """

    read: Convertible
    base: BaseTable
    base_commit: str | None
    weights: BaseWeights | None
    cut: Cut
    asked: bool
    tally: Tally = field(default_factory=Tally)

    def update(self, module: str) -> Merged:
        """dW of a module at the rank that was asked for.

        Raises:
            UnsupportedAdapter: if what the initialisation took cannot be told from the base.
            BaseModelMismatch: if the base's weight does not go with the adapter.
            UsageError: if nothing was asked for and no reasonable rank comes close.
        """
        own = self.read.adapter.modules[module]
        initial = self._initial(own)
        trained = own.factors
        change = trained if initial is None else concatenate([trained, initial.factors], [1.0, -1.0])
        if initial is not None:
            began = initial.factors
            self.tally.alike[module] = inner_product(trained, began), norm(trained) ** 2, norm(began) ** 2
        if module in self.read.adapter.base_copies:
            self._check_copy(module, initial)
        if self.read.magnitudes:
            try:
                matrix = _dora_update(self._weight(own), change, self.read.magnitudes[module])
            except ValueError as error:
                raise BaseModelMismatch(f"{module} cannot be converted: {error}") from None
            size = float(matrix.norm())
            found = _cut_matrix(matrix, self.cut, _TRIED_FIRST * trained.rank)
        else:
            size = norm(change)
            found = _cut_factors(change, self.cut)
        self._check(module, found, size, initial)
        return Merged(found.factors, found.kept_energy)

    def _initial(self, module: LoraModule) -> _Initial | None:
        """s B_0 A_0, None where nothing was taken from the base; no initialisation touches an embedding."""
        if self.read.initial is not None:
            return _Initial(self.read.initial.modules[module.name].factors, 0.0)
        kind = self.read.adapter.config.initialisation
        if kind is None or module.kind == "embedding":
            return None
        factors = module.factors
        try:
            found = _initial_update(kind, self._weight(module), factors.rank, factors.scaling)
        except ValueError as error:
            raise BaseModelMismatch(f"{module.name} cannot be converted: {error}") from None
        assert found is not None, "checked before the work began"
        return found

    def _weight(self, module: LoraModule) -> Tensor:
        """W (out, in), as the factors have it: an embedding's and a Conv1D's are stored the other way round."""
        assert self.weights is not None
        weight = self.weights.read(f"{module.name}.weight")
        turned = KINDS[self._kinds()[module.name]].transposed
        oriented = weight.T if turned else weight
        expected = (module.factors.out_features, module.factors.in_features)
        if tuple(oriented.shape) != expected:
            raise BaseModelMismatch(
                f"the base's {module.name} is (out, in) = {tuple(oriented.shape)} in its files, not {expected}"
            )
        return oriented

    def _kinds(self) -> Mapping[str, ModuleKind]:
        return {module.name: module.kind for module in self.base.modules}

    def _check_copy(self, module: str, initial: _Initial | None) -> None:
        """The base's matrix that PEFT wrote into the adapter is W, or W_res = W - s B_0 A_0 up to its rounding."""
        own = self.read.adapter.modules[module]
        weight = self._weight(own).double()
        copy = self.read.adapter.read_base_copy(module)
        turned = KINDS[self._kinds()[module]].transposed
        found = (copy.T if turned else copy).double()
        allowed = 0.0
        if initial is not None:
            weight = weight - initial.factors.delta_weight()
            allowed = 4 * torch.finfo(copy.dtype).eps * float(weight.norm()) + initial.uncertainty
        if found.shape != weight.shape or float((found - weight).norm()) > allowed:
            raise BaseModelMismatch(
                f"{self.read.adapter.reference} carries its own matrix for {module}, which does not follow from the "
                "base's",
                hint="check --base and --initial; a matrix that was trained itself is more than an adapter can carry",
            )

    def _check(self, module: str, found: Truncation, size: float, initial: _Initial | None) -> None:
        tally, uncertainty = self.tally, 0.0 if initial is None else initial.uncertainty
        if uncertainty > _MOST_UNCERTAIN * size:
            raise UnsupportedAdapter(
                f"{module}: what the initialisation took from the base's weight cannot be told to "
                f"{_MOST_UNCERTAIN:.0%} of what the training changed",
                where=self.read.adapter.reference,
                hint="give the adapter as it was before its training with --initial",
            )
        error, tolerance = _error(found), self.cut.tolerance
        if not self.asked and tolerance is not None and error > tolerance:
            raise UsageError(
                f"{module}: the best LoRA of rank {found.factors.rank} has a relative error of {error:.1%}, more than "
                f"{tolerance:.0%}",
                hint="accept the error with --rank K, or allow another one with --tolerance E",
            )
        tally.sizes[module] = size
        tally.lost[module] = error * size
        tally.uncertainty = max(tally.uncertainty, uncertainty / size if size else 0.0)

    def origin_of_initial(self) -> str | None:
        """Where the adapter before its training comes from, None where nothing was taken from the base."""
        if self.read.initial is not None:
            return "given"
        return None if self.read.adapter.config.initialisation is None else "computed"


def from_conversion(conversion: Conversion) -> Composition:
    """What an adapter changes in its base's weights, as a composition; what it says of its error is what the modules
    that were converted so far have shown."""
    identities = published_identities(conversion.read.trained)
    return Composition(
        adapters=conversion.read.trained,
        base=conversion.base,
        dtype=conversion.read.adapter.dtype,
        document_of=lambda _: _document(conversion, identities),
        card_of=lambda _: _card(conversion, identities),
        update_of=lambda _, module: conversion.update(module),
        task_type=agreed_task([conversion.read.adapter]),
    )


def _document(conversion: Conversion, identities: Sequence[RecipeAdapter]) -> dict[str, Any]:
    config = conversion.read.adapter.config
    return {
        "conversion": {
            "use_dora": config.use_dora,
            "initialisation": config.initialisation,
            "initial": conversion.origin_of_initial(),
            "initial_uncertainty": conversion.tally.uncertainty,
            "rank": conversion.cut.rank,
            "tolerance": conversion.cut.tolerance,
            "relative_error": conversion.tally.error(),
        },
        "base": {"id": conversion.base.id, "commit": conversion.base_commit},
        "adapters": [encode(identity) for identity in identities],
        "versions": {"loracat": __version__, "torch": torch.__version__},
    }


def _card(conversion: Conversion, identities: Sequence[RecipeAdapter]) -> CardText:
    config = conversion.read.adapter.config
    named = ["DoRA"] if config.use_dora else []
    named += [markdown_code(config.initialisation)] if config.initialisation else []
    kind = ", ".join(named) or "an adapter on a changed base"
    how = [
        f"Its update of every module is what the adapter below ({kind}) changes in the base's weights, as",
        f"a plain LoRA: the relative error over all modules is {conversion.tally.error():.1e}, before rounding.",
    ]
    if conversion.read.initial is not None:
        how.append("What the initialisation took from the base comes from the adapter before its training.")
    elif config.initialisation is not None:
        how.append("What the initialisation took from the base was computed again from the base's weights.")
    licences = stated_licences(conversion.read.trained)
    rows = [(identity, None, licence) for identity, licence in zip(identities, licences, strict=True)]
    words = [adapter_words(identities[:1]), *base_words(conversion.base.id, identities)]
    words += [] if conversion.read.initial is None else [f"--initial {adapter_words(identities[1:])}"]
    tolerance = "" if conversion.cut.tolerance is None else f" --tolerance {conversion.cut.tolerance:g}"
    return CardText(
        base_id=conversion.base.id,
        adapters=len(identities),
        how=tuple(how),
        ingredients=(*adapter_table(rows), "", *other_base_lines(conversion.base.id, identities)),
        results=(),
        repeat=Repeat(f"loracat convert{tolerance}", " ".join(words)),
        version=__version__,
        licence=agreed_licence(licences),
        made=f"converted from {kind}",
        base_named=is_named(conversion.base.id, identities),
    )
