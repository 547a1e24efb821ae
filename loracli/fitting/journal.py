"""Where a fit is: what it has spent, the line and the log that tell of it, and its state on disk, so that
nothing is lost when it is stopped at any moment.

A fit is a deterministic program. Its long steps write what they found into a folder, one safetensors file each; a
resumed fit runs the same program from its beginning, and every step that finds its file takes the result from there.
So there is no second path through the search for resumed runs, and the same bytes come out.

    <output>.state/
      identity.json       sha256 of every input and all settings: the state of another fit is refused by name
      <sha256 of its key>.safetensors   tensors of one operation; its key, numbers, and how far the fit was, in the
                                        metadata

A key says what the operation is of: `module from adapter, descent, ridge 0.001, fold 2`. Files are replaced by rename.
A step that is long in itself (a descent, a sum over all batches) writes where it is at most every `seconds` seconds,
and when it is done.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loracli.errors import LoracatError, OutputExists, StateMismatch
from loracli.progress import SILENT, WORK, Progress
from loracli.system.files import ANOTHER_NAME, remove_temporaries, translate_disk_errors, write_atomically
from loracli.system.strict_json import StrictJsonError, parse_json, read_object

_IDENTITY_FILE = "identity.json"
_FORM_NAME = "form of the state"
_MAX_IDENTITY_BYTES = 64 << 20
_SECONDS = 15.0  # between two writes of a step that goes on
_KEPT_BYTES = 1 << 30  # in memory; what does not fit is done again


@dataclass(frozen=True)
class StateKind:
    """Work whose state a folder keeps, as refusals call it.

    Args:
        work: its name.
        form: of keys and entries: raised whenever either changes, so that no state is read as what it is not.
        entries: the pattern of the files that keep what was done.
        elsewhere: the way out where the place of the state is taken.
        joining: names of the identity that either side may lack: of inputs that only some of the entries depend on.
    """

    work: str
    form: str
    entries: str
    elsewhere: str
    joining: frozenset[str] = frozenset()


FIT = StateKind("fit", "4", "*.safetensors", ANOTHER_NAME)

_Value = float | int | str | bool | list[float] | None


@dataclass(frozen=True)
class Entry:
    """What one step leaves: tensors, and values of JSON's kinds (floats come back to the bit)."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, _Value] = field(default_factory=dict)


class Journal:
    """Remembers entries by key; without a folder only what is wanted again, in memory.

    Args:
        folder: of the state, None for nowhere.
        seconds: between two writes of a step that goes on.
    """

    def __init__(self, folder: Path | None = None, *, seconds: float = _SECONDS) -> None:
        self._folder = folder
        self._seconds = seconds
        self._kept: dict[str, Entry] = {}
        self._room = _KEPT_BYTES
        self._opened = time.monotonic()
        self._written: dict[str, float] = {}
        self._recalled: set[str] = set()

    def recall(self, key: str) -> Entry | None:
        """What the step left, None if there is nothing that can be read. Each key is asked for once."""
        if self._folder is None:
            return None
        assert key not in self._recalled, f"two steps are called {key}"
        self._recalled.add(key)
        return self.again(key)

    def again(self, key: str) -> Entry | None:
        """What was written under a key, as often as it is asked for; None if there is nothing that can be read."""
        if self._folder is None:
            return self._kept.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
                return Entry(tensors, json.loads(metadata["values"])) if metadata["key"] == key else None
        except (SafetensorError, OSError, KeyError, ValueError):
            return None  # damaged: the step is done again

    def write(self, key: str, entry: Entry, *, again: bool = False) -> None:
        """Replaces what the step left; `again` if it will be asked for once more in the same fit."""
        if self._folder is None:
            size = sum(tensor.nbytes for tensor in entry.tensors.values())
            if again and size <= self._room:
                self._kept[key], self._room = entry, self._room - size
            return
        tensors = {name: tensor.contiguous() for name, tensor in entry.tensors.items()}
        write_atomically(self._path(key), save(tensors, {"key": key, "values": json.dumps(dict(entry.values))}))
        self._written[key] = time.monotonic()

    def due(self, key: str) -> bool:
        """Whether a step that goes on should write under this key."""
        last = self._written.get(key, self._opened)
        return self._folder is not None and time.monotonic() - last >= self._seconds

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def state_folder(output: Path) -> Path:
    """Where the state of a fit that writes `output` is kept: `recipe.json.state` beside it."""
    return output.with_name(output.name + ".state")


