"""A fused model is the base with the formula's update in its weights, as transformers loads it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from loracli.adapters.adapter import read_adapter
from loracli.composition.weights import weight_tables
from loracli.errors import (
    BaseModelMismatch,
    LoracatError,
    OutOfResources,
    OutputExists,
    StateMismatch,
    UnsupportedAdapter,
    UsageError,
)
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fusing import workplace
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.model.base import plan_base
from loracli.model.checkpoint import loaded_names
from loracli.model.reference import BaseReference
from loracli.recipe.recipe import Recipe
from loracli.verifying.verify import verify_directory
from tests.export.test_export import CASES, Made
from tests.heard import Heard
from tests.tiny import logits, make_adapter, make_base


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def exact_update(recipe: Recipe, made: Made, module: str) -> torch.Tensor:
    """sum_i w_i s_i B_i A_i in float64, dense."""
    parts = [
        float(weight or 0) * adapter.modules[module].factors.delta_weight()
        for weight, adapter in zip(recipe.weights_of(module), made.adapters, strict=True)
        if module in adapter.modules
    ]
    return torch.stack(parts).sum(0)


def shard(folder: Path, files: int = 3, *, prefix: str = "") -> None:
    """Divides the one file of a base into several with an index; `prefix` is taken off every name."""
    whole = {n.removeprefix(prefix): t for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {name: whole[name] for name in names[i::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tree(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("case", CASES)
def test_a_fused_model_has_the_attached_models_logits(tmp_path: Path, case: str) -> None:
    made = Made(tmp_path, case)
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    scale = float((made.logits - made.base_logits).abs().max())
    assert scale > 1e-2
    torch.testing.assert_close(logits(load(tmp_path / "out")), made.logits, rtol=0, atol=2e-5 * max(scale, 1.0))


@pytest.mark.parametrize("case", ["embeddings", "conv1d of two shapes", "mixed ranks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_is_the_float64_sum_rounded_once(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    made = Made(tmp_path, case)
    base = make_base(tmp_path / "other", CASES[case][0], dtype=dtype)
    fuse_model(FuseRequest(made.recipe, base=str(base)), tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    transposed = "conv1d" in case
    assert before.keys() == after.keys()
    changed = {
        (f"{m}.weight" if f"{m}.weight" in before else f"{m.removeprefix('transformer.')}.weight"): m
        for m in made.recipe.mixing.weights
    }
    assert changed.keys() <= before.keys()
    for name, weight in before.items():
        assert after[name].dtype == dtype
        if name not in changed:
            assert torch.equal(after[name], weight)
            continue
        update = exact_update(made.recipe, made, changed[name])
        exact = weight.double() + (update.T if transposed or "embed" in name else update)
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert float(((after[name].double() - exact).abs() / spacing).max()) <= 0.5 + 1e-3
        assert (after[name] != exact.to(dtype)).double().mean() < 5e-3  # ties
        assert not torch.equal(after[name], weight)


def test_weights_by_hand_make_the_model_of_a_recipe_with_these_weights(tmp_path: Path) -> None:
    made = Made(tmp_path, "disjoint targets")
    names, base = [str(path) for path in made.paths], str(made.base)
    tables = weight_tables(["#1", "#2"], made.recipe.mixing.weights)
    fuse_model(FuseRequest(made.recipe, base=base), tmp_path / "recipe")
    fused = fuse_model(FuseRequest(adapters=names, weights=tables, base=base), tmp_path / "hand")
    assert fused.modules == len(made.recipe.mixing.weights)
    expected, found = tensors(tmp_path / "recipe"), tensors(tmp_path / "hand")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert verify_directory(tmp_path / "hand", adapters=names, base=base).not_checked == ()
    assert "weights that were set by hand" in (tmp_path / "hand" / "README.md").read_text()
    with pytest.raises(UsageError, match="--weights and --method both"):
        fuse_model(FuseRequest(adapters=names, weights=(1, 1), method="sum", base=base), tmp_path / "no")


def test_two_roundings_would_show(tmp_path: Path) -> None:
    """What PEFT's merge does to a bfloat16 model with bfloat16 factors misses many entries of the exact result."""
    made = Made(tmp_path, "plain")
    base = make_base(tmp_path / "other", "llama", dtype=torch.bfloat16)
    weight = tensors(base)["model.layers.0.self_attn.q_proj.weight"]
    update = exact_update(made.recipe, made, "model.layers.0.self_attn.q_proj")
    twice = weight + update.to(torch.bfloat16)
    assert (twice != (weight.double() + update).to(torch.bfloat16)).double().mean() > 0.02


