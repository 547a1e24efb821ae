"""What is exported of experts is the weighted sum of each expert's own updates, as stock PEFT loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loracli.adapters.adapter import read_adapter
from loracli.adapters.compatible import inspect_adapters
from loracli.algebra.methods import METHODS
from loracli.errors import UsageError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.model.modules import base_modules
from loracli.verifying.verify import verify_directory
from tests.export.test_export import make_recipe
from tests.mixtures import BOTH, EXPERTS, ROUTERS, add, file_deltas, load, peft_deltas
from tests.tiny import logits, make_adapter, make_base

# PEFT looks for the keys of patterns among modules alone, and says so even where it has used them for a parameter.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

FIRST = {"experts.base_layer": "gate_up_proj", "experts": "down_proj"}


class Mixture:
    """A tiny mixture, three adapters, and a recipe with weights of both signs."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.base, router = make_base(folder / "base", kind), f"{ROUTERS[kind]}.weight"
        q, both = ("q_proj",), (*BOTH, router)
        self.paths = [
            make_adapter(folder / "a", self.base, targets=q, parameters=both, rank=3, alpha=6, seed=1),
            make_adapter(folder / "b", self.base, targets=(), parameters=BOTH[1:], rank=3, alpha=1, seed=2),
            make_adapter(folder / "c", self.base, targets=(), parameters=both, alpha=5, seed=3, use_rslora=True,
                         rank_pattern={"mlp.experts.gate_up_proj": 5, router: 2}, alpha_pattern={"down_proj": 9}),
        ]  # fmt: skip
        adapters = [read_adapter(str(path)) for path in self.paths]
        self.recipe = make_recipe(folder, adapters, base_modules(load(self.base), adapters))

    @property
    def names(self) -> list[str]:
        return [str(path) for path in self.paths]

    def composed(self) -> dict[str, torch.Tensor]:
        """sum_i w_i dW_i in float64, of PEFT's own dW_i."""
        total: dict[str, torch.Tensor] = {}
        for index, path in enumerate(self.paths):
            for name, delta in peft_deltas(path, self.base).items():
                weight = self.recipe.mixing.weights[name][index]
                assert weight is not None
                total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
        return total


