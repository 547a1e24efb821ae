"""The rows of `peers`: which tool makes what of a pair of adapters, by which processes.

PEFT's combiners with equal weights: the average, and else weights of 1 with density 0.2, or 0.5 where entries are
drawn, which it has no defaults of; those that work on A and B, and TIES by SVD, also tuned. mergekit's methods with the
same numbers, and loracat's with its defaults, which are these.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from benchmarks.paper.peft_process import COMBINED
from benchmarks.paper.training import Base
from loracli.adapters.adapter import read_adapter
from loracli.algebra.methods import METHODS
from loracli.evaluation.metrics import TaskMetric
from loracli.system.document import encode
from loracli.system.files import CONFIG_FILE, TENSOR_FILE, file_sha256

AVERAGE = "loracat export --method uniform"  # that the others' loss is held against
Options = Mapping[str, float]  # `weight` of every adapter, `density`
Commands = tuple[list[list[str]], list[Path]]  # processes, and the directory that each point of a grid is in then
_TIES, _DARE = 0.2, 0.5
_WEIGHTS: tuple[Options, ...] = tuple({"weight": one} for one in (0.3, 0.5, 0.7, 1.0))
_GRID: tuple[Options, ...] = tuple({"weight": one, "density": two} for one in (0.5, 1.0) for two in (0.2, 0.5, 0.8))
_CUT = "cut to the largest rank"
_SPLIT = "works on A and B apart: cross terms"


@dataclass(frozen=True, eq=False)
class Pair:
    """What is composed, and on what it is judged.

    Args:
        name: of it, as its table is called.
        base: that the adapters are of.
        adapters: N names of rows and directories.
        calibration, test: files of records.
        metric: of the answers.
        seed: of fits.
        passes: of a fit; None for as many as `fit` takes.
    """

    name: str
    base: Base
    adapters: tuple[tuple[str, Path], ...]
    calibration: Path
    test: Path
    metric: TaskMetric
    seed: int
    passes: float | None = None

    @property
    def made_of(self) -> dict[str, Any]:
        files = [path / name for _, path in self.adapters for name in (CONFIG_FILE, TENSOR_FILE)]
        return {
            "base": self.base.sha256,
            "files": [file_sha256(file) for file in (*files, self.calibration, self.test)],
            "metric": encode(self.metric) | {"command": None},
            "fit": [self.seed, self.passes],
        }


@dataclass(frozen=True)
class Way:
    """A row.

    Args:
        name: of it.
        run: its processes, from the pair, the grid and a folder, and the directory that each point of the grid is in
            then; None for what is there already.
        grid: the options that it has; of several the best on the calibration records.
        formula: of `peers.FORMULAS`, that its update is held against; None for none.
        note: where it departs from that, in a word.
        of: versions that it depends on.
    """

    name: str
    run: Callable[[Pair, Sequence[Options], Path], Commands] | None
    grid: tuple[Options, ...] = ({},)
    formula: str | None = None
    note: str = ""
    of: str = ""


def peft(combination: str, pair: Pair, grid: Sequence[Options], folder: Path) -> Commands:
    """One process of PEFT for all points, on adapters of one rank where it asks for that."""
    adapters = [path for _, path in pair.adapters]
    if needs_one_rank(combination):
        adapters = padded(adapters, folder)
    calls = [
        {
            "combination_type": combination,
            "weights": [options.get("weight", 1.0)] * len(pair.adapters),
            **({"density": options["density"]} if "density" in options else {}),
        }
        for options in grid
    ]
    request = {"base": str(pair.base.reference.path), "adapters": list(map(str, adapters))}
    words = json.dumps({**request, "calls": calls, "out": str(folder)})
    code = "from benchmarks.paper.peft_process import main; main()"
    return [[sys.executable, "-c", code, words]], [folder / str(i) / COMBINED for i in range(len(grid))]


def needs_one_rank(combination: str) -> bool:
    """Whether PEFT refuses adapters of different ranks: what acts on A and B."""
    return combination != "cat" and not combination.endswith("svd")


def padded(adapters: Sequence[Path], folder: Path) -> list[Path]:
    """Copies with zeros beside the factors, up to the largest rank, and the same updates."""
    configs = [json.loads((adapter / CONFIG_FILE).read_text("utf-8")) for adapter in adapters]
    rank = max(config["r"] for config in configs)
    copies = []
    for number, (adapter, config) in enumerate(zip(adapters, configs, strict=True)):
        copies.append(copy := folder / f"padded{number}")
        copy.mkdir()
        missing = rank - config["r"]
        tensors = {
            name: pad(tensor, (0, 0, 0, missing) if "lora_A" in name else (0, missing))
            for name, tensor in load_file(adapter / TENSOR_FILE).items()
        }
        save_file(tensors, copy / TENSOR_FILE, metadata={"format": "pt"})
        scaled = {"r": rank, "lora_alpha": config["lora_alpha"] * rank / config["r"]}
        (copy / CONFIG_FILE).write_text(json.dumps(config | scaled))
    return copies


def mergekit(
    commands: Path, method: str, pair: Pair, grid: Sequence[Options], folder: Path, *, extract: bool = False
) -> Commands:
    """A full model, and with `extract` the adapter that is taken out of it again."""
    (options,), base = grid, pair.base.reference.path
    parameters = {"weight": options.get("weight", 1.0)}
    parameters |= {"density": options["density"]} if "density" in options else {}
    models = [{"model": f"{base}+{adapter}", "parameters": parameters} for _, adapter in pair.adapters]
    config = {"merge_method": method, "base_model": str(base), "dtype": "bfloat16", "models": models}
    (folder / "merge.yml").write_text(json.dumps(config))  # which is YAML too
    model, baked = folder / "model", folder / "baked"
    words = [[commands / "mergekit-yaml", folder / "merge.yml", model, "--lora-merge-cache", baked]]
    if extract:
        rank = sum(max(read_adapter(str(adapter)).ranks) for _, adapter in pair.adapters)
        taken = [commands / "mergekit-extract-lora", "--model", model, "--base-model", base, "--max-rank", rank]
        words.append([*taken, "--out-path", folder / "extracted"])
    return [[str(word) for word in command] for command in words], [folder / ("extracted" if extract else "model")]


def loracat(words: str, pair: Pair, grid: Sequence[Options], folder: Path) -> Commands:
    """A process for each point; of a fit two."""
    base, adapters = str(pair.base.reference.path), [str(path) for _, path in pair.adapters]
    start = [sys.executable, "-m", "loracli"]
    if words == "fit":
        recipe, passes = str(folder / "recipe.json"), [] if pair.passes is None else ["--passes", str(pair.passes)]
        fit = ["fit", "--adapters", *adapters, "--data", str(pair.calibration), "--base", base]
        fit += ["--seed", str(pair.seed), *passes, "--quiet", "--output", recipe]
        return [[*start, *fit], [*start, "export", recipe, "--quiet", "--output", str(folder / "0")]], [folder / "0"]
    commands, outputs = [], []
    for number, options in enumerate(grid):
        command = [*start, *words.split(), "--adapters", *adapters, "--quiet", "--output", str(folder / str(number))]
        command += ["--scale", str(options["weight"])] if "weight" in options else []
        command += ["--density", str(options["density"])] if "density" in options else []
        method = METHODS[words.split("--method ")[1].split()[0]]
        command += ["--fit-data", str(pair.calibration)] if method.needs_records else []
        command += ["--base", base] if method.needs_records or words.startswith("fuse") else []
        commands.append(command)
        outputs.append(folder / str(number))
    return commands, outputs


def ways(pair: Pair, commands: Path | None) -> list[Way]:
    """Every row; mergekit's only where its commands are."""
    rows = [Way("base", None), *(Way(name, None) for name, _ in pair.adapters), *_of_peft(pair)]
    if commands is not None:
        rows += _of_mergekit(commands, 1 / len(pair.adapters))
    return [*rows, *_of_loracat()]


