"""Modules that adapters saved whole stand in the fused model in the place of the base's, as stock PEFT runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.composition.card import closed
from loracli.errors import BaseModelMismatch, LoracatError, UnsupportedAdapter, UsageError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.verifying.verify import verify_directory
from tests.fitting.test_modules_to_save import WEIGHTS, make_saving, saved_tensors
from tests.fusing.test_fuse import load, shard, tensors
from tests.test_whole_way import fit_case
from tests.tiny import logits, make_adapter, make_base

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(base), adapter).eval())


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("llama", ["embed_tokens", "lm_head"]),
        ("llama", ["lm_head", "norm"]),
        ("llama-tied", ["embed_tokens"]),
        ("llama-tied", ["lm_head"]),
        ("llama-tied", ["embed_tokens", "lm_head"]),
        ("neox", ["final_layer_norm"]),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_fused_adapter_is_what_peft_runs(tmp_path: Path, kind: str, modules: list[str], sharded: bool) -> None:
    base = make_base(tmp_path / "base", kind)
    targets = ("query_key_value",) if kind == "neox" else ("q_proj", "v_proj")
    adapter = make_saving(tmp_path / "a", base, modules, seed=1, targets=targets)
    expected = peft_logits(base, adapter)
    if sharded:
        shard(base)
    fused = fuse_model(FuseRequest(adapter, base=str(base)), tmp_path / "out")
    assert {m for m in modules if any(name.endswith(m) for name in fused.replaced)} == set(modules)
    assert fused.untied == (kind == "llama-tied")
    assert float((expected - logits(load(base))).abs().max()) > 1e-2
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-4)
    verify_directory(tmp_path / "out", adapters=[str(adapter)], base=str(base))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A base; an adapter that saved head and last norm, one that saved the head."""
    folder = tmp_path_factory.mktemp("saved")
    base = make_base(folder / "base")
    first = make_saving(folder / "first", base, ["lm_head", "model.norm"], seed=1)
    return base, [str(first), str(make_saving(folder / "second", base, ["lm_head"], seed=2))]


@pytest.mark.parametrize("policy", ["average", "pick:second"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_policy_decides_and_each_value_is_rounded_once(
    tmp_path: Path, made: tuple[Path, list[str]], policy: str, dtype: str | None
) -> None:
    base, names = made
    options: dict[str, Any] = {"adapters": names, "base": str(base), "modules_to_save": policy}
    fuse_model(FuseRequest(method="sum", dtype=dtype, **options), tmp_path / "out")
    saved = [saved_tensors(Path(name)) for name in names]
    head, norm = "base_model.model.lm_head.weight", "base_model.model.model.norm.weight"
    both = (saved[0][head].double() + saved[1][head].double()) / 2
    exact = both if policy == "average" else saved[1][head]
    found, own = tensors(tmp_path / "out"), tensors(base)
    kept = torch.float32 if dtype is None else torch.bfloat16
    assert torch.equal(found["lm_head.weight"], exact.to(kept))
    other = saved[0][norm] if policy == "average" else own["model.norm.weight"]
    assert torch.equal(found["model.norm.weight"], other.to(kept))
    verify_directory(tmp_path / "out", adapters=names, base=str(base))
    export_adapter(ExportRequest(method="sum", **options), tmp_path / "adapter")
    if dtype is None:
        expected = peft_logits(base, tmp_path / "adapter")
        torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-4)


def test_a_recipe_knows_what_it_was_fitted_with(tmp_path: Path, made: tuple[Path, list[str]]) -> None:
    base, names = made
    recipe = fit_case(tmp_path, base, [Path(name) for name in names], modules_to_save="pick:second")
    recipe.save(tmp_path / "recipe.json")
    fused = fuse_model(FuseRequest(tmp_path / "recipe.json", base=str(base)), tmp_path / "out")
    assert fused.replaced == ("lm_head",)
    export_adapter(ExportRequest(recipe), tmp_path / "adapter")
    expected = peft_logits(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-4)
    assert "`lm_head`" in (tmp_path / "out" / "README.md").read_text()
    verify_directory(tmp_path / "out", recipe=tmp_path / "recipe.json", base=str(base))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_one_value_that_was_changed_is_found(tmp_path: Path, made: tuple[Path, list[str]], name: str) -> None:
    import hashlib

    base, names = made
    fuse_model(FuseRequest(names[0], base=str(base)), tmp_path / "out")
    path, where = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "loracat-fuse.json"
    whole = load_file(path)
    value = whole[name].view(-1)[3]
    whole[name].view(-1)[3] = torch.nextafter(value, value + 1)
    save_file(whole, path, metadata={"format": "pt"})
    document = json.loads(where.read_text())
    document["certificate"]["files"]["model.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    where.write_text(json.dumps(closed(document)))
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "out", adapters=names[:1], base=str(base))
    assert [name in problem for problem in caught.value.problems] == [True]


def test_a_resized_vocabulary_needs_the_resized_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(261, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    resized = make_saving(tmp_path / "a", tmp_path / "resized", ["embed_tokens", "lm_head"], seed=1)
    with pytest.raises(BaseModelMismatch, match=r"\(261, 32\)") as caught:
        fuse_model(FuseRequest(resized, base=str(base)), tmp_path / "out")
    assert "resized" in str(caught.value.hint) and not (tmp_path / "out").exists()
    fuse_model(FuseRequest(resized, base=str(tmp_path / "resized")), tmp_path / "out")
    expected = peft_logits(tmp_path / "resized", resized)
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"method": "sum"}, UnsupportedAdapter, "--modules-to-save"),
        ({"method": "sum", "modules_to_save": "some"}, UsageError, "pick:NAME"),
        ({"alone": True, "modules_to_save": "average"}, UsageError, "leave it out"),
    ],
)
def test_without_a_policy_or_where_it_has_no_use_it_is_refused(
    tmp_path: Path, made: tuple[Path, list[str]], options: dict[str, Any], error: type[LoracatError], said: str
) -> None:
    base, names = made
    alone = options.pop("alone", False) if "alone" in (options := dict(options)) else False
    adapters = [] if alone else names
    with pytest.raises(error) as caught:
        fuse_model(
            FuseRequest(names[0] if alone else None, adapters=adapters, base=str(base), **options), tmp_path / "out"
        )
    assert said in f"{caught.value} {caught.value.hint}" and not (tmp_path / "out").exists()


def test_a_saved_value_that_overflows_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)
    adapter = make_adapter(tmp_path / "a", base, modules_to_save=["lm_head"])
    whole = load_file(adapter / WEIGHTS)
    whole["base_model.model.lm_head.weight"] = torch.full((259, 32), 1e5)
    save_file(whole, adapter / WEIGHTS)
    with pytest.raises(UsageError, match=r"lm_head\.weight overflows float16"):
        fuse_model(FuseRequest(adapter, base=str(base)), tmp_path / "out")
    fuse_model(FuseRequest(adapter, base=str(base), dtype="bfloat16"), tmp_path / "out")