@pytest.fixture(scope="module", params=["mixtral", "gpt-oss"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp("one"), "mixtral")


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= tolerance * float(delta.norm()), name


def test_the_updates_are_read_as_peft_means_them(mixtral: Mixture) -> None:
    """Entry by entry: rows expert after expert, columns rank after rank."""
    adapter, dense = read_adapter(mixtral.names[0]), file_deltas(mixtral.paths[0], FIRST)
    assert len(dense) == 4
    for parameter, delta in dense.items():
        modules = adapter.targets[parameter]
        assert [module.name for module in modules] == [f"{parameter}[{expert}]" for expert in range(EXPERTS)]
        for module, expected in zip(modules, delta, strict=True):
            assert torch.allclose(module.factors.delta_weight(), expected, rtol=0, atol=1e-12)
    theirs = peft_deltas(mixtral.paths[0], mixtral.base)
    close({name: theirs[name] for name in dense}, dense)


def test_a_recipe_is_exported_as_the_weighted_sum_of_each_expert(tmp_path: Path, mixture: Mixture) -> None:
    exported = export_adapter(ExportRequest(mixture.recipe), tmp_path / "out")
    assert exported.layout.profile == "peft" and "experts" in str(exported.layout.reason)
    assert exported.layout.ranks["model.layers.0.mlp.experts.gate_up_proj"] == 3 + 5
    assert exported.layout.ranks["model.layers.0.mlp.experts.down_proj"] == 3 + 3 + 4
    assert len(exported.certificate.modules) == 2 * (2 * EXPERTS + 2)
    assert exported.certificate.largest_error < 1e-7
    close(peft_deltas(tmp_path / "out", mixture.base), mixture.composed())


def test_peft_runs_an_export_as_the_bare_model_with_the_updates_added(tmp_path: Path, mixture: Mixture) -> None:
    export_adapter(ExportRequest(mixture.recipe), tmp_path / "out")
    expected = load(mixture.base)
    add(expected, mixture.composed())
    loaded = PeftModel.from_pretrained(load(mixture.base), str(tmp_path / "out"))
    assert torch.allclose(logits(loaded), logits(expected), rtol=0, atol=2e-4)
    assert float((logits(expected) - logits(load(mixture.base))).abs().max()) > 0.1


def test_merging_cuts_each_expert_to_its_best_approximation(tmp_path: Path, mixture: Mixture) -> None:
    exported = export_adapter(ExportRequest(mixture.recipe, merge=True, rank=4), tmp_path / "out")
    expected, energies = {}, {}
    for name, delta in mixture.composed().items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        rank = min(4, *delta.shape[-2:])
        expected[name] = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        for expert, row in enumerate(s if delta.dim() == 3 else s[None]):
            key = f"{name}[{expert}]" if delta.dim() == 3 else name
            energies[key] = float(row[:rank].square().sum() / row.square().sum())
    close(peft_deltas(tmp_path / "out", mixture.base), expected, 1e-5)
    found = {module.name: module.kept_energy for module in exported.certificate.modules}
    assert found == pytest.approx(energies, rel=1e-6)
    worst = exported.certificate.worst
    assert [module.kept_energy for module in worst] == sorted(module.kept_energy for module in worst)
    for parameter in (f"model.layers.{layer}.{name}" for layer in (0, 1) for name in BOTH):
        (shown,) = [module for module in worst if module.name.startswith(f"{parameter}[")]
        assert shown.kept_energy == min(energy for name, energy in found.items() if name.startswith(f"{parameter}["))


@pytest.mark.parametrize("rule", [{"tolerance": 0.4}, {"energy": 0.7}, {"budget": 30_000}], ids=str)
def test_ranks_are_chosen_for_all_experts_of_a_parameter(
    tmp_path: Path, mixtral: Mixture, rule: dict[str, Any]
) -> None:
    """The file can hold one rank for them: no expert is further off than asked, energy and bytes count them all."""
    exported = export_adapter(ExportRequest(mixtral.recipe, merge=True, **rule), tmp_path / "out")
    composed, found = mixtral.composed(), peft_deltas(tmp_path / "out", mixtral.base)
    kept = sum(float(delta.square().sum()) for delta in found.values())
    whole = sum(float(delta.square().sum()) for delta in composed.values())
    if "tolerance" in rule:
        errors = [
            float((found[name] - delta)[expert].norm() / delta[expert].norm())
            for name, delta in composed.items()
            for expert in range(EXPERTS)
            if delta.dim() == 3
        ]
        assert max(errors) <= 0.4
    elif "energy" in rule:
        assert 0.7 <= kept / whole < 0.85
    else:
        assert exported.size_bytes <= 30_000
        assert exported.size_bytes > 25_000, "and what there is room for is used"
    assert exported.merged and kept < 0.99 * whole


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_records])
def test_methods_act_on_each_expert_by_itself(tmp_path: Path, mixtral: Mixture, name: str) -> None:
    """As they act on ordinary modules that hold the same matrices, one module for each expert."""
    plain = tmp_path / "plain"
    for index, path in enumerate(mixtral.paths[:2]):
        as_linear_layers(path, plain / str(index))
    export_adapter(ExportRequest(method=name, adapters=mixtral.names[:2]), tmp_path / "out")
    export_adapter(
        ExportRequest(method=name, adapters=[str(plain / "0"), str(plain / "1")], profile="peft"), tmp_path / "linear"
    )
    linear = {module.name: module for module in read_adapter(str(tmp_path / "linear")).modules.values()}
    experts = read_adapter(str(tmp_path / "out")).modules
    for key, module in experts.items():
        expected = linear[key.replace("[", ".").replace("]", "")].factors.delta_weight()
        scale = float(expected.abs().max())
        assert torch.allclose(module.factors.delta_weight(), expected, rtol=0, atol=1e-5 * max(scale, 1.0)), key
    assert len(experts) == len(linear) == 4 * EXPERTS + 4
    verify_directory(tmp_path / "out", adapters=mixtral.names[:2])


