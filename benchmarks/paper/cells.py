"""Cells: what one way to compose scored on the records of a test, each in a file that is found again by what made it.

    OUT/<task>-<seed>/cells/module-24-0123456789abcdef.json

The hash at the end of a name is of all that the numbers depend on: the adapters (by how they were trained), the base,
the records, the settings, and the code of the library. So a run goes on where it was stopped, one that asks for more
rows does those alone, and a cell of other code or other records is not taken for this one. A file appears whole or not
at all.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import loracli
from benchmarks.paper.tasks import DATAMIX, Task, Unit
from benchmarks.paper.training import Adapter, Base, rendered, say
from loracli.algebra.methods import METHODS
from loracli.comparison.compare import run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.settings import FITTED_MIXINGS, CompareSettings, Controls
from loracli.comparison.state import KeptRows
from loracli.comparison.table import Evaluated
from loracli.fitting.settings import FRESH_LORA, FitSettings
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.progress import Silent
from loracli.system.document import decode, document_sha256, encode
from loracli.system.files import file_sha256, write_atomically

DATA_FREE = tuple(name for name, method in METHODS.items() if not method.needs_records)
PAPER_ROW, CAT, AUTO = "paper", "module", "auto"
FITTED = ("lorahub", PAPER_ROW, CAT, AUTO, FRESH_LORA)
CAN_BE_FITTED = (*FITTED_MIXINGS, *(name for name, one in METHODS.items() if one.search is not None), FRESH_LORA)
_SEARCH_RECORDS = 64  # that a method with a number or two is fitted on, at most
_FRESH_PASSES = 4.0  # of a fresh LoRA, at most
_FORWARD = 0.5  # of a pass forward and backward
_ROOMS = (
    "adapters algebra calibration comparison composition evaluation fitting model recipe system".split()
)  # of the library, that a number may depend on


@dataclass(frozen=True)
class Cell:
    """One way to compose on n records.

    Args:
        row: its name; an adapter goes by its skill.
        kind: of the row, as a comparison has it.
        nats: of each record.
        tokens: scored ones of each record.
        right: of each record, by the task's metric.
        rank: of the one adapter it would be exported as; None of the base.
        note: what the comparison says of it; of a row without records, why it was left out.
        seconds: that it took.
        made_by: commit, versions and machine.
    """

    row: str
    kind: str
    nats: tuple[float, ...]
    tokens: tuple[float, ...]
    right: tuple[float, ...]
    rank: int | None
    note: str
    seconds: float
    made_by: dict[str, str]


@cache
def made_by() -> dict[str, str]:
    """Commit, versions and machine of this process."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "--short=7", "HEAD") or "unknown"
    changed = " with changes" if git("status", "--porcelain", "--", "..", "../../loracli") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return {
        "commit": f"{commit}{changed}",
        "versions": f"loracat {loracli.__version__}, {versions}, Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


@cache
def code_sha256() -> str:
    """Of the rooms of the library that a comparison goes through."""
    root = Path(loracli.__file__).parent
    files = sorted(path for room in _ROOMS for path in (root / room).rglob("*.py"))
    return document_sha256([[path.relative_to(root).as_posix(), path.read_text("utf-8")] for path in files])


@dataclass(frozen=True)
class Stage:
    """One comparison: what needs no data, or what is fitted on one file of calibration records.

    Args:
        task: whose.
        seed: of its data, adapters and fits.
        folder: of this task and seed.
        adapters: of the skills.
        datamix: the adapter that is trained on the data of all skills.
        base: of all.
        test: the records that everything is scored on.
        calibration: the records that are fitted on, None for what needs none.
        rows: the names of what is fitted, or none.
        passes: of a fit; None for as many as `fit` takes.
    """

    task: Task
    seed: int
    folder: Path
    adapters: tuple[Adapter, ...]
    datamix: Adapter
    base: Base
    test: Path
    calibration: Path | None = None
    rows: tuple[str, ...] = ()
    passes: float | None = None

    @property
    def label(self) -> str:
        return "no calibration" if self.calibration is None else self.calibration.stem

    @property
    def names(self) -> tuple[str, ...]:
        """The rows of its table."""
        if self.calibration is not None:
            return self.rows
        return ("base", *self.task.skills, *DATA_FREE, DATAMIX)

    def place(self, row: str) -> Path:
        """The file of a cell."""
        made_of: dict[str, Any] = {
            "row": row,
            "code": code_sha256(),
            "base": [self.base.sha256, self.base.dtype],
            "adapters": [adapter.key for adapter in self.adapters],
            "test": self.test.read_text("utf-8"),
            "metric": encode(self.task.metric) | {"command": None},
        }
        if self.task.metric.command is not None:  # which has places of this machine in it
            made_of["judge"] = file_sha256(Path(__file__).with_name("arithmetic.py"))
        name = row
        if row == DATAMIX:
            made_of["datamix"] = self.datamix.key
        if row in self.rows:
            assert self.calibration is not None
            made_of["calibration"] = self.calibration.read_text("utf-8")
            made_of["fit"] = self._fit.recorded()
            name = f"{row}-{self.calibration.stem.removeprefix('composite_calib_')}"
        return self.folder / "cells" / f"{name}-{document_sha256(made_of)[:16]}.json"

    @property
    def _fit(self) -> FitSettings:
        return FitSettings(seed=self.seed, passes=self.passes)

    @property
    def missing(self) -> list[str]:
        return [row for row in self.names if not self.place(row).exists()]

    def cells(self) -> list[Cell]:
        """Those of the table, in order, without what is not there yet."""
        return [read_cell(self.place(row)) for row in self.names if self.place(row).exists()]

    def tokens(self, tokenizer: Any) -> float:
        """What is left to do, in tokens forward and backward."""
        test = rendered([self.test], tokenizer)
        asked = sum(len(example.input_ids) for example in test)
        written = sum(example.scored_tokens for example in test)
        a_row = _FORWARD * (2 * asked) + written  # scored, and asked again; what is written goes token by token
        total = a_row * len(self.missing)
        if self.calibration is not None:
            examples = rendered([self.calibration], tokenizer)
            total += sum(self._passes(row, len(examples)) for row in self.missing) * sum(
                len(example.input_ids) for example in examples
            )
        return total

    def _passes(self, row: str, records: int) -> float:
        if row == FRESH_LORA:
            return self.passes or _FRESH_PASSES
        if row in METHODS:
            return METHODS[row].evaluations * _FORWARD * min(1.0, _SEARCH_RECORDS / records)
        if row == PAPER_ROW:
            return 1.0
        few = 4 if 6 <= records < 40 else 1
        return FitSettings(mixing=row, passes=self.passes).budget(few, records)

    def run(self) -> None:
        """Scores what is missing."""
        wanted = self.missing
        if self.calibration is None:
            settings = CompareSettings(controls=Controls(datamix=str(self.datamix.path)))
        else:
            methods = tuple(row for row in wanted if row != FRESH_LORA) or ("uniform",)
            settings = CompareSettings(methods, fit=self._fit, controls=Controls(fresh_lora=FRESH_LORA in wanted))
        inputs = prepare_comparison(
            self.test,
            adapters=[str(adapter.path) for adapter in self.adapters],
            fit_data=self.calibration,
            base=str(self.base.reference.path),
            settings=settings,
        )
        (self.folder / "cells").mkdir(exist_ok=True)
        kept = _Cells(self, dict(zip(inputs.references, self.task.skills, strict=True)))
        found = run_comparison(
            inputs, placement=Placement(self.base.dtype), metric=self.task.metric, kept=kept, progress=Told()
        )
        for skipped in found.skipped:
            if skipped.name in wanted:
                kept.keep(Cell(skipped.name, "method", (), (), (), None, skipped.reason, 0.0, made_by()))


class _Cells(KeptRows):
    """The rows of a comparison as cells."""

    def __init__(self, stage: Stage, names: Mapping[str, str]) -> None:
        super().__init__()
        self._stage, self._names = stage, names
        self._since = time.monotonic()

    def recall(self, key: str, row: Any, *, records: int, guard: int, answers: bool) -> Evaluated | None:
        path = self._stage.place(self._names.get(row.name, row.name))
        if not path.exists():
            return None
        cell = read_cell(path)
        if not cell.nats:  # left out, as it will be again
            return None
        nats, tokens, right = (torch.tensor(v, dtype=torch.float64) for v in (cell.nats, cell.tokens, cell.right))
        return Evaluated(row.name, row.kind, Scores(nats, tokens), cell.rank, note=cell.note, values=right)

    def write(self, key: str, row: Evaluated, *, fitted: bool) -> None:
        assert row.values is not None
        now = time.monotonic()
        numbers = (tuple(t.double().tolist()) for t in (row.scores.nats, row.scores.tokens, row.values))
        name = self._names.get(row.name, row.name)
        self.keep(Cell(name, row.kind, *numbers, row.rank, row.note, now - self._since, made_by()))
        self._since = now

    def keep(self, cell: Cell) -> None:
        text = json.dumps(encode(cell), allow_nan=False) + "\n"
        write_atomically(self._stage.place(cell.row), text.encode())
        say(
            f"  {cell.row}: {sum(cell.nats) / sum(cell.tokens):.4f} nats per token" if cell.nats else f"  {cell.row}: -"
        )


def unit_place(folder: Path, unit: Unit) -> Path:
    """The file of a part of an experiment."""
    key = document_sha256({"unit": unit.name, "made_of": unit.made_of, "code": code_sha256()})
    return folder / "cells" / f"{unit.name}-{key[:16]}.json"


def keep_unit(folder: Path, unit: Unit) -> None:
    """Measures a part of an experiment."""
    found = unit.work()
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    document = {"made_by": made_by(), "found": found}
    write_atomically(unit_place(folder, unit), (json.dumps(document, allow_nan=False) + "\n").encode())


def read_cell(path: Path) -> Cell:
    """A cell from its file; ends the run with a sentence where that is damaged."""
    problems: list[str] = []
    cell: Cell = decode(Cell, json.loads(path.read_text("utf-8")), "", problems)
    if problems:
        raise SystemExit(f"{path}: {problems[0]}; remove it, and it is measured again")
    return cell


def first_records(path: Path, count: int | None) -> Path:
    """The first records of a file, in a file of their own."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    if count is None or count >= len(lines):
        return path
    part = path.with_name(f"{path.stem}_{count}.jsonl")
    part.write_text("".join(lines[:count]), encoding="utf-8")
    return part


class Told(Silent):
    """Notes and warnings on stderr."""

    def note(self, message: str) -> None:
        say(f"  {message}")

    def warn(self, message: str) -> None:
        say(f"  warning: {message}")


def kinds_of(test: Path) -> Sequence[str]:
    """What kind of question each record of a test is; nothing where they are all of one."""
    return [str(json.loads(line).get("task", "")) for line in test.read_text("utf-8").splitlines()]