def open_state(
    folder: Path,
    identity: Mapping[str, str],
    *,
    resume: bool,
    force: bool = False,
    kind: StateKind = FIT,
    progress: Progress = SILENT,
) -> bool:
    """Makes the folder, which is there and locked, ready for work of this kind and identity; whether it holds the state
    of an interrupted one.

    Where interrupted work has done something, only `resume` and `force` go on: the one takes it up, the other drops
    it, and says so. With both it is taken up.

    Raises:
        OutputExists: if the folder is there and is no state of ours, or holds what interrupted work has done and
            neither `resume` nor `force` is set.
        StateMismatch: with `resume`, naming every input that is not the one the state was written for, or the form of
            the state where another version wrote it.
    """
    identity = {_FORM_NAME: kind.form, **identity}
    path = folder / _IDENTITY_FILE
    there = path.is_file()
    known = _known(path) if there else {}
    other = _difference(known, identity, kind) if there else None
    if resume and there:
        if other is not None:
            raise StateMismatch(
                f"the state in {folder} {other.what}",
                hint=f"{other.way_back}, or start over: --force in place of --resume",
            )
        if not known.keys() >= identity.keys():
            _write_identity(path, {**known, **identity})
        progress.note(f"going on from {folder}")
        return True
    if resume:
        progress.warn(f"there is no interrupted {kind.work} in {folder}: starting over")
    elif there and any(folder.glob(kind.entries)):
        if not force:
            raise _in_the_way(folder, other, kind)
        progress.warn(f"the interrupted {kind.work} in {folder} is dropped: --resume would have gone on with it")
    remove_temporaries(folder)
    if not there and any(folder.iterdir()):
        raise OutputExists(f"{folder} is in the way of the {kind.work}'s state", hint=f"move it, or {kind.elsewhere}")
    remove_state(folder, kind)
    _write_identity(path, identity)
    return False


def _known(path: Path) -> dict[str, Any]:
    """What the identity of a state says; nothing where it is damaged."""
    try:
        return read_object(path, _MAX_IDENTITY_BYTES)
    except LoracatError:
        return {}


def _write_identity(path: Path, identity: Mapping[str, str]) -> None:
    write_atomically(path, (json.dumps(identity, indent=2) + "\n").encode())


@dataclass(frozen=True)
class _Difference:
    """Why a state cannot be gone on with: `what` it does, after its name, and the way back to where it can."""

    what: str
    way_back: str


def _difference(known: Mapping[str, Any], identity: Mapping[str, str], kind: StateKind) -> _Difference | None:
    """What tells the work that wrote the first identity from the one that would go on; None if they are one."""
    if not known:
        return _Difference(f"is damaged: its {_IDENTITY_FILE} cannot be read", f"restore {_IDENTITY_FILE}")
    if known.get(_FORM_NAME) != kind.form:
        return _Difference(
            f"has the form {known.get(_FORM_NAME, '1')}, of another version of loracat, and this one goes on from the "
            f"form {kind.form}",
            f"go on with the version that began the {kind.work}",
        )
    names = (known.keys() | identity.keys()) - {
        name for name in kind.joining if name not in known or name not in identity
    }
    changed = sorted(name for name in names if known.get(name) != identity.get(name))
    if not changed:
        return None
    return _Difference(f"belongs to another {kind.work}; changed: {', '.join(changed)}", "restore what has changed")


