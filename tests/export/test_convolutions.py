"""What is exported of convolutions is the weighted sum of their updates, as stock PEFT runs it: within each group of a
grouped one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loracli.adapters.adapter import read_adapter
from loracli.algebra.methods import METHODS
from loracli.composition.base_table import modules_of
from loracli.errors import IncompatibleAdapters, LoracatError, UnsupportedAdapter, UsageError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.recipe.recipe import decode_recipe
from loracli.serving.lint import lint_adapter
from loracli.verifying.verify import verify_directory
from tests.convolutions import GROUPS, Adapted, adapt, biases, close, config_of, deltas, images, load, model, total
from tests.export.test_export import make_recipe

WITHOUT_SEARCH = [name for name, method in METHODS.items() if not method.needs_records]


class Vision:
    """The model, three adapters of other ranks, scalings and targets, and a recipe with weights of both signs."""

    def __init__(self, folder: Path) -> None:
        self.paths = [
            adapt(folder / "a", model(), r=4, lora_alpha=6, seed=1),
            adapt(folder / "b", model(), ("first", "second"), r=3, use_rslora=True, seed=2,
                  rank_pattern={"second": 6}, alpha_pattern={"second": 3}),
            adapt(folder / "c", model(), ("second",), r=2, lora_alpha=5, seed=3),
        ]  # fmt: skip
        adapters = [read_adapter(str(path)) for path in self.paths]
        self.recipe = make_recipe(folder, adapters, modules_of(adapters))

    @property
    def names(self) -> list[str]:
        return [str(path) for path in self.paths]

    def composed(self) -> dict[str, Tensor]:
        """sum_i w_i dW_i of the recipe, in float64."""
        found: dict[str, Tensor] = {}
        for index, path in enumerate(self.paths):
            for name, delta in deltas(path).items():
                weight = self.recipe.mixing.weights[name][index]
                assert weight is not None
                found[name] = found.get(name, torch.zeros_like(delta)) + weight * delta
        return found


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return Vision(tmp_path_factory.mktemp("vision"))


def runs_as(adapter: Path, expected: dict[str, Tensor], shifts: dict[str, Tensor] | None = None) -> None:
    """Stock PEFT's live forward of the adapter is that of the plain model with the dense updates."""
    x = images()
    base = model()(x)
    change = Adapted(model(), expected, shifts or {})(x) - base
    assert float(change.abs().max()) > 0.05
    close(load(adapter)(x) - base, change, 1e-11)


def by_group(delta: Tensor) -> list[Tensor]:
    """The matrices (out / G, in k) of the updates that a module of the model has."""
    return list(delta.flatten(1).chunk(GROUPS if delta.shape[0] == 6 else 1))


