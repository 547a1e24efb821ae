"""Beside the peers: PEFT's combiners, mergekit, LoRAHub's search and loracat on the same adapters and records.

    python -m benchmarks.paper peers OUT --mergekit mergekit/bin
    python -m benchmarks.paper peers OUT --peers-of math-code --base BASE --assets DATA --trained ADAPTERS

Every way starts from what is on disk and writes an adapter, or a model where it knows nothing else; its processes are
timed whole, one thread each, and their peak memory is the resident size that the system reports. What it wrote is
loaded by stock PEFT, or as the model that it is, into float32, and scored on the same test records by the same code.

The error is |dW' - dW|_F / |dW|_F over all adapted modules together, where dW is the method's own formula in float64,
written out here: the average or the sum of the updates, TIES of the dense updates (arXiv 2306.01708), the sum of the
dense updates pruned by magnitude. What is drawn at random, or has no formula but its own code, has none.

`tuned` means: of the weights and densities of a grid, those with the least loss on the calibration records; scoring
them counts as time. mergekit is called from an environment of its own. LoRAHub's published package runs T5 models
alone, so its row is loracat's replay: the same objective, bounds and number of evaluations, with the same optimiser,
nevergrad's.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from benchmarks.made_inputs import part_of_example
from benchmarks.paper.cells import Stage
from benchmarks.paper.tables import wilson
from benchmarks.paper.tasks import Experiment, Part, Unit
from benchmarks.paper.training import MAX_LENGTH, identify, rendered
from benchmarks.paper.ways import AVERAGE, Options, Pair, Way, ways
from loracli.adapters.adapter import module_names, read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import read_records
from loracli.demo.run import example_folder
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.scorer import make_scorer
from loracli.evaluation.sentences import interval_text
from loracli.evaluation.statistics import intervals
from loracli.model.attach import attach
from loracli.model.base import load_base
from loracli.model.loss import make_objective
from loracli.model.reference import find_base
from loracli.model.session import usable_length
from loracli.system.files import CONFIG_FILE

NAME = "peers"
ASKS = (
    "What do other tools make of the same adapters? Each writes an adapter, or a model, from what is on disk; error of "
    "the update against the method's formula in float64, time and memory of its processes, loss and right answers of "
    "what it wrote. `tuned`: weights and density with the least loss on the calibration records, which takes its time."
)
INSTALL = "python -m venv mergekit && mergekit/bin/pip install mergekit"
ROOT = Path(__file__).parents[2]
_MODEL, _BATCH_TOKENS = "model.safetensors", 1024
_HEADS = ("", "error of dW", "seconds", "of the processor", "peak MB", "nats per token")
_HEADS += ("to the average, 95 % interval", "right", "95 % interval", "")
_QUICK = ("know", "PEFT linear", AVERAGE, "loracat fit, export")


def kept_largest(matrix: Tensor, density: float) -> Tensor:
    """The `density` largest entries by magnitude, 0 elsewhere."""
    count = max(1, round(density * matrix.numel()))
    least = matrix.abs().flatten().kthvalue(matrix.numel() - count + 1).values
    return torch.where(matrix.abs() >= least, matrix, 0.0)


def ties(updates: Sequence[Tensor], options: Options) -> Tensor:
    """Trimmed, the sign of the sum elected, and the mean over the entries that have it."""
    trimmed = torch.stack([kept_largest(update, options["density"]) for update in updates])
    agree = trimmed * trimmed.sum(dim=0).sign() > 0
    mean: Tensor = (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    return mean * options.get("weight", 1.0)


def pruned(updates: Sequence[Tensor], options: Options) -> Tensor:
    """The sum of what magnitude pruning leaves of each."""
    return total([kept_largest(update, options["density"]) for update in updates], options)


def total(updates: Sequence[Tensor], options: Options) -> Tensor:
    return torch.stack(list(updates)).sum(dim=0) * options.get("weight", 1.0)


FORMULAS: dict[str, Callable[[Sequence[Tensor], Options], Tensor]] = {
    "average": lambda updates, options: total(updates, {"weight": 1 / len(updates)}),
    "sum": total,
    "ties": ties,
    "pruned": pruned,
}


def experiment(pairs: Sequence[Pair], commands: Path | None, quick: bool) -> Experiment:
    """The rows of each pair as units, and their tables."""
    every = {pair: [way for way in ways(pair, commands) if not quick or way.name in _QUICK] for pair in pairs}
    units = [
        Unit(
            f"{pair.name}-{way.name.replace(' ', '-').replace(',', '')}",
            {**pair.made_of, "grid": way.grid, "formula": way.formula, "of": way.of},
            seconds_of(pair) * len(way.grid),
            partial(measured, pair, way),
        )
        for pair, those in every.items()
        for way in those
    ]
    return Experiment(NAME, ASKS, lambda *_: units, parts)


def seconds_of(pair: Pair) -> float:
    """That a row takes, about: processes start, and the base is loaded, changed and run."""
    size = sum(file.stat().st_size for file in pair.base.reference.path.glob("*.safetensors"))
    return 10 + 0.3e-6 * size


@dataclass(frozen=True)
class Ended:
    """Processes, one after the other: seconds on the clock and of the processor, peak memory in MB, and in the words of
    the one that failed why."""

    seconds: float = 0.0
    processor: float = 0.0
    memory: float = 0.0
    refused: str = ""


# A small process starts each: the peak that the system has of a child is at least its parent's size.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
lines = [line.strip() for line in child.stdout if line.strip() and not line.startswith("hint:")]
status, usage = os.wait4(child.pid, 0)[1:]
child.returncode = status
spent = [time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]
print(json.dumps([*spent, (lines or ["it failed"])[-1] if status else ""]))
"""


