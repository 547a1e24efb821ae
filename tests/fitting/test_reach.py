"""Modules that are attached and never called: named, left where they were, and the same model everywhere.

The witnesses are autograd, which knows whether a loss depends on a weight, and stock PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from loracli.adapters.adapter import read_adapter
from loracli.algebra.methods import METHODS
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings, Controls
from loracli.errors import BaseModelMismatch, IntegrityError, LoracatError, RecipeError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.loss import loss_of_export, read_loss_data
from loracli.export.method import searched_weights
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.job import plan_fit
from loracli.fitting.reach import weights_read
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.model.loss import gradient_of
from loracli.model.modules import kind_and_shape
from loracli.model.placement import Placement
from loracli.model.reference import BaseReference
from loracli.recipe.recipe import load_recipe
from loracli.verifying.verify import verify_directory
from tests.heard import Heard
from tests.test_whole_way import fit_case, nats_of_peft
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

KINDS = ["mamba", "falcon-mamba", "jamba", "bloom-slow", "gemma3-vision", "falcon", "llama-tied", "gpt2", "mixtral"]
READ = {"mamba": ("in_proj", "dt_proj"), "bloom-slow": ("query_key_value", "dense", "dense_4h_to_h"),
        "jamba": ("q_proj", "x_proj", "dt_proj"), "falcon-mamba": ("x_proj", "dt_proj")}  # fmt: skip


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_that_a_model_reads_are_those_that_autograd_sees_of_layers_it_does_not_call(
    tmp_path: Path, kind: str
) -> None:
    base = make_base(tmp_path, kind)
    model, called = load(base), set()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding))}
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    loss = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits.square().sum()
    weights = [module.weight for module in layers.values()]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    used = {name for name, gradient in zip(layers, gradients, strict=True) if gradient is not None}
    found = weights_read(BaseReference("base", base, None))
    assert found.failure is None
    assert found.bypassed == used - called
    assert bool(found.bypassed) == (kind in READ)


@pytest.mark.parametrize(
    ("kind", "mixing"), [("mamba", "module"), ("mamba", "factors"), ("bloom-slow", "core"), ("jamba", "adapter")]
)
def test_fit_export_fuse_and_verify_are_one_model_where_weights_are_read(
    tmp_path: Path, kind: str, mixing: str
) -> None:
    base = make_base(tmp_path / "base", kind)
    paths = [make_adapter(tmp_path / name, base, targets=READ[kind], seed=i) for i, name in enumerate("ab")]
    bypassed = tuple(sorted(weights_read(BaseReference("base", base, None)).bypassed))
    control = None if mixing == "module" else "none"
    recipe = fit_case(tmp_path, base, paths, mixing=mixing, control=control)
    assert recipe.mixing.unreached == recipe.mixing.bypassed == bypassed
    recipe.save(tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json").mixing.bypassed == bypassed

    heard = Heard()
    export_adapter(ExportRequest(recipe), tmp_path / "out", progress=heard)
    assert any("merge_and_unload" in said and bypassed[0] in said for said in heard.warnings)
    assert bypassed[0] in (tmp_path / "out" / "README.md").read_text()
    reported = recipe.held_out.row("fit").nats_per_token
    assert nats_of_peft(base, tmp_path / "out", tmp_path / "test.jsonl") == pytest.approx(reported, rel=2e-5)

    heard = Heard()
    fused = fuse_model(FuseRequest(tmp_path / "recipe.json", base=str(base)), tmp_path / "fused", progress=heard)
    assert fused.bypassed == bypassed and any("left out" in said for said in heard.warnings)
    again = fuse_model(FuseRequest(tmp_path / "out", base=str(base)), tmp_path / "again")  # which has no recipe to ask
    assert again.bypassed == bypassed

    expected = logits(PeftModel.from_pretrained(load(base), tmp_path / "out").eval())
    assert float((expected - logits(load(base))).abs().max()) > 1e-2
    for folder in ("fused", "again"):
        torch.testing.assert_close(logits(load(tmp_path / folder)), expected, rtol=1e-4, atol=1e-4)
    verify_directory(tmp_path / "fused", recipe=tmp_path / "recipe.json", base=str(base))


def test_the_weights_of_unreached_modules_are_the_starts(tmp_path: Path) -> None:
    """Where the others move away from the weight of their adapter that all began with."""
    base = make_base(tmp_path / "base", "mamba")
    paths = [make_adapter(tmp_path / name, base, targets=READ["mamba"], seed=i) for i, name in enumerate("ab")]
    records = [{"prompt": f"{i}", "completion": "aaaaaaaa"} for i in range(60)]
    data = write_jsonl(tmp_path / "val.jsonl", records)
    settings = FitSettings(mixing="module", passes=6, holdout=0.2, control="none")
    recipe = fit_mixing([str(path) for path in paths], data, base=str(base), settings=settings)
    weights, unreached = recipe.mixing.weights, recipe.mixing.unreached
    (start,) = {weights[name] for name in unreached}
    assert recipe.fit.largest_move > 1e-2
    reached = [row for name, row in weights.items() if name not in unreached]
    moves = [abs(weight - begun) for row in reached for weight, begun in zip(row, start, strict=True)]
    assert max(moves) == pytest.approx(recipe.fit.largest_move) and min(moves) > 0


def test_what_no_record_comes_by_is_named_and_kept(tmp_path: Path) -> None:
    """A tower for pictures: the records say nothing of it, and a picture will."""
    base = make_base(tmp_path / "base", "gemma3-vision")
    paths = [make_adapter(tmp_path / name, base, targets=("q_proj",), seed=i) for i, name in enumerate("ab")]
    heard = Heard()
    write_jsonl(tmp_path / "val.jsonl", random_records(24))
    names, settings = [str(path) for path in paths], FitSettings(passes=2)
    recipe = fit_mixing(names, tmp_path / "val.jsonl", base=str(base), settings=settings, progress=heard)
    assert recipe.mixing.unreached and recipe.mixing.bypassed == ()
    assert all("vision_tower" in name for name in recipe.mixing.unreached)
    assert any("no record reaches" in said and recipe.mixing.unreached[0] in said for said in heard.warnings)
    fuse_model(FuseRequest(recipe, base=str(base)), tmp_path / "fused")
    name = recipe.mixing.unreached[0]
    before, after = (load(folder).get_submodule(name).weight for folder in (base, tmp_path / "fused"))
    assert not torch.equal(before, after)
    export_adapter(ExportRequest(recipe), tmp_path / "out")
    assert name in (tmp_path / "out" / "README.md").read_text()


def test_a_router_is_reached_and_adapters_of_it_alone_fit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mixtral")
    routers = {"targets": (), "parameters": ("mlp.gate.weight",), "size": 0.6}
    paths = [make_adapter(tmp_path / name, base, seed=i, **routers) for i, name in enumerate("ab")]
    recipe = fit_case(tmp_path, base, paths)
    assert recipe.mixing.unreached == recipe.mixing.bypassed == ()
    rows = {row.name: row.nats_per_token for row in recipe.held_out.rows}
    assert abs(rows["sum"] - rows["base"]) > 1e-3
    export_adapter(ExportRequest(recipe), tmp_path / "out")
    reported = recipe.held_out.row("fit").nats_per_token
    assert nats_of_peft(base, tmp_path / "out", tmp_path / "test.jsonl") == pytest.approx(reported, rel=2e-5)


def test_a_base_whose_forward_could_not_be_tried_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "mamba")
    names = [str(make_adapter(tmp_path / "a", base, targets=READ["mamba"]))]
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))

    def fail(*_: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("loracli.fitting.reach._Trial.run", fail)

    request = ExportRequest(method="sum", adapters=names, base=str(base))
    fused = FuseRequest(adapters=names, method="sum", base=str(base))
    settings = FitSettings(mixing="adapter", passes=2, holdout=0.4, control="none")
    commands = [
        lambda heard: plan_fit(prepare_fit(names, data, base=str(base)), placement=Placement(), progress=heard),
        lambda heard: fit_mixing(names, data, base=str(base), settings=settings, progress=heard),
        lambda heard: export_adapter(request, tmp_path / "out", progress=heard),
        lambda heard: fuse_model(fused, tmp_path / "fused", progress=heard),
    ]  # fmt: skip
    for command in commands:
        heard = Heard()
        command(heard)
        assert len([said for said in heard.warnings if "could not be tried: no such operator" in said]) == 1


def test_adapters_of_which_nothing_is_called_are_refused_by_everything_that_runs_or_fuses_them(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mamba")
    names = [str(make_adapter(tmp_path / n, base, targets=("dt_proj",), seed=i)) for i, n in enumerate("ab")]
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    exported = export_adapter(ExportRequest(method="sum", adapters=names, base=str(base)), tmp_path / "out")

    refused = [
        lambda: fit_mixing(names, data, base=str(base)),
        lambda: plan_fit(prepare_fit(names, data, base=str(base)), placement=Placement()),
        lambda: compare_adapters(data, adapters=names, base=str(base)),
        lambda: loss_of_export(exported, read_loss_data(data), base=str(base)),
        lambda: searched_weights(
            ExportRequest(fit_data=data, base=str(base)), METHODS["lorahub"], [read_adapter(n) for n in names]
        ),
        lambda: fuse_model(FuseRequest(adapters=names, method="sum", base=str(base)), tmp_path / "fused"),
    ]
    for command in refused:
        with pytest.raises(BaseModelMismatch, match=r"reads the weight of backbone\.layers\.0\.mixer\.dt_proj"):
            command()
    assert not (tmp_path / "fused").exists()


def test_the_datamix_control_is_looked_at_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mamba")
    name, other = (
        str(make_adapter(tmp_path / n, base, targets=targets))
        for n, targets in (("a", ("in_proj",)), ("b", ("dt_proj",)))
    )
    data = write_jsonl(tmp_path / "val.jsonl", random_records(12))

    settings = CompareSettings(("sum",), controls=Controls(datamix=other))
    with pytest.raises(BaseModelMismatch, match="no record reaches"):
        compare_adapters(data, adapters=[name], base=str(base), settings=settings)


def test_a_model_with_the_updates_that_were_left_out_is_not_the_recorded_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mamba")
    adapter = make_adapter(tmp_path / "a", base, targets=READ["mamba"])
    fuse_model(FuseRequest(adapter, base=str(base)), tmp_path / "fused")
    where = tmp_path / "fused" / "loracat-fuse.json"
    document = json.loads(where.read_text())
    again = {"adapters": [str(adapter)], "base": str(base)}
    verify_directory(tmp_path / "fused", **again)

    taken = document["fuse"].pop("bypassed")
    where.write_text(json.dumps(document))
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "fused", **again)
    assert taken[0] in str(caught.value.problems)
    document["fuse"]["bypassed"] = "all"
    where.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="fuse.bypassed"):
        verify_directory(tmp_path / "fused", **again)


def test_a_recipe_whose_bypassed_modules_were_reached_is_damaged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mamba")
    recipe = fit_case(tmp_path, base, [make_adapter(tmp_path / "a", base, targets=READ["mamba"])])
    recipe.save(tmp_path / "recipe.json")
    document = json.loads((tmp_path / "recipe.json").read_text())
    assert document["loracat_recipe"] == 6
    document["mixing"]["unreached"] = document["mixing"]["unreached"][:1]
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.json")
    assert "mixing.bypassed" in str(caught.value.problems)


def test_the_gradient_of_a_loss_that_nothing_attached_reaches_is_zero() -> None:
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gradient_of(torch.tensor(2.0), leaf), torch.zeros(3, dtype=torch.float64))
    other = torch.ones(1, requires_grad=True)
    assert torch.equal(gradient_of(other.sum(), leaf), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient_of((leaf * leaf).sum(), leaf), 2 * torch.ones(3, dtype=torch.float64))


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...i,oi->...o", x, self.weight)
        return y if self.bias is None else self.bias + y


class Doubled(nn.Linear):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e3, 1e3)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.bias


class Scaled(nn.Linear):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Product, Doubled, Clamped, Rounded, Pair, Scaled])
def test_a_subclass_of_linear_is_one_if_it_computes_the_same(kind: Any, bias: bool, device: str) -> None:
    """Whether it has numbers or not; one with more tensors, as a quantised layer has, is not tried."""
    layer, state = kind(8, 6, bias=bias, device=device), torch.random.get_rng_state()
    expected = ("linear", 8, 6) if kind is Product else ("other", 0, 0)
    assert kind_and_shape(layer) == expected
    assert torch.equal(torch.random.get_rng_state(), state) and layer.in_features == 8


def test_a_layer_in_whole_numbers_is_no_linear_layer() -> None:
    layer = Product(8, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
    assert kind_and_shape(layer) == ("other", 0, 0)
    layer.weight = nn.Parameter(torch.zeros(24, 1))  # packed
    assert kind_and_shape(layer) == ("other", 0, 0)


@pytest.mark.parametrize("given", [True, False])
def test_a_method_holds_copies_of_matrices_against_the_base_that_is_given(tmp_path: Path, given: bool) -> None:
    base = make_base(tmp_path / "base", "llama-tied")
    path = make_adapter(tmp_path / "a", base, targets=("embed_tokens", "q_proj"))
    tensors = load_file(path / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    own = load(base).get_input_embeddings().weight.detach().clone()
    options: dict[str, Any] = {"adapters": [str(path)], "base": str(base) if given else None}
    for changed in (0.0, 1.0):
        own[5, 5] += changed
        save_file({**tensors, name: own}, path / "adapter_model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"out{changed}"
        if given and not changed:
            export_adapter(ExportRequest(method="sum", **options), out)
            assert name not in load_file(out / "adapter_model.safetensors")
            continue

        with pytest.raises(LoracatError, match="embed_tokens") as caught:
            export_adapter(ExportRequest(method="sum", **options), out)
        assert isinstance(caught.value, BaseModelMismatch) if given else "--base" in str(caught.value.hint)
        assert not out.exists()