def test_a_recipe_is_written_as_the_sum_that_stock_peft_runs(tmp_path: Path, vision: Vision) -> None:
    exported = export_adapter(ExportRequest(vision.recipe), tmp_path / "out")
    assert exported.layout.profile == "peft" and not exported.merged
    assert exported.certificate.largest_error < 1e-15
    assert [module.name for module in exported.certificate.modules] == ["first", "head", "second[0]", "second[1]"]
    for name, delta in deltas(tmp_path / "out").items():
        close(delta, vision.composed()[name], 1e-14)
    runs_as(tmp_path / "out", vision.composed())
    shapes = {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items()
    }
    name = "base_model.model.second.lora_{}.weight"
    assert (shapes[name.format("A")], shapes[name.format("B")]) == ((12, 4, 1, 2), (6, 12 // GROUPS, 1, 1))


def test_a_recipe_of_convolutions_is_read_back_as_it_was_written(vision: Vision) -> None:
    written = json.loads(vision.recipe.to_json())
    kinds = {module["name"]: module["kind"] for module in written["modules"]}
    assert kinds == {"first": "convolution", "second": "convolution", "head": "linear"}
    again = decode_recipe(written, "recipe.json", vision.recipe.folder)
    assert again.modules == vision.recipe.modules


@pytest.mark.parametrize(("method", "weight"), [("sum", 1.0), ("uniform", 1 / 3)])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_data_free_sums_need_no_base(
    tmp_path: Path, vision: Vision, method: str, weight: float, dtype: str | None
) -> None:
    exported = export_adapter(ExportRequest(method=method, adapters=vision.names, dtype=dtype), tmp_path / "out")
    expected = total([deltas(path) for path in vision.paths], [weight] * 3)
    change = {None: 1e-14, "float32": 1e-6, "bfloat16": 1e-2}[dtype]
    for name, delta in deltas(tmp_path / "out").items():
        close(delta, expected[name], change)
        norms = float((delta - expected[name]).norm() / expected[name].norm())
        assert norms <= max(1.01 * exported.certificate.largest_error, 1e-15)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_sums_of_any_ranks_are_exact(tmp_path: Path, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(10 * groups + seed)
    ranks = [int(rank) for rank in torch.randint(1, 6, (3,), generator=generator)]
    base = nn.Sequential(nn.Conv2d(6, 6, 2, groups=groups)).double()
    paths = [
        adapt(
            tmp_path / str(rank), base, ("0",), r=groups * rank, lora_alpha=3 + rank, seed=seed, use_rslora=rank % 2 > 0
        )
        for rank in dict.fromkeys(ranks)
    ]
    export_adapter(ExportRequest(method="sum", adapters=[str(path) for path in paths]), tmp_path / "out")
    expected = total([deltas(path, base) for path in paths], [1.0] * len(paths))["0"]
    close(deltas(tmp_path / "out", base)["0"], expected, 1e-14)
    assert config_of(tmp_path / "out")["r"] == groups * sum(dict.fromkeys(ranks))
    x = torch.randn(2, 6, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        close(load(tmp_path / "out", base)(x) - base(x), nn.functional.conv2d(x, expected), 1e-11)


@pytest.mark.parametrize("rank", [1, 3])
def test_merging_cuts_each_group_to_its_best_approximation(tmp_path: Path, vision: Vision, rank: int) -> None:
    exported = export_adapter(ExportRequest(vision.recipe, merge=True, rank=rank), tmp_path / "out")
    found = deltas(tmp_path / "out")
    energies = []
    for name, delta in sorted(vision.composed().items()):
        for own, exact in zip(by_group(found[name]), by_group(delta), strict=True):
            u, s, vh = torch.linalg.svd(exact, full_matrices=False)
            close(own, (u[:, :rank] * s[:rank]) @ vh[:rank], 1e-12)
            energies.append(float(s[:rank].square().sum() / s.square().sum()))
    assert [module.kept_energy for module in exported.certificate.modules] == pytest.approx(energies)
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == rank * GROUPS
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^first": rank, "^head": rank}
    runs_as(tmp_path / "out", found)


@pytest.mark.parametrize("rule", [{"tolerance": 0.4}, {"energy": 0.8}, {"budget": 4_600}], ids=str)
def test_ranks_are_chosen_for_all_groups_of_a_convolution(tmp_path: Path, vision: Vision, rule: dict[str, Any]) -> None:
    exported = export_adapter(ExportRequest(vision.recipe, merge=True, **rule), tmp_path / "out")
    composed, found = vision.composed(), deltas(tmp_path / "out")
    errors = [
        float((own - exact).norm() / exact.norm())
        for name, delta in composed.items()
        for own, exact in zip(by_group(found[name]), by_group(delta), strict=True)
    ]
    kept = sum(float(d.square().sum()) for d in found.values()) / sum(
        float(d.square().sum()) for d in composed.values()
    )
    if "tolerance" in rule:
        assert 0.2 < max(errors) <= 0.4
    elif "energy" in rule:
        assert 0.8 <= kept < 0.95
    else:
        assert 3_800 < exported.size_bytes <= 4_600
        assert (tmp_path / "out/adapter_model.safetensors").stat().st_size == exported.size_bytes
    verify_directory(tmp_path / "out", adapters=vision.names)


def as_linear_layers(path: Path, folder: Path) -> Path:
    """The same matrices as an adapter of linear layers, one for each update."""
    modules = {name.replace("[", "_").rstrip("]"): m for name, m in read_adapter(str(path)).modules.items()}
    factors = {f"base_model.model.{name}.lora_A.weight": m.factors.lora_A for name, m in modules.items()}
    factors |= {f"base_model.model.{name}.lora_B.weight": m.factors.lora_B for name, m in modules.items()}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, folder / "adapter_model.safetensors")
    fields = {
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {f"^{name}": m.factors.rank for name, m in modules.items()},
        "alpha_pattern": {f"^{name}": m.factors.scaling * m.factors.rank for name, m in modules.items()},
        "target_modules": sorted(modules),
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config_of(path) | fields))
    return folder


@pytest.mark.parametrize("method", WITHOUT_SEARCH)
def test_methods_do_to_each_group_what_they_do_to_a_linear_layer(tmp_path: Path, method: str) -> None:
    paths = [adapt(tmp_path / "ab"[seed], model(), r=4, lora_alpha=2 + 2 * seed, seed=seed) for seed in (0, 1)]
    layers = [as_linear_layers(path, tmp_path / f"{path.name}-linear") for path in paths]
    export_adapter(ExportRequest(method=method, adapters=[str(path) for path in paths]), tmp_path / "out")
    export_adapter(ExportRequest(method=method, adapters=[str(path) for path in layers]), tmp_path / "linear")
    found, expected = (read_adapter(str(tmp_path / name)).modules for name in ("out", "linear"))
    assert {name.replace("[", "_").rstrip("]") for name in found} == expected.keys()
    for name, module in found.items():
        layer = expected[name.replace("[", "_").rstrip("]")]
        close(module.factors.delta_weight(), layer.factors.delta_weight(), 1e-9)
    runs_as(tmp_path / "out", deltas(tmp_path / "out"))
    verify_directory(tmp_path / "out", adapters=[str(path) for path in paths])


def test_biases_of_lora_B_are_summed_group_by_group(tmp_path: Path) -> None:
    paths = [
        adapt(tmp_path / "a", model(), r=4, lora_bias=True, seed=1),
        adapt(tmp_path / "b", model(), ("second",), r=2, lora_alpha=3, seed=2),
    ]
    export_adapter(ExportRequest(method="sum", adapters=[str(path) for path in paths]), tmp_path / "out")
    expected, shifts = total([deltas(path) for path in paths], [1.0, 1.0]), biases(paths[0])
    runs_as(tmp_path / "out", expected, shifts)
    verify_directory(tmp_path / "out", adapters=[str(path) for path in paths])


@pytest.mark.parametrize("merge", [False, True], ids=["cat", "merge"])
def test_verify_computes_them_again_and_sees_a_changed_kernel(tmp_path: Path, vision: Vision, merge: bool) -> None:
    export_adapter(ExportRequest(vision.recipe, merge=merge, rank=2 if merge else None), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=vision.names)
    assert found.tensors == 2 * 3
    assert "that PEFT loads these tensors with these scalings, into layers of the recorded shapes" in found.checked
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.second.lora_B.weight"][5, 1] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "out", adapters=vision.names)
    problems = str(caught.value.problems)
    assert "second[1]: " in problems and "second[0]: " not in problems


def test_verify_sees_a_config_that_is_not_the_layouts(tmp_path: Path, vision: Vision) -> None:
    export_adapter(ExportRequest(vision.recipe), tmp_path / "out")
    changed = config_of(tmp_path / "out") | {"lora_alpha": 5}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "out", adapters=vision.names)
    assert "lora_alpha = 5; an export of this record has 12" in str(caught.value.problems)


@pytest.mark.parametrize(
    ("own", "written", "tag"),
    [
        ((None, None), None, False),
        (("CAUSAL_LM", "CAUSAL_LM"), "CAUSAL_LM", True),
        (("FEATURE_EXTRACTION", None), None, False),
    ],
)
def test_the_task_is_the_one_that_the_adapters_agree_on(
    tmp_path: Path, own: tuple[str | None, ...], written: str | None, tag: bool
) -> None:
    """PEFT wraps a model by its task: the one of a causal language model would not take this model."""
    paths = []
    for name, task in zip("ab", own, strict=True):
        paths.append(adapt(tmp_path / name, model(), r=2, seed=ord(name)))
        config = config_of(paths[-1]) | {"task_type": task}
        (paths[-1] / "adapter_config.json").write_text(json.dumps(config))
    export_adapter(ExportRequest(method="sum", adapters=[str(path) for path in paths]), tmp_path / "out")
    assert config_of(tmp_path / "out")["task_type"] == written
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("pipeline_tag: text-generation" in card) == tag
    assert [line for line in card.splitlines() if line.startswith("Only PEFT")] == [
        "Only PEFT reads this adapter: `it changes the convolution first, which PEFT alone reads`."
    ]
    verify_directory(tmp_path / "out", adapters=[str(path) for path in paths])


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"profile": "portable"}, UsageError, "portable profile is impossible: it changes the convolution first"),
        ({"profile": "mlx"}, UsageError, "mlx profile is impossible: first is a convolution"),
        ({"gguf": True}, UsageError, "no GGUF can hold the update of first, a convolution"),
        ({"base": "tiny/other"}, UnsupportedAdapter, "a changes the convolution first, and only linear layers"),
        ({"merge": True, "refit": True, "data": "data"}, UsageError, "the convolution first has no core"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_refused_by_name(
    tmp_path: Path, vision: Vision, options: dict[str, Any], kind: type[LoracatError], said: str
) -> None:
    if "data" in options:
        options = {**options, "data": tmp_path / "data.jsonl"}
        options["data"].write_text("".join(f'{{"text": "{number}"}}\n' for number in range(9)))
    with pytest.raises(kind, match=said) as caught:
        export_adapter(ExportRequest(method="sum", adapters=vision.names, **options), tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_recipes_cut_by_activations_and_gguf_are_refused_by_name(tmp_path: Path, vision: Vision) -> None:
    with pytest.raises(UsageError, match="the activations of the convolution first cannot be weighed"):
        export_adapter(ExportRequest(vision.recipe, merge=True, activation_aware=True), tmp_path / "out")
    with pytest.raises(UsageError, match="no GGUF can hold the update of first, a convolution"):
        export_adapter(ExportRequest(vision.recipe, gguf=True), tmp_path / "out")


def test_adapters_that_name_no_base_are_told_where_to_write_it(tmp_path: Path) -> None:
    path = adapt(tmp_path / "a", model(), r=2)
    (path / "adapter_config.json").write_text(json.dumps(config_of(path) | {"base_model_name_or_path": None}))
    with pytest.raises(IncompatibleAdapters, match="no adapter names its base model") as caught:
        export_adapter(ExportRequest(method="sum", adapters=[str(path)]), tmp_path / "out")
    assert "base_model_name_or_path" in str(caught.value.hint)


def test_lint_says_that_peft_alone_takes_the_export(tmp_path: Path, vision: Vision) -> None:
    export_adapter(ExportRequest(method="sum", adapters=vision.names), tmp_path / "out")
    verdicts = {server.id: server.verdict for server in lint_adapter(tmp_path / "out").servers}
    assert verdicts.pop("peft") == "takes"
    assert "takes" not in verdicts.values()
    for server in lint_adapter(tmp_path / "out", servers=("vllm", "sglang", "llamacpp", "tgi")).servers:
        assert any(
            rule.rule == "matrices" and "second has a factor of shape" in str(rule.found) for rule in server.violations
        )