def test_shards_and_a_missing_prefix_make_no_difference(tmp_path: Path) -> None:
    made = Made(tmp_path, "conv1d of two shapes")
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "one")
    shard(made.base, 3, prefix="transformer.")
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "three")
    one, three = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert {n.removeprefix("transformer."): t.tolist() for n, t in one.items()} == {
        n.removeprefix("transformer."): t.tolist() for n, t in three.items()
    }
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "three")))
    index = "model.safetensors.index.json"
    assert (tmp_path / "three" / index).read_bytes() == (made.base / index).read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_one_of_two_tied_matrices_unties_them(tmp_path: Path, target: str, sharded: bool) -> None:
    base = make_base(tmp_path / "base", "llama-tied")
    if sharded:
        shard(base)
    tied = tensors(base)["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tensors(base)
    adapter = make_adapter(tmp_path / "a", base, targets=(target,))
    fused = fuse_model(FuseRequest(adapters=[str(adapter)], method="sum", base=str(base)), tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (next(t for n, t in factors.items() if f"_{side}" in n).double() for side in "AB")
    update = 2.0 * (b @ a)  # alpha 8 of rank 4
    update = update.T if target == "embed_tokens" else update
    assert fused.untied
    after, config = tensors(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    other = {"embed_tokens": "lm_head.weight", "lm_head": "model.embed_tokens.weight"}[target]
    own = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}[target]
    assert torch.equal(after[own], (tied.double() + update).float()) and torch.equal(after[other], tied)
    assert config["tie_word_embeddings"] is False
    del config["tie_word_embeddings"]
    assert config == {
        k: v for k, v in json.loads((base / "config.json").read_text()).items() if k != "tie_word_embeddings"
    }
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in after.values())
    with pytest.warns(UserWarning, match="tie_word_embeddings") if target == "lm_head" else pytest.warns(UserWarning):
        attached = logits(PeftModel.from_pretrained(load(base), adapter).eval())
    assert torch.allclose(logits(load(tmp_path / "out")), attached, atol=1e-4)


class Stop(BaseException):
    """As a signal: nothing catches it."""


class StopAfter:
    """A `Progress` that stops the work after some blocks."""

    def __init__(self, blocks: int) -> None:
        self.left, self.notes = blocks, []  # type: ignore[var-annotated]

    def advance(self, task: str, amount: int, status: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop

    def begin(self, task: str, total: int | None, unit: str) -> None: ...
    def expect(self, task: str, total: int) -> None: ...
    def finish(self, task: str) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)

    warn = note


def test_a_fusion_stopped_at_any_block_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    shard(made.base, 3)
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "whole")
    blocks = len(tensors(made.base))
    for stop in range(0, blocks, 4):
        with pytest.raises(Stop):
            fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", progress=StopAfter(stop))
        assert not (tmp_path / "out").exists()
        told = StopAfter(10**6)
        fused = fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", resume=True, progress=told)
        assert fused.resumed == stop // (blocks // 3)
        assert any("going on from" in note for note in told.notes)
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")
        assert sorted(p.name for p in tmp_path.iterdir() if "fusing" in p.name) == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("step", ["card", "certificate", "rename", "last"])
