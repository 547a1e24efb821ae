"""The parts of a recipe: what was mixed and with which weights, and how that was found.

Of the mixing the kinds there are, and what is numbers and what tensors; of the fit the search, and the certificate: how
close the mixing weights stand to the optimum of their objective, and how well the records determine them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from loracli.adapters.claims import OtherBase, other_bases
from loracli.adapters.names import RecipePlace, layer, target_of
from loracli.hub.references import REPO_ID, URI_PREFIX, BaseClaim, is_hub_id, is_repo_id
from loracli.system.display import count_text, repr_line
from loracli.system.document import AtMost, Matches, added, document_sha256
from loracli.system.files import TENSOR_FILES
from loracli.system.near import named

MAX_RECIPE_BYTES = 64 << 20
MAX_MODULES = 200_000  # as many as tensors in a file
MAX_ADAPTERS = 1000
_MAX_TASKS = 100_000
FINGERPRINT = 12  # digits of a record's sha256 that are kept: two of a million records agree by chance once in 500
RECORDS_PER_NUMBER = 4  # below, sampling makes standard errors too large by more than a half

_Sha256 = Annotated[str, Matches(re.compile(r"[0-9a-f]{64}"), "a sha256, 64 hexadecimal digits")]
_Commit = Annotated[str, Matches(re.compile(r"[0-9a-f]{40}"), "a commit, 40 hexadecimal digits")]
_RepoId = Annotated[str, Matches(REPO_ID, "a repository on the Hub, org/name")]
_AdapterReference = Annotated[str, Matches(re.compile(r"[^\0]{1,4096}"), "a name of 1 to 4096 characters")]
Version = Annotated[str, Matches(re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,99}"), "a version")]
Word = Annotated[str, Matches(re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]{0,99}"), "a name of letters, digits, ., _ and -")]

BaseForm = Literal["nf4", "fp4", "int8"]  # what the linear layers of a base keep their weights in
ON_LOADING: tuple[BaseForm, ...] = ("nf4", "int8")  # and what those of one in full precision can be made
MixingKind = Literal["adapter", "layer", "module", "rank", "core", "factors"]
MIXING_KINDS: tuple[MixingKind, ...] = get_args(MixingKind)
INLINE_KINDS: tuple[MixingKind, ...] = ("adapter", "layer", "module")  # their numbers stand in the recipe itself
# The other kinds are tensors: `<module>.<part>` for each module and each of these parts.
TENSOR_PARTS: dict[MixingKind, tuple[str, ...]] = {
    "rank": ("mixing",),
    "core": ("mixing",),
    "factors": ("lora_A", "lora_B"),
}
NOTHING = "nothing"  # the start of trained factors that are a new LoRA
HALVES = "half of each"  # the mean of such a one and of factors that started from the adapters'
EDITED = "weights edited after the fit"  # what everything that shows such a recipe says
_EVERY_MODULE = "*"  # the one group of the mixing `adapter`


def group_name(module: str, kind: MixingKind) -> str:
    """The group whose weights `module` takes: every module together, those of its decoder layer, or itself; the experts
    of a parameter have one weight, and so have the groups of a convolution."""
    if kind == "adapter":
        return _EVERY_MODULE
    return layer(module) if kind == "layer" else target_of(module)


def weights_digest(weights: Mapping[str, Sequence[float | None]]) -> str:
    """sha256 of weights by group, each number by its value: 1, 1.0 and 10e-1 are one, and so are 0 and -0."""
    by_value = {group: [None if w is None else float(w) + 0.0 for w in row] for group, row in weights.items()}
    return document_sha256(by_value)


@dataclass(frozen=True)
class RecipeMixing:
    """The mixing of every module.

        dW_l = B_l M_l A_l    A_l = [A_1; ...; A_N] (R, in), B_l = [s_1 B_1, ..., s_N B_N] (out, R)

    Args:
        kind: how free M_l is: `adapter`, `layer` and `module` have one weight for each adapter, blockdiag(w_i I);
            `rank` one for each singular direction of an adapter; `core` a full M_l; `factors` has trained A_l and B_l
            themselves. The last three are tensors: `loracli.recipe.tensors` makes this object of them.
        weights: by group, one for each adapter in order, null where the adapter changes nothing there. With tensors a
            summary by module: the weights of the adapters that come closest to the composition.
        numbers: how many numbers were fitted.
        tensors_sha256: of the file with the tensors, None without.
        tensors: by name, float64 M_l (R, R), or float32 lora_A (r, in) and lora_B (out, r); not part of the document.
        unreached: modules that the base called for no training record; a weight of theirs alone is the start's.
        bypassed: of those, the ones whose weight the base reads without calling the layer: their update acts neither in
            the fit nor in PEFT, but would in a weight that it is merged into.
        weights_sha256: `weights_digest` of what the fit found; None with tensors, whose file has its own sha256, and in
            recipes from before it came.
    """

    kind: MixingKind
    weights: Annotated[dict[str, tuple[float | None, ...]], AtMost(MAX_MODULES)]
    numbers: int
    tensors_sha256: _Sha256 | None = None
    tensors: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    unreached: tuple[str, ...] = added(4, ())
    bypassed: tuple[str, ...] = added(4, ())
    weights_sha256: _Sha256 | None = added(5, None)

    def __repr__(self) -> str:
        groups = count_text(len(self.weights), "group")
        return repr_line(self, self.kind, f"{count_text(self.numbers, 'number')} in {groups}")

    @cached_property
    def edited(self) -> bool:
        """Whether the weights are others than the fit found, as far as that is known: what it measured is not theirs
        then."""
        return self.weights_sha256 is not None and self.weights_sha256 != weights_digest(self.weights)


@dataclass(frozen=True)
class RecipeActivations:
    """What calibration records show of the input x of every module: G = E[z z^T], z = A x, over their tokens.

    Args:
        records: how many of the training records.
        tokens: in them.
        sha256: of the file with G, which is beside the recipe.
        moments: `<module>.moment`, G (R, R) in float32, with A (R, in) as in the mixing's tensors: the adapters' own,
            stacked, or the trained one. Not part of the document; empty until they are read.
        recipe: the file that they stand beside, None where they were never written. Not part of the document.
    """

    records: int
    tokens: int
    sha256: _Sha256
    moments: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    recipe: Path | None = field(default=None, compare=False, repr=False)


def tensors_path(recipe: Path) -> Path:
    """The file of the tensors of the recipe at this path."""
    return recipe.with_suffix(".safetensors")


def activations_path(recipe: Path) -> Path:
    """The file of the second moments of the recipe at this path."""
    return recipe.with_name(f"{recipe.name}.activations.safetensors")


def kept_path(recipe: Path) -> Path:
    """Where the recipe at this path is kept when a fit replaces it: `recipe.bak.json`, with the files beside it that
    follow from that name."""
    return recipe.with_name(f"{recipe.stem}.bak{recipe.suffix}")


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
        noise: how far rounding moves the loss of nearby weights; None in float32 and float64.
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
    noise: float | None = added(7, None)

    @property
    def certain(self) -> bool:
        """Whether there are records enough to say more than an upper bound."""
        return self.records >= RECORDS_PER_NUMBER * self.effective_numbers

    @property
    def left(self) -> float:
        """What is still to gain, in nats per token: the decrement, or the loss, which is not below 0, so that no step
        gains more."""
        return min(self.decrement, self.loss)


@dataclass(frozen=True)
class StartRecord:
    """A point that a level was searched from. Costs are those of the criterion, None where nothing was measured.

    Args:
        name: of the start: the level below, `sum`, `random`, or a point that needs no fit.
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
        stage: `probe` for the first steps from a start, `descent` after them, `refit` on all records.
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
class LevelRecord:
    """One level of the ladder of mixings.

    Args:
        kind: of the mixing.
        numbers: how many numbers it has.
        starts: that it was searched from.
        chosen: the start that won.
        ridge: of the stage that won; None if the start was never beaten, or there was no path.
        validation: cost of its solution, on records that it was not fitted to; None without such records.
        gain: over the level that was the best until then; None if it was not compared.
        standard_error: of the gain, paired over records.
        won: whether it is the level of the recipe.
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
        criterion: what chose among starts, ridges and kinds of mixing: `nats per token`, or a task metric, whose
            cost is 1 minus its mean, and 1e-4 at most for the loss.
        rungs: that were tried, in this order.
        stages: the descents of the search, in order; none of the level `adapter`, which is found by BFGS.
        folds: parts that the training records were cut into to choose among starts, ridges and kinds of mixing; 1 if
            one part was set aside, 0 if nothing was.
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
        dropped: places from 0 of the adapters whose weights are 0, as they could not be told from it.
    """

    recipe: str
    settings: dict[str, int | float | str | bool | None]
    criterion: str
    rungs: tuple[LevelRecord, ...]
    stages: tuple[StageRecord, ...]
    folds: int
    refitted: bool
    passes: float
    largest_move: float
    training_nats_per_token: float | None
    certificate: FitCertificate | None = None
    halvings: int = 0
    stopped: str | None = None
    dropped: tuple[int, ...] = added(6, ())

    @property
    def from_nothing(self) -> bool:
        """Whether it is a new LoRA, which has nothing of the adapters."""
        return self._chosen(NOTHING)

    @property
    def half_from_nothing(self) -> bool:
        """Whether it is the mean of factors that started from the adapters' and of a new LoRA."""
        return self._chosen(HALVES)

    def _chosen(self, start: str) -> bool:
        return any(rung.won and rung.chosen == start for rung in self.rungs)


