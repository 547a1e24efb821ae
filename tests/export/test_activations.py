"""Cutting by activations: G is that of a model with the composition in its weights, and the export uses it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from loracli.algebra.truncate import truncate_for
from loracli.calibration.dataset import read_dataset
from loracli.calibration.render import Example
from loracli.composition.composition import Composition, from_recipe
from loracli.errors import IntegrityError, OutputExists, RecipeError, UsageError
from loracli.export.activations import moments_of, recorded_moments
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.activations import _MOST_RECORDS, _watched, chosen_records
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.placement import Placement
from loracli.recipe.ingredients import read_ingredients
from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import activations_path
from loracli.recipe.tensors import read_moments
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.heard import Heard
from tests.tiny import random_records, write_jsonl
from tests.verifying.test_verify_adapter import flip, problems, rewrite

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "records.jsonl", random_records(7, seed=3))


def inputs_of_modules(model: Any, names: tuple[str, ...], records: list[dict[str, str]], base: Path) -> dict[str, Any]:
    """What reaches each module, token by token over all records, from plain forward passes."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1))
        )
        for name in names
    ]
    for record in records:
        ids = tokenizer(record["prompt"] + record["completion"]).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("case", ["plain", "disjoint targets", "embeddings", "conv1d of two shapes", "head"])
def test_the_moments_are_those_of_a_model_with_the_update_in_its_weights(tmp_path: Path, data: Path, case: str) -> None:
    made = Made(tmp_path, case)
    composition = from_recipe(made.recipe, tuple(made.adapters))
    found = moments_of(composition, data, base=str(made.base))
    assert tuple(sorted(found)) == composition.names()
    model = made.load()
    for name in composition.names():
        update, weight = composition.compose(name).factors.delta_weight(), model.get_submodule(name).weight
        turned = isinstance(model.get_submodule(name), (nn.Embedding, Conv1D))
        with torch.no_grad():
            weight += (update.T if turned else update).to(weight)
    names = tuple(name for name in composition.names() if name != "lm_head")  # which sees what is scored, no more
    seen = inputs_of_modules(model, names, random_records(7, seed=3), made.base)
    for name in names:
        lora_A = composition.compose(name).factors.lora_A
        x = seen[name]
        z = lora_A.T[x] if isinstance(model.get_submodule(name), nn.Embedding) else x.double() @ lora_A.T
        torch.testing.assert_close(found[name], z.T @ z / len(z), rtol=1e-3, atol=1e-4 * float(found[name].abs().max()))


def test_a_layer_that_a_model_runs_twice_is_seen_twice() -> None:
    torch.manual_seed(0)
    layer, A, inputs = nn.Linear(5, 5, bias=False), torch.randn(3, 5), torch.randn(2, 4, 5)
    model = nn.ModuleDict({"shared": layer})
    attached = SimpleNamespace(model=model, device=torch.device("cpu"))
    objective: Any = SimpleNamespace(attached=attached, record_sums=lambda _: layer(layer(inputs)))
    with _watched(objective, {"shared": A}) as sums_of, torch.inference_mode():
        *sums, rows = sums_of(objective)
        z = torch.cat([x.reshape(-1, 5) for x in (inputs, layer(inputs))]) @ A.T
    assert rows == 16
    torch.testing.assert_close(torch.stack(sums).view(3, 3), (z.T @ z).double(), rtol=1e-5, atol=1e-5)


