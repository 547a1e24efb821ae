"""A bias on lora_B, against stock PEFT with one adapter and the dense formula with several.

PEFT's own combination of adapters leaves the biases out, so it is no witness for several.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import make_batch
from loracli.calibration.render import Example
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.composition.attached import of_factors
from loracli.composition.composition import compose_module
from loracli.errors import MalformedAdapter, RecipeError, UsageError
from loracli.export.export import export_adapter
from loracli.export.loss import loss_of_export, read_loss_data
from loracli.export.request import ExportRequest
from loracli.fitting.certificate import _record_gradients
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from loracli.model.placement import Placement
from loracli.recipe.record import INLINE_KINDS, MixingKind, RecipeMixing
from tests.test_whole_way import fit_case
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

# PEFT's advice on a head without a bias of its own.
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")

# Of NeoX, whose linear layers have biases and whose norms keep float64.
TARGETS = ("query_key_value", "dense_4h_to_h")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three adapters: two with biases, on other modules each, and one without."""
    folder = tmp_path_factory.mktemp("biased")
    base = make_base(folder / "base", "neox")
    options: list[dict[str, Any]] = [
        {"targets": TARGETS, "rank": 3, "lora_bias": True},
        {"targets": TARGETS, "rank": 2, "alpha": 5, "use_rslora": True},
        {"targets": ("query_key_value", "lm_head"), "rank": 2, "alpha": 1, "lora_bias": True},
    ]
    return base, [make_adapter(folder / f"a{i}", base, seed=i + 1, **o) for i, o in enumerate(options)]


def read(paths: list[Path]) -> list[LoraAdapter]:
    return [read_adapter(str(path)) for path in paths]


