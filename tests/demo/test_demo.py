"""The embedded example is what it says, and the demo tells the truth about it."""

import json
import shutil
from pathlib import Path

import pytest

import loracli
from loracli.calibration.records import read_records
from loracli.demo.run import EXAMPLE, DemoResult, example_folder, run_demo
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.recipe.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    return run_demo(folder)


def test_what_is_kept_is_whole_wherever_it_goes(result: DemoResult, folder: Path, tmp_path: Path) -> None:
    """The recipe finds its ingredients beside it, and an export that is made of the copy has the same bytes."""
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert {path.name for path in copy.iterdir()} >= {*EXAMPLE, "recipe.json", "adapter-cat", "adapter-merged"}
    assert [adapter.reference for adapter in load_recipe(copy / "recipe.json").adapters] == ["know", "form"]
    again = export_adapter(ExportRequest(copy / "recipe.json"), tmp_path / "again").path
    assert (again / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter-cat" / "adapter_model.safetensors"
    ).read_bytes()


def accuracy(result: DemoResult, name: str) -> float:
    row = next(row for row in result.rows if row.name == name)
    return row.correct / row.questions


def test_no_question_and_no_person_of_the_test_is_in_the_calibration_file() -> None:
    people = []
    for name in ("calibration.jsonl", "test.jsonl"):
        records = read_records(example_folder() / name).records
        words = [record.content["prompt"].replace("?", " ").split() for record in records]
        people.append({pair for line in words for pair in zip(line, line[1:], strict=False) if _is_name(pair)})
        assert people[-1]
    assert not people[0] & people[1]


def _is_name(pair: tuple[str, str]) -> bool:
    return all(word.removesuffix("'s").isalpha() and word[0].isupper() for word in pair)


def test_the_package_stays_small() -> None:
    package = Path(loracli.__file__).parent
    size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert size < 4_300_000


def test_the_adapters_are_two_of_different_ranks_on_one_base() -> None:
    configs = [json.loads((example_folder() / n / "adapter_config.json").read_text()) for n in ("know", "form")]
    assert [config["r"] for config in configs] == [16, 8]
    assert len({config["base_model_name_or_path"] for config in configs}) == 1


def test_only_the_composition_answers_the_questions(result: DemoResult) -> None:
    assert accuracy(result, "fit") > 0.6
    for name in ("base", "know", "form", "uniform", "sum", "fresh LoRA"):
        assert accuracy(result, name) < 0.3


def test_the_exported_adapter_answers_as_the_fit_does(result: DemoResult) -> None:
    losses = {row.name: row.nats_per_token for row in result.rows}
    assert abs(losses["exported"] - losses["fit"]) < 1e-3
    assert abs(accuracy(result, "exported") - accuracy(result, "fit")) <= 2 / 128
    assert abs(accuracy(result, "exported, merged") - accuracy(result, "fit")) < 0.1