def as_linear_layers(adapter: Path, folder: Path) -> None:
    """The same updates as those of linear layers `down_proj.3`."""
    tensors, ranks, alphas = {}, {}, {}
    for name, module in read_adapter(str(adapter)).modules.items():
        plain = name.replace("[", ".").replace("]", "")
        tensors[f"base_model.model.{plain}.lora_A.weight"] = module.factors.lora_A.contiguous()
        tensors[f"base_model.model.{plain}.lora_B.weight"] = module.factors.lora_B.contiguous()
        ranks[plain] = module.factors.rank
        alphas[plain] = module.factors.rank * module.factors.scaling
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": ["q_proj", "gate", *map(str, range(EXPERTS))],
        "base_model_name_or_path": "tiny/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_export_comes_back_as_an_ingredient_and_verifies(tmp_path: Path, mixtral: Mixture) -> None:
    export_adapter(ExportRequest(mixtral.recipe), tmp_path / "out")
    save = mixtral.recipe.folder / "recipe.json"
    mixtral.recipe.save(save)
    found = verify_directory(tmp_path / "out", recipe=save, base=str(mixtral.base))
    assert any("PEFT loads these tensors" in said for said in found.checked)
    assert any("every tensor against the composition" in said for said in found.checked)
    again = export_adapter(
        ExportRequest(method="sum", adapters=[str(tmp_path / "out")], base=str(mixtral.base)), tmp_path / "again"
    )
    assert again.certificate.largest_error == 0.0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_verify_finds_one_wrong_entry_of_one_expert(tmp_path: Path, mixtral: Mixture) -> None:
    export_adapter(ExportRequest(method="sum", adapters=mixtral.names), tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    tensors[name][5, 2] += 0.01  # rank 0 of expert 2
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError) as caught:
        verify_directory(tmp_path / "out", adapters=mixtral.names)
    assert "model.layers.1.mlp.experts.gate_up_proj[2]: 1 of" in str(caught.value.problems)


def test_inspect_counts_parameters_and_compares_experts(mixtral: Mixture) -> None:
    seen = inspect_adapters(mixtral.names[:2])
    assert [adapter.modules for adapter in seen.adapters] == [2 * 4, 2]
    assert seen.adapters[1].leaves == ("down_proj",)
    dense = [peft_deltas(path, mixtral.base) for path in mixtral.paths[:2]]
    assert seen.adapters[0].norm == pytest.approx(sum(float(d.square().sum()) for d in dense[0].values()) ** 0.5)
    product = sum(float((d * dense[1][name]).sum()) for name, d in dense[0].items() if name in dense[1])
    assert seen.overlaps[0].cosine == pytest.approx(product / (seen.adapters[0].norm * seen.adapters[1].norm))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"profile": "portable"}, "changes the experts of model.layers.0.mlp.experts.down_proj"),
        ({"profile": "mlx"}, "model.layers.0.mlp.experts.down_proj belongs to an expert"),
    ],
    ids=str,
)
def test_layouts_that_cannot_hold_experts_are_refused_by_name(
    tmp_path: Path, mixtral: Mixture, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        export_adapter(ExportRequest(mixtral.recipe, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_bias_beside_experts_is_refused_by_name(tmp_path: Path, mixtral: Mixture) -> None:
    biased = make_adapter(tmp_path / "biased", mixtral.base, lora_bias=True)
    with pytest.raises(UsageError, match="has lora_bias, which PEFT does not support beside adapted experts"):
        export_adapter(
            ExportRequest(method="sum", adapters=[mixtral.names[0], str(biased)], base=str(mixtral.base)),
            tmp_path / "out",
        )
