"""The paper's claim, measured again: skills composed, beside everything else that could be done. One command a table.

    python -m benchmarks.paper TASK... OUT --base BASE [--seeds 0 1 2]
    python -m benchmarks.paper agreement [TASK...] OUT --base BASE
    python -m benchmarks.paper false-alarms OUT
    python -m benchmarks.paper pools OUT [--of TASK --base BASE]
    python -m benchmarks.paper peers OUT [--mergekit BIN] [--of TASK --base BASE]
    python -m benchmarks.paper OUT --base BASE --all [--pages docs/results]

For each task and seed: the data, an adapter for each skill and one trained on the data of all, as many tokens as they
together; then every way to compose, on test records that no calibration record touches, calibrated on the skills' own
data, which is the paper's setting, and on composite records. Loss and answers, with intervals, against the best single
adapter. `paper` is CAT as published, `module` is `loracat fit` as it is, `fresh-lora` a new LoRA trained on the
calibration records alone. `agreement` asks what could be known of tasks beforehand; false alarms are on the embedded
example. `pools` adds idle adapters to those of that example or of a task, `peers` has PEFT and mergekit compose them.

It says beforehand how long it will take. What is done is kept in OUT and not done again: adapters by a hash of their
training, cells by a hash of all that they are made of. Tables go to standard output, and as JSON and pages to
OUT/pages, or where --pages says. --quick takes the base of the embedded example, a few records and hardly any training,
in a folder that is deleted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.measuring import BenchmarkParser
from benchmarks.paper import agreement, peers, pools
from benchmarks.paper.cells import (
    CAN_BE_FITTED,
    CAT,
    FITTED,
    Cell,
    Stage,
    first_records,
    keep_unit,
    kinds_of,
    unit_place,
)
from benchmarks.paper.closed_book import CLOSED_BOOK
from benchmarks.paper.false_alarms import FALSE_ALARMS
from benchmarks.paper.formats import FORMATS
from benchmarks.paper.programs import MATH_CODE, SUMS
from benchmarks.paper.reading import READING
from benchmarks.paper.tables import Parts, Table, make_table, markdown, together, write_table
from benchmarks.paper.tasks import DATAMIX, SKILLS, Experiment, Task, Unit, write_records
from benchmarks.paper.training import Adapter, Base, identify, pace, say
from benchmarks.paper.ways import Pair
from loracli.demo.run import example_folder
from loracli.errors import LoracatError
from loracli.model.reference import find_base
from loracli.progress import duration_text

TASKS = {task.name: task for task in (CLOSED_BOOK, SUMS, FORMATS, READING, MATH_CODE)}
EXPERIMENTS = {FALSE_ALARMS.name: FALSE_ALARMS}
OF_PAIRS = (peers.NAME, pools.NAME)  # the embedded example, or with --of a task
KNOWN = (*TASKS, agreement.NAME, *OF_PAIRS, *EXPERIMENTS)
OWN = "the skills' own records"
SHOWN = ("seeds", "calibrate", "fitted", "test_records", "records", "epochs", "passes", "assets", "trained", "quick")
SHOWN = (*SHOWN, "of", "mergekit", "suffix")


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("words", nargs="*", metavar="NAME... OUT", help=f"{', '.join(KNOWN)}; and a folder")
    parser.add_argument("--all", action="store_true", help="every task that has its records, and every experiment")
    parser.add_argument("--base", quick=str(example_folder() / "base"), help="a directory, or a Hub id")
    parser.add_argument("--base-id", help="its name in the adapters' configs; default: as it was given")
    parser.add_argument("--dtype", default="auto", help="of the base's weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], quick=[0])
    parser.add_argument(
        "--calibrate", nargs="+", type=calibration, quick=[SKILLS], help="skills, or so many composite records"
    )
    parser.add_argument(
        "--fitted", nargs="+", default=list(FITTED), choices=CAN_BE_FITTED, help="what is fitted on these"
    )
    parser.add_argument("--test-records", type=int, quick=2, help="the first so many of the test")
    parser.add_argument("--records", type=int, quick=12, help="the first so many of each file of data; default: all")
    parser.add_argument("--epochs", type=int, quick=1, help="of training an adapter; default: the task's")
    parser.add_argument("--passes", type=float, quick=2.0, help="of a fit; default: as many as `loracat fit` takes")
    parser.add_argument("--assets", type=Path, help="a folder of JSONL that some tasks take records from")
    parser.add_argument(
        "--trained", type=Path, help="a folder of adapters, TASK/NAME, taken as they are for the first seed"
    )
    parser.add_argument(
        "--of", choices=TASKS, help="whose adapters peers and pools take; default: the embedded example"
    )
    parser.add_argument("--mergekit", type=Path, help="the folder of mergekit's commands, for its rows among peers")
    parser.add_argument("--pages", type=Path, help="a folder for the JSON and the page of each table")
    parser.add_argument("--suffix", help="of the tables' names, where pages of another base stand beside them")
    parser.add_argument("--plan", action="store_true", help="only say how long it takes")
    arguments = chosen(parser)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(arguments.names, arguments.out or Path(scratch), arguments)
        except LoracatError as error:
            raise SystemExit(f"{error}\n{getattr(error, 'hint', None) or ''}") from None


def chosen(parser: BenchmarkParser) -> argparse.Namespace:
    """What was typed, with `names` of what is measured, the folder `out`, and the options that were `changed`."""
    arguments = parser.parse_args()
    changed = {name: value for name, value in vars(arguments).items() if value != parser.get_default(name)}
    arguments.changed = {name: changed[name] for name in SHOWN if name in changed}
    names = [word for word in arguments.words if word in KNOWN]
    folders = [word for word in arguments.words if word not in KNOWN]
    if arguments.all or (arguments.quick and not names):
        names = [name for name in KNOWN if arguments.assets or name not in TASKS or not TASKS[name].needs_assets]
    if not names or len(folders) > 1 or (not folders and not arguments.quick):
        parser.error(f"give names of {', '.join(KNOWN)}, or --all, and one folder; got: {' '.join(arguments.words)}")
    without_base = {*EXPERIMENTS, *([] if arguments.of else OF_PAIRS)}
    if arguments.base is None and not set(names) <= without_base:
        parser.error("give the --base that adapters are trained on")
    if agreement.NAME in names:
        names = [*names, *(name for name in TASKS if not set(names) & set(TASKS) and not TASKS[name].needs_assets)]
        if CAT not in arguments.fitted or SKILLS not in (arguments.calibrate or [SKILLS]):
            parser.error(f"{agreement.NAME} needs {CAT} among --fitted, and {SKILLS} among --calibrate")
    if "lorahub" in arguments.fitted and find_spec("nevergrad") is None and not set(names) <= {*EXPERIMENTS, *OF_PAIRS}:
        parser.error("lorahub needs nevergrad: pip install 'loracat[lorahub]', or leave it out of --fitted")
    if arguments.mergekit and not all((arguments.mergekit / name).exists() for name in ("mergekit-yaml", "python")):
        parser.error(f"--mergekit {arguments.mergekit} has no mergekit: {peers.INSTALL}, then --mergekit mergekit/bin")
    if arguments.quick and arguments.pages:
        parser.error("--quick measures nothing that a page should show: leave --pages out")
    arguments.names, arguments.out = names, Path(folders[0]) if folders else None
    return arguments


def calibration(word: str) -> str:
    """A value of --calibrate."""
    return word if word == SKILLS else str(int(word))


@dataclass(frozen=True)
class Job:
    """Something that takes long, and is not done yet.

    Args:
        name: what it is.
        seconds: that it takes, about.
        work: does it.
    """

    name: str
    seconds: float
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

    @property
    def done(self) -> bool:
        return not any(stage.missing for stage in self.stages.values())

    @property
    def own_cells(self) -> list[Cell]:
        """Of what needs no data, and of what is calibrated on the skills' own records."""
        return self.stages[""].cells() + self.stages[OWN].cells()

    def jobs(self, tokenizer: Any, pace: float) -> list[Job]:
        """What is left to do, at so many tokens a second, forward and backward."""
        left = [
            Job(f"{self.name}: trains {adapter.name}", adapter.tokens(tokenizer) / pace, adapter.train)
            for adapter in self.adapters
            if not adapter.done
        ]
        return left + [
            Job(
                f"{self.name}, {label or 'no data'}: {', '.join(stage.missing)}",
                stage.tokens(tokenizer) / pace,
                stage.run,
            )
            for label, stage in self.stages.items()
            if stage.missing
        ]


