"""Math and code: GSM8K with worked solutions, MBPP from description to Python; the task is GSM-Hard answered by a
Python function, the paper's own kind.

From a folder with the files {math,code}_train, {math,code}_calib, composite_calib and composite_dev, as
`.messages.jsonl` (`--math-code-data`).
"""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.skills.training import ATTENTION, EVERY_LINEAR, Training

ADAPTERS = ("math", "code")
TRAINING = {
    "math": Training(16, EVERY_LINEAR, rate=6e-4, epochs=1, batch_size=6),
    "code": Training(8, ATTENTION, rate=1e-3, epochs=1, batch_size=8),
    "datamix": Training(16, EVERY_LINEAR, rate=6e-4, epochs=1, batch_size=7),
}
TRAINED_ON = {"math": 400, "code": 512}
SKILL_RECORDS = 40  # of each skill, for calibration


def write_data(out: Path, source: Path, seed: int) -> None:
    """Takes the parts that are used out of the files of `source`; the seed decides which."""
    rng = random.Random(seed)

    def lines(name: str) -> list[str]:
        return (source / f"{name}.messages.jsonl").read_text().splitlines(keepends=True)

    skills: list[str] = []
    for name, count in TRAINED_ON.items():
        (out / f"{name}_train.jsonl").write_text("".join(rng.sample(lines(f"{name}_train"), count)))
        skills += lines(f"{name}_calib")[:SKILL_RECORDS]
    rng.shuffle(skills)
    composite = lines("composite_calib")
    rng.shuffle(composite)
    files = {"skills_calib": skills, "composite_calib": composite, "composite_test": lines("composite_dev")}
    for name, records in files.items():
        (out / f"{name}.jsonl").write_text("".join(records))
