"""The certificate of a fit, from the gradients of its records: is this the optimum, and how sure are the weights?
And the Gauss-Newton steps that end a fit of few numbers, while they promise something.

With T scored tokens, each as many times as it counts, t_n of them in record n, and w_0 the weights that the ridge
rho pulls towards:

    L(w) = 1/T sum_n nats_n(w) + rho/2 |w - w_0|^2
    g    = 1/T sum_n g_n + rho (w - w_0)               g_n, h_n: below
    G    = 1/T sum_n h_n h_n^T                         estimates the Gauss-Newton matrix of the first term
    H    = G + rho I

    decrement              1/2 g^T H^-1 g              what a Newton step would gain (Boyd and Vandenberghe 2004, 9.5.1)
    effective numbers      tr(H^-1 G)                  (Bishop 2006, 3.91)
    standard errors        sqrt diag(H^-1 S H^-1)      S = sum_n s_n s_n^T, s_n = (g_n + rho t_n (w - w_0)) / T

S is the sandwich of White 1982 with the record as the unit: tokens of a record may depend on each other, and its length
is drawn with it. The s_n are the parts of g, so at the optimum they sum to 0. Standard errors tell how w would vary
with other records of the same kind, w_0 and rho being given.

G comes from samples, of which each record gives one. Its inverse is too large, by about n / (n - p - 1) for p effective
numbers: the decrement is then an upper estimate, and so are the standard errors, by a half at 4 records for each
effective number and without bound below, so there none is given. The n records span n directions at most: with n < P
and rho = 0, H has no inverse. The pseudo-inverse takes its place, the decrement tells of what the seen directions can
gain, and the length of the gradient in the others stands beside it.

Where the records determine G well, the step w - H^-1 g goes to the optimum of the quadratic model; it is kept if the
objective there is lower.

In bfloat16 and float16 the loss of nearby weights is rough, and no difference below that says anything. How rough comes
from the fourth differences of m records' nats f_n along a random line, which leave nothing of a smooth function whose
step is short (Moré and Wild 2011, Estimating computational noise, SIAM J. Sci. Comput. 33, with k = 4 and one
difference for each record):

    D_n  = f_n(w - 2d) - 4 f_n(w - d) + 6 f_n(w) - 4 f_n(w + d) + f_n(w + 2d)      variance 70 times that of f_n
    noise of L = sqrt(1/70 sum_m D_n^2 / (T_m T))                   T_m the scored tokens of these records

if the errors of different records are uncorrelated.

g_n and h_n are the gradients of every record by itself, for the true labels and for sampled ones. Of its nats, whose
scored positions t count v times each:

    g_n = sum_t v d/dtheta -log p(y_t)                y_t the label
    h_n = sum_t sqrt(v) d/dtheta -log p(s_t)          s_t sampled from p, the model's distribution at position t

Under the model, scores d/dtheta log p(s_t) have mean 0 and those of different positions are uncorrelated. So
E[sum_n h_n h_n^T] = sum_n v sum_t F_t with F_t the Fisher information of position t, which for the cross-entropy of a
softmax is the Gauss-Newton matrix (Martens, arXiv 1412.1193). With the labels in the place of samples it would not be
(Kunstner et al., arXiv 1905.12558).

Each record is given mixing weights of its own, all at the same theta: one backward pass then leaves the gradients of
all records of a batch side by side. Forward and twice backward costs 3 units a token, where a step of a fit costs 2; a
sharded model costs 4, for there each backward pass needs a forward of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.engine import Engine
from loracli.fitting.mixing import DiagonalMixing, Mixing
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Objective, gradient_of
from loracli.recipe.record import INLINE_KINDS, RECORDS_PER_NUMBER, FitCertificate


@dataclass(frozen=True)
class RecordGradients:
    """Of n records at one theta (P,), all float64.

    Args:
        nats: (n,) sums over the scored tokens, each as many times as it counts.
        tokens: (n,) how many those are, counted likewise.
        gradients: (n, P) g_n, of those nats.
        sampled: (n, P) h_n, of the nats of sampled labels.
    """

    nats: Tensor
    tokens: Tensor
    gradients: Tensor
    sampled: Tensor

    def rows(self) -> Tensor:
        """(n, 2 + 2P): one row for each record."""
        return torch.cat([self.nats[:, None], self.tokens[:, None], self.gradients, self.sampled], dim=1)


def _from_rows(rows: Tensor) -> RecordGradients:
    """The inverse of `RecordGradients.rows`."""
    gradients, sampled = rows[:, 2:].chunk(2, dim=1)
    return RecordGradients(rows[:, 0], rows[:, 1], gradients, sampled)


def _record_gradients(
    objective: Objective, mixing: DiagonalMixing, theta: Tensor, batch: Batch, examples: Sequence[Example], *, seed: int
) -> RecordGradients:
    """The gradients of each of the b records of a batch; the attached model is left at theta.

    What is drawn for a record is decided by the seed and its tokens: not by its place, nor by the batch.

    Args:
        objective: of the attached model.
        mixing: without softmax.
        theta: (P,).
        batch: of some of the examples.
        examples: that the batch was made from.
        seed: of the sampled labels.
    Raises:
        ValueError: if the weights of the mixing are a softmax.
    """
    if mixing.softmax:
        raise ValueError("theta is not the weights themselves where they are a softmax")
    weights = mixing.weights(theta)[mixing.index].repeat(len(batch.indices), 1).requires_grad_(True)  # (b, sum R)
    draws = torch.cat([_draws(examples[index], seed) for index in batch.indices])  # (s,)
    v = torch.ones(len(draws), dtype=torch.float64) if batch.weights is None else batch.weights  # (s,)

    def forward() -> tuple[Tensor, Tensor]:
        objective.set_weights_of_records(batch, weights)
        return objective.nats_and_sampled_nats(batch, draws)

    nats, sampled_nats = forward()
    # A sharded model gives its weights up after a backward pass, and the graph is of no use then.
    sharded = _is_sharded(objective.attached.model)
    first = gradient_of((nats * v.to(nats)).sum(), weights, retain_graph=not sharded)
    if sharded:
        _, sampled_nats = forward()
    second = gradient_of((sampled_nats * v.to(nats).sqrt()).sum(), weights)
    with torch.no_grad():
        mixing.apply(objective.attached, theta)
    none = torch.zeros(len(batch.indices), dtype=torch.float64)
    return RecordGradients(
        nats=none.index_add(0, batch.owners, nats.detach().cpu().double() * v),
        tokens=none.index_add(0, batch.owners, v),
        gradients=_by_number(first, mixing),
        sampled=_by_number(second, mixing),
    )


def _by_number(gradient: Tensor, mixing: DiagonalMixing) -> Tensor:
    """(b, P): the sums over the rank rows that take the same number, from (b, sum R)."""
    sums = torch.zeros(len(gradient), mixing.numbers, dtype=torch.float64).index_add(1, mixing.index, gradient)
    return sums if mixing.kept is None else torch.where(mixing.kept, sums, 0.0)


def _draws(example: Example, seed: int) -> Tensor:
    """(scored tokens,) uniform on the multiples of 2^-24 in [0, 1), which float32 holds, from SHAKE-256 of the seed and
    what the record is."""
    source = hashlib.shake_256(f"{seed}:{example.input_ids}:{example.scored}".encode())
    stream = source.digest(3 * example.scored_tokens)
    numbers = [int.from_bytes(stream[i : i + 3]) for i in range(0, len(stream), 3)]
    return torch.tensor(numbers, dtype=torch.float32) / (1 << 24)


_CERTIFICATE_COST = 3  # of a token: forward, and twice backward
_MOST_NUMBERS = 2000  # G is P x P, and a row for each record is 2 P
_EXTRAPOLATED = 2.0  # an adapter was trained to act at 1
_NO_CURVATURE = 1e-10  # of the largest eigenvalue of G: what rounding leaves of float32 gradients of equal directions
_UNDETERMINED = 1e-6  # share of a weight that lies in directions without curvature


def can_certify(mixing: Mixing) -> bool:
    """Whether there is a certificate for this mixing: adapter, layer or module, free weights, at most 2,000."""
    return (
        isinstance(mixing, DiagonalMixing)
        and mixing.kind in INLINE_KINDS
        and not mixing.softmax
        and mixing.numbers <= _MOST_NUMBERS
    )


@dataclass(frozen=True)
class _Model:
    """The quadratic model of the objective at a point, in the eigenvectors of G.

    Args:
        vectors: (P, P), of G.
        seen: (P,) which of them have curvature.
        curvature: (P,) eigenvalues of G, 0 where there is none.
        inverse: (P,) eigenvalues of H^-1, or of its pseudo-inverse.
        rotated: (P,) the gradient.
    """

    vectors: Tensor
    seen: Tensor
    curvature: Tensor
    inverse: Tensor
    rotated: Tensor


def _model(theta: Tensor, start: Tensor, records: RecordGradients, ridge: float) -> _Model:
    total = records.tokens.sum()
    gradient = records.gradients.sum(dim=0) / total + ridge * (theta - start)
    eigenvalues, vectors = torch.linalg.eigh(records.sampled.T @ records.sampled / total)
    seen = eigenvalues > _NO_CURVATURE * eigenvalues[-1]
    curvature = eigenvalues * seen  # (P,), of G
    inverse = torch.where(seen | (ridge > 0), 1 / (curvature + ridge), 0.0)
    return _Model(vectors, seen, curvature, inverse, vectors.T @ gradient)


def _newton_step(theta: Tensor, start: Tensor, records: RecordGradients, *, ridge: float) -> Tensor:
    """-H^-1 g (P,), from theta to the optimum of the quadratic model; arguments as for `_certify`."""
    model = _model(theta, start, records, ridge)
    return -(model.vectors @ (model.inverse * model.rotated))


def _certify(
    mixing: DiagonalMixing, theta: Tensor, start: Tensor, records: RecordGradients, *, ridge: float
) -> FitCertificate:
    """The certificate of theta (P,).

    A weight has a standard error where the records determine it: with a ridge, where they hold it more than the ridge
    does, [H^-1 G]_ii > 1/2; without, where it lies within the directions that have curvature. None has one with fewer
    than 4 records for each effective number.

    Args:
        mixing: that `can_certify` accepts.
        theta: (P,) the weights.
        start: (P,) w_0.
        records: all of the fit, at theta; finite.
        ridge: rho, in nats per token.
    """
    model = _model(theta, start, records, ridge)
    total, move = records.tokens.sum(), theta - start
    vectors, curvature, inverse = model.vectors, model.curvature, model.inverse
    parts = (records.gradients + ridge * records.tokens[:, None] * move) / total  # (n, P) s_n
    errors = ((parts @ vectors * inverse) @ vectors.T).square().sum(dim=0).sqrt()
    held = vectors.square() @ (curvature * inverse)  # (P,) diagonal of H^-1 G
    enough = len(records.nats) >= RECORDS_PER_NUMBER * held.sum()
    determined = enough & (held > (0.5 if ridge > 0 else 1 - _UNDETERMINED))
    return FitCertificate(
        records=len(records.nats),
        directions=int(model.seen.sum()),
        ridge=ridge,
        loss=float(records.nats.sum() / total + ridge / 2 * move.square().sum()),
        gradient_norm=float(model.rotated.norm()),
        decrement=float((model.rotated.square() * inverse).sum() / 2),
        unseen_gradient_norm=float((model.rotated * (inverse == 0)).norm()),
        effective_numbers=float(held.sum()),
        standard_errors=_without_nan(mixing.by_group(errors.where(determined, torch.nan))),
        extrapolated=_extrapolated(mixing.by_group(mixing.weights(theta))),
    )


def _without_nan(by_group: dict[str, tuple[float | None, ...]]) -> dict[str, tuple[float | None, ...]]:
    return {
        group: tuple(None if error is None or math.isnan(error) else error for error in errors)
        for group, errors in by_group.items()
    }


def _extrapolated(weights: dict[str, tuple[float | None, ...]]) -> dict[str, tuple[int, ...]]:
    places = {
        group: tuple(i for i, weight in enumerate(row) if weight is not None and abs(weight) > _EXTRAPOLATED)
        for group, row in weights.items()
    }
    return {group: found for group, found in places.items() if found}


_NOISY_RECORDS = 8  # whose nats tell how rough the loss is, within a factor of two where one of them is much rougher
_SHORT_STEP = 2.0**-6  # length: what is smooth is gone, and a step of 64 times as much finds the same roughness
_FOURTH = (1.0, -4.0, 6.0, -4.0, 1.0)  # their squares add up to 70

_FEWEST_PASSES = 5.5  # of a budget that has room for a certificate
_WORTH_A_STEP = 1e-5  # nats per token
_MANY_RECORDS = 16  # for each number: one label a token tells G so well that a step does more than as many passes


def certificate_tokens(mixing: Mixing, training: Sequence[Example], settings: FitSettings, passes: float) -> int:
    """The tokens of the budget that the end of a fit takes: of one certificate; of two with a Newton step between them
    where there are many records for each number, and for `adapter`, whose few numbers any records determine; none where
    the mixing or the budget has no room for it."""
    if not can_certify(mixing) or passes < _FEWEST_PASSES:
        return 0
    enough = RECORDS_PER_NUMBER if mixing.kind == "adapter" else _MANY_RECORDS
    stepped = len(training) >= enough * mixing.numbers
    return (2 if stepped else 1) * _certificate_cost(training, settings)


def _certificate_cost(training: Sequence[Example], settings: FitSettings) -> int:
    """What one certificate takes of the budget, in tokens."""
    return _CERTIFICATE_COST * sum(b.tokens for b in plan_batches(training, batch_tokens=settings.batch_tokens))


def certified(
    engine: Engine,
    mixing: DiagonalMixing,
    theta: Tensor,
    anchor: Tensor,
    ridge: float,
    training: Sequence[Example],
    settings: FitSettings,
    left: float,
) -> tuple[Tensor, FitCertificate | None]:
    """Theta, or better, with its certificate; None where the budget has no room for one.

    Args:
        engine: the attached model.
        mixing: that `can_certify` accepts.
        theta: (P,) what the search found.
        anchor: (P,) that the ridge pulls towards.
        ridge: in nats per token.
        training: all training records.
        settings: of the fit.
        left: tokens of the budget.
    """
    most = engine.meter.spent + left
    batches = plan_batches(training, batch_tokens=settings.batch_tokens)
    cost = _certificate_cost(training, settings)
    best: FitCertificate | None = None
    noise: float | None = None
    trial, number = theta, 0
    while engine.meter.spent + cost <= most:
        engine.meter.stage(
            "checking how sure the weights are", rung=mixing.kind, start="", stage="certificate", ridge=ridge
        )
        try:
            number += 1
            key = f"{mixing.kind}, certificate {number}"
            records = _gradients(engine, mixing, trial, batches, training, settings.seed, key)
            if best is None and engine.objective.attached.model.dtype.itemsize < torch.float32.itemsize:
                noise = _noise(engine, mixing, trial, training, settings)
        except NonFiniteLoss:
            break  # of a step too far, or of records that have stopped the search already
        found = replace(_certify(mixing, trial, anchor, records, ridge=ridge), noise=noise)
        if best is not None and found.loss >= best.loss:
            break
        theta, best = trial, found
        if not found.certain or found.decrement < max(_WORTH_A_STEP, noise or 0.0):
            break
        trial = theta + _newton_step(theta, anchor, records, ridge=ridge)
    return theta, best


def _gradients(
    engine: Engine,
    mixing: DiagonalMixing,
    theta: Tensor,
    batches: Sequence[Batch],
    training: Sequence[Example],
    seed: int,
    key: str,
) -> RecordGradients:
    """Of all training records at theta.

    Raises:
        NonFiniteLoss: naming the records of a batch.
    """

    def work(batch: Batch) -> Tensor:
        return _record_gradients(engine.objective, mixing, theta, batch, training, seed=seed).rows()

    return _from_rows(engine.of_records(batches, training, work, 2 + 2 * len(theta), cost=_CERTIFICATE_COST, key=key))


def _noise(
    engine: Engine, mixing: DiagonalMixing, theta: Tensor, training: Sequence[Example], settings: FitSettings
) -> float:
    """How rough the loss is at theta, in nats per token: the formula above, from some of the records, evenly chosen.
    Not counted in the budget.

    Raises:
        NonFiniteLoss: naming the records of a batch.
    """
    apart = max(len(training) // _NOISY_RECORDS, 1)
    some = training[::apart][:_NOISY_RECORDS]
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(settings.seed), dtype=torch.float64)
    step = _SHORT_STEP * direction / direction.norm()

    def work(batch: Batch) -> Tensor:
        nats = []
        for steps in range(-2, 3):
            mixing.apply(engine.objective.attached, theta + steps * step)
            nats.append(engine.objective.record_sums(batch)[0])
        return torch.stack(nats, dim=1)  # (b, 5)

    batches = plan_batches(some, batch_tokens=settings.batch_tokens)
    with torch.no_grad():
        nats = engine.of_records(batches, some, work, 5, cost=0, key=f"{mixing.kind}, noise")
    differences = nats @ torch.tensor(_FOURTH, dtype=torch.float64)  # (m,)
    of_some, of_all = (
        sum(example.weight * example.scored_tokens for example in records) for records in (some, training)
    )
    return math.sqrt(float(differences.square().sum()) / 70 / (of_some * of_all))


def _is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are shared out over several processes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)
