"""Exports without a fit: what a method makes of adapters, in every tensor and every word."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loracli.adapters.adapter import read_adapter
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.errors import BaseModelMismatch, IncompatibleAdapters, NonFiniteLoss, OutputExists, UsageError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from tests.tiny import BASE_ID, logits, make_adapter, make_base, random_records, write_jsonl


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """dW in float64 of each module that PEFT would find there, by its own scaling."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scaling
        * (tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double())
        for name in tensors
        if name.endswith("lora_A.weight")
    }


@pytest.fixture
def names(two_adapters: tuple[Path, Path]) -> list[str]:
    return [str(path) for path in two_adapters]


def test_ties_is_written_as_the_best_approximation_of_the_dense_formula(tmp_path: Path, names: list[str]) -> None:
    """In float64 from the files, entry by entry; energy and error of each module are those of the dense matrices."""
    exported = export_adapter(
        ExportRequest(method="ties", adapters=names, method_options=MethodOptions(density=0.3), rank=3),
        tmp_path / "out",
    )
    certificates = {module.name: module for module in exported.certificate.modules}
    found, parts = updates(tmp_path / "out"), [updates(Path(name)) for name in names]
    for name, matrix in found.items():
        dense = [part[name] for part in parts if name in part]
        if not dense:
            assert not matrix.any()
            continue
        trimmed = []
        for d in dense:
            threshold = d.abs().flatten().sort(descending=True).values[round(0.3 * d.numel()) - 1]
            trimmed.append(torch.where(d.abs() >= threshold, d, 0.0))
        sign = torch.stack(trimmed).sum(0).sign()
        agree = [torch.where((t.sign() == sign) & (t != 0), 1.0, 0.0) for t in trimmed]
        mean = sum(t * a for t, a in zip(trimmed, agree, strict=True)) / sum(agree).clamp(min=1)  # type: ignore[union-attr]
        u, s, vh = torch.linalg.svd(mean)
        best = (u[:, :3] * s[:3]) @ vh[:3]
        assert torch.allclose(matrix, best, atol=1e-5)
        certificate = certificates[name]
        assert certificate.kept_energy == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), rel=1e-6)
        assert certificate.relative_error == pytest.approx(float((matrix - mean).norm() / mean.norm()), rel=1e-4)
    assert exported.layout.rank == 3 and exported.merged


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_records])
def test_the_order_of_the_adapters_changes_nothing_and_two_exports_are_the_same_bytes(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], name: str
) -> None:
    alike = [str(two_adapters[0]), str(make_adapter(tmp_path / "b", tiny_base, rank=4, seed=4))]
    for out, adapters in (("one", alike), ("two", alike), ("turned", alike[::-1])):
        export_adapter(ExportRequest(method=name, adapters=adapters), tmp_path / out)
    for file in ("adapter_model.safetensors", "adapter_config.json", "loracat.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    one, turned = updates(tmp_path / "one"), updates(tmp_path / "turned")
    for module, matrix in one.items():
        assert torch.allclose(matrix, turned[module], atol=1e-5)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_records])
def test_one_adapter_by_itself_comes_back_as_itself(tmp_path: Path, two_adapters: tuple[Path, Path], name: str) -> None:
    options = MethodOptions(density=1.0) if "density" in METHODS[name].takes else MethodOptions()
    export_adapter(
        ExportRequest(method=name, adapters=[str(two_adapters[0])], method_options=options), tmp_path / "out"
    )
    own = updates(two_adapters[0])
    for module, matrix in updates(tmp_path / "out").items():
        assert torch.allclose(matrix, own[module], atol=1e-5)


def test_merge_cuts_to_the_largest_ingredient_rank_and_rank_to_any(tmp_path: Path, names: list[str]) -> None:
    assert export_adapter(ExportRequest(method="ties", adapters=names), tmp_path / "sum").layout.rank == 6
    assert (
        export_adapter(ExportRequest(method="ties", adapters=names, merge=True), tmp_path / "merged").layout.rank == 4
    )
    assert export_adapter(ExportRequest(method="svd", adapters=names), tmp_path / "svd").layout.rank == 4
    assert export_adapter(ExportRequest(method="svd", adapters=names, rank=2), tmp_path / "two").layout.rank == 2
    assert (
        export_adapter(ExportRequest(method="sum", adapters=names, merge=True, rank=2), tmp_path / "cut").layout.rank
        == 2
    )
    with pytest.raises(UsageError, match="a rank is for a merge"):
        export_adapter(ExportRequest(method="sum", adapters=names, rank=2), tmp_path / "no")
    exact, cut = updates(tmp_path / "svd"), updates(tmp_path / "two")
    for module, matrix in exact.items():
        u, s, vh = torch.linalg.svd(matrix)
        assert torch.allclose(cut[module], (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "uniform", None])
