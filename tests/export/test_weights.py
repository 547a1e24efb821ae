"""Weights by hand: what is written is their float64 sum, for every kind of adapter, and the bytes of a recipe with the
same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from loracli.composition.weights import recipe_tables, weight_tables
from loracli.errors import RecipeError, UnsupportedAdapter, UsageError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.recipe.record import RecipeMixing
from loracli.verifying.verify import verify_directory
from tests.convolutions import adapt, biases, close, deltas, model, total
from tests.export.test_convolutions import Vision
from tests.export.test_experts import Mixture
from tests.export.test_export import Made
from tests.heard import Heard
from tests.mixtures import peft_deltas
from tests.tiny import make_adapter

TENSORS = "adapter_model.safetensors"
KINDS = (
    "both rslora",
    "patterns",
    "some layers only",
    "embeddings",
    "tied head",
    "conv1d of two shapes",
    "weights that are read",
    "three adapters",
)


def places(count: int) -> list[str]:
    return [f"#{place + 1}" for place in range(count)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice on tied layers
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_float64_sum_and_the_bytes_of_a_recipe_with_these_weights(
    tmp_path: Path, kind: str
) -> None:
    made = Made(tmp_path, kind)
    names, rows = [str(path) for path in made.paths], made.recipe.mixing.weights
    tables = weight_tables(places(len(names)), rows)
    request = ExportRequest(adapters=names, weights=tables, base=str(made.base))
    hand, recipe = (
        export_adapter(request, tmp_path / "hand"),
        export_adapter(ExportRequest(made.recipe), tmp_path / "r"),
    )
    assert (hand.path / TENSORS).read_bytes() == (recipe.path / TENSORS).read_bytes()
    assert (hand.path / "adapter_config.json").read_bytes() == (recipe.path / "adapter_config.json").read_bytes()
    tensors = load_file(hand.path / TENSORS)
    for name, row in rows.items():
        exact = torch.zeros((), dtype=torch.float64)
        for weight, adapter in zip(row, made.adapters, strict=True):
            if weight is not None:
                exact = exact + weight * adapter.modules[name].factors.delta_weight()
        embedding = f"base_model.model.{name}.lora_embedding_A"
        if embedding in tensors:
            written = tensors[embedding.replace("_A", "_B")].double() @ tensors[embedding].double()
        else:
            prefix = f"base_model.model.{name}.lora_"
            written = tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()
        assert float((written - exact).norm()) < 1e-6 * float(exact.norm()), name
    assert verify_directory(hand.path, adapters=names, base=str(made.base)).not_checked == ()


def test_a_sum_whose_updates_cancel_or_vanish_is_called_rounding(tmp_path: Path, tiny_base: Path) -> None:
    """Beside the same adapters at weights that leave something; cut and not."""
    first, twice = make_adapter(tmp_path / "first", tiny_base, rank=4, alpha=8, seed=1), tmp_path / "twice"
    shutil.copytree(first, twice)
    config = json.loads((twice / "adapter_config.json").read_text())
    (twice / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    cut = {"merge": True, "rank": 2}
    cases: tuple[tuple[tuple[float, float], dict[str, Any], bool], ...] = (
        ((1.0, -0.5), {}, True),
        ((1.0, -0.5), cut, True),
        ((1e-12, 0.0), {"dtype": "float16"}, True),
        ((1.0, -0.4), {}, False),
        ((1.0, -0.4), cut, False),
    )
    for place, (weights, how, rounding) in enumerate(cases):
        heard, request = Heard(), ExportRequest(adapters=(first, twice), weights=weights, base=tiny_base, **how)
        exported = export_adapter(request, tmp_path / f"out{place}", progress=heard)
        said = [line for line in heard.warnings if " is rounding, with a relative error of " in line]
        assert len(said) == rounding, (weights, how, exported.certificate.largest_error)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, -1), (-2.5, 0.0)])
def test_it_is_the_sum_that_peft_makes_of_its_live_adapters(tmp_path: Path, weights: tuple[float, ...]) -> None:
    """PEFT's `cat` multiplies each scaling by its weight: right for either sign, and without rsLoRA, which it would
    scale the sum by once more."""
    made = Made(tmp_path, "plain")
    peft: Any = PeftModel.from_pretrained(made.load(), made.paths[0], adapter_name="a")
    peft.load_adapter(made.paths[1], "b")
    peft.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type="cat")
    export_adapter(ExportRequest(adapters=[str(path) for path in made.paths], weights=weights), tmp_path / "out")
    ours: Any = PeftModel.from_pretrained(made.load(), tmp_path / "out")
    layers = dict(ours.base_model.model.named_modules())
    compared = 0
    for name, layer in peft.base_model.model.named_modules():
        if "sum" in getattr(layer, "lora_A", {}):
            theirs = layer.get_delta_weight("sum")
            torch.testing.assert_close(layers[name].get_delta_weight("default"), theirs, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == len(made.recipe.mixing.weights)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_the_experts_of_a_parameter_have_one_weight(tmp_path: Path) -> None:
    mixture = Mixture(tmp_path, "mixtral")
    tables = weight_tables(places(3), mixture.recipe.mixing.weights)
    exported = export_adapter(
        ExportRequest(adapters=mixture.names, weights=tables, base=str(mixture.base)), tmp_path / "out"
    )
    found, expected = peft_deltas(tmp_path / "out", mixture.base), mixture.composed()
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= 1e-6 * float(delta.norm()), name
    again = {"#1": {"experts": 2, "default": 0}, "#2": {"default": 0}, "#3": {"default": 0}}
    export_adapter(ExportRequest(adapters=mixture.names, weights=again, base=str(mixture.base)), tmp_path / "experts")
    only, first = peft_deltas(tmp_path / "experts", mixture.base), peft_deltas(mixture.paths[0], mixture.base)
    for name, delta in only.items():
        expected_one = 2 * first[name] if ".experts." in name and name in first else torch.zeros_like(delta)
        torch.testing.assert_close(delta, expected_one, rtol=1e-5, atol=1e-6)
    assert exported.layout.experts


def test_convolutions_and_lora_bias_are_summed_too(tmp_path: Path) -> None:
    vision = Vision(tmp_path)
    tables = weight_tables(places(3), vision.recipe.mixing.weights)
    export_adapter(ExportRequest(adapters=vision.names, weights=tables), tmp_path / "out")
    for name, delta in deltas(tmp_path / "out").items():
        close(delta, vision.composed()[name], 1e-6)
    paths = [adapt(tmp_path / f"biased{i}", model(), r=4, lora_bias=True, seed=i) for i in (1, 2)]
    export_adapter(ExportRequest(adapters=[str(path) for path in paths], weights=(0.7, -0.3)), tmp_path / "both")
    for name, bias in biases(tmp_path / "both").items():
        close(bias, total([biases(path) for path in paths], (0.7, -0.3))[name], 1e-6)


def test_modules_that_adapters_saved_whole_need_a_policy(tmp_path: Path, tiny_base: Path) -> None:
    names = [
        str(make_adapter(tmp_path / name, tiny_base, seed=seed, modules_to_save=["lm_head"]))
        for seed, name in enumerate(("a", "b"))
    ]
    with pytest.raises(UnsupportedAdapter, match="lm_head"):
        export_adapter(ExportRequest(adapters=names, weights=(1, 1)), tmp_path / "no")
    request = ExportRequest(adapters=names, weights=(1, 1), modules_to_save="average")
    export_adapter(request, tmp_path / "out")
    own = [load_file(Path(name) / TENSORS)["base_model.model.lm_head.weight"] for name in names]
    written = load_file(tmp_path / "out" / TENSORS)["base_model.model.lm_head.weight"]
    assert torch.equal(written, ((own[0].double() + own[1].double()) / 2).float())
    assert "--modules-to-save average" in (tmp_path / "out" / "README.md").read_text()
    verify_directory(tmp_path / "out", adapters=names)


@pytest.mark.parametrize("kind", ["adapter", "layer", "module"])
def test_the_tables_of_a_recipe_are_its_weights_to_the_last_bit(tmp_path: Path, kind: Any) -> None:
    made = Made(tmp_path, "embeddings")
    groups = dict.fromkeys(made.recipe.mixing.weights)
    if kind == "adapter":
        rows: dict[str, Any] = {"*": (1 / 3, -0.1)}
    elif kind == "layer":
        numbered = {f"model.layers.{i}": (i / 7, None) for i in range(3)}
        rows = {"model.embed_tokens": (0.1, 1e-17), **numbered}
    else:
        rows = {name: (i / 7, -0.1) for i, name in enumerate(groups)}
        rows = {n: (w[0], w[1] if made.recipe.mixing.weights[n][1] is not None else None) for n, w in rows.items()}
    recipe = replace(made.recipe, mixing=RecipeMixing(kind, rows, 2))
    tables = recipe_tables(recipe)
    assert list(tables) == ["adapter0", "adapter1"]
    export_adapter(ExportRequest(recipe), tmp_path / "recipe")
    request = ExportRequest(adapters=[str(path) for path in made.paths], weights=tables, base=str(made.base))
    export_adapter(request, tmp_path / "hand")
    assert (tmp_path / "hand" / TENSORS).read_bytes() == (tmp_path / "recipe" / TENSORS).read_bytes()


def test_layers_of_two_towers_are_told_apart_by_patterns(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    rows = {"model.layers.0": (1.0, 2.0), "tower.layers.0": (3.0, 4.0), "model.layers.1": (5.0, 6.0)}
    modules = [replace(m, name=f"tower.layers.0.{i}") for i, m in enumerate(made.recipe.modules)]
    recipe = replace(made.recipe, modules=(*made.recipe.modules, *modules), mixing=RecipeMixing("layer", rows, 6))
    assert recipe_tables(recipe)["adapter0"] == {"model.layers.0.*": 1.0, "tower.layers.0.*": 3.0, "1": 5.0}


@pytest.mark.parametrize("kind", ["rank", "core", "factors"])
def test_a_mixing_that_has_no_weight_for_each_module_is_refused_by_name(tmp_path: Path, kind: Any) -> None:
    recipe = replace(Made(tmp_path, "one adapter").recipe, mixing=RecipeMixing(kind, {}, 1, "0" * 64))
    with pytest.raises(RecipeError, match=f"mixing '{kind}' of the recipe has no weight") as caught:
        recipe_tables(recipe)
    assert caught.value.hint and "export the recipe as it is" in caught.value.hint


def test_a_record_of_other_weights_is_found_out(tmp_path: Path, two_adapters: tuple[Path, Path]) -> None:
    names = [str(path) for path in two_adapters]
    export_adapter(ExportRequest(adapters=names, weights=(0.7, 0.3)), tmp_path / "out")
    record = tmp_path / "out" / "loracat.json"
    document = json.loads(record.read_text())
    assert document["weights"] == {"#1": {"default": 0.7}, "#2": {"default": 0.3}}
    document["weights"]["#1"]["default"] = 0.71
    record.write_text(json.dumps(document))
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "out", adapters=names)
    assert any("model.layers.0.self_attn.q_proj" in problem for problem in caught.value.problems)


def test_the_record_of_an_export_is_a_file_of_its_weights(tmp_path: Path, two_adapters: tuple[Path, Path]) -> None:
    names = [str(path) for path in two_adapters]
    tables = {"#1": {"attention": 0.5, "*.up_proj": -1.5}, "#2": {"default": 1.25, "0-1": 0.1}}
    first = export_adapter(ExportRequest(adapters=names, weights=tables), tmp_path / "first")
    assert "--weights loracat.json" in (first.path / "README.md").read_text()
    again = ExportRequest(adapters=names, weights=first.path / "loracat.json")
    for file in (TENSORS, "README.md", "loracat.json"):
        written = export_adapter(again, tmp_path / "again", force=True).path / file
        assert written.read_bytes() == (first.path / file).read_bytes()


def test_what_does_not_go_with_weights_is_refused_with_the_way_out(tmp_path: Path, two_adapters: Any) -> None:
    names = [str(path) for path in two_adapters]
    made: list[tuple[dict[str, Any], str, str]] = [
        ({"method": "sum"}, "--weights and --method both", "give one"),
        (
            {"recipe": "r.json"},
            "r.json is taken for a recipe, which has its own weights",
            "loracat show --weights r.json",
        ),
        ({"adapters": ()}, "--weights without adapters", "--adapters"),
        ({"rank": 3}, "a rank is for a merge", "--merge"),
        ({"merge": True, "activation_aware": True}, "no activations to go by", "--fit-data"),
        ({"fit_data": "x.jsonl"}, "--fit-data has no use here", "--activation-aware"),
        ({"adapters": [names[0], names[0]]}, "given twice", ""),
        ({"weights": (0, 0.0)}, "every weight is 0", "--weights"),
        ({"weights": ()}, "0 numbers for 2 adapters", "one for each"),
    ]
    for fields, what, hint in made:
        with pytest.raises(UsageError, match=what) as caught:
            export_adapter(ExportRequest(**{"adapters": names, "weights": (1, 2), **fields}), tmp_path / "out")
        assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
