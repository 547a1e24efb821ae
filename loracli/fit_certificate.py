"""The certificate of a fit: how close the mixing weights stand to the optimum of their objective, and how well the
records determine them."""

from __future__ import annotations

from dataclasses import dataclass

RECORDS_PER_NUMBER = 4  # below, sampling makes standard errors too large by more than a half


@dataclass(frozen=True)
class FitCertificate:
    """What one forward and two backward passes over the training records say; `loracli.fitting.certificate` has the
    formulas. Everything is in nats per scored token, everything by group has one place for each adapter in order.

    Args:
        records: n, that it was computed on.
        directions: how many of the P that a weight can move in these records tell the curvature of, n at most.
        ridge: of the objective.
        loss: the objective: the mean over the scored tokens, and the ridge's term.
        gradient_norm: length of its gradient.
        decrement: what a Newton step would still gain; an upper estimate, and a wide one with fewer than 4 records for
            each effective number.
        unseen_gradient_norm: length of the part of the gradient that the decrement leaves out, where there is neither
            curvature nor ridge; 0 with a ridge.
        effective_numbers: how many of the P numbers the records determine; the rest is the ridge's.
        standard_errors: by group, of each weight; None where the records do not determine it or are too few to say, and
            where the adapter changes nothing.
        extrapolated: by group, the places of the adapters whose weight is beyond 2 in size; groups without are left
            out.
    """

    records: int
    directions: int
    ridge: float
    loss: float
    gradient_norm: float
    decrement: float
    unseen_gradient_norm: float
    effective_numbers: float
    standard_errors: dict[str, tuple[float | None, ...]]
    extrapolated: dict[str, tuple[int, ...]]

    @property
    def certain(self) -> bool:
        """Whether there are records enough to say more than an upper bound."""
        return self.records >= RECORDS_PER_NUMBER * self.effective_numbers
