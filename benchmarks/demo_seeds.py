"""The demo on examples made from several seeds; prints Markdown for docs/results.md.

    python benchmarks/demo_seeds.py --seeds 0 1 2

Makes each example from nothing with scripts/make_demo.py (its people and facts, its base model, its two adapters), then
runs what `loracat demo` runs. Some minutes for each seed; --quick makes none and runs a part of the embedded one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.made_inputs import part_of_example
from benchmarks.measuring import BenchmarkParser, left_out
from loracli.demo.run import DemoResult, run_demo

MAKER = Path(__file__).parent.parent / "scripts" / "make_demo.py"


def make_example(folder: Path, seed: int) -> Path:
    """Runs the maker on one core."""
    example = folder / f"seed{seed}"
    command = [sys.executable, str(MAKER), "--seed", str(seed), "--out", str(example)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return example


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], quick=[0])
    parser.add_argument("--jobs", type=int, default=2, help="examples made at the same time")
    arguments = parser.parse_args()
    results: dict[int, DemoResult] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            left_out("making an example, which takes minutes; this is a part of the embedded one")
            examples = [part_of_example(Path(scratch) / "part", calibration=4, test=4)] * len(arguments.seeds)
        else:
            with ThreadPoolExecutor(arguments.jobs) as pool:
                examples = list(pool.map(lambda seed: make_example(Path(scratch), seed), arguments.seeds))
        for seed, example in zip(arguments.seeds, examples, strict=True):
            output = Path(scratch) / f"run{seed}"
            output.mkdir()
            results[seed] = run_demo(output, example=example)
    print("| | " + " | ".join(f"seed {seed}" for seed in results) + " |")
    print("|---|" + "--:|" * len(results))
    for index, first in enumerate(next(iter(results.values())).rows):
        rows = [result.rows[index] for result in results.values()]
        cells = [f"{row.correct / row.questions:.0%}, {row.nats_per_token:.3f}" for row in rows]
        print(f"| {first.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