def run(commands: Sequence[Sequence[str]]) -> Ended:
    """Runs processes until one fails, each with one thread."""
    ended = Ended()
    plain = {"NO_COLOR": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}  # so that what is said last stands last
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | plain
    for command in commands:
        words = [sys.executable, "-c", _LAUNCHER, *command]
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds, processor, memory, refused = json.loads(done.stdout)
        memory = max(memory, ended.memory)
        ended = Ended(ended.seconds + seconds, ended.processor + processor, memory, refused)
        if refused:
            break
    return ended


class Judge:
    """Scores models on a pair's records, as completions of the base's tokenizer, in float32."""

    def __init__(self, pair: Pair) -> None:
        base = load_base(pair.base.reference, dtype="float32")
        self._model = base.model
        self._examples = {file: rendered([file], base.tokenizer) for file in (pair.calibration, pair.test)}
        self._batches = {file: plan_batches(e, batch_tokens=_BATCH_TOKENS) for file, e in self._examples.items()}
        self._pair, places = pair, [example.place for example in self._examples[pair.test]]
        window = usable_length(base, 1 << 20)
        limits = {"max_length": MAX_LENGTH, "window": window, "batch_tokens": 4 * _BATCH_TOKENS}
        self._right = make_scorer(pair.metric, [read_records(pair.test)], places, base.tokenizer, **limits)

    def of(self, written: Path | None, file: Path) -> dict[str, list[float]]:
        """Nats and tokens of each record, of the test also what the metric says; of the base for None."""
        if written is None:
            return self._scored(self._model, file)
        if not (written / CONFIG_FILE).exists():
            return self._scored(load_base(find_base((), str(written)), dtype="float32").model, file)
        adapted = PeftModel.from_pretrained(self._model, written)
        try:
            return self._scored(adapted, file)
        finally:
            self._model = adapted.unload()

    def nats_per_token(self, written: Path) -> float:
        """On the calibration records."""
        found = self.of(written, self._pair.calibration)
        return sum(found["nats"]) / sum(found["tokens"])

    def _scored(self, model: Any, file: Path) -> dict[str, list[float]]:
        batches = self._batches[file]
        with torch.no_grad(), attach(model.eval(), (), ()) as plain:
            objective = make_objective(plain, batches[0])
            scores = objective.score(batches, len(self._examples[file]))
            found = {"nats": scores.nats.tolist(), "tokens": scores.tokens.tolist()}
            return found | ({"right": self._right(objective).tolist()} if file == self._pair.test else {})


judge = cache(Judge)  # a base is loaded once for all its rows


def measured(pair: Pair, way: Way) -> dict[str, Any]:
    """Makes what a row is of, and judges it."""
    found: dict[str, Any] = {"pair": pair.name, "row": way.name, "note": way.note, "of": way.of}
    if way.run is None:
        return found | judge(pair).of(dict(pair.adapters).get(way.name), pair.test)
    with tempfile.TemporaryDirectory() as scratch:
        commands, written = way.run(pair, way.grid, Path(scratch))
        found |= {"ended": asdict(ended := run(commands))}
        if ended.refused:
            return found
        best, seconds = 0, time.process_time()
        if len(written) > 1:
            best = min(range(len(written)), key=[judge(pair).nats_per_token(one) for one in written].__getitem__)
            found["note"] = "; ".join(filter(None, (_text(way.grid[best]), way.note)))
            found["tuning"] = time.process_time() - seconds
        found["error"] = None if way.formula is None else error_of(written[best], pair, way.formula, way.grid[best])
        return found | judge(pair).of(written[best], pair.test)


