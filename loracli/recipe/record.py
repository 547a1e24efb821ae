"""How a mixing was found, and how close it stands to the optimum: the part of a recipe that tells of the fit.

The certificate of a fit: how close the mixing weights stand to the optimum of their objective, and how well the
records determine them.

How a mixing was found: the part of a recipe that tells of the search.
"""

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


@dataclass(frozen=True)
class StartRecord:
    """A point that a rung was searched from. Costs are those of the criterion, None where nothing was measured.

    Args:
        name: of the start: the rung below, `sum`, `random`, or a point that needs no fit.
        before: at the start itself, on the validation records.
        after: after the first steps, on the validation records.
        unseen: what chose between the starts: `after`, together with the later batches of those steps, each scored
            before the step on it.
        left_out: why the search did not go on from here although nothing was measured, None if it could have.
    """

    name: str
    before: float | None
    after: float | None
    unseen: float | None
    left_out: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """Some steps of a descent; with folds, of the first one.

    Args:
        rung: kind of the mixing.
        start: name of the start that it began from.
        stage: `probe` for the first steps from a start, `descent` on the path of ridges, `refit` on all records.
        ridge: strength.
        steps: how many.
        validation: cost of what it came to, None where that was not measured.
        losses: nats per scored token of the steps' batches, each before its step; means over runs of steps where there
            are more than 48.
    """

    rung: str
    start: str
    stage: str
    ridge: float
    steps: int
    validation: float | None
    losses: tuple[float, ...]


@dataclass(frozen=True)
class RungRecord:
    """One rung of the ladder of mixings.

    Args:
        kind: of the mixing.
        numbers: how many numbers it has.
        starts: that it was searched from.
        chosen: the start that won.
        ridge: of the stage that won; None if the start was never beaten, or there was no path.
        validation: cost of its solution, on records that it was not fitted to; None without such records.
        gain: over the rung that was the best until then; None if it was not compared.
        standard_error: of the gain, paired over records.
        won: whether it is the rung of the recipe.
        why: that, in words.
    """

    kind: str
    numbers: int
    starts: tuple[StartRecord, ...]
    chosen: str
    ridge: float | None
    validation: float | None
    gain: float | None
    standard_error: float | None
    won: bool
    why: str


@dataclass(frozen=True)
class FitRecord:
    """How the weights were found.

    Args:
        recipe: `cat`, or `paper` for the published one.
        settings: everything that was set and changes the result.
        criterion: what chose among starts, ridges and rungs: `nats per token`, or a task metric, whose cost is 1 minus
            its mean, and 1e-4 at most for the loss.
        rungs: that were tried, in this order.
        stages: the descents of the search, in order; none of the rung `adapter`, which is found by BFGS.
        folds: parts that the training records were cut into to choose among starts, ridges and rungs; 1 if one part was
            set aside, 0 if nothing was.
        refitted: whether the choice was fitted once more, on all training records.
        passes: over the training records that were used, forward and backward.
        largest_move: largest change of a fitted number from the start that won; of `factors` in units of the root mean
            square of the tensor.
        training_nats_per_token: loss on the training records; None if it is not finite.
        certificate: that the weights stand at the optimum of the objective, and how sure they are; for `adapter`,
            `layer` and `module` of up to 2,000 numbers, where the budget has room for it.
        halvings: how many micro-batches were halved because memory ran out; above 0 another run may differ in the last
            bits.
        stopped: why the search ended early, None if it did not.
    """

    recipe: str
    settings: dict[str, int | float | str | bool | None]
    criterion: str
    rungs: tuple[RungRecord, ...]
    stages: tuple[StageRecord, ...]
    folds: int
    refitted: bool
    passes: float
    largest_move: float
    training_nats_per_token: float | None
    certificate: FitCertificate | None = None
    halvings: int = 0
    stopped: str | None = None
