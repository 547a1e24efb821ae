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


def test_the_four_steps_in_six_lines(tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(45))
    adapters = [loracli.fetch_adapter(str(path)) for path in two_adapters]
    recipe = loracli.fit_mixing(adapters, data, base=str(tiny_base), settings=loracli.FitSettings(passes=2))
    recipe.save(tmp_path / "recipe.json")
    exported = loracli.export_adapter(
        loracli.ExportRequest(tmp_path / "recipe.json", merge=True), tmp_path / "adapter-merged"
    )
    assert exported.layout.rank == 4
    size = f"{exported.size_bytes / 1e3:.1f} kB"
    assert repr(recipe).startswith("<Recipe first + second, module, ")
    assert repr(exported) == f"<Exported adapter-merged, first + second, rank 4, 12 modules, float32, {size}>"
    assert repr(loracli.read_adapter(adapters[0])) == "<LoraAdapter first, rank 4, 9 modules, float32>"
    inspected = loracli.inspect_adapters([str(path) for path in two_adapters])
    assert repr(inspected) == "<Inspection first + second, no problems>"
    assert (tmp_path / "adapter-merged" / "adapter_model.safetensors").is_file()
