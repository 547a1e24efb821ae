"""What a task is: skills, how an adapter of each is trained, a composite of them, and records; what an experiment is.

    <skill>_train     what the adapter of a skill is trained on
    skills_calib      records of the skills alone: the paper's setting
    composite_calib   records of the composite, about nothing that the test asks
    composite_test    what everything is compared on

Imports neither torch nor PEFT.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.evaluation.metrics import TaskMetric

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
DATAMIX = "datamix"  # the adapter that is trained on the data of all skills
SKILLS = "skills"  # calibration on the skills' own data

Conversation = dict[str, Any]
Records = dict[str, list[Conversation]]  # by the name of their file


@dataclass(frozen=True)
class Training:
    """How one adapter is trained; its lora_alpha is twice its rank."""

    rank: int
    targets: Sequence[str]
    rate: float
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Task:
    """Skills and their composite.

    Args:
        name: of the task.
        asks: what the composite is, in a sentence for the reader of its table.
        training: of each skill, and of `datamix`.
        draw: the records, from a seeded generator and the folder of `--assets`, if there is one.
        metric: of the answers.
        calibrate: what it is calibrated on: `skills`, or so many composite records.
        needs_assets: whether it has no records without `--assets`.
    """

    name: str
    asks: str
    training: Mapping[str, Training]
    draw: Callable[[random.Random, Path | None], Records]
    metric: TaskMetric
    calibrate: tuple[str, ...]
    needs_assets: bool = False

    @property
    def skills(self) -> tuple[str, ...]:
        return tuple(name for name in self.training if name != DATAMIX)


@dataclass(frozen=True)
class Unit:
    """A part of an experiment that is measured by itself.

    Args:
        name: of it within the experiment.
        made_of: what it depends on besides the code of the library.
        seconds: that it takes on one core, about.
        work: measures it; what it gives is kept as JSON.
    """

    name: str
    made_of: Mapping[str, Any]
    seconds: float
    work: Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One table of several: its columns, and rows of as many texts.

    Args:
        title: a sentence before it.
        heads: of the columns.
        rows: of cells.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Experiment:
    """Something else that is measured, on the embedded example.

    Args:
        name: of it.
        asks: what is asked, for the reader of its tables.
        units: that it consists of, for some seeds, in full or `quick`.
        parts: the tables, from what the units gave, by name.
    """

    name: str
    asks: str
    units: Callable[[Sequence[int], bool], list[Unit]]
    parts: Callable[[Mapping[str, Any]], tuple[Part, ...]]


def words(text: str) -> list[str]:
    """Splits a list that is written as one text."""
    return text.split()


def conversation(prompt: str, answer: str, task: str | None = None) -> Conversation:
    """One prompt and its answer; `task` is the kind of question, where a table tells kinds apart."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns} if task is None else {"messages": turns, "task": task}


def write_records(folder: Path, records: Records, most: int | None) -> None:
    """Each file of a task, or the first `most` records of it."""
    for name, lines in records.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:most])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
