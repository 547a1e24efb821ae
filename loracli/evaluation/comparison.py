"""What a comparison of ways to compose says: the document behind the table, `--json` and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loracli.recipe.record import HeldOutTask
from loracli.system.display import count_text, html_of, names_text, repr_line
from loracli.system.document import added, encode
from loracli.system.near import named

SIGNIFICANCE = 0.05  # of the claim that one way is the best of all
NEAR = 5  # rows that a sentence names
RowKind = Literal["base", "ingredient", "method", "fit", "control"]


def listed(names: Sequence[str]) -> str:
    """`a, b and c`, of many the first ones."""
    shown = list(names) if len(names) <= NEAR else [*names[:NEAR], f"{len(names) - NEAR} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


@dataclass(frozen=True)
class Difference:
    """A paired difference in nats per scored token, below zero where the row is better.

    Args:
        mean: sum of the differences over the sum of the tokens.
        interval: its 95 % bootstrap interval over records, low and high.
    """

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class MetricScore:
    """A row's answers by the task metric, higher is better.

    Args:
        mean: over records.
        difference: of the mean to the best ingredient's by this metric.
        interval: of the difference, 95 %.
        p_value: that the two are equally good: McNemar's exact test where every answer is right or wrong, None
            otherwise.
    """

    mean: float
    difference: float
    interval: tuple[float, float]
    p_value: float | None


@dataclass(frozen=True)
class GuardScore:
    """What a row does to the records that must not get worse.

    Args:
        nats_per_token: on them.
        difference: to the base model.
        safe: whether the whole interval lies below the margin, so that it is shown not to be worse; not below 20
            different records.
    """

    nats_per_token: float
    difference: Difference
    safe: bool


@dataclass(frozen=True)
class Draws:
    """The draws whose mean the row of the control `random` is, and how far below them the fit lies.

    Args:
        nats_per_token: of each draw.
        fit: the row of the fit on the true adapters: a recipe's, the best of several, else `module`, else `auto`; None
            without any.
        z_score: (mean - loss of `fit`) / s, with s the standard deviation of the draws (n - 1 below the sum); None
            without `fit`, or where all draws are the same.
    """

    nats_per_token: tuple[float, ...]
    fit: str | None
    z_score: float | None


@dataclass(frozen=True)
class ComparisonRow:
    """One way to compose.

    Args:
        name: `base`, an adapter's reference, the name of a method, `fit` or of several recipes a file, or a control.
        kind: which of these.
        nats_per_token: total nats over total scored tokens.
        perplexity: exp of it.
        difference: to the best ingredient; `interval` is its 95 % bootstrap interval.
        interval: of `difference`.
        against_uniform: the difference to `uniform`; None with one adapter.
        worse_records: share of the records on which it costs more than the best ingredient.
        rank: of the one adapter it would be exported as; None of the base model.
        kept_energy: share of |dW|^2 that this rank keeps, over all modules; None where nothing is lost.
        note: what a reader has to know of it, or nothing.
        weights: one for each adapter where it is the same in every module, None otherwise.
        metric: by the task metric, None without one.
        guard: on the guard records, None without any.
        draws: where it is the mean of several, None otherwise.
    """

    name: str
    kind: RowKind
    nats_per_token: float
    perplexity: float
    difference: float
    interval: tuple[float, float]
    against_uniform: Difference | None
    worse_records: float
    rank: int | None
    kept_energy: float | None
    note: str
    weights: tuple[float, ...] | None
    metric: MetricScore | None
    guard: GuardScore | None
    draws: Draws | None = added(1, None)


@dataclass(frozen=True)
class Skipped:
    """A method that cannot be compared here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class BestOf:
    """Whether one way is the best of all, with the number of comparisons taken into account.

    Args:
        name: of the row with the lowest loss.
        rivals: each other way's p-value that it is as good, by its row, one-sided and corrected by Holm for their
            number.
        clear: whether every one is below 0.05, of at least 20 different records.
        same: rows that are one way, as they cost the same on every record; the first of each stands for them in `name`
            and `rivals`.
    """

    name: str
    rivals: dict[str, float]
    clear: bool
    same: tuple[tuple[str, ...], ...] = added(1, ())

    def called(self, name: str) -> str:
        """`core (as is auto)`: a row with those that are the same way."""
        others = next((group[1:] for group in self.same if group[0] == name), ())
        return f"{name} (as {'is' if len(others) == 1 else 'are'} {listed(others)})" if others else name


@dataclass(frozen=True)
class RecipeRow:
    """A recipe whose fit is a row.

    Args:
        row: name of the row.
        sha256: of the recipe's document, as exports have it as `recipe_sha256`.
        adapters: the rows of its ingredients, in its order.
    """

    row: str
    sha256: str
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class FitFile:
    """A file of the records that rows were fitted on.

    Args:
        name: without its folder.
        sha256: of its bytes.
        weight: how many times each scored token counts.
        adapter: whose own records these are, by its place from 1; None for records of all.
    """

    name: str
    sha256: str
    weight: float
    adapter: int | None