def load(base: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(False)


def raw(path: Path, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """A, B and b straight from the file, in float64."""
    tensors = {name.removeprefix("base_model.model."): t.double() for name, t in load_file(path / WEIGHTS).items()}
    if f"{module}.lora_A.weight" not in tensors:
        return None
    return tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"], tensors.get(f"{module}.lora_B.bias")


WEIGHTS = "adapter_model.safetensors"
SCALINGS = (8 / 3, 5 / 2**0.5, 1 / 2)


def dense_model(base: Path, paths: list[Path], weights: list[float]) -> Any:
    """W + sum w_i s_i B_i A_i and b + sum w_i s_i b_i, module by module."""
    model = load(base)
    for path, weight, scaling in zip(paths, weights, SCALINGS, strict=True):
        for name in read_adapter(str(path)).modules:
            lora_A, lora_B, bias = raw(path, name)  # type: ignore[misc]
            target = model.get_submodule(name)
            target.weight += weight * scaling * (lora_B @ lora_A)
            if bias is not None:
                own = target.bias if target.bias is not None else torch.zeros_like(bias)
                target.bias = torch.nn.Parameter(own + weight * scaling * bias, requires_grad=False)
    return model


def test_several_biases_add_up_by_weight_and_scaling(made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    adapters, weights = read(paths), [0.7, -1.3, 2.0]
    modules = make_layout(adapters).modules
    with attach(load(base), adapters, modules) as attached:
        attached.set_weights(torch.tensor([weights] * len(modules), dtype=torch.float64))
        ours = logits(attached.model)
    torch.testing.assert_close(ours, logits(dense_model(base, paths, weights)), rtol=1e-9, atol=1e-9)
    without = [a for a in adapters if not a.config.lora_bias]
    assert len(without) == 1  # and the biases matter
    dense = load(base)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, module in adapter.modules.items():
            dense.get_submodule(name).weight += weight * module.factors.delta_weight()
    assert float((ours - logits(dense)).abs().max()) > 1e-2


def test_one_adapter_is_what_peft_runs(made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    for index in (0, 2):
        modules = make_layout(read(paths)).modules
        with attach(load(base, torch.float32), read(paths), modules) as attached:
            attached.set_weights(torch.tensor([[float(i == index) for i in range(3)]] * len(modules)))
            ours = logits(attached.model)
        theirs = logits(peft(load(base, torch.float32), paths[index]))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def peft(model: Any, path: Path) -> Any:
    return PeftModel.from_pretrained(model, path).eval()


@pytest.mark.parametrize("kind", INLINE_KINDS)
def test_gradients_of_the_batch_and_of_each_record_are_those_of_finite_differences(
    made: tuple[Path, list[Path]], kind: MixingKind
) -> None:
    base, paths = made
    adapters = read(paths)
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(f"val.jsonl:{i}", tuple(torch.randint(3, 259, (n,), generator=generator).tolist()),
                (False,) * 4 + (True,) * (n - 4))
        for i, n in enumerate((11, 8))
    ]  # fmt: skip
    batch, layout = make_batch(examples, [0, 1]), make_layout(adapters)
    with attach(load(base), adapters, layout.modules) as attached:
        objective, mixing = make_objective(attached, batch), make_mixing(attached, layout, kind)

        def loss(theta: torch.Tensor) -> torch.Tensor:
            mixing.apply(attached, theta)
            return objective.nats(batch).sum()

        theta = mixing.constant([0.8, -0.6, 0.4])
        theta += 0.3 * torch.randn(mixing.numbers, generator=generator, dtype=torch.float64)
        leaf = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        records = _record_gradients(objective, mixing, theta, batch, examples, seed=0)  # type: ignore[arg-type]
        torch.testing.assert_close(records.gradients.sum(dim=0), gradient, rtol=1e-8, atol=1e-8)
        for place in range(mixing.numbers):
            shift = torch.zeros_like(theta)
            shift[place] = 1e-5
            with torch.no_grad():
                expected = float(loss(theta + shift) - loss(theta - shift)) / 2e-5
            assert abs(float(gradient[place]) - expected) < 1e-6 * max(1.0, abs(expected))


def test_an_export_holds_the_weighted_bias_and_its_certificate_tells_of_it(
    tmp_path: Path, made: tuple[Path, list[Path]]
) -> None:
    base, paths = made
    recipe = fit_case(tmp_path, base, paths)
    for name, options in {"cat": {}, "merged": {"merge": True, "rank": 2}, "half": {"dtype": "float16"}}.items():
        exported = export_adapter(ExportRequest(recipe, **options), tmp_path / name)  # type: ignore[arg-type]
        assert exported.layout.profile == "peft" and "lora_bias" in str(exported.layout.reason)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["lora_bias"] is True and config["bias"] == "none"
        written = load_file(tmp_path / name / WEIGHTS)
        for certificate in exported.certificate.modules:
            prefix = f"base_model.model.{certificate.name}.lora_"
            exact_bias: Any = 0.0
            exact: Any = 0.0
            for path, weight, s in zip(paths, recipe.weights_of(certificate.name), SCALINGS, strict=True):
                found = raw(path, certificate.name)
                if found is None:
                    continue
                exact = exact + weight * s * (found[1] @ found[0])
                exact_bias = exact_bias + weight * s * (0.0 if found[2] is None else found[2])
            bias = written[prefix + "B.bias"].double()
            eps = torch.finfo(written[prefix + "B.bias"].dtype).eps
            assert float((bias - exact_bias).abs().max()) <= eps * float(exact_bias.abs().max())
            delta = config["lora_alpha"] / config["r"] * written[prefix + "B.weight"].double()
            both = torch.cat([delta @ written[prefix + "A.weight"].double(), bias[:, None]], dim=1)
            whole = torch.cat([exact, exact_bias[:, None]], dim=1)
            error = float((both - whole).norm() / whole.norm()) if whole.any() else float((both - whole).norm())
            assert abs(certificate.relative_error - error) < 1e-9
    with pytest.raises(UsageError, match="lora_bias"):
        export_adapter(ExportRequest(recipe, profile="portable"), tmp_path / "other")
    kept = read_adapter(str(tmp_path / "cat"))  # what we write, we read
    assert kept.config.lora_bias and all(m.factors.bias is not None for m in kept.modules.values())


@pytest.mark.parametrize("kind", ["rank", "core", "factors", "auto"])
def test_levels_that_a_bias_does_not_have_are_refused_by_name(
    tmp_path: Path, made: tuple[Path, list[Path]], kind: str
) -> None:
    base, paths = made
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    with pytest.raises(UsageError, match=f"lora_bias.*{kind}") as caught:
        prepare_fit([str(p) for p in paths], data, base=str(base), settings=FitSettings(mixing=kind))
    assert caught.value.hint == "use --mixing adapter, layer or module"
    if kind != "auto":
        module = "gpt_neox.layers.0.attention.query_key_value"
        with pytest.raises(RecipeError, match="lora_bias"):
            compose_module(RecipeMixing(kind, {}, 1), read(paths), module)  # type: ignore[arg-type]


def test_methods_that_merge_updates_are_refused_or_left_out_and_weights_go(
    tmp_path: Path, made: tuple[Path, list[Path]]
) -> None:
    base, paths = made
    names = [str(path) for path in paths]
    with pytest.raises(UsageError, match="lora_bias"):
        export_adapter(ExportRequest(method="ties", adapters=names, base=str(base)), tmp_path / "ties")
    assert not (tmp_path / "ties").exists()
    exported = export_adapter(ExportRequest(method="sum", adapters=names, base=str(base)), tmp_path / "sum")
    assert exported.layout.lora_bias
    ours = logits(peft(load(base, torch.float32), tmp_path / "sum"))
    expected = logits(dense_model(base, paths, [1.0, 1.0, 1.0])).float()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    data = write_jsonl(tmp_path / "test.jsonl", random_records(20))
    found = compare_adapters(data, adapters=names, base=str(base), settings=CompareSettings(methods=("data-free",)))
    assert {"ties", "knots", "svd"} <= {skipped.name for skipped in found.skipped}
    assert {"base", "sum", "uniform", *names} <= {row.name for row in found.rows}


def test_no_layout_holds_a_bias_beside_an_embedding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    biased = make_adapter(tmp_path / "biased", base, lora_bias=True)
    other = make_adapter(tmp_path / "other", base, targets=("embed_tokens",))
    with pytest.raises(UsageError, match="embed_tokens"):
        export_adapter(ExportRequest(method="sum", adapters=[str(biased), str(other)]), tmp_path / "out")


# What contradicts itself.


@pytest.mark.parametrize("how", ["off", "missing", "long", "embedding"])
def test_a_bias_that_contradicts_config_or_factors_is_refused(
    tmp_path: Path, made: tuple[Path, list[Path]], how: str
) -> None:
    _, paths = made
    tensors = load_file(paths[0] / WEIGHTS)
    name = "base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_B.bias"
    fields = json.loads((paths[0] / "adapter_config.json").read_text())
    if how == "off":
        fields["lora_bias"] = False
    elif how == "missing":
        del tensors[name]
    elif how == "long":
        tensors[name] = torch.ones(3)
    else:
        A, B = name.replace("lora_B.bias", "lora_embedding_A"), name.replace("lora_B.bias", "lora_embedding_B")
        tensors[A], tensors[B] = torch.ones(3, 7), torch.ones(5, 3)
        del tensors[name.replace("bias", "weight")], tensors[name.replace("B.bias", "A.weight")]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(MalformedAdapter) as caught:
        read_adapter(str(tmp_path))
    assert name in caught.value.what or "bias (3,)" in caught.value.what


def test_an_export_is_scored_with_its_biases(made: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The loss of `export --data` is that of the dense formula, of the composition and of what was written."""
    base, paths = made
    weights = [0.5, 0.7, -0.4]
    data = write_jsonl(tmp_path / "val.jsonl", random_records(9))
    request = ExportRequest(adapters=[str(p) for p in paths], weights=weights, base=str(base), dtype="float32")
    exported = export_adapter(request, tmp_path / "out")
    place = Placement(dtype="float32")
    found = loss_of_export(exported, read_loss_data(data), base=str(base), placement=place)
    settings = CompareSettings(("sum",), weights=tuple(weights))
    rows = compare_adapters(data, adapters=[str(p) for p in paths], base=str(base), settings=settings, placement=place)
    expected = rows.row("weights").nats_per_token
    assert (found.before, found.after) == pytest.approx((expected, expected), rel=1e-5)
    theirs = logits(dense_model(base, paths, weights))
    with attach(load(base), read(paths), make_layout(read(paths)).modules) as attached:
        factors = {name: exported.composition.compose(name).factors for name in exported.composition.names()}
        point = of_factors(factors)
        point.mixing.apply(attached, point.theta)
        torch.testing.assert_close(logits(attached.model), theirs, rtol=1e-5, atol=1e-5)
