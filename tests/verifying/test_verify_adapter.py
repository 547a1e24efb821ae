"""An export that is what its record says passes; one bit elsewhere does not, also when the hash was changed with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.adapters.adapter import read_adapter
from loracli.composition.card import RECORD_DIGEST, closed
from loracli.errors import AdapterNotFound, InputError, IntegrityError, LoracatError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.verifying.findings import Verification
from loracli.verifying.origin import _EVIDENCE, COMPOSITION
from loracli.verifying.peft_reload import reload_differences, skeleton_of
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.export.test_tensor_mixing import recipe_of
from tests.tiny import make_adapter

WEIGHTS = "adapter_model.safetensors"


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file, and with it the digest that a record has of itself."""
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(closed(fields) if RECORD_DIGEST in fields else fields))


def only_the_recipe_is_missing(found: Verification) -> bool:
    """Whether everything was checked that does not need the recipe itself."""
    return [item.what for item in found.not_checked] == [_EVIDENCE]


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], *, record: bool) -> None:
    """Changes tensors; with `record` the recorded hash too."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if record:
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        change(folder / "loracat.json", lambda d: d["certificate"]["sha256"].update({WEIGHTS: digest}))


def flip(tensors: dict[str, torch.Tensor], name: str, *, at: int = 5) -> None:
    """Flips the last bit of one weight."""
    kind = torch.int32 if tensors[name].dtype == torch.float32 else torch.int16
    tensors[name].view(kind).view(-1)[at] ^= 1


def problems(folder: Path, paths: list[str], **options: Any) -> str:
    """What differs, once it is seen that something does, with the exit code for it."""
    with pytest.raises(IntegrityError) as caught:
        verify_directory(folder, adapters=paths, **options)
    assert caught.value.exit_code == 7
    return "\n".join(getattr(caught.value, "problems", ()) or [str(caught.value)])


def exported(folder: Path, case: str, **options: Any) -> tuple[Path, list[str], Made]:
    made = Made(folder, case)
    export_adapter(ExportRequest(made.recipe, **options), folder / "out")
    return folder / "out", [str(path) for path in made.paths], made


@pytest.mark.parametrize(
    "case", ["patterns", "some layers only", "embeddings", "tied embeddings", "head", "conv1d", "conv1d of two shapes"]
)
def test_an_untouched_export_passes_with_everything_checked(tmp_path: Path, case: str) -> None:
    made = Made(tmp_path, case)
    paths = [str(path) for path in made.paths]
    for merge, base in ((False, str(made.base)), (True, None)):
        export_adapter(ExportRequest(made.recipe, merge=merge), tmp_path / "out", force=True)
        found = verify_directory(tmp_path / "out", adapters=paths, base=base)
        assert only_the_recipe_is_missing(found) and found.kind == "adapter"
        assert found.tensors == len(load_file(tmp_path / "out" / WEIGHTS))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16", "merge": True, "rank": 3}])
def test_other_dtypes_and_ranks_pass(tmp_path: Path, options: dict[str, Any]) -> None:
    out, paths, _ = exported(tmp_path, "mixed ranks", **options)
    assert only_the_recipe_is_missing(verify_directory(out, adapters=paths))


@pytest.mark.parametrize(
    "options", [{}, {"merge": True}, {"dtype": "bfloat16"}, {"merge": True, "rank": 2, "dtype": "bfloat16"}]
)
def test_one_flipped_bit_of_one_weight_is_found_also_with_its_hash(tmp_path: Path, options: dict[str, Any]) -> None:
    out, paths, _ = exported(tmp_path, "mixed ranks", **options)
    whole = {name: (out / name).read_bytes() for name in (WEIGHTS, "loracat.json")}
    for side in "AB":
        for record in (False, True):
            for name, data in whole.items():
                (out / name).write_bytes(data)
            tensor = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"
            rewrite(out, lambda tensors, tensor=tensor: flip(tensors, tensor), record=record)  # type: ignore[misc]
            said = problems(out, paths)
            assert "model.layers.1.self_attn.q_proj" in said
            assert ("is not the file of the certificate" in said) == (not record)
            if record:  # without ingredients only the hash can tell
                assert verify_directory(out).not_checked
            else:
                assert "is not the file of the certificate" in problems(out, [])


@pytest.mark.parametrize("merge", [False, True])
def test_two_modules_that_were_swapped_are_found(tmp_path: Path, merge: bool) -> None:
    out, paths, _ = exported(tmp_path, "plain", merge=merge)

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            one, two = (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight" for i in (0, 2))
            tensors[one], tensors[two] = tensors[two], tensors[one]

    rewrite(out, swap, record=True)
    said = problems(out, paths)
    assert "model.layers.0.self_attn.q_proj: " in said and "model.layers.2.self_attn.q_proj: " in said
    assert "layers.1" not in said


@pytest.mark.parametrize("merge", [False, True])
def test_factors_scaled_against_each_other_are_no_bytes_that_an_export_writes(tmp_path: Path, merge: bool) -> None:
    """The product is the same to the bit; the tensors are not, and tensors are what is verified."""
    out, paths, _ = exported(tmp_path, "plain", merge=merge)

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"] *= 2
        tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"] /= 2

    rewrite(out, scale, record=True)
    assert "model.layers.0.self_attn.v_proj: " in problems(out, paths)


def test_a_changed_config_is_found_without_ingredients(tmp_path: Path) -> None:
    out, _, _ = exported(tmp_path, "plain")
    config = out / "adapter_config.json"
    whole = config.read_text()
    for key, value in (
        ("lora_alpha", 17),
        ("use_rslora", True),
        ("alpha_pattern", {"q_proj": 3}),
        ("target_modules", ["q_proj"]),
        ("target_modules", "q_proj|(([a-z._0-9]+)+)+$X"),
        ("layers_to_transform", [0]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("base_model_name_or_path", "else/where"),
    ):
        change(config, lambda fields, key=key, value=value: fields.update({key: value}))  # type: ignore[misc]
        assert key in problems(out, [])
        config.write_text(whole)
    assert verify_directory(out)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_modules", ["transformer.h.0.attn.c_attn"], "PEFT does not adapt transformer.h.1.attn.c_attn"),
        ("lora_alpha", 16, "PEFT scales transformer.h.0.attn.c_attn by 2 instead of 1"),
        ("r", 9, "PEFT cannot load it"),
    ],
)
def test_peft_tells_of_a_config_that_means_something_else(tmp_path: Path, key: str, value: Any, said: str) -> None:
    """Of one that is handed to it: a config that no export would write is not."""
    out, _, made = exported(tmp_path, "conv1d")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    adapter = read_adapter(str(out))
    assert reload_differences(out, adapter, skeleton_of(made.recipe.modules)) == []
    change(out / "adapter_config.json", lambda fields: fields.update({key: value}))
    assert any(said in line for line in reload_differences(out, adapter, skeleton_of(made.recipe.modules)))


def test_a_changed_figure_of_the_certificate_is_found(tmp_path: Path) -> None:
    out, paths, _ = exported(tmp_path, "plain", merge=True)
    whole = (out / "loracat.json").read_text()
    for figure, value in (("relative_error", 0.0), ("kept_energy", 0.5), ("rank", 3), ("name", "model.norm")):
        change(
            out / "loracat.json",
            lambda d, figure=figure, value=value: d["certificate"]["modules"][0].update({figure: value}),  # type: ignore[misc]
        )
        assert problems(out, paths)
        (out / "loracat.json").write_text(whole)


def test_a_figure_of_the_certificate_that_is_a_hundredth_off_is_named_with_the_right_one(tmp_path: Path) -> None:
    out, paths, _ = exported(tmp_path, "plain", merge=True)
    whole = (out / "loracat.json").read_text()
    module = json.loads(whole)["certificate"]["modules"][0]
    for figure in ("relative_error", "kept_energy"):
        wrong = 0.99 * module[figure]
        change(
            out / "loracat.json",
            lambda d, figure=figure, wrong=wrong: d["certificate"]["modules"][0].update({figure: wrong}),  # type: ignore[misc]
        )
        what = f"the certificate's {figure.replace('_', ' ')} is {wrong:g}; it is {module[figure]:g}"
        assert f"{module['name']}: {what}" in problems(out, paths)
        (out / "loracat.json").write_text(whole)
    change(out / "loracat.json", lambda d: d["certificate"].update(largest_relative_error=0.0))
    assert "the certificate's largest error is 0 and not " in problems(out, paths)


def test_what_pads_an_export_is_zero(tmp_path: Path, tiny_base: Path) -> None:
    some = make_adapter(tmp_path / "some", tiny_base, layers_to_transform=[1], seed=3)
    wide = make_adapter(tmp_path / "wide", tiny_base, layers_to_transform=[1], targets=("o_proj",), rank=6, seed=4)
    paths = [str(some), str(wide)]
    for module, said in (
        ("model.layers.1.self_attn.q_proj", "the rows and columns beyond rank 4 are not zero"),
        ("model.layers.0.self_attn.q_proj", "is not changed by the composition and has tensors that are not zero"),
    ):
        export_adapter(ExportRequest(method="sum", adapters=paths, base=str(tiny_base)), tmp_path / "out", force=True)
        assert not verify_directory(tmp_path / "out", adapters=paths).not_checked
        name = f"base_model.model.{module}.lora_A.weight"
        rewrite(tmp_path / "out", lambda t, name=name: t[name].__setitem__((5, 0), 1.0), record=True)  # type: ignore[misc]
        assert said in problems(tmp_path / "out", paths)


def test_a_changed_weight_in_the_record_is_found(tmp_path: Path) -> None:
    out, paths, _ = exported(tmp_path, "plain")
    name = "model.layers.0.self_attn.v_proj"
    change(out / "loracat.json", lambda d: d["recipe"]["mixing"]["weights"][name].__setitem__(0, 0.25))
    assert f"{name}: " in problems(out, paths)


def test_without_ingredients_it_says_what_was_not_checked(tmp_path: Path) -> None:
    out, paths, made = exported(tmp_path, "plain")
    found = verify_directory(out)
    assert [item.what for item in found.not_checked] == [_EVIDENCE, COMPOSITION, "README.md"]
    assert "say where with --adapters" in found.not_checked[1].why and found.tensors == 0
    recipe = tmp_path / "recipe.json"
    made.recipe.save(recipe)
    assert not verify_directory(out, recipe=recipe).not_checked
    with pytest.raises(AdapterNotFound):
        verify_directory(out, adapters=[paths[0], str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="was not written by loracat"):
        verify_directory(made.paths[0])
    with pytest.raises(InputError, match="there is no directory"):
        verify_directory(tmp_path / "nowhere")


def test_a_changed_ingredient_and_another_recipe_are_found(tmp_path: Path) -> None:
    out, paths, made = exported(tmp_path, "plain")
    other = Made(tmp_path / "other", "mixed ranks").recipe
    other.save(tmp_path / "other.json")
    assert "is not the recipe that this was made with" in problems(out, [], recipe=tmp_path / "other.json")
    change(made.paths[0] / "adapter_config.json", lambda fields: fields.update(lora_alpha=9))
    assert "is not the file" in problems(out, paths)


@pytest.mark.parametrize("name", ["sum", "knots", "tsv", "svd", "ties", "dare"])
def test_an_export_by_a_method_is_computed_again(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], name: str
) -> None:
    paths = [str(path) for path in two_adapters]
    export_adapter(ExportRequest(method=name, adapters=paths), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=paths)
    assert not found.not_checked
    tensor = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(tmp_path / "out", lambda tensors: tensors[tensor].mul_(1.01), record=True)
    assert "model.layers.1.self_attn.q_proj: " in problems(tmp_path / "out", paths)
    with pytest.raises(LoracatError):
        verify_directory(tmp_path / "out", adapters=paths[::-1])


def test_a_mixing_in_tensors_needs_its_recipe(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    recipe = recipe_of(made, "core")
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "out")
    paths = [str(path) for path in made.paths]
    unchecked = {item.what: item.why for item in verify_directory(tmp_path / "out", adapters=paths).not_checked}
    assert "name the recipe with --recipe" in unchecked[COMPOSITION]
    assert not verify_directory(tmp_path / "out", recipe=tmp_path / "recipe.json").not_checked
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(tmp_path / "out", lambda tensors: flip(tensors, name), record=True)
    assert "layers.0.self_attn.q_proj" in problems(tmp_path / "out", [], recipe=tmp_path / "recipe.json")
    change(made.paths[0] / "adapter_config.json", lambda fields: fields.update(inference_mode=None))
    with pytest.raises(IntegrityError, match="is not the file"):
        verify_directory(tmp_path / "out", adapters=paths)


def test_a_damaged_record_is_said_to_be_damaged(tmp_path: Path, tiny_base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_base)
    export_adapter(ExportRequest(method="sum", adapters=[str(adapter)]), tmp_path / "out")
    whole = (tmp_path / "out" / "loracat.json").read_text()
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda d: d.pop("certificate"),
        lambda d: d["export"].update(rank="9"),
        lambda d: d["export"].update(rank=0),
        lambda d: d["method"].update(name="none"),
        lambda d: d["method"].update(weights=[1.0, 2.0]),
        lambda d: d["adapters"][0].update(sha256={}),
        lambda d: d["certificate"].update(modules=[]),
    ]
    for edit in edits:
        (tmp_path / "out" / "loracat.json").write_text(whole)
        change(tmp_path / "out" / "loracat.json", edit)
        with pytest.raises(IntegrityError, match="the record"):
            verify_directory(tmp_path / "out", adapters=[str(adapter)])
    (tmp_path / "out" / "loracat.json").write_text("{" * 1000)
    with pytest.raises(IntegrityError, match="the record is damaged"):
        verify_directory(tmp_path / "out")
