"""An export of a mixing with tensors is its dense formula, as stock PEFT loads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.algebra.basis import CanonicalStack, canonical_stack, mixing_in_file_basis
from loracli.cli import app
from loracli.errors import RecipeError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.model.modules import base_modules
from loracli.recipe.recipe import Recipe, load_recipe
from loracli.recipe.record import TENSOR_PARTS, MixingKind
from loracli.recipe.tensors import composed_update, tensor_mixing
from tests.export.test_export import Made, make_recipe
from tests.tiny import make_adapter, make_base

KINDS: tuple[MixingKind, ...] = tuple(TENSOR_PARTS)
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def modules_of(adapters: list[LoraAdapter]) -> list[str]:
    return sorted({name for adapter in adapters for name in adapter.modules})


def stacked(adapters: list[LoraAdapter], module: str) -> tuple[Tensor, Tensor]:
    """A = [A_1; ...] and B = [s_1 B_1, ...] of a module in float64."""
    present = [a.modules[module].factors for a in adapters if module in a.modules]
    lora_A = torch.cat([f.lora_A.double() for f in present])
    return lora_A, torch.cat([f.scaling * f.lora_B.double() for f in present], dim=1)


def random_tensors(kind: MixingKind, adapters: list[LoraAdapter], seed: int = 0) -> dict[str, Tensor]:
    """`rank`: diagonal in the canonical basis; `core`: any M; `factors`: of one rank more than the files have."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in modules_of(adapters):
        lora_A, lora_B = stacked(adapters, module)
        rank = len(lora_A)
        if kind == "rank":
            stack = canonical_stack([a.modules[module].factors for a in adapters if module in a.modules])
            weights = torch.randn(rank, generator=generator, dtype=torch.float64)
            tensors[f"{module}.mixing"] = mixing_in_file_basis(stack, torch.diag(weights))
        elif kind == "core":
            tensors[f"{module}.mixing"] = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        else:
            tensors[f"{module}.lora_A"] = torch.randn(rank + 1, lora_A.shape[1], generator=generator)
            tensors[f"{module}.lora_B"] = 0.1 * torch.randn(lora_B.shape[0], rank + 1, generator=generator)
    return tensors


def dense_update(recipe: Recipe, adapters: list[LoraAdapter], module: str) -> Tensor:
    """dW (out, in) in float64 from the definition."""
    tensors = recipe.mixing.tensors
    if recipe.mixing.kind == "factors":
        return tensors[f"{module}.lora_B"].double() @ tensors[f"{module}.lora_A"].double()
    lora_A, lora_B = stacked(adapters, module)
    dense: Tensor = lora_B @ tensors[f"{module}.mixing"] @ lora_A
    return dense


def recipe_of(made: Made, kind: MixingKind) -> Recipe:
    tensors = random_tensors(kind, made.adapters)
    return replace(made.recipe, mixing=tensor_mixing(kind, tensors, made.adapters, numbers=77))


def peft_updates(made: Made, directory: Path) -> dict[str, Tensor]:
    """dW (out, in) of each module as stock PEFT computes it, float64; Conv1D transposed back."""
    model = PeftModel.from_pretrained(made.load(), directory)
    updates = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double()
            swap = getattr(module, "fan_in_fan_out", False) or "embedding" in type(module).__name__.lower()
            updates[name.removeprefix("base_model.model.")] = delta.T if swap else delta
    return updates


SOME = [
    "plain",
    "mixed ranks",
    "disjoint targets",
    "patterns",
    "both rslora",
    "some layers only",
    "embeddings",
    "tied embeddings",
    "conv1d of two shapes",
    "one adapter",
    "three adapters",
]


@pytest.mark.parametrize("case", SOME)
def test_stock_peft_loads_the_dense_update_of_every_module(tmp_path: Path, case: str) -> None:
    made = Made(tmp_path, case)
    for kind in KINDS:
        recipe = recipe_of(made, kind)
        exported = export_adapter(ExportRequest(recipe), tmp_path / kind)
        assert exported.certificate.largest_error < 1e-6
        found = peft_updates(made, tmp_path / kind)
        for module in modules_of(made.adapters):
            expected = dense_update(recipe, made.adapters, module)
            error = float((found.pop(module) - expected).norm() / expected.norm())
            assert error < 1e-6, (kind, module)
        assert not any(padding.any() for padding in found.values())