@dataclass(frozen=True)
class RecipeBase:
    """The base model: `id` is the name an export carries; `commit` is None for a local directory; `quantisation` is
    what its linear layers kept their weights in while the fit ran, None for full precision."""

    id: Annotated[str, Matches(re.compile(r"[^\0]{1,255}"), "a name of 1 to 255 characters")]
    commit: _Commit | None
    config_sha256: _Sha256
    quantisation: BaseForm | None = added(7, None)

    @property
    def claim(self) -> BaseClaim | None:
        """What to fetch where the user names no base; None for a local directory, which only the user knows."""
        return None if self.commit is None else BaseClaim(self.id, self.commit)


@dataclass(frozen=True)
class RecipeAdapter:
    """One ingredient.

    Args:
        reference: as asked for, or the directory relative to the recipe's folder.
        repo_id: of a Hub adapter, None for a local directory.
        subfolder: within the repository, or None.
        commit: the pinned commit, None for a local directory.
        sha256: of each file, by name.
        rank: the largest rank of a module.
        lora_alpha: from its config.
        use_rslora: from its config.
        dtype: of its factors.
        base_model: the base model it names, or None.
        renamed: what the base calls otherwise than the adapter, by the adapter's name; None for nothing.
    """

    reference: _AdapterReference
    repo_id: _RepoId | None
    subfolder: str | None
    commit: _Commit | None
    sha256: Annotated[dict[Word, _Sha256], AtMost(10)]
    rank: int
    lora_alpha: float
    use_rslora: bool
    dtype: Word
    base_model: str | None
    renamed: dict[str, RecipePlace] | None = added(4, None)

    @property
    def pinned(self) -> str | None:
        """The reference to a Hub adapter at its commit; None of a local directory."""
        if self.repo_id is None:
            return None
        tail = f"/{self.subfolder}" if self.subfolder else ""
        return f"{URI_PREFIX}{self.repo_id}@{self.commit}{tail}"

    @property
    def weights_sha256(self) -> str:
        """Of the file that holds the factors."""
        return next(self.sha256[name] for name in TENSOR_FILES if name in self.sha256)


