"""What a comparison has done, kept on disk while it runs, so that one that was stopped goes on after its last row.

    loracat-compare-1a2b3c4d.state/
      identity.json                   sha256 of every input and all settings: other ones are refused by name
      row-<sha256 of its key>.json    one way to compose: what each record costs, and what the table says beside it

It stands in the current folder, under a name that comes from the recipes, adapters and data as they were typed.
The unit is a row: of one that was not finished nothing is kept, and a fit inside starts over. Numbers are JSON's, in as
many digits as give the same float64 again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from loracli.comparison.candidates import Candidate
from loracli.comparison.inputs import CompareInputs
from loracli.comparison.settings import DATAMIX
from loracli.comparison.table import Evaluated
from loracli.errors import InputError, LoracatError, StateMismatch, UsageError
from loracli.evaluation.metrics import TaskMetric
from loracli.fitting.job import digest, identity_of, settings_identity
from loracli.fitting.journal import StateKind, open_state, remove_state
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.progress import SILENT, Progress
from loracli.system.document import decode, encode
from loracli.system.files import locked_directory, write_atomically
from loracli.system.strict_json import read_object

_ENTRY = "row-{}.json"
_OF_FITS = ("--fit-data", "--passes", "--cv")
_WEIGHTS, _MIXED = "--weights", f"--control {DATAMIX}"
_STATE = StateKind(
    "comparison",
    "3",
    _ENTRY.format("*"),
    "compare in another folder",
    frozenset({*_OF_FITS, _WEIGHTS, _MIXED}),  # rows that need none of them are the same without
)
_MAX_ROW_BYTES = 256 << 20
_MOST = 1e12  # nats or tokens of a record
_NATS, _TOKENS, _GUARD_NATS, _GUARD_TOKENS, _VALUES = "nats", "tokens", "guard nats", "guard tokens", "values"
_DRAWS = "draws"


def comparison_state(recipes: Sequence[str | Path], adapters: Sequence[str], data: Sequence[str]) -> Path:
    """Where the state of a comparison is kept: in the current folder, under a name of its own."""
    return Path(f"loracat-compare-{digest([[str(path) for path in recipes], list(adapters), list(data)])[:8]}.state")


@dataclass(frozen=True)
class _Row:
    """An `Evaluated` as a document; `numbers` are its tensors, one number for each record or draw."""

    key: str
    rank: int | None
    kept_energy: float | None
    weights: tuple[float, ...] | None
    note: str
    numbers: dict[str, tuple[float, ...]]


class KeptRows:
    """The rows that are done, by keys that say what each is of.

    Args:
        folder: of the state, which is open; None to keep nothing.
        resumed: whether it is of a comparison that was stopped.
    Attributes:
        fitted: whether one that had to be fitted was written.
    """

    def __init__(self, folder: Path | None = None, *, resumed: bool = False) -> None:
        self.folder, self.resumed = folder, resumed
        self.fitted = False

    def recall(self, key: str, row: Candidate, *, records: int, guard: int, answers: bool) -> Evaluated | None:
        """What was kept of a row; None if nothing was.

        Args:
            key: that it was written under.
            row: whose it is.
            records: how many it was measured on.
            guard: how many must not get worse, 0 without any.
            answers: whether there is a task metric.
        Raises:
            StateMismatch: if its file is damaged.
        """
        if self.folder is None or not (path := self._path(key)).exists():
            return None

        def damaged(reason: str) -> StateMismatch:
            return StateMismatch(
                f"{path}, which keeps the row {row.name}, is damaged: {reason}",
                hint="remove that file and go on with --resume, or start over: --force in place of --resume",
            )

        problems: list[str] = []
        found: _Row = decode(_Row, read_object(path, _MAX_ROW_BYTES, damaged), "", problems)
        if problems:
            raise damaged(problems[0])
        sizes = {_NATS: records, _TOKENS: records, **({_VALUES: records} if answers else {})}
        sizes |= {_GUARD_NATS: guard, _GUARD_TOKENS: guard} if guard else {}
        sizes |= {_DRAWS: len(row.draws)} if row.more else {}
        if found.key != key or {name: len(numbers) for name, numbers in found.numbers.items()} != sizes:
            raise damaged("it is of another row, or of other records")
        if not all(_can_be(name, number) for name, numbers in found.numbers.items() for number in numbers):
            raise damaged("no record can cost that")
        tensors = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in found.numbers.items()}
        guarded = Scores(tensors[_GUARD_NATS], tensors[_GUARD_TOKENS]) if guard else None
        return Evaluated(
            row.name,
            row.kind,
            Scores(tensors[_NATS], tensors[_TOKENS]),
            found.rank,
            found.kept_energy,
            found.weights,
            found.note,
            guarded,
            tensors.get(_VALUES),
            found.numbers.get(_DRAWS, ()),
        )

    def write(self, key: str, row: Evaluated, *, fitted: bool) -> None:
        """Keeps a row that is done; `fitted`, whether it took a fit."""
        if self.folder is None:
            return
        tensors = {_NATS: row.scores.nats, _TOKENS: row.scores.tokens}
        if row.guard is not None:
            tensors |= {_GUARD_NATS: row.guard.nats, _GUARD_TOKENS: row.guard.tokens}
        if row.values is not None:
            tensors[_VALUES] = row.values
        numbers = {name: tuple(tensor.double().tolist()) for name, tensor in tensors.items()}
        numbers |= {_DRAWS: row.draws} if row.draws else {}
        document = _Row(key, row.rank, row.kept_energy, row.weights, row.note, numbers)
        write_atomically(self._path(key), (json.dumps(encode(document), allow_nan=False) + "\n").encode())
        self.fitted |= fitted

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / _ENTRY.format(sha256(key.encode()).hexdigest())


def _can_be(name: str, number: float) -> bool:
    """Whether a record can have so many tokens, or cost so much; a task metric may give it anything."""
    if name == _VALUES:
        return math.isfinite(number)
    return abs(number) <= _MOST and (number > 0 or name not in (_TOKENS, _GUARD_TOKENS))


@contextmanager
def kept_rows(
    folder: Path,
    inputs: CompareInputs,
    placement: Placement,
    metric: TaskMetric | None,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Iterator[KeptRows]:
    """The rows of a comparison that are kept while the context lasts: gone where it ends well, and left for `resume`
    where it does not.

    Where the folder cannot be written, or another process has it, nothing is kept, and this is said. After an input
    that is rejected nothing stays either, unless a row took a fit.

    Raises:
        OutputExists: if an interrupted comparison left rows and neither `resume` nor `force` is set, or the folder is
            none of ours.
        StateMismatch: with `resume`, naming what has changed.
        LoracatError: with `resume` or `force`, if the folder cannot be written, or another process has it.
    """
    with ExitStack() as held:
        kept, resumed = KeptRows(), False
        try:
            held.enter_context(locked_directory(folder, Path("its state"), elsewhere=_STATE.elsewhere))
            identity = _identity(inputs, placement, metric)
            resumed = open_state(folder, identity, resume=resume, force=force, kind=_STATE, progress=progress)
            kept = KeptRows(folder, resumed=resumed)
        except LoracatError as error:
            if resume or force or isinstance(error, (InputError, UsageError)):
                raise
            progress.warn(f"nothing of this comparison is kept if it is stopped: {error}")
        if kept.folder is None:
            yield kept
            return
        try:
            yield kept
        except BaseException as error:
            rejected = isinstance(error, (InputError, UsageError)) and not (resumed or kept.fitted)
            if rejected or not any(folder.glob(_STATE.entries)):
                remove_state(folder, _STATE)
            elif not isinstance(error, StateMismatch):
                error.add_note(f"what was done is kept in {folder}: the same command with --resume goes on from there")
                progress.warn(error.__notes__[-1])
            raise
        remove_state(folder, _STATE)


def _identity(inputs: CompareInputs, placement: Placement, metric: TaskMetric | None) -> dict[str, str]:
    """Everything that a row depends on besides its key."""
    settings = inputs.settings
    values = {**settings.fit.recorded(), **encode(settings.options)}
    joining: dict[str, object] = {}
    if inputs.calibration is not None:
        given = zip(inputs.calibration.files, inputs.owners, strict=True)
        files = [[file.source.name, file.sha256, file.source.weight, owner] for file, owner in given]
        joining = dict(zip(_OF_FITS, (files, values["passes"], values["cv"]), strict=True))
    if inputs.weights is not None:
        joining[_WEIGHTS] = encode(dict(inputs.weights))
    if inputs.datamix is not None:
        joining[_MIXED] = dict(inputs.datamix.sha256)
    return {
        **identity_of(
            inputs.base,
            dict(zip(inputs.references, inputs.adapters, strict=True)),
            {"data file": inputs.test, "guard file": inputs.guard},
            inputs.as_fitted(placement),
        ),
        **{f"recipe {one.row}": digest([one.recipe.sha256(), one.places]) for one in inputs.recipes},
        **settings_identity({name: value for name, value in values.items() if name not in ("passes", "cv")}),
        "--device-map": str(placement.device_map),
        "task metric": digest(encode(metric)),
        **{name: digest(value) for name, value in joining.items()},
    }