def run(names: Sequence[str], out: Path, arguments: argparse.Namespace) -> None:
    """Does what is not done yet, then makes the tables."""
    tasks = [TASKS[name] for name in names if name in TASKS]
    experiments = {name: EXPERIMENTS[name] for name in names if name in EXPERIMENTS}
    runs: list[Run] = []
    jobs: list[Job] = []
    units = {name: one.units(arguments.seeds, arguments.quick) for name, one in experiments.items()}
    named: dict[str, str] = {}
    for name in [name for name in names if name in OF_PAIRS]:
        pairs = pairs_of(name, arguments, out)
        if name == peers.NAME:
            experiments[name] = peers.experiment(pairs, arguments.mergekit, arguments.quick)
        else:
            experiments[name] = pools.experiment(pairs, arguments.quick)
        units[name] = experiments[name].units(arguments.seeds, arguments.quick)
        named |= {name: pairs[0].base.name} if arguments.of else {}
    if tasks:
        base = identify(find_base((), arguments.base), arguments.base_id, arguments.dtype)
        runs = [prepared(task, seed, out, base, arguments) for task in tasks for seed in arguments.seeds]
        jobs, gradients = task_jobs(runs, base)
        if agreement.NAME in names:
            experiments[agreement.NAME] = Experiment(
                agreement.NAME,
                agreement.ASKS,
                lambda *_: gradients,
                lambda found: agreement.parts(found, {one.name: one.own_cells for one in runs}),
            )
            units[agreement.NAME], named[agreement.NAME] = gradients, base.name
    for name, those in units.items():
        jobs += [
            Job(f"{name}: {unit.name}", unit.seconds, partial(keep_unit, out / name, unit))
            for unit in those
            if not unit_place(out / name, unit).exists()
        ]
    if arguments.plan:
        for job in jobs:
            print(f"{job.name}: about {duration_text(job.seconds)}")
        print(f"{len(jobs)} jobs: about {duration_text(sum(job.seconds for job in jobs))}")
        return
    work(jobs)
    tables: list[Table | Parts] = [
        table_of(task, [one for one in runs if one.task is task], arguments) for task in tasks
    ]
    for name, one in experiments.items():
        tables.append(parts_of(one, units[name], out / name, arguments, named.get(name)))
    for table in tables:
        if arguments.suffix:
            table = replace(table, name=f"{table.name}-{arguments.suffix}")
        write_table(arguments.pages or out / "pages", table)
        print(f"### {table.name}\n\n{markdown(table)}", flush=True)