RecordedAdapters = Annotated[tuple[RecipeAdapter, ...], AtMost(MAX_ADAPTERS)]


def is_named(base_id: str, adapters: Sequence[RecipeAdapter]) -> bool:
    """Whether a base goes by a name that it can be loaded by, a Hub id or what an adapter names; else it is that of a
    directory."""
    named = any(adapter.base_model == base_id for adapter in adapters)
    return is_repo_id(base_id) or (named and is_hub_id(base_id))


def other_bases_of(base_id: str, adapters: Sequence[RecipeAdapter]) -> tuple[OtherBase, ...]:
    """The adapters that name another base than the one they are composed for."""
    claims = {adapter.reference: adapter.base_model for adapter in adapters}
    return other_bases(base_id, claims, directory=not is_named(base_id, adapters))


@dataclass(frozen=True)
class RecipeData:
    """One calibration file.

    Args:
        name: of the file, without its folder.
        sha256: of its bytes.
        shape: of its records, as it was read.
        weight: how many times each of its scored tokens counts.
        records: in the training part.
        scored_tokens: in them, whatever the weight.
        skipped: bad lines that were left out.
        skipped_lines: the numbers of the first of them.
        dropped: records of the file that have nothing scored within the longest length.
        cut: records of the file that were cut at the longest length, the dropped ones included.
        template_sha256: of the chat template that rendered it, None where none did.
        unread: keys of its records that were not read.
        record_sha256: the first 12 digits of the sha256 of each training record's content, end to end, so that a later
            comparison can tell a record that was fitted on.
    """

    name: str
    sha256: _Sha256
    shape: Word
    weight: float
    records: int
    scored_tokens: int
    skipped: int
    skipped_lines: tuple[int, ...]
    dropped: int
    cut: int
    template_sha256: _Sha256 | None
    record_sha256: Annotated[str, Matches(re.compile(r"[0-9a-f]*"), "hexadecimal digits")]
    unread: tuple[str, ...] = added(4, ())

    @property
    def source_name(self) -> str:
        """As it was typed, without its folder: with its weight where that is not 1."""
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    def fingerprints(self) -> set[str]:
        """What `record_sha256` holds."""
        return {self.record_sha256[i : i + FINGERPRINT] for i in range(0, len(self.record_sha256), FINGERPRINT)}