def test_a_rank_among_the_options_of_a_method_is_refused_with_its_place(
    tmp_path: Path, names: list[str], method: str | None
) -> None:
    request = ExportRequest(method=method, adapters=names, method_options=MethodOptions(rank=2))
    with pytest.raises(UsageError, match="MethodOptions is for a comparison") as refused:
        export_adapter(request, tmp_path / "out")
    assert refused.value.hint == "give it as ExportRequest(..., rank=2)"
    assert not (tmp_path / "out").exists()


def test_an_option_that_a_method_does_not_take_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name, options in (
        ("uniform", MethodOptions(density=0.5)),
        ("svd", MethodOptions(scale=2.0)),
        ("ties", MethodOptions(seed=3)),
    ):
        with pytest.raises(UsageError, match=f"{name} takes no --"):
            export_adapter(ExportRequest(method=name, adapters=names, method_options=options), tmp_path / "out")
    with pytest.raises(UsageError, match="--method tie is not one of"):
        export_adapter(ExportRequest(method="tie", adapters=names), tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        export_adapter(ExportRequest(method="module", adapters=names), tmp_path / "out")
    assert "loracat fit --mixing module" in str(caught.value.hint)
    with pytest.raises(UsageError, match="lorahub has to be fitted"):
        export_adapter(ExportRequest(method="lorahub", adapters=names), tmp_path / "out")
    with pytest.raises(UsageError, match="ties needs no calibration records"):
        export_adapter(ExportRequest(method="ties", adapters=names, fit_data=tmp_path / "x.jsonl"), tmp_path / "out")
    with pytest.raises(UsageError, match="linear-peft cannot be computed here"):
        export_adapter(ExportRequest(method="linear-peft", adapters=names), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_method_whose_package_is_not_installed_is_refused_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    request = ExportRequest(method="lorahub", adapters=["./nowhere"], fit_data=tmp_path / "nowhere.jsonl")
    with pytest.raises(UsageError, match="lorahub needs the package nevergrad") as caught:
        export_adapter(request, tmp_path / "out")
    assert caught.value.hint == "pip install 'loracat[lorahub]'"


def test_the_base_is_asked_only_where_the_adapters_do_not_say_where_a_name_stands(
    tmp_path: Path, tiny_base: Path
) -> None:
    """With layers left out, the base's config tells of the others: the same layout as from adapters on every layer."""
    some = make_adapter(tmp_path / "some", tiny_base, layers_to_transform=[1])
    every = make_adapter(tmp_path / "every", tiny_base)
    from_adapters = export_adapter(ExportRequest(method="sum", adapters=[str(some), str(every)]), tmp_path / "one")
    from_base = export_adapter(
        ExportRequest(method="sum", adapters=[str(some), str(every)], base=str(tiny_base)), tmp_path / "two"
    )
    assert from_adapters.layout == from_base.layout and from_adapters.layout.profile == "portable"
    alone = export_adapter(ExportRequest(method="sum", adapters=[str(some)], base=str(tiny_base)), tmp_path / "three")
    assert len(alone.layout.ranks) == 6  # two leaves in three layers
    assert {"q_proj", "v_proj"} == read_adapter(str(every)).config.whole_names
    assert read_adapter(str(some)).config.whole_names == frozenset()


def test_a_base_of_another_shape_and_adapters_of_none_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_base)
    other = make_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(BaseModelMismatch):
        export_adapter(ExportRequest(method="sum", adapters=[str(adapter)], base=str(other)), tmp_path / "out")
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    with pytest.raises(IncompatibleAdapters, match="names its base model"):
        export_adapter(ExportRequest(method="sum", adapters=[str(adapter)]), tmp_path / "out")
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "/home/else/base"}))
    assert (
        export_adapter(
            ExportRequest(method="sum", adapters=[str(adapter)], base=str(tiny_base)), tmp_path / "out"
        ).layout.rank
        == 4
    )


def test_conv1d_and_embeddings_load_in_stock_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for kind, fields in (
        ("gpt2", {"targets": ("c_attn",), "fan_in_fan_out": True}),
        ("llama", {"targets": ("o_proj",)}),
    ):
        base = make_base(tmp_path / kind, kind)
        adapters = [make_adapter(tmp_path / f"{kind}{seed}", base, seed=seed, **fields) for seed in (1, 2)]  # type: ignore[arg-type]
        export_adapter(ExportRequest(method="sum", adapters=[str(a) for a in adapters]), tmp_path / f"{kind}-out")
        composed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / f"{kind}-out")
        merged: Any = AutoModelForCausalLM.from_pretrained(base)
        for adapter in adapters:
            merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
        assert torch.allclose(logits(composed), logits(merged), atol=2e-4)


