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

from loracli.errors import AdapterNotFound, InputError, IntegrityError, LoracatError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.method import export_method
from loracli.verifying.verify import verify_directory
from tests.export.test_export import CASES, Made
from tests.export.test_tensor_mixing import recipe_of
from tests.tiny import make_adapter

WEIGHTS = "adapter_model.safetensors"


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file."""
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


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
    export_adapter(made.recipe, folder / "out", **options)
    return folder / "out", [str(path) for path in made.paths], made


@pytest.mark.parametrize("merge", [False, True], ids=["cat", "merge"])
@pytest.mark.parametrize("case", CASES)
def test_an_untouched_export_passes_with_everything_checked(tmp_path: Path, case: str, merge: bool) -> None:
    out, paths, made = exported(tmp_path, case, merge=merge)
    for base in (None, str(made.base)):
        found = verify_directory(out, adapters=paths, base=base)
        assert not found.not_checked and found.kind == "adapter"
        assert found.tensors == len(load_file(out / WEIGHTS))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16", "merge": True, "rank": 3}])
def test_other_dtypes_and_ranks_pass(tmp_path: Path, options: dict[str, Any]) -> None:
    out, paths, _ = exported(tmp_path, "mixed ranks", **options)
    assert not verify_directory(out, adapters=paths).not_checked


@pytest.mark.parametrize("record", [False, True], ids=["weight alone", "weight and hash"])
@pytest.mark.parametrize("side", "AB")
@pytest.mark.parametrize(
    "options", [{}, {"merge": True}, {"dtype": "bfloat16"}, {"merge": True, "rank": 2, "dtype": "bfloat16"}]
)
def test_one_flipped_bit_of_one_weight_is_found(
    tmp_path: Path, options: dict[str, Any], side: str, record: bool
) -> None:
    out, paths, _ = exported(tmp_path, "mixed ranks", **options)
    name = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"
    rewrite(out, lambda tensors: flip(tensors, name), record=record)
    said = problems(out, paths)
    assert "model.layers.1.self_attn.q_proj" in said
    assert ("is not the file of the certificate" in said) == (not record)
    with pytest.raises(VerificationError) if not record else _passes():
        verify_directory(out)  # without ingredients only the hash can tell


def _passes() -> Any:
    from contextlib import nullcontext

    return nullcontext()


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


@pytest.mark.parametrize("case", ["plain", "conv1d of two shapes"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", 17),
        ("use_rslora", True),
        ("alpha_pattern", {"q_proj": 3, "c_attn": 3}),
        ("target_modules", ["q_proj"]),
        ("target_modules", "q_proj|.*c_attn"),
        ("layers_to_transform", [0]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("base_model_name_or_path", "else/where"),
    ],
)
def test_a_changed_config_is_found_without_ingredients(tmp_path: Path, case: str, key: str, value: Any) -> None:
    out, _, _ = exported(tmp_path, case)
    change(out / "adapter_config.json", lambda fields: fields.update({key: value}))
    assert key in problems(out, [])


def test_peft_itself_would_tell_of_a_changed_scaling(tmp_path: Path) -> None:
    """Where config and record are changed together, what PEFT makes of it still differs from the composition."""
    out, paths, _ = exported(tmp_path, "conv1d of two shapes")
    change(out / "loracat.json", lambda d: d["export"].update(rank=4))
    change(out / "adapter_config.json", lambda fields: fields.update(target_modules=["transformer.h.0.attn.c_attn"]))
    assert "PEFT does not adapt transformer.h.1.attn.c_attn" in problems(out, paths)


@pytest.mark.parametrize(
    ("figure", "value"), [("relative_error", 0.0), ("kept_energy", 0.5), ("rank", 3), ("name", "model.norm")]
)
def test_a_changed_figure_of_the_certificate_is_found(tmp_path: Path, figure: str, value: Any) -> None:
    out, paths, _ = exported(tmp_path, "plain", merge=True)
    change(out / "loracat.json", lambda d: d["certificate"]["modules"][0].update({figure: value}))
    assert problems(out, paths)


def test_a_padding_module_is_zero(tmp_path: Path) -> None:
    from loracli.adapters.adapter import read_adapter

    out, paths, made = exported(tmp_path, "disjoint targets")
    changed = {name for path in paths for name in read_adapter(path).modules}
    assert changed == set(made.recipe.mixing.weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        assert not tensors[name][4:].any()
        tensors[name][-1, -1] = 1.0

    if load_file(out / WEIGHTS)[name].shape[0] > 4:
        rewrite(out, fill, record=True)
        assert "beyond rank 4 are not zero" in problems(out, paths)


def test_a_changed_weight_in_the_record_is_found(tmp_path: Path) -> None:
    out, paths, _ = exported(tmp_path, "plain")
    name = "model.layers.0.self_attn.v_proj"
    change(out / "loracat.json", lambda d: d["recipe"]["mixing"]["weights"][name].__setitem__(0, 0.25))
    assert f"{name}: " in problems(out, paths)


def test_without_ingredients_it_says_what_was_not_checked(tmp_path: Path) -> None:
    out, paths, made = exported(tmp_path, "plain")
    found = verify_directory(out)
    assert [item.what for item in found.not_checked] == ["the composition of the written weights"]
    assert "say where with --adapters" in found.not_checked[0].why and found.tensors == 0
    recipe = tmp_path / "recipe.json"
    made.recipe.save(recipe)
    assert not verify_directory(out, recipe=recipe).not_checked
    with pytest.raises(AdapterNotFound):
        verify_directory(out, adapters=[paths[0], str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="nothing that loracat wrote"):
        verify_directory(made.paths[0])


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
    export_method(name, tmp_path / "out", adapters=paths)
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
    export_adapter(tmp_path / "recipe.json", tmp_path / "out")
    paths = [str(path) for path in made.paths]
    assert "name the recipe with --recipe" in verify_directory(tmp_path / "out", adapters=paths).not_checked[0].why
    assert not verify_directory(tmp_path / "out", recipe=tmp_path / "recipe.json").not_checked
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(tmp_path / "out", lambda tensors: flip(tensors, name), record=True)
    assert "layers.0.self_attn.q_proj" in problems(tmp_path / "out", [], recipe=tmp_path / "recipe.json")


def test_a_damaged_record_is_said_to_be_damaged(tmp_path: Path, tiny_base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_base)
    export_method("sum", tmp_path / "out", adapters=[str(adapter)])
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
