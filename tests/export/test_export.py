"""What is exported is what was attached, as stock PEFT loads it."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.errors import IntegrityError, OutputExists, RecipeError, UsageError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.mixing import make_diagonal, make_layout
from loracli.model.attach import attach
from loracli.model.modules import base_modules
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import FitRecord, HeldOut, HeldOutRow, RecipeAdapter, RecipeBase, RecipeData, RecipeMixing
from tests.tiny import BASE_ID, logits, make_adapter, make_base

CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "plain": ("llama", [{"targets": ("q_proj", "v_proj")}, {"targets": ("q_proj", "v_proj"), "alpha": 3}]),
    "mixed ranks": ("llama", [{"rank": 7}, {"rank": 2, "alpha": 5}]),
    "disjoint targets": ("llama", [{"targets": ("q_proj",)}, {"targets": ("down_proj", "gate_proj"), "rank": 3}]),
    "rslora": ("llama", [{"use_rslora": True}, {}]),
    "both rslora": ("llama", [{"use_rslora": True, "rank": 6}, {"use_rslora": True, "alpha": 1}]),
    "patterns": (
        "llama",
        [
            {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 20}},
            {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 1, "v_proj": 7}, "use_rslora": True},
        ],
    ),
    "some layers only": ("llama", [{"layers_to_transform": [1]}, {"layers_to_transform": [0, 2]}]),
    "embeddings": ("llama", [{"targets": ("embed_tokens", "q_proj")}, {"targets": ("embed_tokens",), "rank": 2}]),
    "tied embeddings": ("llama-tied", [{"targets": ("embed_tokens",)}, {"targets": ("q_proj",)}]),
    "tied head": ("llama-tied", [{"targets": ("lm_head",)}, {"targets": ("q_proj", "lm_head"), "rank": 2}]),
    "tied head and embeddings": ("llama-tied", [{"targets": ("embed_tokens", "lm_head")}, {"targets": ("lm_head",)}]),
    "tied adapters": (
        "llama-tied",
        [{"targets": ("embed_tokens",), "ensure_weight_tying": True}, {"targets": ("embed_tokens",), "rank": 2}],
    ),
    "conv1d, embeddings and a tied head": (
        "gpt2",
        [{"targets": ("c_attn", "wte"), "fan_in_fan_out": True}, {"targets": ("lm_head", "wpe"), "rank": 2}],
    ),
    "head": ("llama", [{"targets": ("lm_head",)}, {"targets": ("q_proj", "lm_head")}]),
    "biased linear": ("qwen2", [{}, {"targets": ("k_proj", "o_proj")}]),
    "gemma2": ("gemma2", [{}, {"targets": ("up_proj",)}]),
    "conv1d": ("gpt2", [{"targets": ("c_attn",), "fan_in_fan_out": True}] * 2),
    "conv1d of two shapes": ("gpt2", [{"targets": ("c_attn", "c_proj"), "fan_in_fan_out": True}] * 2),
    "subclass of linear": ("falcon", [{"targets": ("query_key_value",)}, {"targets": ("dense", "dense_h_to_4h")}]),
    "weights that are read": ("mamba", [{"targets": ("x_proj", "dt_proj")}, {"targets": ("in_proj", "dt_proj")}]),
    "one adapter": ("llama", [{}]),
    "three adapters": ("llama", [{}, {"targets": ("o_proj",)}, {"rank": 1}]),
}


def make_recipe(folder: Path, adapters: list[LoraAdapter], modules: Any, *, seed: int = 0) -> Recipe:
    """A recipe with random weights, of both signs, for every module."""
    mixing = make_diagonal(make_layout(adapters), "module")
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(mixing.numbers, generator=generator, dtype=torch.float64)
    references = [os.path.relpath(a.path, folder) for a in adapters]
    rows = (HeldOutRow("fit", 1.0, 0.0, (-0.1, 0.1), 0.5), HeldOutRow(references[0], 1.0, 0.0, (0.0, 0.0), 0.0))
    return Recipe(
        base=RecipeBase(BASE_ID, None, "0" * 64),
        adapters=tuple(
            RecipeAdapter(reference, None, None, None, dict(a.sha256), max(a.ranks), 8.0, False, "float32", BASE_ID)
            for a, reference in zip(adapters, references, strict=True)
        ),
        data=(RecipeData("val.jsonl", "0" * 64, "text", 1.0, 1, 1, 0, (), 0, 0, None, ""),),
        fit=FitRecord("cat", {}, "nats per token", (), (), 0, False, 1.0, 0.0, 1.0),
        mixing=RecipeMixing("module", mixing.by_group(theta), mixing.numbers),
        modules=modules,
        dtype="float32",
        held_out=HeldOut("val.jsonl", 1, 1, references[0], rows, (), "too few records"),
        versions={"loracat": "0"},
        folder=folder,
    )


class Made:
    """A base, adapters, a recipe, and the logits of the attached model at its weights."""

    def __init__(self, folder: Path, case: str) -> None:
        kind, options = CASES[case]
        self.base = make_base(folder / "base", kind)
        defaults = {"targets": ("q_proj", "v_proj"), "rank": 4, "alpha": 8}
        self.paths = [
            make_adapter(folder / f"adapter{i}", self.base, seed=i + 1, **{**defaults, **more})
            for i, more in enumerate(options)
        ]
        self.adapters = [read_adapter(str(path)) for path in self.paths]
        model = self.load()
        self.recipe = make_recipe(folder, self.adapters, base_modules(model, self.adapters))
        self.base_logits = logits(model)
        modules = make_layout(self.adapters).modules
        with attach(model, self.adapters, modules) as attached:
            attached.set_weights(torch.tensor([[w or 0.0 for w in self.recipe.weights_of(m)] for m in modules]))
            self.logits = logits(model)

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base).eval().requires_grad_(False)

    def peft_logits(self, directory: Path) -> torch.Tensor:
        return logits(PeftModel.from_pretrained(self.load(), directory).eval())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice on tied layers
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target:UserWarning")  # of GPT-2's head
@pytest.mark.parametrize("merge", [False, True], ids=["cat", "merge"])
@pytest.mark.parametrize("profile", [None, "peft"])
@pytest.mark.parametrize("case", CASES)
def test_stock_peft_gives_the_attached_models_logits(
    tmp_path: Path, case: str, profile: str | None, merge: bool
) -> None:
    made = Made(tmp_path, case)
    rank = sum(max(a.ranks) for a in made.adapters) if merge else None  # enough to lose nothing
    export_adapter(ExportRequest(made.recipe, merge=merge, rank=rank, profile=profile), tmp_path / "out")
    scale = float((made.logits - made.base_logits).abs().max())
    assert scale > 1e-2
    torch.testing.assert_close(made.peft_logits(tmp_path / "out"), made.logits, rtol=0, atol=2e-5 * max(scale, 1.0))


def test_the_portable_layout_has_one_rank_and_every_targeted_leaf_everywhere(tmp_path: Path) -> None:
    made = Made(tmp_path, "some layers only")
    exported = export_adapter(ExportRequest(made.recipe), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rank = exported.layout.rank
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert isinstance(config["lora_alpha"], int)
    names = {
        f"base_model.model.model.layers.{i}.self_attn.{leaf}" for i in range(3) for leaf in config["target_modules"]
    }
    assert tensors.keys() == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {rank}
    assert {t.shape[1] for name, t in tensors.items() if "lora_B" in name} == {rank}


def test_leaves_of_two_shapes_are_written_for_peft_and_refused_as_portable(tmp_path: Path) -> None:
    made = Made(tmp_path, "conv1d of two shapes")
    exported = export_adapter(ExportRequest(made.recipe), tmp_path / "out")
    assert exported.layout.profile == "peft"
    assert exported.layout.reason and "c_proj" in exported.layout.reason
    with pytest.raises(UsageError, match="c_proj"):
        export_adapter(ExportRequest(made.recipe, profile="portable"), tmp_path / "other")


def test_concatenation_keeps_the_bytes_of_a_and_its_certificate_is_the_dense_error(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    exported = export_adapter(ExportRequest(made.recipe, dtype="float32"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for certificate in exported.certificate.modules:
        prefix = f"base_model.model.{certificate.name}.lora_"
        stacked = torch.cat([a.modules[certificate.name].factors.lora_A for a in made.adapters])
        assert torch.equal(tensors[prefix + "A.weight"], stacked)
        weights = made.recipe.weights_of(certificate.name)
        exact = sum(
            float(w or 0) * a.modules[certificate.name].factors.delta_weight()
            for w, a in zip(weights, made.adapters, strict=True)
        )
        written = tensors[prefix + "B.weight"].double() @ tensors[prefix + "A.weight"].double()
        error = float((written - exact).norm() / exact.norm())  # type: ignore[union-attr]
        assert error < 1e-7
        assert abs(certificate.relative_error - error) < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_merge_is_the_best_approximation_of_its_rank(tmp_path: Path, rank: int) -> None:
    made = Made(tmp_path, "plain")
    exported = export_adapter(ExportRequest(made.recipe, merge=True, rank=rank), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for certificate in exported.certificate.modules:
        weights = made.recipe.weights_of(certificate.name)
        exact = sum(
            (float(w or 0) * a.modules[certificate.name].factors.delta_weight()
             for w, a in zip(weights, made.adapters, strict=True)),
            torch.zeros(1),
        )  # fmt: skip
        singular = torch.linalg.svdvals(exact)
        prefix = f"base_model.model.{certificate.name}.lora_"
        written = tensors[prefix + "B.weight"].double() @ tensors[prefix + "A.weight"].double()
        left_out = float(singular[rank:].norm())
        assert abs(float((written - exact).norm()) - left_out) < 1e-5 * float(singular.norm())
        energy = float(singular[:rank].square().sum() / singular.square().sum())
        assert abs(certificate.kept_energy - energy) < 1e-9


def test_the_default_rank_of_a_merge_is_the_largest_ingredient_rank(tmp_path: Path) -> None:
    made = Made(tmp_path, "mixed ranks")
    assert export_adapter(ExportRequest(made.recipe, merge=True), tmp_path / "out").layout.rank == 7
    assert export_adapter(ExportRequest(made.recipe), tmp_path / "cat").layout.rank == 9


def test_two_exports_are_byte_equal_and_readable_as_the_umask_says(tmp_path: Path) -> None:
    made = Made(tmp_path, "disjoint targets")
    for name in ("one", "two"):
        export_adapter(ExportRequest(made.recipe, merge=True, rank=3), tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_the_output_dtype_is_the_widest_ingredients_or_the_one_asked_for(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    half = read_adapter(str(make_adapter(tmp_path / "half", base, dtype=torch.float16)))
    brain = read_adapter(str(make_adapter(tmp_path / "brain", base, dtype=torch.bfloat16, seed=1)))
    model = AutoModelForCausalLM.from_pretrained(base)
    recipe = make_recipe(tmp_path, [half, brain], base_modules(model, [half, brain]))
    assert export_adapter(ExportRequest(recipe), tmp_path / "a").dtype == torch.float32
    assert export_adapter(ExportRequest(recipe, dtype="bfloat16"), tmp_path / "b").dtype == torch.bfloat16
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_a_changed_ingredient_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    config = made.paths[1] / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        export_adapter(ExportRequest(made.recipe), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_moved_ingredients_are_found_with_adapters_in_the_recipes_order_only(tmp_path: Path) -> None:
    made = Made(tmp_path, "mixed ranks")
    export_adapter(ExportRequest(made.recipe), tmp_path / "before")
    for i, path in enumerate(made.paths):
        path.rename(tmp_path / f"moved{i}")
    moved = [str(tmp_path / "moved0"), str(tmp_path / "moved1")]
    with pytest.raises(Exception, match="is not at"):
        export_adapter(ExportRequest(made.recipe), tmp_path / "out")
    with pytest.raises(UsageError, match="in another order than the recipe's") as caught:
        export_adapter(ExportRequest(made.recipe, adapters=moved[::-1]), tmp_path / "out")
    assert caught.value.hint == f"give them as --adapters {moved[0]} {moved[1]}"
    with pytest.raises(IntegrityError, match="is not the file"):
        export_adapter(ExportRequest(made.recipe, adapters=[moved[0], moved[0]]), tmp_path / "out")
    with pytest.raises(UsageError, match="2 adapters and 1"):
        export_adapter(ExportRequest(made.recipe, adapters=moved[:1]), tmp_path / "out")
    export_adapter(ExportRequest(made.recipe, adapters=moved), tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_an_existing_output_is_refused_before_any_work_and_replaced_with_force(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    export_adapter(ExportRequest(made.recipe), tmp_path / "out")
    with pytest.raises(OutputExists):  # before it is seen that no ingredient is there
        export_adapter(ExportRequest(made.recipe, adapters=["no/one", "no/other"]), tmp_path / "out")
    exported = export_adapter(ExportRequest(made.recipe, merge=True), tmp_path / "out", force=True)
    assert exported.merged
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_module_without_a_weight_or_outside_the_recipes_table_is_an_error(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    weights = dict(made.recipe.mixing.weights)
    name = "model.layers.1.self_attn.v_proj"
    del weights[name]
    without = replace(made.recipe, mixing=replace(made.recipe.mixing, weights=weights))
    with pytest.raises(RecipeError, match=name):
        export_adapter(ExportRequest(without), tmp_path / "out")
    table = tuple(module for module in made.recipe.modules if module.name != name)
    with pytest.raises(RecipeError, match=name):
        export_adapter(ExportRequest(replace(made.recipe, modules=table)), tmp_path / "out")


def test_no_path_of_the_machine_reaches_the_exported_directory(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    export_adapter(ExportRequest(replace(made.recipe, folder=tmp_path)), tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert b"../" not in file.read_bytes()


def test_force_never_removes_an_ingredient_or_what_loracat_did_not_write(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    before = {path: path.read_bytes() for folder in made.paths for path in folder.iterdir()}
    with pytest.raises(OutputExists, match="something else than an export"):
        export_adapter(ExportRequest(made.recipe), made.paths[0], force=True)
    first = export_adapter(ExportRequest(made.recipe), tmp_path / "first").path
    (first / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(OutputExists, match="something else than an export"):
        export_adapter(ExportRequest(made.recipe), first, force=True)
    (first / "optimizer.pt").unlink()
    again = [read_adapter(str(first))]
    recipe = make_recipe(tmp_path, again, made.recipe.modules)
    with pytest.raises(UsageError, match="holds the ingredient"):
        export_adapter(ExportRequest(recipe), first, force=True)
    assert before == {path: path.read_bytes() for folder in made.paths for path in folder.iterdir()}
    assert (first / "adapter_model.safetensors").is_file()