@every_kind
def test_a_recipe_from_its_file_exports_the_same_bytes(tmp_path: Path, kind: MixingKind) -> None:
    made = Made(tmp_path, "mixed ranks")
    recipe = recipe_of(made, kind)
    recipe.save(tmp_path / "recipe.json")
    for name, source in (("one", recipe), ("two", tmp_path / "recipe.json")):
        export_adapter(ExportRequest(source), tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@every_kind
def test_a_merge_of_full_rank_loses_nothing_and_of_a_lower_one_what_the_svd_leaves_out(
    tmp_path: Path, kind: MixingKind
) -> None:
    made = Made(tmp_path, "mixed ranks")
    recipe = recipe_of(made, kind)
    full_rank = max(torch.linalg.matrix_rank(dense_update(recipe, made.adapters, m)) for m in modules_of(made.adapters))
    export_adapter(ExportRequest(recipe, merge=True, rank=int(full_rank)), tmp_path / "full")
    exported = export_adapter(ExportRequest(recipe, merge=True, rank=3), tmp_path / "low")
    full, low = peft_updates(made, tmp_path / "full"), peft_updates(made, tmp_path / "low")
    for certificate in exported.certificate.modules:
        expected = dense_update(recipe, made.adapters, certificate.name)
        torch.testing.assert_close(full[certificate.name], expected, rtol=0, atol=1e-6 * float(expected.norm()))
        singular = torch.linalg.svdvals(expected)
        left_out = float(singular[3:].norm())
        found = float((low[certificate.name] - expected).norm())
        assert abs(found - left_out) < 1e-6 * float(singular.norm())
        assert certificate.relative_error == pytest.approx(left_out / float(singular.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["rank", "core"])
def test_a_concatenation_keeps_the_bytes_of_a(tmp_path: Path, kind: MixingKind) -> None:
    made = Made(tmp_path, "plain")
    export_adapter(ExportRequest(recipe_of(made, kind)), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in modules_of(made.adapters):
        files = torch.cat([a.modules[module].factors.lora_A for a in made.adapters])
        assert torch.equal(tensors[f"base_model.model.{module}.lora_A.weight"], files)


def test_trained_factors_are_written_to_the_bit_whatever_the_ingredients_dtype(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    half = [read_adapter(str(make_adapter(tmp_path / "half", base, dtype=torch.float16)))]
    recipe = make_recipe(tmp_path, half, base_modules(AutoModelForCausalLM.from_pretrained(base), half))
    recipe = replace(recipe, mixing=tensor_mixing("factors", random_tensors("factors", half), half, numbers=1))
    exported = export_adapter(ExportRequest(recipe), tmp_path / "out")
    assert exported.dtype == torch.float32 and exported.certificate.largest_error < 1e-14
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in recipe.mixing.tensors.items():
        assert torch.equal(tensors[f"base_model.model.{name}.weight"], tensor)
    assert export_adapter(ExportRequest(recipe, dtype="float16"), tmp_path / "low").certificate.largest_error > 1e-5


# Singular values that are equal.


class Equal:
    """Two adapters whose updates have four singular values of exactly 2, and a mixing fitted in their canonical
    basis."""

    def __init__(self, folder: Path) -> None:
        base = make_base(folder / "base")
        self.adapters = []
        for seed in (1, 2):
            path = make_adapter(folder / f"adapter{seed}", base, seed=seed) / "adapter_model.safetensors"
            generator = torch.Generator().manual_seed(seed)
            units = {
                name: torch.eye(max(tensor.shape))[torch.randperm(max(tensor.shape), generator=generator)[:4]]
                for name, tensor in sorted(load_file(path).items())
            }
            units = {name: (t if "lora_A" in name else t.T).contiguous() for name, t in units.items()}
            save_file(units, path, metadata={"format": "pt"})
            self.adapters.append(read_adapter(str(path.parent)))
        self.stacks: dict[str, CanonicalStack] = {}
        self.mixings: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for module in modules_of(self.adapters):
            self.stacks[module] = canonical_stack([a.modules[module].factors for a in self.adapters])
            self.mixings[module] = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        tensors = {f"{m}.mixing": mixing_in_file_basis(self.stacks[m], self.mixings[m]) for m in self.stacks}
        table = base_modules(AutoModelForCausalLM.from_pretrained(base), self.adapters)
        mixing = tensor_mixing("core", tensors, self.adapters, numbers=64)
        self.recipe = replace(make_recipe(folder, self.adapters, table), mixing=mixing)


def test_equal_singular_values_export_what_was_fitted_without_another_svd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Equal(tmp_path)
    for adapter in made.adapters:
        for update in adapter.modules.values():
            assert torch.linalg.svdvals(update.factors.delta_weight())[:5].tolist() == [2, 2, 2, 2, 0]
    made.recipe.save(tmp_path / "recipe.json")

    def svd(*_: object, **__: object) -> None:
        raise AssertionError("the basis of equal singular values was made again")

    monkeypatch.setattr(torch.linalg, "svd", svd)
    for name in ("one", "two"):
        export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / name)
    monkeypatch.undo()
    file = "adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for module, found in read_adapter(str(tmp_path / "one")).modules.items():
        stack = made.stacks[module]
        expected = stack.lora_B @ made.mixings[module] @ stack.lora_A
        error = (found.factors.delta_weight() - expected).norm() / expected.norm()
        assert float(error) < 1e-6


# What carries nothing.


def test_modules_whose_update_is_zero_are_exported_as_zeros(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    recipe = recipe_of(made, "core")
    zero = modules_of(made.adapters)[0]
    tensors = dict(recipe.mixing.tensors) | {f"{zero}.mixing": torch.zeros(8, 8)}
    mixing = tensor_mixing("core", tensors, made.adapters, numbers=1)
    assert mixing.weights[zero] == (0.0, 0.0)
    for merge in (False, True):
        exported = export_adapter(ExportRequest(replace(recipe, mixing=mixing), merge=merge), tmp_path / str(merge))
        found = read_adapter(str(tmp_path / str(merge))).modules[zero].factors.delta_weight()
        certificate = next(c for c in exported.certificate.modules if c.name == zero)
        assert not found.any() and certificate.relative_error == 0.0


def test_an_adapter_that_changes_nothing_at_all_is_exported_and_has_no_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [
        read_adapter(str(make_adapter(tmp_path / f"a{i}", base, seed=i, size=size))) for i, size in enumerate((0.3, 0))
    ]
    recipe = make_recipe(tmp_path, adapters, base_modules(AutoModelForCausalLM.from_pretrained(base), adapters))
    for kind in KINDS:
        mixing = tensor_mixing(kind, random_tensors(kind, adapters), adapters, numbers=1)
        assert all(row[0] is not None and row[1] is None for row in mixing.weights.values())
        export_adapter(ExportRequest(replace(recipe, mixing=mixing)), tmp_path / kind)
        assert "| - | - |" in (tmp_path / kind / "README.md").read_text()


# What does not fit.


@every_kind
def test_a_missing_tensor_and_one_of_another_shape_are_named(tmp_path: Path, kind: MixingKind) -> None:
    made = Made(tmp_path, "mixed ranks")
    recipe = recipe_of(made, kind)
    tensors = dict(recipe.mixing.tensors)
    name = sorted(tensors)[-1]
    for damaged in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: tensors[name][:-1, :-1]},
    ):
        changed = replace(recipe, mixing=replace(recipe.mixing, tensors=damaged))
        with pytest.raises(RecipeError, match=name):
            export_adapter(ExportRequest(changed), tmp_path / "out")
        with pytest.raises(RecipeError, match=name):
            tensor_mixing(kind, damaged, made.adapters, numbers=1)
    with pytest.raises(ValueError, match="x.mixing is not a tensor"):
        tensor_mixing(kind, tensors | {"x.mixing": torch.eye(9)}, made.adapters, numbers=1)


def test_tensors_for_a_module_that_no_adapter_changes_are_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    recipe = recipe_of(made, "core")
    weights = {**recipe.mixing.weights, "lm_head": (None, None)}
    with pytest.raises(RecipeError, match="lm_head, which no adapter changes"):
        export_adapter(ExportRequest(replace(recipe, mixing=replace(recipe.mixing, weights=weights))), tmp_path / "out")


# For people.


def test_weights_are_those_of_the_dense_least_squares(tmp_path: Path) -> None:
    made = Made(tmp_path, "three adapters")
    for kind in KINDS:
        recipe = recipe_of(made, kind)
        for module in modules_of(made.adapters):
            dense = [a.modules[module].factors.delta_weight() for a in made.adapters if module in a.modules]
            target = dense_update(recipe, made.adapters, module).flatten()[:, None]
            solution = torch.linalg.lstsq(torch.stack([d.flatten() for d in dense], dim=1), target).solution
            found = recipe.mixing.weights[module]
            assert [w is not None for w in found] == [module in a.modules for a in made.adapters]
            torch.testing.assert_close(
                torch.tensor([w for w in found if w is not None], dtype=torch.float64), solution.flatten()
            )


def test_tensors_that_need_a_gradient_or_another_dtype_are_kept_as_plain_ones(tmp_path: Path) -> None:
    made = Made(tmp_path, "one adapter")
    tensors = {n: t.float().T.requires_grad_() for n, t in random_tensors("core", made.adapters).items()}
    mixing = tensor_mixing("core", tensors, made.adapters, numbers=1)
    for name, tensor in mixing.tensors.items():
        assert tensor.dtype == torch.float64 and not tensor.requires_grad and tensor.is_contiguous()
        assert torch.equal(tensor, tensors[name].detach().double())
    composed = composed_update(
        "core", mixing.tensors, modules_of(made.adapters)[0], [next(iter(made.adapters[0].modules.values())).factors]
    )
    assert composed.scaling == 1.0


@every_kind
def test_card_and_certificate_say_which_kind_it_is_and_name_the_tensors_by_hash(
    tmp_path: Path, kind: MixingKind
) -> None:
    made = Made(tmp_path, "plain")
    recipe = recipe_of(made, kind)
    export_adapter(ExportRequest(recipe), tmp_path / "out")
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    says = {"rank": "each singular direction", "core": "full matrix `M`", "factors": "were then trained"}
    assert [k for k, words in says.items() if words in card] == [kind]
    assert "77 numbers" in card and "CAT" not in card and "The weights are a summary" in card
    assert f"sha256 `{recipe.mixing.tensors_sha256}`" in card
    first = [row[0] for row in recipe.mixing.weights.values()]
    assert f"| {sum(w or 0 for w in first) / len(first):.3f} |" in card
    document = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert document["recipe"]["mixing"]["tensors_sha256"] == recipe.mixing.tensors_sha256
    assert document["recipe"]["mixing"]["kind"] == kind


@every_kind
def test_show_says_what_the_weights_are_and_how_many_numbers_were_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: MixingKind
) -> None:
    made = Made(tmp_path, "plain")
    recipe_of(made, kind).save(tmp_path / "recipe.json")
    monkeypatch.chdir(tmp_path)
    shown: Any = CliRunner().invoke(app, ["show"])
    assert shown.exit_code == 0
    assert f"77 numbers ({kind}), fitted, kept in recipe.safetensors" in shown.stdout
    assert "the weights that come closest: mean over modules" in shown.stdout
    recipe = load_recipe("recipe.json")
    values = [row[0] for name, row in recipe.mixing.weights.items() if name.endswith("q_proj")]
    assert f"{sum(w or 0 for w in values) / len(values):+.2f}" in shown.stdout


@pytest.mark.parametrize(("damage", "code"), [("missing", 3), ("swapped", 7), ("cut", 7)])
@pytest.mark.parametrize("command", ["show", "export"])
def test_damaged_tensors_end_a_command_with_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, damage: str, code: int
) -> None:
    made = Made(tmp_path, "one adapter")
    recipe_of(made, "core").save(tmp_path / "recipe.json")
    path = tmp_path / "recipe.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-8] + (b"" if damage == "cut" else b"12345678"))
    monkeypatch.chdir(tmp_path)
    result: Any = CliRunner().invoke(app, [command, "--json"])
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["code"]) == (code, code) and "recipe.safetensors" in error["message"]