def test_an_export_cuts_every_module_by_its_moment(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, "plain")
    composition = from_recipe(made.recipe, tuple(made.adapters))
    moments = moments_of(composition, data, base=str(made.base))
    exported = export_adapter(
        ExportRequest(made.recipe, merge=True, rank=3, activation_aware=True, fit_data=data, base=str(made.base)),
        tmp_path / "out",
    )
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    plain = export_adapter(ExportRequest(made.recipe, merge=True, rank=3), tmp_path / "plain")
    for module, other in zip(exported.certificate.modules, plain.certificate.modules, strict=True):
        exact = composition.compose(module.name).factors
        wanted = truncate_for(exact, 3, moments[module.name]).factors.delta_weight()
        prefix = f"base_model.model.{module.name}.lora_"
        written = tensors[prefix + "B.weight"].double() @ tensors[prefix + "A.weight"].double()
        torch.testing.assert_close(written, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))
        error = float((written - exact.delta_weight()).norm() / exact.delta_weight().norm())
        assert module.relative_error == pytest.approx(error, rel=1e-6)
        assert module.kept_energy == pytest.approx(1 - error**2, abs=1e-6)
        assert module.kept_energy < other.kept_energy
    document = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert document["export"]["activation_aware"] is True and document["export"]["moments"] == "records"
    assert "--merge --activation-aware --fit-data FILE --rank 3" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_aware": True}, "--activation-aware is for --merge"),
        ({"activation_aware": True, "merge": True, "energy": 0.5}, "--activation-aware is for --merge to a rank"),
        ({"fit_data": "records.jsonl", "merge": True}, "--fit-data has no use"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_adapter(ExportRequest(tmp_path / "no-such-recipe.json", **options), tmp_path / "out")


# From the recipe.


@pytest.fixture(scope="module", params=["module", "core", "factors"])
def fitted(
    request: pytest.FixtureRequest, tiny_base: Path, two_adapters: tuple[Path, Path], tmp_path_factory: Any
) -> Path:
    """A recipe that was fitted on 50 records of random letters, of which 30 are for training."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_jsonl(folder / "val.jsonl", random_records(50))
    settings = FitSettings(control="none", mixing=request.param, passes=12, holdout=0.2)
    adapters = [str(path) for path in two_adapters]
    recipe = fit_mixing(adapters, data, base=str(tiny_base), settings=settings, placement=Placement(dtype="float32"))
    recipe.save(folder / "recipe.json")
    return folder / "recipe.json"


def composition_of(path: Path) -> Composition:
    recipe = load_recipe(path)
    return from_recipe(recipe, read_ingredients(recipe))


def test_a_fit_leaves_the_moments_of_its_training_records(fitted: Path, tiny_base: Path, tmp_path: Path) -> None:
    composition = composition_of(fitted)
    activations = composition.activations
    training = read_dataset(fitted.parent / "val.jsonl", None, holdout=0.2, seed=0).training
    records = [json.loads((fitted.parent / "val.jsonl").read_text().splitlines()[r.line - 1]) for r in training]
    assert activations is not None and activations.records == len(records) == 30
    assert activations.tokens == sum(len(r["prompt"]) + len(r["completion"]) + 2 for r in records)
    seen = moments_of(composition, write_jsonl(tmp_path / "training.jsonl", records), base=str(tiny_base))
    found = recorded_moments(composition, fitted)
    assert found.origin == "recipe" and tuple(found.by_module) == composition.names()
    for name, moment in found.by_module.items():
        atol = 1e-4 * float(seen[name].abs().max())
        torch.testing.assert_close(moment, seen[name], rtol=1e-3, atol=atol)


def test_an_export_needs_neither_base_nor_data(fitted: Path, tmp_path: Path) -> None:
    composition = composition_of(fitted)
    moments = recorded_moments(composition, fitted).by_module
    exported = export_adapter(ExportRequest(fitted, merge=True, rank=2, activation_aware=True), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in exported.certificate.modules:
        wanted = truncate_for(composition.compose(module.name).factors, 2, moments[module.name]).factors.delta_weight()
        prefix = f"base_model.model.{module.name}.lora_"
        written = tensors[prefix + "B.weight"].double() @ tensors[prefix + "A.weight"].double()
        torch.testing.assert_close(written, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))
    assert json.loads((tmp_path / "out" / "loracat.json").read_text())["export"]["moments"] == "recipe"
    assert "--merge --activation-aware --rank 2" in (tmp_path / "out" / "README.md").read_text()


def test_a_recipe_that_was_read_keeps_its_moments(fitted: Path, tmp_path: Path) -> None:
    beside, there = "recipe.json.activations.safetensors", fitted.parent
    document, moments = fitted.read_bytes(), (there / beside).read_bytes()
    recipe = load_recipe(fitted)
    recipe.save(fitted, force=True)
    recipe.save(tmp_path / "recipe.json")
    assert fitted.read_bytes() == document and (there / beside).read_bytes() == moments
    assert (tmp_path / beside).read_bytes() == moments and load_recipe(tmp_path / "recipe.json") == recipe
    how = {"merge": True, "rank": 2, "activation_aware": True}
    for name, source in (("file", fitted), ("read", recipe), ("copied", load_recipe(tmp_path / "recipe.json"))):
        export_adapter(ExportRequest(source, **how), tmp_path / name)
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("file", "read", "copied")]
    assert written[0] == written[1] == written[2]
    (tmp_path / beside).write_bytes((tmp_path / beside).read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="is not the file"):
        load_recipe(tmp_path / "recipe.json").save(tmp_path / "again.json")
    (tmp_path / beside).unlink()
    load_recipe(tmp_path / "recipe.json").save(tmp_path / "again.json")
    assert load_recipe(tmp_path / "again.json").activations is None


@pytest.mark.parametrize("fitted", ["module"], indirect=True)
def test_an_adapter_of_weight_zero_has_no_row_in_the_moments(fitted: Path) -> None:
    recipe = load_recipe(fitted)
    whole = recorded_moments(composition_of(fitted), fitted).by_module
    weights = {
        name: tuple(w and w * (i == 0) for i, w in enumerate(row)) for name, row in recipe.mixing.weights.items()
    }
    changed = replace(recipe, mixing=replace(recipe.mixing, weights=weights))
    composition = from_recipe(changed, read_ingredients(changed))
    for name, moment in recorded_moments(composition, fitted).by_module.items():
        first = composition.adapters[0].modules.get(name)
        rank = 0 if first is None else first.factors.rank
        assert torch.equal(moment, whole[name][:rank, :rank] if rank else torch.zeros(1, 1).double())
        assert len(moment) == composition.compose(name).factors.rank


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), RecipeError, "does not exist"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
            IntegrityError,
            "is not the file that",
        ),
    ],
)
def test_moments_that_are_not_the_fits_are_refused_and_other_exports_go_on(
    fitted: Path, tmp_path: Path, damage: Any, error: type[Exception], message: str
) -> None:
    folder = Path(shutil.copytree(fitted.parent, fitted.parent.parent / f"damaged{len(message)}-{fitted.parent.name}"))
    damage(folder / "recipe.json.activations.safetensors")
    with pytest.raises(error, match=message) as caught:
        export_adapter(ExportRequest(folder / "recipe.json", merge=True, activation_aware=True), tmp_path / "out")
    assert "--fit-data" in (getattr(caught.value, "hint", "") or "")
    export_adapter(ExportRequest(folder / "recipe.json", merge=True), tmp_path / "out")


def test_an_older_recipe_is_refused_with_the_way_out_and_exported_otherwise(fitted: Path, tmp_path: Path) -> None:
    document = json.loads(fitted.read_text())
    del document["activations"]
    document["mixing"].pop("weights_sha256", None)
    del document["held_out"]["standard_error"]
    older = fitted.with_name("older.json")
    older.write_text(json.dumps(document | {"loracat_recipe": 2}, indent=2, ensure_ascii=False) + "\n")
    if fitted.with_name("recipe.safetensors").exists():
        shutil.copy(fitted.with_name("recipe.safetensors"), older.with_name("older.safetensors"))
    assert load_recipe(older).to_json() == older.read_text()
    with pytest.raises(UsageError, match="holds no second moments") as caught:
        export_adapter(ExportRequest(older, merge=True, activation_aware=True), tmp_path / "out")
    assert "--fit-data" in (caught.value.hint or "")
    export_adapter(ExportRequest(older, merge=True), tmp_path / "out")


def test_a_fit_looks_at_so_many_records_and_no_more_and_at_the_same_ones() -> None:
    examples = [Example(f"val.jsonl:{n}", (1, 2), (False, True)) for n in range(500)]
    chosen = chosen_records(examples, seed=3)
    assert len(set(chosen)) == _MOST_RECORDS == 64 and chosen == chosen_records(examples, seed=3)
    assert chosen != chosen_records(examples, seed=4)


def test_moments_that_would_be_too_large_are_left_out_and_that_is_said(
    tiny_base: Path, two_adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracli.fitting.activations._MOST_BYTES", 1)
    data, listener = write_jsonl(tmp_path / "val.jsonl", random_records(44)), Heard()
    settings = FitSettings(mixing="adapter", passes=2, holdout=0.2, control="none")
    adapters = [str(path) for path in two_adapters]
    recipe = fit_mixing(
        adapters, data, base=str(tiny_base), settings=settings, progress=listener, placement=Placement(dtype="float32")
    )
    assert recipe.activations is None
    assert any("left out of the recipe" in line and "--fit-data" in line for line in listener.said)
    recipe.save(tmp_path / "recipe.json")
    assert "activations" not in json.loads((tmp_path / "recipe.json").read_text())
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("fitted", ["module", "core"], indirect=True)
def test_the_file_of_the_moments_stands_and_falls_with_its_recipe(fitted: Path, tmp_path: Path) -> None:
    recipe, path = load_recipe(fitted), tmp_path / "recipe.json"
    assert recipe.activations is not None
    moments = read_moments(fitted, recipe.activations)
    whole = replace(recipe, activations=replace(recipe.activations, moments=moments))
    whole.save(path)
    assert activations_path(path).read_bytes() == activations_path(fitted).read_bytes()
    beside = activations_path(path)
    path.unlink()
    with pytest.raises(OutputExists, match="activations.safetensors exists"):
        whole.save(path)
    replace(recipe, activations=None).save(path, force=True)
    assert not beside.exists() and load_recipe(path).activations is None
    beside.write_bytes((tmp_path / "recipe.json").read_bytes())
    with pytest.raises(OutputExists, match="holds something else"):
        whole.save(path, force=True)


# Verified.


def cut_on(fitted: Path, tiny_base: Path, output: Path, **options: Any) -> Path:
    data = fitted.parent / "val.jsonl"
    chosen = {"merge": True, "rank": 3, "activation_aware": True, "fit_data": data, "base": str(tiny_base)}
    export_adapter(ExportRequest(fitted, **{**chosen, **options}), output)
    return output


@pytest.mark.parametrize("fitted", ["module"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cut_by_records_is_held_against_its_own_column_space(
    fitted: Path, tiny_base: Path, tmp_path: Path, dtype: str
) -> None:
    out = cut_on(fitted, tiny_base, tmp_path / "out", dtype=dtype)
    found = verify_directory(out, recipe=fitted)
    assert [skipped.what for skipped in found.not_checked] == ["that a cut by activations keeps the best directions"]
    assert found.tensors == len(load_file(out / WEIGHTS))
    tensor = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    size = {"float32": 1e-5, "bfloat16": 0.1}[dtype]

    def moved(tensors: dict[str, Tensor]) -> None:
        tensors[tensor][0] *= 1 + size

    def scaled(tensors: dict[str, Tensor]) -> None:
        tensors[tensor] *= 2.0
        tensors[tensor.replace("lora_A", "lora_B")] /= 2.0

    for edit, said in ((moved, "the update is off by"), (scaled, "another scale")):
        copied = Path(shutil.copytree(out, tmp_path / edit.__name__))
        rewrite(copied, edit, record=True)
        assert said in problems(copied, [], recipe=fitted)


def test_a_cut_by_the_recipe_is_computed_again_to_the_bit(fitted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_adapter(ExportRequest(fitted, merge=True, rank=3, activation_aware=True), out)
    found = verify_directory(out, recipe=fitted)
    assert not found.not_checked and found.tensors == len(load_file(out / WEIGHTS))
    for side in "AB":
        copied = Path(shutil.copytree(out, tmp_path / side))
        tensor = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"
        rewrite(copied, lambda tensors, tensor=tensor: flip(tensors, tensor), record=True)
        assert "1 of 3 directions are not those" in problems(copied, [], recipe=fitted)


@pytest.mark.parametrize("fitted", ["module"], indirect=True)
def test_without_the_recipes_moments_what_cannot_be_checked_is_named(fitted: Path, tmp_path: Path) -> None:
    export_adapter(ExportRequest(fitted, merge=True, rank=3, activation_aware=True), tmp_path / "out")
    paths = [str(adapter.path) for adapter in composition_of(fitted).adapters]
    found = verify_directory(tmp_path / "out", adapters=paths)
    assert ["with --recipe" in skipped.why for skipped in found.not_checked] == [True, True]
    assert found.tensors == len(load_file(tmp_path / "out" / WEIGHTS))