def pairs_of(name: str, arguments: argparse.Namespace, out: Path) -> list[Pair]:
    """What is composed: the embedded example, or of each seed a task's adapters, on its last calibration."""
    if arguments.of is None:
        pair = peers.embedded(out / f"{name}-example", arguments.quick)
        return [pair] if name == peers.NAME else [replace(pair, seed=seed) for seed in arguments.seeds]
    base = identify(find_base((), arguments.base), arguments.base_id, arguments.dtype)
    runs = [prepared(TASKS[arguments.of], seed, out, base, arguments) for seed in arguments.seeds]
    if lacking := [f"{one.name}/{a.name}" for one in runs for a in one.adapters[:-1] if not a.done]:
        raise SystemExit(f"{out} lacks {', '.join(lacking)}: give --trained, or make the tables of {arguments.of}")
    return [peers.of_task(one.name, list(one.stages.values())[-1]) for one in runs]


def parts_of(
    one: Experiment, units: Sequence[Unit], folder: Path, arguments: argparse.Namespace, base: str | None
) -> Parts:
    kept = {unit.name: json.loads(unit_place(folder, unit).read_text("utf-8")) for unit in units}
    parts = one.parts({name: each["found"] for name, each in kept.items()})
    made_by = together([each["made_by"] for each in kept.values()])
    return Parts(one.name, one.asks, command_of(one.name, arguments, base), made_by, parts)


