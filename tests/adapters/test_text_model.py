"""Adapters that were trained inside a larger model, on its text model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loracli.adapters.adapter import read_adapter
from loracli.adapters.on_base import as_text_model
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.errors import BaseModelMismatch
from loracli.export.method import export_method
from tests.test_whole_way import assert_whole_way, fit_case, nats_of_peft
from tests.tiny import make_adapter

WEIGHTS = "adapter_model.safetensors"
SPELLINGS = {
    "new": ("model.layers", "model.language_model.layers"),
    "old": ("model.layers", "language_model.model.layers"),
}


def moved_inside(peft: Path, folder: Path, how: str, *, beside: bool = False) -> Path:
    """The same numbers by the names of a model around the text model; `beside`: with a module of another part."""
    folder.mkdir()
    tensors = load_file(peft / WEIGHTS)
    inside = {name.replace(*SPELLINGS[how]): tensor for name, tensor in tensors.items()}
    if beside:
        A, B = (next(t for n, t in sorted(tensors.items()) if part in n) for part in ("lora_A", "lora_B"))
        name = "base_model.model.model.visual.blocks.0.q_proj"
        inside |= {f"{name}.lora_A.weight": A.clone(), f"{name}.lora_B.weight": B.clone()}
    save_file(inside, folder / WEIGHTS)
    (folder / "adapter_config.json").write_bytes((peft / "adapter_config.json").read_bytes())
    return folder


@pytest.mark.parametrize("how", SPELLINGS)
def test_they_go_the_whole_way_beside_one_of_the_text_model(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], how: str
) -> None:
    inside = moved_inside(two_adapters[0], tmp_path / "inside", how)
    recipe = fit_case(tmp_path, tiny_base, [inside, two_adapters[1]])
    assert all("language_model" not in name for name in recipe.mixing.weights)
    assert_whole_way(tmp_path, tiny_base, recipe, list(two_adapters))


def test_a_method_and_a_comparison_see_the_same(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    names = [str(moved_inside(two_adapters[0], tmp_path / "inside", "new")), str(two_adapters[1])]
    fit_case(tmp_path, tiny_base, [two_adapters[1]])  # writes the records
    export_method("sum", tmp_path / "sum", adapters=names, base=str(tiny_base))
    found = compare_adapters(
        tmp_path / "test.jsonl", adapters=names, base=str(tiny_base), settings=CompareSettings(("sum",))
    )
    rows = {row.name: row.nats_per_token for row in found.rows}
    for row, witness in ((names[0], two_adapters[0]), ("sum", tmp_path / "sum")):
        assert rows[row] == pytest.approx(nats_of_peft(tiny_base, witness, tmp_path / "test.jsonl"), rel=2e-5)


def test_without_every_module_in_the_base_nothing_is_renamed(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    inside = moved_inside(two_adapters[0], tmp_path / "inside", "new", beside=True)
    with pytest.raises(BaseModelMismatch, match="language_model"):
        fit_case(tmp_path, tiny_base, [inside])


def test_a_base_that_has_them_keeps_them(tmp_path: Path, two_adapters: tuple[Path, Path]) -> None:
    adapter = read_adapter(str(moved_inside(two_adapters[0], tmp_path / "inside", "new")))
    own = set(adapter.modules)
    plain = {name.replace("language_model.", "") for name in own}
    assert as_text_model(adapter, own) is adapter
    assert as_text_model(adapter, own | plain) is adapter
    assert as_text_model(adapter, set()) is adapter
    assert set(as_text_model(adapter, plain).modules) == plain


def test_saved_modules_and_copies_go_by_the_same_names(tmp_path: Path, tiny_base: Path) -> None:
    peft = make_adapter(tmp_path / "a", tiny_base, targets=("embed_tokens",), modules_to_save=["layers.0.mlp"])
    tensors = load_file(peft / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = load_file(tiny_base / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    save_file({n.replace("base_model.model.model.", "base_model.model.model.language_model."): t
               for n, t in tensors.items()}, peft / WEIGHTS)  # fmt: skip
    found = as_text_model(read_adapter(str(peft)), {"model.embed_tokens"})
    assert list(found.modules) == list(found.base_copies) == ["model.embed_tokens"]
    assert list(found.saved) == ["model.layers.0.mlp"]
    assert all(path.startswith("model.layers.0.mlp.") for path in found.saved["model.layers.0.mlp"])
    assert json.loads((peft / "adapter_config.json").read_text())["modules_to_save"] == ["layers.0.mlp"]