def _text(options: Options) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def error_of(written: Path, pair: Pair, formula: str, options: Options) -> float:
    """|dW' - dW|_F / |dW|_F over all adapted modules, of an adapter or a model."""
    adapters = [read_adapter(str(path)) for _, path in pair.adapters]
    update = _update_of(written, pair.base.reference.path)
    missed = whole = 0.0
    for name in module_names(adapters):
        there = {place: a.modules[name].factors.delta_weight() for place, a in enumerate(adapters) if name in a.modules}
        none = torch.zeros_like(next(iter(there.values())))
        exact = FORMULAS[formula]([there.get(place, none) for place in range(len(adapters))], options)
        missed += float((update(name) - exact).square().sum())
        whole += float(exact.square().sum())
    return math.sqrt(missed / whole)


def _update_of(written: Path, base: Path) -> Callable[[str], Tensor]:
    """The update of a module in float64, out of an adapter or the files of two models."""
    if (written / CONFIG_FILE).exists():
        modules = read_adapter(str(written)).modules
        zero = torch.zeros((), dtype=torch.float64)
        return lambda name: modules[name].factors.delta_weight() if name in modules else zero

    def difference(name: str) -> Tensor:
        with safe_open(written / _MODEL, "pt") as model, safe_open(base / _MODEL, "pt") as bare:
            one, other = model.get_tensor(f"{name}.weight"), bare.get_tensor(f"{name}.weight")
        return one.double() - other.double()

    return difference


def parts(found: Mapping[str, Mapping[str, Any]]) -> tuple[Part, ...]:
    """A table for each pair; without mergekit's rows it says so."""
    tables = []
    for pair in dict.fromkeys(one["pair"] for one in found.values()):
        rows = [one for one in found.values() if one["pair"] == pair]
        judged = [one for one in rows if "nats" in one]
        nats, tokens, right = (
            torch.tensor([one[k] for one in judged], dtype=torch.float64) for k in ("nats", "tokens", "right")
        )
        average = next(place for place, one in enumerate(judged) if one["row"] == AVERAGE)
        ends = dict(zip([one["row"] for one in judged], intervals(nats - nats[average], tokens[0]), strict=True))
        of = "; ".join(dict.fromkeys(one["of"] for one in rows if one["of"]))
        without = "" if "mergekit" in of else f"; without mergekit: {INSTALL}, then --mergekit mergekit/bin"
        title = f"`{pair}`, {nats.shape[1]} test records, {int(tokens[0].sum())} scored tokens; {of}{without}:"
        tables.append(Part(title, _HEADS, tuple(_row(one, judged[average], ends) for one in rows)))
    return tuple(tables)


def _row(
    one: Mapping[str, Any], average: Mapping[str, Any], ends: Mapping[str, tuple[float, float]]
) -> tuple[str, ...]:
    ended, error = one.get("ended"), one.get("error")
    cost = ("", "", "")
    if ended is not None:
        tuning = one.get("tuning", 0.0)
        cost = (f"{ended['seconds'] + tuning:.1f}", f"{ended['processor'] + tuning:.1f}", f"{ended['memory']:.0f}")
    if "nats" not in one:
        return (one["row"], "", *cost, "", "", "", "", f"refused: {ended['refused']}")
    loss, shown = (sum(row["nats"]) / sum(row["tokens"]) for row in (one, average))
    low, high = wilson(sum(one["right"]), len(one["right"]))
    return (
        one["row"],
        "" if error is None else f"{error:.2e}",
        *cost,
        f"{loss:.4f}",
        f"{loss - shown:+.4f}, {interval_text(ends[one['row']])}",
        f"{sum(one['right']) / len(one['right']):.1%}",
        f"{low:.1%} to {high:.1%}",
        one["note"],
    )


def embedded(folder: Path, quick: bool) -> Pair:
    """The example of `loracat demo`; with `quick` a few of its records, in a folder."""
    example = part_of_example(folder, calibration=8, test=8) if quick else example_folder()
    base = identify(find_base((), str(example / "base")), None, "auto")
    adapters = tuple((name, example / name) for name in ("know", "form"))
    metric = TaskMetric("exact", max_new_tokens=24)
    files = example / "calibration.jsonl", example / "test.jsonl"
    return Pair("know-form", base, adapters, *files, metric, 0, 2.0 if quick else None)


def of_task(name: str, stage: Stage) -> Pair:
    """A task's adapters, with the calibration and the test of one of its comparisons."""
    assert stage.calibration is not None
    adapters = tuple((adapter.name, adapter.path) for adapter in stage.adapters)
    metric = stage.task.metric
    return Pair(name, stage.base, adapters, stage.calibration, stage.test, metric, stage.seed, stage.passes)