def table_of(task: Task, done: Sequence[Run], arguments: argparse.Namespace) -> Table:
    base = done[0].stages[""].base.name
    about = {"name": task.name, "asks": task.asks, "command": command_of(task.name, arguments, base), "base": base}
    found = {label: [one.stages[label].cells() for one in done] for label in done[0].stages}
    kinds = [kind for one in done for kind in kinds_of(one.stages[""].test)]
    return make_table(found, task.skills, seeds=arguments.seeds, kinds=kinds, about=about)


def command_of(name: str, arguments: argparse.Namespace, base: str | None) -> str:
    """What to type for a table, in a line."""
    tasks = [one for one in arguments.names if one in TASKS and name == agreement.NAME]
    words = ["python -m benchmarks.paper", name, *tasks, "out", *([] if base is None else ["--base", base])]
    for option, value in arguments.changed.items():
        if base is None and option not in ("seeds", "quick", "mergekit"):
            continue
        words.append(f"--{option.replace('_', '-')}")
        if isinstance(value, Path):  # whose place is nobody's business
            words.append(option)
        elif value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return " ".join(words)


def prepared(task: Task, seed: int, out: Path, base: Base, arguments: argparse.Namespace) -> Run:
    """Writes the data of a task and a seed, and says what is to be done with them."""
    folder = out / f"{task.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder, task.draw(Random(seed), arguments.assets), arguments.records)
    adapters = []
    for place, (name, training) in enumerate(task.training.items()):
        skills = task.skills if name == DATAMIX else (name,)
        given = arguments.trained / task.name / name if arguments.trained and seed == arguments.seeds[0] else None
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
            found[OWN] = folder / "skills_calib.jsonl"
        else:
            file = first_records(folder / "composite_calib.jsonl", int(word))
            found[f"{len(file.read_text('utf-8').splitlines())} composite records"] = file
    return found


def task_jobs(runs: Sequence[Run], base: Base) -> tuple[list[Job], list[Unit]]:
    """What is left to do for tasks, timed by a step through the base on this machine; and their gradients."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.reference.path)
    tokens_a_second = 1.0
    if not all(one.done for one in runs):
        tokens_a_second = pace(base, runs[0].adapters[0].files)
        say(f"the base goes through {tokens_a_second:.0f} tokens a second, forward and backward")
    jobs = [job for one in runs for job in one.jobs(tokenizer, tokens_a_second)]
    return jobs, [agreement.unit_of(one.stages[""], tokens_a_second, tokenizer) for one in runs]


def work(jobs: Sequence[Job]) -> None:
    """Does the jobs in order, and says before and between how long it takes."""
    total, done, started = sum(job.seconds for job in jobs), 0.0, time.monotonic()
    say(f"{len(jobs)} jobs to do: about {duration_text(total)}" if jobs else "everything is done")
    for number, job in enumerate(jobs, start=1):
        say(f"[{number}/{len(jobs)}] {job.name}: about {duration_text(job.seconds)}")
        job.work()
        done += job.seconds
        left = (time.monotonic() - started) / done * (total - done)
        say(f"{done / total:.0%} done, about {duration_text(left)} left")


if __name__ == "__main__":
    main()
