"""The paper's claim, measured again: skills composed, beside everything else that could be done. One command a task.

    python -m benchmarks.paper TASK... OUT --base BASE [--seeds 0 1 2]
    python -m benchmarks.paper OUT --base BASE --all [--pages docs/results]

For each task and seed: the data, an adapter for each skill and one trained on the data of all, as many tokens as they
together; then every way to compose, on test records that no calibration record touches, calibrated on the skills' own
data, which is the paper's setting, and on composite records. Loss and answers, with intervals, against the best single
adapter. `paper` is CAT as published, `module` is `loracat fit` as it is, `fresh-lora` a new LoRA trained on the
calibration records alone.

It says beforehand how long it will take. What is done is kept in OUT and not done again: adapters by a hash of their
training, cells by a hash of all that they are made of. Tables go to standard output, and as JSON and pages to
OUT/pages, or where --pages says. --quick takes the base of the embedded example, a few records and hardly any training,
in a folder that is deleted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.measuring import BenchmarkParser
from benchmarks.paper.cells import FITTED, Stage, first_records, kinds_of
from benchmarks.paper.closed_book import CLOSED_BOOK
from benchmarks.paper.formats import FORMATS
from benchmarks.paper.programs import MATH_CODE, SUMS
from benchmarks.paper.reading import READING
from benchmarks.paper.tables import make_table, markdown, write_table
from benchmarks.paper.tasks import DATAMIX, SKILLS, Task, write_records
from benchmarks.paper.training import Adapter, Base, identify, pace, say
from loracli.demo.run import example_folder
from loracli.errors import LoracatError
from loracli.model.reference import find_base
from loracli.progress import duration_text

TASKS = {task.name: task for task in (CLOSED_BOOK, SUMS, FORMATS, READING, MATH_CODE)}


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("words", nargs="*", metavar="TASK... OUT", help=f"tasks: {', '.join(TASKS)}; and a folder")
    parser.add_argument("--all", action="store_true", help="every task")
    parser.add_argument("--base", required=True, quick=str(example_folder() / "base"), help="a directory, or a Hub id")
    parser.add_argument("--base-id", help="its name in the adapters' configs; default: as it was given")
    parser.add_argument("--dtype", default="auto", help="of the base's weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], quick=[0])
    parser.add_argument("--calibrate", nargs="+", quick=[SKILLS, "6"], help="skills, or so many composite records")
    parser.add_argument("--fitted", nargs="+", default=list(FITTED), help="what is fitted on these")
    parser.add_argument("--test-records", type=int, quick=4, help="the first so many of the test")
    parser.add_argument("--records", type=int, quick=12, help="the first so many of each file of data; default: all")
    parser.add_argument("--epochs", type=int, quick=1, help="of training an adapter; default: the task's")
    parser.add_argument("--passes", type=float, quick=2.0, help="of a fit; default: as many as `loracat fit` takes")
    parser.add_argument("--assets", type=Path, help="a folder with data/ that some tasks take records from")
    parser.add_argument("--trained", type=Path, help="a folder of adapters, taken as they are for the first seed")
    parser.add_argument("--pages", type=Path, help="a folder for the JSON and the page of each table")
    parser.add_argument("--plan", action="store_true", help="only say how long it takes")
    arguments = parser.parse_args()
    names = [word for word in arguments.words if word in TASKS]
    folders = [word for word in arguments.words if word not in TASKS]
    if arguments.all or (arguments.quick and not names):
        names = [name for name in TASKS if arguments.assets or not TASKS[name].needs_assets]
    if not names or len(folders) > 1 or (not folders and not arguments.quick):
        parser.error(f"give tasks of {', '.join(TASKS)}, or --all, and one folder; got: {' '.join(arguments.words)}")
    if arguments.quick and arguments.pages:
        parser.error("--quick measures nothing that a page should show: leave --pages out")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run([TASKS[name] for name in names], Path(folders[0] if folders else scratch), arguments)
        except LoracatError as error:
            raise SystemExit(f"{error}\n{getattr(error, 'hint', None) or ''}") from None


@dataclass(frozen=True)
class Job:
    """Something that takes long, and is not done yet.

    Args:
        name: what it is.
        tokens: forward and backward, that it takes about.
        work: does it.
    """

    name: str
    tokens: float
    work: Callable[[], None]


@dataclass(frozen=True)
class Run:
    """A task with a seed: its adapters and its comparisons."""

    task: Task
    seed: int
    adapters: tuple[Adapter, ...]
    stages: dict[str, Stage]

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.seed}"

    def jobs(self, tokenizer: Any) -> list[Job]:
        left = [
            Job(f"{self.name}: trains {adapter.name}", adapter.tokens(tokenizer), adapter.train)
            for adapter in self.adapters
            if not adapter.done
        ]
        return left + [
            Job(f"{self.name}, {label or 'no data'}: {', '.join(stage.missing)}", stage.tokens(tokenizer), stage.run)
            for label, stage in self.stages.items()
            if stage.missing
        ]


def run(tasks: Sequence[Task], out: Path, arguments: argparse.Namespace) -> None:
    base = identify(find_base((), arguments.base), arguments.base_id, arguments.dtype)
    runs = [[prepared(task, seed, out, base, arguments) for seed in arguments.seeds] for task in tasks]
    work([one for done in runs for one in done], base, arguments)
    if arguments.plan:
        return
    for task, done in zip(tasks, runs, strict=True):
        found = {label: [one.stages[label].cells() for one in done] for label in done[0].stages}
        seeds = " ".join(map(str, arguments.seeds))
        about = {
            "name": task.name,
            "asks": task.asks,
            "command": f"python -m benchmarks.paper {task.name} out --base {base.name} --seeds {seeds}",
            "base": base.name,
        }
        kinds = [kind for one in done for kind in kinds_of(one.stages[""].test)]
        table = make_table(found, task.skills, seeds=arguments.seeds, kinds=kinds, about=about)
        write_table(arguments.pages or out / "pages", table)
        print(f"### {task.name}\n\n{markdown(table)}", flush=True)


def prepared(task: Task, seed: int, out: Path, base: Base, arguments: argparse.Namespace) -> Run:
    """Writes the data of a task and a seed, and says what is to be done with them."""
    folder = out / f"{task.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder, task.draw(Random(seed), arguments.assets), arguments.records)
    adapters = []
    for place, (name, training) in enumerate(task.training.items()):
        skills = task.skills if name == DATAMIX else (name,)
        given = arguments.trained / name if arguments.trained and seed == arguments.seeds[0] else None
        adapters.append(
            Adapter(
                name,
                tuple(folder / f"{skill}_train.jsonl" for skill in skills),
                replace(training, epochs=arguments.epochs or training.epochs),
                base,
                seed + place,
                folder,
                given if given and given.exists() else None,
            )
        )
    *skills, datamix = adapters
    test = first_records(folder / "composite_test.jsonl", arguments.test_records)
    first = Stage(task, seed, folder, tuple(skills), datamix, base, test)
    stages = {"": first}
    for label, calibration in calibrations(arguments.calibrate or task.calibrate, folder).items():
        stages[label] = replace(first, calibration=calibration, rows=tuple(arguments.fitted), passes=arguments.passes)
    return Run(task, seed, tuple(adapters), stages)


def calibrations(wanted: Sequence[str], folder: Path) -> dict[str, Path]:
    """The files that are calibrated on, by what a table calls them."""
    found = {}
    for word in wanted:
        if word == SKILLS:
            found["the skills' own records"] = folder / "skills_calib.jsonl"
        else:
            file = first_records(folder / "composite_calib.jsonl", int(word))
            found[f"{len(file.read_text('utf-8').splitlines())} composite records"] = file
    return found


def work(runs: Sequence[Run], base: Base, arguments: argparse.Namespace) -> None:
    """Does what is not done yet, and says before and between how long it takes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.reference.path)
    jobs = [job for one in runs for job in one.jobs(tokenizer)]
    left = sum(job.tokens for job in jobs)
    if not jobs:
        say("everything is done")
        return
    seconds = 1 / pace(base, runs[0].adapters[0].files)
    say(f"{len(jobs)} jobs, {left:,.0f} tokens forward and backward, {1 / seconds:.0f} a second: "
        f"about {duration_text(left * seconds)}")  # fmt: skip
    if arguments.plan:
        for job in jobs:
            say(f"  {job.name}: about {duration_text(job.tokens * seconds)}")
        return
    total, done, started = left, 0.0, time.monotonic()
    for number, job in enumerate(jobs, start=1):
        say(f"[{number}/{len(jobs)}] {job.name}: about {duration_text(job.tokens * seconds)}")
        job.work()
        done += job.tokens
        seconds = (time.monotonic() - started) / done
        say(f"{done / total:.0%} done, about {duration_text((total - done) * seconds)} left")


if __name__ == "__main__":
    main()
