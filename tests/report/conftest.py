"""A recipe with a comparison of it, from a tiny fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from loracli.comparison.compare import run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.settings import CompareSettings
from loracli.evaluation.metrics import TaskMetric
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from tests.tiny import random_records, write_jsonl


@dataclass(frozen=True)
class Story:
    """Where recipe and comparison are."""

    recipe: Path
    comparison: Path


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, two_adapters: tuple[Path, Path]) -> Story:
    folder = tmp_path_factory.mktemp("story")
    data = write_jsonl(folder / "val.jsonl", random_records(50))
    records = [{**r, "task": ["odd", "even"][i % 2]} for i, r in enumerate(random_records(24, seed=2))]
    test = write_jsonl(folder / "test.jsonl", records)
    recipe = fit_mixing(
        [str(path) for path in two_adapters], data, eval_data=test, base=str(tiny_base), settings=FitSettings(passes=5)
    )
    recipe.save(folder / "recipe.json")
    inputs = prepare_comparison(
        test, recipe=folder / "recipe.json", base=str(tiny_base), settings=CompareSettings(("data-free",)), guard=data
    )
    found = run_comparison(inputs, metric=TaskMetric("contains", max_new_tokens=4))
    (folder / "comparison.json").write_text(json.dumps(found.as_dict()))
    return Story(folder / "recipe.json", folder / "comparison.json")