def test_a_recipes_ingredients_can_be_composed_by_a_method_and_its_own_mixing_is_not_used(
    tmp_path: Path, tiny_base: Path, names: list[str]
) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(40))
    settings = FitSettings(passes=2, holdout=0.2, control="none")
    fit_mixing(names, data, base=str(tiny_base), settings=settings).save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(method="sum", recipe=tmp_path / "recipe.json"), tmp_path / "one")
    export_adapter(ExportRequest(method="sum", adapters=names), tmp_path / "two")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_search_finds_the_weights_that_a_comparison_finds(tmp_path: Path, tiny_base: Path, names: list[str]) -> None:
    from loracli.comparison.compare import run_comparison
    from loracli.comparison.inputs import prepare_comparison
    from loracli.comparison.settings import CompareSettings

    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    test = write_jsonl(tmp_path / "test.jsonl", random_records(8, seed=5))
    inputs = prepare_comparison(
        test, adapters=names, fit_data=data, base=str(tiny_base), settings=CompareSettings(("task-arithmetic",))
    )
    weights = run_comparison(inputs).row("task-arithmetic").weights
    export_adapter(
        ExportRequest(method="task-arithmetic", adapters=names, fit_data=data, base=str(tiny_base)), tmp_path / "out"
    )
    written = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert written["method"]["weights"] == list(weights or ()) and weights != (1.0, 1.0)
    found, parts = updates(tmp_path / "out"), [updates(Path(name)) for name in names]
    for name, matrix in found.items():
        expected = sum(w * p[name] for w, p in zip(weights or (), parts, strict=True) if name in p)
        assert torch.allclose(matrix, torch.as_tensor(expected), atol=1e-5)


def test_a_search_steps_over_weights_whose_loss_is_not_finite(tmp_path: Path, tiny_base: Path) -> None:
    """Of the five scales of the grid the model stays finite at 0.3 alone, of larger factors at none."""
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    options = {"method": "task-arithmetic", "fit_data": data, "base": str(tiny_base)}
    large = make_adapter(tmp_path / "large", tiny_base, targets=("down_proj",), seed=9, size=2e18)
    export_adapter(ExportRequest(adapters=[str(large)], **options), tmp_path / "out")  # type: ignore[arg-type]
    assert json.loads((tmp_path / "out" / "loracat.json").read_text())["method"]["weights"] == [0.3]
    larger = make_adapter(tmp_path / "larger", tiny_base, targets=("down_proj",), seed=9, size=4e18)
    with pytest.raises(NonFiniteLoss, match="not finite on the records at val.jsonl"):
        export_adapter(ExportRequest(adapters=[str(larger)], **options), tmp_path / "none")  # type: ignore[arg-type]


def test_card_and_certificate_tell_the_origin_and_no_path(tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "out"
    export_adapter(
        ExportRequest(method="dare", adapters=names, method_options=MethodOptions(density=0.7, seed=5), merge=True), out
    )
    card, document = (out / "README.md").read_text(), json.loads((out / "loracat.json").read_text())
    assert "loracat export --method dare --density 0.7 --scale 1 --seed 5 --merge --rank 4" in card
    assert f'base_model: "{BASE_ID}"' in card and "`first`" in card and "`second`" in card
    assert [a["reference"] for a in document["adapters"]] == ["first", "second"]
    assert document["adapters"][0]["sha256"] == dict(read_adapter(names[0]).sha256)
    for file in out.iterdir():
        assert str(tmp_path.parent).encode() not in file.read_bytes()


def test_the_command_on_a_card_has_every_digit(tmp_path: Path, names: list[str]) -> None:
    options = MethodOptions(density=0.3333333, seed=12345678)
    export_adapter(ExportRequest(method="dare", adapters=names, method_options=options), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "loracat export --method dare --density 0.3333333 --scale 1 --seed 12345678" in card
    assert "(density 0.3333333, scale 1, seed 12345678)" in card


def test_an_export_of_a_method_replaces_an_export_only(tmp_path: Path, names: list[str]) -> None:
    export_adapter(ExportRequest(method="sum", adapters=names), tmp_path / "out")
    with pytest.raises(OutputExists):
        export_adapter(ExportRequest(method="uniform", adapters=names), tmp_path / "out")
    export_adapter(ExportRequest(method="uniform", adapters=names), tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out" / "loracat.json").read_text())["method"]["name"] == "uniform"
    copied = shutil.copytree(names[0], tmp_path / "mine")
    with pytest.raises((OutputExists, UsageError)):
        export_adapter(ExportRequest(method="sum", adapters=[str(copied), names[1]]), copied, force=True)
    with pytest.raises(UsageError, match="given twice"):
        export_adapter(ExportRequest(method="sum", adapters=[names[0], names[0]]), tmp_path / "twice")