@dataclass(frozen=True)
class ComparisonSettings:
    """What a comparison was made with.

    Args:
        methods: that were asked for, in the words of `--methods`.
        controls: likewise.
        options: every other option that changes what rows score, by its name with underscores; None where it is left to
            loracat.
        dtype: of the base model, as it ran.
        quantisation: of its linear layers, None in full precision.
        fit_data: what rows were fitted on.
        versions: of the packages that it ran with.
    """

    methods: tuple[str, ...]
    controls: tuple[str, ...]
    options: dict[str, int | float | str | bool | None]
    dtype: str
    quantisation: str | None
    fit_data: tuple[FitFile, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Ways to compose on the same records.

    Args:
        data: names of the files.
        base: of the base model.
        adapters: their references.
        records: how many.
        scored_tokens: in them.
        best_ingredient: the adapter with the lowest loss on them.
        rows: base, ingredients, methods, fits, controls.
        skipped: methods that were left out of `all`.
        tasks: one for each task that the records name.
        best: whether the best row is so beyond chance.
        detectable: nats per token: a difference of this size between the row `detectable_of` and the best ingredient
            would be found with a probability of 80 %, at a level of 5 % on two sides, with this many records. Between
            other rows it is another, for they vary otherwise over records; 0 where there is nothing to tell apart.
        metric: name of the task metric, None without one.
        guard: names of the guard files, None without any.
        margin: nats per token that `guard` allows.
        repeated_records: how many of the records stand in the calibration data, as far as that is known.
        recipes: whose fits are rows, and their ingredients; none of older documents.
        detectable_of: the fit with the lowest loss, or without one the best other row; nothing of older documents.
        settings: what it was made with; None of older documents.
    """

    data: str
    base: str
    adapters: tuple[str, ...]
    records: int
    scored_tokens: int
    best_ingredient: str
    rows: tuple[ComparisonRow, ...]
    skipped: tuple[Skipped, ...]
    tasks: tuple[HeldOutTask, ...]
    best: BestOf
    detectable: float
    metric: str | None
    guard: str | None
    margin: float
    repeated_records: int
    recipes: tuple[RecipeRow, ...] = added(1, ())
    detectable_of: str = added(1, "")
    settings: ComparisonSettings | None = added(1, None)

    def __repr__(self) -> str:
        ways, records = count_text(1 + len(self.best.rivals), "way"), count_text(self.records, "record")
        loss = next((f" with {row.nats_per_token:.4g} nats" for row in self.rows if row.name == self.best.name), "")
        best = f"{names_text([self.labelled().best.name])} is {'best' if self.best.clear else 'lowest'}{loss}"
        return repr_line(self, f"{ways} on {records}", best, "" if self.best.clear else "not clearly the best")

    def _repr_html_(self) -> str:
        return html_of(self)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document, of which a report can be made."""
        document: dict[str, Any] = encode(self)
        return document

    def row(self, name: str) -> ComparisonRow:
        """The row of a name.

        Raises:
            UsageError: if there is none.
        """
        return named(name, {row.name: row for row in self.rows}, "row")

    def renamed(self, names: Mapping[str, str]) -> Comparison:
        """With other names of rows."""
        return replace(
            self,
            adapters=tuple(names.get(name, name) for name in self.adapters),
            best_ingredient=names.get(self.best_ingredient, self.best_ingredient),
            detectable_of=names.get(self.detectable_of, self.detectable_of),
            rows=tuple(replace(row, name=names.get(row.name, row.name)) for row in self.rows),
            tasks=tuple(
                replace(task, nats_per_token={names.get(n, n): loss for n, loss in task.nats_per_token.items()})
                for task in self.tasks
            ),
            best=replace(
                self.best,
                name=names.get(self.best.name, self.best.name),
                rivals={names.get(n, n): p for n, p in self.best.rivals.items()},
                same=tuple(tuple(names.get(n, n) for n in group) for group in self.best.same),
            ),
            recipes=tuple(
                replace(one, adapters=tuple(names.get(name, name) for name in one.adapters)) for one in self.recipes
            ),
        )

    def labelled(self) -> Comparison:
        """With local adapters by as many of their last names as tell them from the other rows."""
        others = [row.name for row in self.rows if row.kind != "ingredient"]
        names: dict[str, str] = {}
        for reference in self.adapters:
            parts, rest = reference.rstrip("/").split("/"), [other for other in self.adapters if other != reference]
            if len(parts) > 2 or parts[0] in (".", ".."):
                tails = ("/".join(parts[-count:]) for count in range(1, len(parts)))
                taken = [*others, *rest]
                free = (t for t in tails if not any(f"/{o}".endswith(f"/{t}") for o in taken))
                names[reference] = next(free, reference)
        return self.renamed(names)
