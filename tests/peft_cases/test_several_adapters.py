"""An export of ours in stock PEFT beside other adapters: switched, merged, taken out, disabled, swapped, saved again.

After tests/testing_common.py (`_test_merge_layers`, `_multi`, `_is_idempotent`, `_fp16`, `_test_safe_merge`,
`_test_disable_adapter`, `_test_mixed_adapter_batches`), tests/test_custom_models.py (several active adapters) and
tests/test_initialization.py (hot-swapping).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.peft_cases.composition import (
    assert_same,
    assert_update,
    build,
    changes,
    delta_weights,
    dense,
    export,
    load,
    lora_config,
    outputs,
    save_adapter,
    weighted,
)

KINDS = ["llama", "gpt2", "qwen2", "gemma3"]
WEIGHTS = (0.7, -0.4)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Soup:
    """A model, two adapters of different rank and alpha, our export, and what they should give."""

    folder: Path
    kind: str
    model: Any
    paths: dict[str, Path]
    parts: dict[str, dict[str, Tensor]]
    unchanged: Tensor

    def load(self, *names: str) -> Any:
        return load(self.model, {name: self.paths[name] for name in names})

    def expected(self, **weights: float) -> Tensor:
        """By the dense formula; `ours` is an adapter like the others."""
        return outputs(dense(self.model, weighted([self.parts[n] for n in weights], list(weights.values()))))

    def check(self, found: Tensor, *, tolerance: float, **weights: float) -> None:
        assert_same(found, self.expected(**weights), self.unchanged, tolerance=tolerance)


@pytest.fixture(scope="module", params=KINDS)
def soup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Soup:
    folder, kind = tmp_path_factory.mktemp("soup"), request.param
    model = build(kind)
    paths = {
        "one": save_adapter(folder / "one", model, lora_config(kind), seed=1),
        "two": save_adapter(folder / "two", model, lora_config(kind, r=3, lora_alpha=4), seed=2),
    }
    parts = {name: changes(model, path) for name, path in paths.items()}
    paths["ours"] = export(folder / "ours", model, list(paths.values()), WEIGHTS)
    parts["ours"] = weighted([parts["one"], parts["two"]], WEIGHTS)
    return Soup(folder, kind, model, paths, parts, outputs(model))


def test_merged_into_the_base_taken_out_and_unloaded(soup: Soup, tmp_path: Path) -> None:
    peft_model = soup.load("ours")
    soup.check(outputs(peft_model), tolerance=1e-4, ours=1)
    peft_model.merge_adapter()
    soup.check(outputs(peft_model), tolerance=1e-4, ours=1)
    with pytest.warns(UserWarning, match="already merged"):
        peft_model.merge_adapter()
    soup.check(outputs(peft_model), tolerance=1e-6, ours=1)
    peft_model.unmerge_adapter()
    soup.check(outputs(peft_model), tolerance=1e-4, ours=1)
    with peft_model.disable_adapter():
        torch.testing.assert_close(outputs(peft_model), soup.unchanged, atol=1e-5, rtol=1e-5)
    merged = peft_model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    soup.check(outputs(merged), tolerance=1e-4, ours=1)
    merged.save_pretrained(tmp_path)
    soup.check(outputs(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), tolerance=1e-4, ours=1)
    safely = soup.load("ours").merge_and_unload(safe_merge=True)
    soup.check(outputs(safely), tolerance=1e-6, ours=1)


def test_beside_its_ingredients_it_is_switched_disabled_and_merged(soup: Soup) -> None:
    peft_model = soup.load("one", "two", "ours")
    for name in ("ours", "one", "ours", "two", "ours"):
        peft_model.set_adapter(name)
        assert peft_model.active_adapters == [name]
        soup.check(outputs(peft_model), tolerance=1e-5, **{name: 1})
    with peft_model.disable_adapter():
        assert torch.equal(outputs(peft_model), soup.unchanged)
    soup.check(outputs(peft_model), tolerance=1e-6, ours=1)
    peft_model.base_model.set_adapter(["ours", "one"])
    soup.check(outputs(peft_model), tolerance=1e-5, ours=1, one=1)
    peft_model.merge_adapter(adapter_names=["ours"])
    with pytest.warns(UserWarning, match="additionally merging"):
        peft_model.merge_adapter(adapter_names=["two"])  # one after the other is the same as both at once
    soup.check(outputs(peft_model), tolerance=1e-5, ours=1, two=1)
    peft_model.unmerge_adapter()
    peft_model.delete_adapter("one")
    peft_model.set_adapter("ours")
    soup.check(outputs(peft_model), tolerance=1e-5, ours=1)
    soup.check(outputs(peft_model.merge_and_unload(adapter_names=["two", "ours"])), tolerance=1e-3, ours=1, two=1)


def test_a_batch_mixes_it_with_its_ingredients_and_the_bare_base(soup: Soup) -> None:
    names = ["ours", "__base__", "two", "one"]
    found = outputs(soup.load("one", "two", "ours"), adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            torch.testing.assert_close(found[row], soup.unchanged[row], atol=1e-4, rtol=1e-4)
        else:
            assert_same(found[row], soup.expected(**{name: 1})[row], soup.unchanged[row], tolerance=1e-4)


def test_both_ingredients_active_at_once_are_our_sum(soup: Soup, tmp_path: Path) -> None:
    path = export(tmp_path / "sum", soup.model, [soup.paths["one"], soup.paths["two"]], (1, 1))
    peft_model = load(soup.model, {"one": soup.paths["one"], "two": soup.paths["two"], "sum": path})
    peft_model.base_model.set_adapter(["one", "two"])
    both = outputs(peft_model)
    peft_model.set_adapter("sum")
    torch.testing.assert_close(outputs(peft_model), both, atol=1e-5, rtol=1e-5)
    soup.check(both, tolerance=1e-5, one=1, two=1)


def test_saved_again_by_peft_it_is_the_same_and_an_ingredient_like_any_other(soup: Soup, tmp_path: Path) -> None:
    soup.load("ours").save_pretrained(tmp_path, save_embedding_layers=False)
    again = tmp_path / "ours"
    written, rewritten = (load_file(p / "adapter_model.safetensors") for p in (soup.paths["ours"], again))
    assert written.keys() == rewritten.keys()
    assert all(torch.equal(written[name], rewritten[name]) for name in written)
    soup.check(outputs(load(soup.model, {"again": again})), tolerance=1e-6, ours=1)

    itself = export(tmp_path / "itself", soup.model, [again], [1])
    assert_update(load(soup.model, {"itself": itself}), "itself", soup.parts["ours"], tolerance=1e-6)

    ingredients = [again, soup.paths["one"], soup.paths["two"]]
    nothing = load(soup.model, {"nothing": export(tmp_path / "nothing", soup.model, ingredients, (-1, *WEIGHTS))})
    for name, change in delta_weights(nothing, "nothing").items():
        assert float(change.norm()) <= 1e-6 * float(soup.parts["ours"][name].norm())


def test_one_export_is_swapped_for_another_in_place(soup: Soup, tmp_path: Path) -> None:
    other = export(tmp_path / "other", soup.model, [soup.paths["one"], soup.paths["two"]], (-1.5, 0.25))
    peft_model = soup.load("ours")
    hotswap_adapter(peft_model, other, adapter_name="ours", torch_device="cpu")
    soup.check(outputs(peft_model), tolerance=1e-4, one=-1.5, two=0.25)
    hotswap_adapter(peft_model, soup.paths["ours"], adapter_name="ours", torch_device="cpu")
    soup.check(outputs(peft_model), tolerance=1e-4, ours=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_rounded_once_and_merge_into_a_half_precision_base(
    soup: Soup, tmp_path: Path, dtype: str
) -> None:
    """A is written as it is and each entry of B is off by at most half a unit in the last place; in norm, so is dW."""
    half = DTYPES[dtype]
    own = [
        save_adapter(tmp_path / f"a{i}", soup.model, lora_config(soup.kind, r=r), i, half) for i, r in enumerate((8, 3))
    ]
    exact = weighted([changes(soup.model, path) for path in own], WEIGHTS)
    path = export(tmp_path / "ours", soup.model, own, WEIGHTS)
    assert {tensor.dtype for tensor in load_file(path / "adapter_model.safetensors").values()} == {half}
    unit = float(torch.finfo(half).eps) / 2
    assert_update(load(soup.model, {"ours": path}), "ours", exact, tolerance=1e-2, close=unit)
    full = export(tmp_path / "full", soup.model, own, WEIGHTS, dtype="float32")
    assert_update(load(soup.model, {"full": full}), "full", exact, tolerance=1e-6)
    merged = load(copy.deepcopy(soup.model).to(half), {"ours": path}).merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {half}
    found, expected = outputs(merged).double(), outputs(dense(soup.model, exact))
    assert float((found - expected).norm()) <= 8 * unit * float(expected.norm())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice on tied layers
@pytest.mark.parametrize("kind", ["gemma", "opt"])
def test_tied_embeddings_are_changed_apart_and_merge_once_they_are_untied(tmp_path: Path, kind: str) -> None:
    """One adapter changes the input side, the other the head: live on the tied base, merged into an untied copy."""
    tied = build(kind)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    own = [
        save_adapter(tmp_path / "input", tied, lora_config(kind, target_modules=["embed_tokens"], r=2), seed=1),
        save_adapter(tmp_path / "head", tied, lora_config(kind, target_modules=["lm_head", "q_proj"]), seed=2),
    ]
    change = weighted([changes(untied, path) for path in own], WEIGHTS)
    expected, unchanged = outputs(dense(untied, change)), outputs(tied)
    path = export(tmp_path / "ours", tied, own, WEIGHTS)
    assert_same(outputs(load(tied, {"ours": path})), expected, unchanged, tolerance=1e-4)
    merged = load(untied, {"ours": path}).merge_and_unload()
    assert_same(outputs(merged), expected, unchanged, tolerance=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert_same(outputs(again), expected, unchanged, tolerance=1e-4)