def _of_peft(pair: Pair) -> list[Way]:
    one_rank = len({max(read_adapter(str(path)).ranks) for _, path in pair.adapters}) == 1

    def row(kind: str, grid: tuple[Options, ...], formula: str | None) -> Way:
        note = _SPLIT if needs_one_rank(kind) else "in the base's dtype" if kind == "cat" else _CUT
        note += "; padded to one rank, as it refuses others" if needs_one_rank(kind) and not one_rank else ""
        name = f"PEFT {kind}{', tuned' if len(grid) > 1 else ''}"
        return Way(name, partial(peft, kind), grid, formula, note, f"peft {version('peft')}")

    average = ({"weight": 1 / len(pair.adapters)},)
    rows = [row("cat", average, "sum"), row("svd", average, "sum")]
    rows += [row("linear", grid, "sum") for grid in (average, _WEIGHTS)]
    for kind, formula in (("ties", "ties"), ("magnitude_prune", "pruned"), ("dare_linear", None), ("dare_ties", None)):
        options = ({"weight": 1.0, "density": _DARE if formula is None else _TIES},)
        rows += [row(kind, options, formula), row(kind, _GRID, formula), row(f"{kind}_svd", options, formula)]
    return [*rows, row("ties_svd", _GRID, "ties")]


def _of_mergekit(commands: Path, share: float) -> list[Way]:
    found = f"mergekit {mergekit_version(commands)}"

    def row(kind: str, options: Options, formula: str | None) -> Way:
        note = "a model; rounded to bfloat16 twice"
        return Way(f"mergekit {kind}", partial(mergekit, commands, kind), (options,), formula, note, found)

    taken = partial(mergekit, commands, "task_arithmetic", extract=True)
    return [
        row("task_arithmetic", {"weight": share}, "sum"),
        Way("mergekit task_arithmetic, extract-lora", taken, ({"weight": share},), "sum", "out of that model", found),
        row("ties", {"weight": 1.0, "density": _TIES}, "ties"),
        row("dare_linear", {"weight": 1.0, "density": _DARE}, None),
        row("dare_ties", {"weight": 1.0, "density": _DARE}, None),
    ]


def _of_loracat() -> list[Way]:
    rows = []
    for name, method in METHODS.items():
        if method.regress is not None:  # wants records of each adapter's own
            continue
        words, formula = f"export --method {name}", {"uniform": "average", "sum": "sum", "svd": "sum", "ties": "ties"}
        grid: tuple[Options, ...] = ({"density": _TIES},) if name == "ties" else ({},)
        note = {"ties": "cut to the sum of ranks", "svd": _CUT}.get(name, "")
        rows.append(Way(f"loracat {words}", partial(loracat, words), grid, formula.get(name), note))
    tuned = Way("loracat export --method ties, tuned", partial(loracat, "export --method ties"), _GRID, "ties")
    for words, note in (("export --method uniform --merge", _CUT), ("fuse --method uniform", "a model, rounded once")):
        rows.append(Way(f"loracat {words}", partial(loracat, words), formula="average", note=note))
    return [*rows, tuned, Way("loracat fit, export", partial(loracat, "fit"))]


def mergekit_version(commands: Path) -> str:
    code = "from importlib.metadata import version; print(version('mergekit'))"
    done = subprocess.run([commands / "python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