@dataclass(frozen=True)
class HeldOutRow:
    """One line of the held-out table.

    Args:
        name: `base`, an adapter's reference, `uniform`, `sum`, or `fit`.
        nats_per_token: total nats over total scored tokens.
        difference: to the best ingredient in nats per token; negative is better.
        interval: 95 % bootstrap interval of the difference over records, low and high.
        worse_records: share of the records on which it costs more than the best ingredient.
    """

    name: str
    nats_per_token: float
    difference: float
    interval: tuple[float, float]
    worse_records: float


@dataclass(frozen=True)
class HeldOutTask:
    """The held-out records of one task: `nats_per_token` by the name of the row."""

    task: str
    records: int
    scored_tokens: int
    nats_per_token: dict[str, float]


Verdict = Literal["better", "not better", "no better than a fresh LoRA", "too few records"]


@dataclass(frozen=True)
class HeldOutControl:
    """What was fitted on the same records, and knows nothing of the adapters.

    Args:
        row: its line of the table, called `fresh-lora`: a new LoRA of the composition's rank.
        difference: of the fit to it in nats per token; negative where the fit is better.
        interval: of that difference, as in the table.
    """

    row: HeldOutRow
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class HeldOut:
    """What held-out records say, read once at the end.

    Args:
        name: of the files they came from, each with its weight where it has one.
        records: how many.
        scored_tokens: in them, whatever the weights.
        best_ingredient: the adapter with the lowest loss on them.
        rows: the table.
        tasks: one for each task that the records name.
        verdict: `better`, `not better`, `no better than a fresh LoRA`, or `too few records`.
        parts: that the records were cut into, each scored by a fit of its own on the others, while the weights come
            from all of them; 0 where they were set apart.
        standard_error: of the fit's own loss over records, in nats per token; None of one record, and in recipes from
            before it came.
        controls: that the fit was held against.
    """

    name: str
    records: int
    scored_tokens: int
    best_ingredient: str
    rows: tuple[HeldOutRow, ...]
    tasks: Annotated[tuple[HeldOutTask, ...], AtMost(_MAX_TASKS)]
    verdict: Verdict
    parts: int = added(6, 0)
    standard_error: float | None = added(6, None)
    controls: Annotated[tuple[HeldOutControl, ...], AtMost(1)] = added(6, ())

    def __repr__(self) -> str:
        losses = [f"{row.nats_per_token:.4g} nats" for row in self.rows if row.name == "fit"]
        return repr_line(self, self.verdict, *losses, f"{count_text(self.records, 'record')} of {self.name}")

    @property
    def how(self) -> str:
        """How records could be fitted on and held out at once, to be said beside the table; nothing where they were set
        apart."""
        if not self.parts:
            return ""
        return f"each scored by one of {self.parts} fits that had not seen it; the weights come from all of them"

    @property
    def lines(self) -> tuple[HeldOutRow, ...]:
        """The rows with those of the controls."""
        return (*self.rows, *(control.row for control in self.controls))

    def row(self, name: str) -> HeldOutRow:
        """The row of a name, a control's too.

        Raises:
            UsageError: if there is none.
        """
        return named(name, {row.name: row for row in self.lines}, "row")