def _in_the_way(folder: Path, other: _Difference | None, kind: StateKind) -> OutputExists:
    """The refusal of work that would drop what an interrupted one has done, with the ways out that there are."""
    if other is None:
        return OutputExists(
            f"a {kind.work} of the same inputs was interrupted, and {folder} keeps what it has done",
            hint="go on with it: --resume; or start over: --force",
        )
    return OutputExists(
        f"{folder} keeps what an interrupted {kind.work} has done, and --resume would refuse it: the state "
        f"{other.what}",
        hint=f"{other.way_back} and go on with --resume, or start over with --force, or {kind.elsewhere}",
    )


def remove_state(folder: Path, kind: StateKind = FIT) -> None:
    """Removes the state of work that is over from its folder; files that are not ours stay."""
    if not (folder / _IDENTITY_FILE).is_file():
        return
    remove_temporaries(folder)
    for path in (*folder.glob(kind.entries), folder / _IDENTITY_FILE):
        path.unlink(missing_ok=True)


TASK = "fit"
_MAX_LINE = 1 << 16  # bytes of a log's line


class Meter:
    """Counts what was spent: a token forward is 1, forward and backward 2.

    The progress is told of the effort, in which a micro-batch has some tokens more: what it costs whatever its size.

    Args:
        progress: told of every micro-batch.
        log: takes one JSON object for each step, None for none.
        task: of the progress.
        overhead: tokens that a micro-batch has more.
    """

    def __init__(self, progress: Progress, log: StepLog | None = None, *, task: str = TASK, overhead: int = 0) -> None:
        self.spent = 0
        self.overhead = overhead
        self.validation: float | None = None  # nats per token, the last measured
        self.within = ""  # which of several fits this is, said in the log and the status
        self._progress = progress
        self._task = task
        self._log = log
        self._stages: tuple[str, ...] = ()
        self._left: Callable[[str, int], int] = lambda _, __: 0
        self._place, self._effort, self._total = 0, 0.0, 0
        self._scale = 1.0  # of the effort: less where more work turned up, so that the bar does not go back
        self._repeated: Callable[[str, int], int] | None = None  # what is left of a fit that was all done so far
        self._stage_of_fit, self._before_stage, self._before_fit = "", 0, 0
        self._stage, self._fields = "", dict[str, str | float | None]()
        self._started = time.monotonic()
        self._tokens = 0

    @contextmanager
    def counted(self, stages: tuple[str, ...], left: Callable[[str, int], int], *, overhead: int = 0) -> Iterator[None]:
        """A task of these stages, whose status says at which one it is.

        Args:
            stages: their names in order; some may be left out.
            left: the effort that is left, at most, when a stage begins: its name, and what was spent by then.
            overhead: tokens that a micro-batch has more.
        """
        self.overhead = overhead
        self._stages, self._left, self._total = stages, left, left(stages[0], self.spent)
        self._progress.begin(self._task, self._total, WORK)
        try:
            yield
        finally:
            self._progress.finish(self._task)

    def enter(self, stage: str) -> None:
        """A stage begins; what those before it have left undone is not to be done any more. Where no stages are
        counted, nothing happens; one of several fits is a stage itself."""
        if not self._stages:
            return
        if self.within:
            self._stage_of_fit, self._before_stage = stage, self.spent
            return
        self._place = self._stages.index(stage) + 1
        self._expect(self._effort + self._scale * self._left(stage, self.spent))

    def _expect(self, total: float) -> None:
        if _whole(total) != self._total:
            self._total = _whole(total)
            self._progress.expect(self._task, self._total)

    @contextmanager
    def within_fit(self, name: str, left: Callable[[str, int], int] | None) -> Iterator[None]:
        """One of several fits, of which another may have done everything: the effort that is `left` of it when one of
        its stages begins (its name, and what the fit spent by then) counts once there is something that none has done:
        it shares the rest of the bar with what was to come.
        """
        self.within, self._repeated, self._before_fit = name, left, self.spent
        try:
            yield
        finally:
            self.within, self._repeated = "", None

    def not_done_yet(self) -> None:
        """The work that comes has been done by no other fit."""
        if self._repeated is not None and self._stages and self._stage_of_fit:
            left = self._repeated(self._stage_of_fit, self._before_stage - self._before_fit)
            room = self._total - self._effort
            self._repeated, self._scale = None, self._scale * room / max(room + self._scale * left, 1.0)

    def stage(self, text: str, **fields: str | float | None) -> None:
        """Names what the following batches are for; `fields` go into the log of each step."""
        words = f"{self.within}, {text}" if self.within else text
        self._stage, self._fields = f"{self._place}/{len(self._stages)} {words}" if self._stages else words, fields
        self._started, self._tokens = time.monotonic(), 0
        self._progress.advance(self._task, 0, self._stage)

    def count(self, tokens: int, *, cost: int, nats: float | None = None) -> None:
        """Some tokens are done, each at this cost, and at `nats` per scored token if that is known."""
        self.spent += cost * tokens
        self._tokens += tokens
        parts = [self._stage]
        if nats is not None:
            parts.append(f"loss {nats:.3f}")
        if self.validation is not None:
            parts.append(f"validation {self.validation:.3f}")
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._advance(cost * (tokens + self.overhead), ", ".join([*parts, f"{rate:.0f} tok/s"]))

    def _advance(self, effort: int, status: str = "") -> None:
        before, self._effort = self._effort, self._effort + self._scale * effort
        self._progress.advance(self._task, _whole(self._effort) - _whole(before), status)

    def restore(self, spent: int, logged: int) -> None:
        """Goes to where an interrupted fit was: what it had spent, and how many lines its log had."""
        self._advance(spent - self.spent)
        self.spent = spent
        if self._log is not None:
            self._log.lines = logged

    def step(self, **fields: float) -> None:
        """Writes one line of the log."""
        if self._log is not None:
            part = {"within": self.within} if self.within else {}
            self._log.write(
                {**part, **self._fields, **fields, "validation": self.validation, "spent_tokens": self.spent}
            )

    @property
    def logged(self) -> int:
        """Lines in the log."""
        return self._log.lines if self._log is not None else 0


