"""The public names, and what importing them costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import loracli
from tests.tiny import random_records, write_jsonl

LOADED = "import sys; import {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"


def exit_code(module: str) -> int:
    return subprocess.run([sys.executable, "-c", LOADED.format(module=module)], check=False).returncode


@pytest.mark.parametrize("module", ["loracli", "loracli.cli", "loracli.errors"])
def test_importing_loads_nothing_slow(module: str) -> None:
    assert exit_code(module) == 0


def test_the_check_for_slow_imports_can_fail() -> None:
    assert exit_code("loracli.algebra.factors") == 1


def test_every_public_name_resolves_and_no_other_does() -> None:
    assert loracli.__all__ == sorted(loracli.__all__, key=lambda name: (name.lower() == name, name))
    for name in loracli.__all__:
        assert getattr(loracli, name) is getattr(loracli, name)
        assert name in dir(loracli)
    with pytest.raises(AttributeError):
        loracli.no_such_name  # noqa: B018


def test_weights_by_hand_in_six_lines(tmp_path: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = [str(path) for path in two_adapters]
    composed = loracli.compose(adapters, [0.7, -0.3])
    composed.export(tmp_path / "cat")
    merged = composed.export(tmp_path / "merged", merge=True, rank=3)
    loracli.export_adapter(loracli.ExportRequest(adapters=adapters, weights=[0.7, -0.3]), tmp_path / "asked")

    written = [(tmp_path / name / "loracat.json").read_bytes() for name in ("cat", "asked")]
    assert written[0] == written[1] and merged.layout.rank == 3
    assert loracli.compose(two_adapters, {"#1": {"default": 0.7}, "#2": {"default": -0.3}}).composition.names()
    with pytest.raises(TypeError, match=r"weights is for compose"):
        composed.export(tmp_path / "no", weights=[1, 1])
    with pytest.raises(loracli.LoracatError, match="--rank is for --merge"):
        composed.export(tmp_path / "no", rank=3)
    with pytest.raises(loracli.LoracatError, match="1 number for 2 adapters"):
        loracli.compose(adapters, [0.7])


def test_the_four_steps_in_six_lines(tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(45))
    adapters = [loracli.fetch_adapter(str(path)) for path in two_adapters]
    recipe = loracli.fit_mixing(adapters, data, base=str(tiny_base), settings=loracli.FitSettings(passes=2))
    recipe.save(tmp_path / "recipe.json")
    exported = loracli.export_adapter(
        loracli.ExportRequest(tmp_path / "recipe.json", merge=True), tmp_path / "adapter-merged"
    )
    assert exported.layout.rank == 4
    assert (tmp_path / "adapter-merged" / "adapter_model.safetensors").is_file()