def test_a_fusion_stopped_near_its_end_is_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    made = Made(tmp_path, "plain")
    shard(made.base, 2)
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "whole")
    target = {
        "card": "loracli.fusing.fuse.fused_card",
        "certificate": "loracli.fusing.fuse._Fusion._certificate",
        "rename": "loracli.fusing.workplace.put_in_place",
        "last": "loracli.fusing.workplace.Workplace.drop",
    }[step]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(target, lambda *_, **__: (_ for _ in ()).throw(Stop))
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    assert (tmp_path / "out").exists() == (step == "last")
    fused = fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", resume=True)
    assert fused.resumed == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_output_that_is_in_the_way_of_resume_costs_no_finished_file(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    shard(made.base, 3)
    request = FuseRequest(made.recipe, base=str(made.base))
    fuse_model(request, tmp_path / "out")
    with pytest.raises(Stop):
        fuse_model(request, tmp_path / "out", force=True, progress=StopAfter(25))
    with pytest.raises(OutputExists):
        fuse_model(request, tmp_path / "out", resume=True)
    assert fuse_model(request, tmp_path / "out", resume=True, force=True).resumed == 2


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_appears_meanwhile_keeps_its_files_and_costs_no_finished_one(
    tmp_path: Path, force: bool
) -> None:
    made = Made(tmp_path, "plain")
    request, kept = FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out" / "precious.txt"

    class Meanwhile(Heard):
        def advance(self, task: str, amount: int, status: str = "") -> None:
            kept.parent.mkdir(exist_ok=True)
            kept.write_text("mine")

    heard = Meanwhile()
    with pytest.raises(OutputExists, match="something else than a fused model"):
        fuse_model(request, kept.parent, force=force, progress=heard)
    assert kept.read_text() == "mine"
    assert any("--resume goes on from there" in warning for warning in heard.warnings)
    shutil.rmtree(kept.parent)
    assert fuse_model(request, kept.parent, resume=True).resumed == 1


def test_a_finished_file_that_was_damaged_is_made_again_and_other_inputs_are_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    shard(made.base, 3)
    with pytest.raises(Stop):
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", progress=StopAfter(25))
    [first, second] = sorted((tmp_path / ".out.fusing").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    with pytest.raises(StateMismatch, match="dtype"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base), dtype="bfloat16"), tmp_path / "out", resume=True)
    fused = fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", resume=True)
    assert fused.resumed == 1
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")

    class Second(StopAfter):
        def advance(self, task: str, amount: int, status: str = "") -> None:
            with pytest.raises(LoracatError, match="another process is writing"):
                fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")

    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", progress=Second(0))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_somebody_else_in_the_place_of_a_fusion_is_refused_and_keeps_its_files(
    tmp_path: Path, resume: bool
) -> None:
    made = Made(tmp_path, "plain")
    (tmp_path / ".out.fusing" / "deep").mkdir(parents=True)
    (tmp_path / ".out.fusing" / "deep" / "photo").write_text("kept")
    os.mkfifo(tmp_path / ".out.fusing.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputExists, match=r"\.out\.fusing is in the way"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_room_is_said_in_bytes_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, "plain")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutOfResources, match=r"needs \d+ bytes more .* and 1000 are free"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter0", "adapter1", "base"]