def _whole(effort: float) -> int:
    return math.floor(effort + 1e-6)


class StepLog:
    """A JSONL file that grows by one line a step.

    Args:
        path: of the file.
        resume: keep what is in it, up to where the fit goes on.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: IO[bytes] = open(path, "r+b" if resume and path.exists() else "w+b")
        # Those that were dropped to do a damaged step again are there when a later step is taken from the state.
        self._known = [line for line in self._file if line.endswith(b"\n")]
        self._ends = [0, *accumulate(map(len, self._known))]
        self.lines = 0
        self._started = time.monotonic()

    def write(self, content: dict[str, str | float | None]) -> None:
        """Writes the line after the first `lines`, drops any that followed, and hands it to the system."""
        line = {**content, "seconds": round(time.monotonic() - self._started, 3)}
        self.cut()
        self._known[self.lines : self.lines + 1] = [json.dumps(line).encode() + b"\n"]
        self.lines += 1
        self.cut()

    def close(self) -> None:
        """Closes the file as it is: a fit may be stopped before it is where its state and these lines are."""
        with translate_disk_errors(self._path):
            self._file.close()

    def cut(self) -> None:
        """Leaves the first `lines` in the file, of those that are known."""
        self.lines = min(self.lines, len(self._known))
        del self._ends[self.lines + 1 :]
        with translate_disk_errors(self._path):
            self._file.seek(self._ends[-1])
            self._file.truncate()
            for line in self._known[len(self._ends) - 1 : self.lines]:
                self._file.write(line)
                self._ends.append(self._file.tell())
            self._file.flush()


def is_step_log(path: Path) -> bool:
    """Whether a file begins as a log of steps does, or is empty."""
    with open(path, "rb") as file:
        line = file.readline(_MAX_LINE)
    try:
        content = parse_json(line or b'{"seconds": 0}')
    except StrictJsonError:
        return False
    return isinstance(content, dict) and "seconds" in content
