"""The end of a fit of few numbers: Gauss-Newton steps while they promise something, and a certificate.

One forward and two backward passes give the gradient g and the Gauss-Newton matrix G of the objective (see
`fitting.certificate`). Where the records determine G well, the step w - (G + rho I)^-1 g goes to the optimum of the
quadratic model; it is kept if the objective there is lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loracli.calibration.batches import plan_batches
from loracli.calibration.render import Example
from loracli.errors import NonFiniteLoss
from loracli.fitting.certificate import can_certify, certify, newton_step
from loracli.fitting.engine import CERTIFICATE_COST, GRADIENT_COST, Engine
from loracli.fitting.mixing import DiagonalMixing, Mixing
from loracli.fitting.settings import FitSettings
from loracli.fitting.solved import tokens_of
from loracli.recipe.record import RECORDS_PER_NUMBER, FitCertificate

FEWEST_PASSES = 6.0  # of a budget that has room for a certificate
WORTH_A_STEP = 1e-5  # nats per token


@dataclass(frozen=True)
class Finish:
    """How a fit of a mixing ends.

    Args:
        certificates: how many the budget is to leave room for.
        instead_of_refit: whether a Newton step between two certificates is the last fit on all records.
        reserved: tokens of the budget that this takes.
    """

    certificates: int
    instead_of_refit: bool
    reserved: int


NO_FINISH = Finish(0, False, 0)


def plan_finish(mixing: Mixing, training: Sequence[Example], settings: FitSettings) -> Finish:
    """One certificate; two with a step between them for `adapter`, whose few numbers any records determine; none where
    the mixing or the budget has no room for it."""
    if not can_certify(mixing) or settings.budget < FEWEST_PASSES:
        return NO_FINISH
    few = mixing.kind == "adapter" and len(training) >= RECORDS_PER_NUMBER * mixing.numbers
    certificates = 2 if few else 1
    return Finish(certificates, few, certificates * _certificate_cost(training, settings))


def _certificate_cost(training: Sequence[Example], settings: FitSettings) -> int:
    """What one certificate takes of the budget, in tokens."""
    return CERTIFICATE_COST * sum(b.tokens for b in plan_batches(training, batch_tokens=settings.batch_tokens))


def certified(
    engine: Engine,
    mixing: DiagonalMixing,
    theta: Tensor,
    anchor: Tensor,
    ridge: float,
    training: Sequence[Example],
    settings: FitSettings,
) -> tuple[Tensor, FitCertificate | None]:
    """Theta, or better, with its certificate; None where the budget has no room for one.

    Args:
        engine: the attached model.
        mixing: that `can_certify` accepts.
        theta: (P,) what the search found.
        anchor: (P,) that the ridge pulls towards.
        ridge: in nats per token.
        training: all training records.
        settings: of the fit, with the budget.
    """
    whole = settings.budget * GRADIENT_COST * tokens_of(training)
    batches = plan_batches(training, batch_tokens=settings.batch_tokens)
    cost = _certificate_cost(training, settings)
    best: FitCertificate | None = None
    trial = theta
    while engine.meter.spent + cost <= whole:
        engine.meter.stage("certificate", rung=mixing.kind, start="", stage="certificate", ridge=ridge)
        try:
            records = engine.record_gradients(mixing, trial, batches, training, seed=settings.seed)
        except NonFiniteLoss:
            break  # of a step too far, or of records that have stopped the search already
        found = certify(mixing, trial, anchor, records, ridge=ridge)
        if best is not None and found.loss >= best.loss:
            break
        theta, best = trial, found
        if not found.certain or found.decrement < WORTH_A_STEP:
            break
        trial = theta + newton_step(theta, anchor, records, ridge=ridge)
    return theta, best