def test_other_files_come_along_and_weights_of_other_formats_do_not(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "pytorch_model.bin.index.json"):
        (made.base / name).write_bytes(b"weights")
    for name in ("LICENSE", "merges.txt", "spiece.model", "chat_template.jinja"):
        (made.base / name).write_bytes(b"kept")
    (made.base / "onnx").mkdir()
    (made.base / "README.md").write_text("the base's own card")
    fused = fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    before, after = {p.name: p for p in made.base.iterdir()}, {p.name: p for p in (tmp_path / "out").iterdir()}
    left = {"pytorch_model.bin", "model.gguf", "consolidated.safetensors", "pytorch_model.bin.index.json", "onnx"}
    assert set(fused.left_behind) == left
    assert after.keys() == (before.keys() - left) | {"loracat-fuse.json"}
    for name in after.keys() - {"model.safetensors", "README.md", "loracat-fuse.json"}:
        assert after[name].read_bytes() == before[name].read_bytes()
    card = after["README.md"].read_text()
    assert "base_model_relation: merge" in card and "the base's own card" not in card
    for file in after.values():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_no_file_beside_the_weights_is_in_memory_as_a_whole(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    request, size = FuseRequest(made.recipe, base=str(made.base)), 64 << 20
    with open(made.base / "corpus.txt", "wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        fuse_model(request, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "corpus.txt").stat().st_size == size


@pytest.mark.parametrize("cached", [False, True], ids=["directory", "cache"])
def test_a_link_comes_along_only_where_it_leads_to_a_file_of_the_base(tmp_path: Path, cached: bool) -> None:
    made = Made(tmp_path, "plain")
    base = tmp_path / "hub" / "models--tiny--base" / "snapshots" / "abc" if cached else made.base
    if cached:
        shutil.copytree(made.base, base)
    (tmp_path / "id_rsa").write_text("private")
    places = {"own": base / "generation_config.json", "key": tmp_path / "id_rsa"}
    places |= {"blob": base.parents[1] / "blobs" / "x", "shared": base.parents[2] / "blobs" / "ab" / "y"}
    for name, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        (base / f"{name}.txt").symlink_to(os.path.relpath(place, base))
    fused = fuse_model(FuseRequest(made.recipe, base=str(base)), tmp_path / "out")
    taken = {"own.txt", "blob.txt", "shared.txt"} if cached else {"own.txt"}
    assert set(fused.left_behind) == {f"{name}.txt" for name in places} - taken
    assert {path.name for path in (tmp_path / "out").glob("*.txt")} == taken
    assert not [path for path in (tmp_path / "out").iterdir() if b"private" in path.read_bytes()]


def test_an_exported_adapter_and_the_recipe_it_came_from_give_the_same_model(tmp_path: Path) -> None:
    made = Made(tmp_path, "mixed ranks")
    export_adapter(ExportRequest(made.recipe), tmp_path / "adapter-cat")
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "one")
    fuse_model(FuseRequest(str(tmp_path / "adapter-cat"), base=str(made.base)), tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.allclose(one[n], two[n], atol=1e-6) for n in one)


def test_the_dtype_asked_for_is_the_dtype_of_every_weight_and_of_the_config(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dtype="bfloat16"), tmp_path / "out")
    before, after = tensors(made.base), tensors(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(after[untouched], before[untouched].bfloat16())
    assert load(tmp_path / "out").dtype == torch.bfloat16
    huge = make_base(tmp_path / "huge")
    weights = load_file(huge / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(weights, huge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"q_proj\.weight overflows float16"):
        fuse_model(FuseRequest(made.recipe, base=str(huge), dtype="float16"), tmp_path / "half")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, huge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatch, match=r"q_proj\.weight holds values that are infinite"):
        fuse_model(FuseRequest(made.recipe, base=str(huge)), tmp_path / "half")


def test_a_base_that_lacks_a_weight_or_contradicts_itself_is_refused_by_name(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    weights = load_file(made.base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    for broken, message in (
        ({n: t for n, t in weights.items() if n != name}, f"lack {name}"),
        ({**weights, name: weights[name][:-1].contiguous()}, "has the shape"),
        ({**weights, name: weights[name].to(torch.int8)}, "stored as I8: the base is quantised"),
        ({**weights, name.removeprefix("model."): weights[name].clone()}, "stores .* twice"),
    ):
        save_file(broken, made.base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseModelMismatch, match=message):
            fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter0", "adapter1", "base"]


def test_an_index_leads_to_no_file_outside_the_base(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    shard(made.base, 2)
    (tmp_path / "secret.safetensors").write_bytes((made.base / "model-00001-of-00002.safetensors").read_bytes())
    path = made.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "config.json", "absent.safetensors"):
        broken = {**index["weight_map"], "model.norm.weight": name}
        path.write_text(json.dumps({**index, "weight_map": broken}))
        with pytest.raises(BaseModelMismatch, match="which is not in the directory"):
            fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    with safe_open(made.base / "model-00001-of-00002.safetensors", "pt") as file:
        first = next(iter(file.keys()))
    path.write_text(
        json.dumps({**index, "weight_map": {**index["weight_map"], first: "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(BaseModelMismatch, match="does not hold it"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")


def test_force_replaces_a_fused_model_and_nothing_else(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    with pytest.raises(OutputExists):
        fuse_model(FuseRequest(made.recipe, base="no/base"), tmp_path / "out")
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dtype="float16"), tmp_path / "out", force=True)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float16}
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="something else than a fused model of loracat"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", force=True)
    with pytest.raises((OutputExists, UsageError)):
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), made.base, force=True)
    assert (made.base / "config.json").is_file()


def test_the_base_is_the_recorded_one_or_named(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    with pytest.raises(UsageError, match="fitted on a local copy of tiny/base"):
        fuse_model(FuseRequest(made.recipe), tmp_path / "out")
    told = StopAfter(10**6)
    fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out", progress=told)
    assert any("is not the one that the recipe was fitted on" in note for note in told.notes)


def test_methods_that_cut_or_need_records_are_left_to_an_export(tmp_path: Path, tiny_base: Path) -> None:
    adapters = [str(make_adapter(tmp_path / name, tiny_base, seed=seed)) for seed, name in enumerate("ab")]
    for name, message in (("ties", "cuts its result"), ("lorahub", "has to be fitted")):
        with pytest.raises(UsageError, match=message):
            fuse_model(FuseRequest(adapters=adapters, method=name, base=str(tiny_base)), tmp_path / "out")
    fuse_model(FuseRequest(adapters=adapters, method="knots", base=str(tiny_base)), tmp_path / "out")


def test_experts_that_are_computed_on_loading_stay_as_they_are(tmp_path: Path) -> None:
    """The checkpoint has a tensor for each expert; the model has all of them in one."""
    small = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    config = MixtralConfig(**small, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    before = tensors(tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in before
    adapter = make_adapter(tmp_path / "a", tmp_path / "base", targets=("q_proj", "v_proj"))
    fuse_model(FuseRequest(str(adapter), base=str(tmp_path / "base")), tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        f"model.layers.{i}.self_attn.{leaf}.weight" for i in range(2) for leaf in ("q_proj", "v_proj")
    }
    attached = logits(PeftModel.from_pretrained(load(tmp_path / "base"), adapter).eval())
    assert torch.allclose(logits(load(tmp_path / "out")), attached, atol=1e-4)
    found = verify_directory(tmp_path / "out", adapters=[str(adapter)], base=str(tmp_path / "base"))
    assert not found.not_checked and found.tensors == len(after)
    names = loaded_names(plan_base(BaseReference("x", tmp_path / "base", None)).skeleton, before)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names.computed


def test_an_adapter_of_another_task_is_refused_by_the_tasks_name(tmp_path: Path, tiny_base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
    with pytest.raises(UnsupportedAdapter, match="has the task_type SEQ_CLS") as refused:
        fuse_model(FuseRequest(str(adapter), base=str(tiny_base)), tmp_path / "fused")
    assert "merge_and_unload" in str(refused.value.hint)


@pytest.mark.parametrize(("stored", "trained"), [("float32", "bfloat16"), ("float16", "bfloat16")])
def test_a_copy_of_the_bases_matrix_in_fewer_digits_is_no_change_of_it(
    tmp_path: Path, stored: str, trained: str
) -> None:
    base = make_base(tmp_path / "base", dtype=getattr(torch, stored))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, trained))
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert read_adapter(str(tmp_path / "a")).base_copies
    fuse_model(FuseRequest(str(tmp_path / "a"), base=str(base)), tmp_path / "fused")
    changed = make_base(tmp_path / "changed", dtype=getattr(torch, stored), seed=1)
    with pytest.raises(BaseModelMismatch, match="differs from the base model's"):
        fuse_model(FuseRequest(str(tmp_path / "a"), base=str(changed)), tmp_path / "none")
