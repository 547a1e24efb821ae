"""A recipe and its tensors are written together, found together, and refused apart."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loracli.errors import IntegrityError, LoracatError, OutOfResources, OutputExists, RecipeError, UsageError
from loracli.recipe.recipe import Recipe, check_recipe_path, load_recipe, weights_by_leaf
from loracli.recipe.record import INLINE_KINDS, TENSOR_PARTS, MixingKind, RecipeMixing
from loracli.recipe.tensors import METADATA, sidecar_sha256
from tests.test_recipe import make_recipe

KINDS: tuple[MixingKind, ...] = ("rank", "core", "factors")


def random_tensors(kind: MixingKind, modules: list[str], seed: int = 0) -> dict[str, Tensor]:
    """M (5, 5), or factors of rank 5 for the (48, 32) modules of `make_recipe`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    if kind == "factors":
        pairs = {m: (random(5, 32), random(48, 5)) for m in modules}
        return {f"{m}.lora_{side}": pair[i] for m, pair in pairs.items() for i, side in enumerate("AB")}
    return {f"{m}.mixing": random(5, 5, dtype=torch.float64) for m in modules}


def with_tensors(folder: Path, kind: MixingKind, seed: int = 0) -> Recipe:
    recipe = make_recipe(folder)
    tensors = random_tensors(kind, list(recipe.mixing.weights), seed)
    mixing = RecipeMixing(kind, recipe.mixing.weights, 30, sidecar_sha256(tensors), tensors)
    return replace(recipe, mixing=mixing)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def store(folder: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Other tensors than the fit's, written by the library and with their hash in the recipe: a forged pair."""
    save_file(tensors, folder / "r.safetensors", metadata=metadata)
    record_hash(folder)


def record_hash(folder: Path) -> None:
    document = json.loads((folder / "r.json").read_text())
    document["mixing"]["tensors_sha256"] = sha256((folder / "r.safetensors").read_bytes()).hexdigest()
    (folder / "r.json").write_text(json.dumps(document))


def test_every_kind_of_mixing_stands_in_the_recipe_or_is_tensors() -> None:
    assert {*INLINE_KINDS, *TENSOR_PARTS} == set(get_args(MixingKind)) and not set(INLINE_KINDS) & TENSOR_PARTS.keys()


# Round trips.


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, kind: MixingKind) -> None:
    recipe = with_tensors(tmp_path, kind)
    recipe.save(tmp_path / "r.json")
    loaded = load_recipe(tmp_path / "r.json")
    assert loaded == recipe and repr(vars(loaded)) == repr(vars(recipe))
    assert loaded.mixing.tensors.keys() == recipe.mixing.tensors.keys()
    for name, tensor in recipe.mixing.tensors.items():
        assert torch.equal(loaded.mixing.tensors[name], tensor) and loaded.mixing.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_are_a_safetensors_file_named_after_the_recipe_with_its_hash_in_it(
    tmp_path: Path, kind: MixingKind
) -> None:
    recipe = with_tensors(tmp_path, kind)
    recipe.save(tmp_path / "my.soup.json")
    assert files(tmp_path).keys() == {"my.soup.json", "my.soup.safetensors"}
    recorded = json.loads((tmp_path / "my.soup.json").read_text())["mixing"]
    assert recorded["tensors_sha256"] == sha256((tmp_path / "my.soup.safetensors").read_bytes()).hexdigest()
    assert recorded.keys() == {"kind", "weights", "numbers", "tensors_sha256"}
    stored = load_file(tmp_path / "my.soup.safetensors")
    assert stored.keys() == recipe.mixing.tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in recipe.mixing.tensors.items())


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_elsewhere_writes_the_same_bytes(tmp_path: Path, kind: MixingKind) -> None:
    with_tensors(tmp_path, kind).save(tmp_path / "one.json")
    load_recipe(tmp_path / "one.json").save(tmp_path / "two.json")
    found = files(tmp_path)
    assert found["one.json"] == found["two.json"] and found["one.safetensors"] == found["two.safetensors"]


def test_the_order_in_which_tensors_come_does_not_matter(tmp_path: Path) -> None:
    tensors = random_tensors("core", ["b", "a", "c"])
    assert sidecar_sha256(tensors) == sidecar_sha256(dict(reversed(tensors.items())))


@pytest.mark.parametrize("kind", INLINE_KINDS)
def test_kinds_up_to_module_leave_one_file(tmp_path: Path, kind: MixingKind) -> None:
    recipe = make_recipe(tmp_path)
    replace(recipe, mixing=RecipeMixing(kind, recipe.mixing.weights, 2)).save(tmp_path / "r.json", force=True)
    assert files(tmp_path).keys() == {"r.json"}


def test_a_published_recipe_keeps_the_hash_of_its_tensors(tmp_path: Path) -> None:
    recipe = with_tensors(tmp_path, "core")
    assert f'"tensors_sha256": "{recipe.mixing.tensors_sha256}"' in recipe.public().to_json()


def test_the_summary_is_grouped_by_leaf(tmp_path: Path) -> None:
    assert weights_by_leaf(with_tensors(tmp_path, "core")).keys() == {"q_proj", "v_proj"}


def test_a_recipe_without_tensors_is_read_and_written_without_torch(tmp_path: Path) -> None:
    make_recipe(tmp_path).save(tmp_path / "r.json")
    code = (
        "import sys; from loracli.recipe.recipe import load_recipe; load_recipe('r.json').save('s.json', force=True); "
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=60)


# What does not belong together.


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    (tmp_path / "r.json").rename(tmp_path / "moved.json")
    with pytest.raises(RecipeError, match=r"moved\.safetensors does not exist") as caught:
        load_recipe(tmp_path / "moved.json")
    assert "fit again" in (caught.value.hint or "")


def test_the_tensors_of_another_fit_are_refused(tmp_path: Path) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    with_tensors(tmp_path, "core", seed=1).save(tmp_path / "other.json")
    os.replace(tmp_path / "other.safetensors", tmp_path / "r.safetensors")
    with pytest.raises(IntegrityError, match=r"r\.safetensors is not the file") as caught:
        load_recipe(tmp_path / "r.json")
    assert caught.value.exit_code == 7 and "fit again" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_that_flips_or_an_end_that_is_cut_anywhere_is_found(tmp_path: Path, kind: MixingKind) -> None:
    with_tensors(tmp_path, kind).save(tmp_path / "r.json")
    whole = (tmp_path / "r.safetensors").read_bytes()
    step = max(1, len(whole) // 20)
    for place in (*range(0, len(whole), step), len(whole) - 1):
        flipped = bytes([whole[place] ^ 1])
        for damaged in (whole[:place] + flipped + whole[place + 1 :], whole[:place], whole + flipped):
            (tmp_path / "r.safetensors").write_bytes(damaged)
            with pytest.raises(IntegrityError):
                load_recipe(tmp_path / "r.json")


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = min(tensors)
    return {"x" + name if name == first else name: tensor for name, tensor in tensors.items()}


def cut(tensors: dict[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    first = min(tensors)
    return {name: tensor[:rows, :columns].contiguous() if name == first else tensor for name, tensor in tensors.items()}


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("core", renamed, f"{FIRST}.mixing: missing"),
        ("core", renamed, f"x{FIRST}.mixing: unknown"),
        ("factors", renamed, f"{FIRST}.lora_A: missing"),
        ("rank", lambda t: cut(t, 5, 4), f"{FIRST}.mixing: expected a square matrix of at most 12 rows, got (5, 4)"),
        (
            "core",
            lambda t: {name: torch.eye(13, dtype=torch.float64) for name in t},
            f"{FIRST}.mixing: expected a square matrix of at most 12 rows, got (13, 13)",
        ),
        ("core", lambda t: {n: v.float() for n, v in t.items()}, f"{FIRST}.mixing: expected float64, got float32"),
        ("factors", lambda t: {n: v.half() for n, v in t.items()}, f"{FIRST}.lora_B: expected float32, got float16"),
        ("factors", lambda t: cut(t, 4, 32), f"{FIRST}: lora_A has rank 4 and lora_B 5"),
        ("factors", lambda t: cut(t, 5, 31), f"{FIRST}: expected a change of 48 x 32, got 48 x 31"),
    ],
)
def test_tensors_that_do_not_fit_the_recipe_are_named(
    tmp_path: Path, kind: MixingKind, change: object, problem: str
) -> None:
    recipe = with_tensors(tmp_path, kind)
    recipe.save(tmp_path / "r.json")
    store(tmp_path, change(dict(recipe.mixing.tensors)))  # type: ignore[operator]
    with pytest.raises(RecipeError, match=r"r\.safetensors") as caught:
        load_recipe(tmp_path / "r.json")
    assert problem in caught.value.problems


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_holds_no_number_is_refused(tmp_path: Path, value: float) -> None:
    recipe = with_tensors(tmp_path, "core")
    recipe.save(tmp_path / "r.json")
    tensors = dict(recipe.mixing.tensors)
    tensors[f"{FIRST}.mixing"][1, 1] = value
    store(tmp_path, tensors)
    with pytest.raises(RecipeError, match=f"{FIRST}.mixing.*infinite or not a number"):
        load_recipe(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut short"),
        (b"\xff" * 64, "cut short"),
        ((17 << 20).to_bytes(8, "little") + b" " * (17 << 20), "header claims"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    ],
)
def test_a_hostile_file_of_tensors_is_refused_though_the_recipe_names_its_hash(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    (tmp_path / "r.safetensors").write_bytes(content)
    record_hash(tmp_path)
    with pytest.raises(RecipeError, match=reason):
        load_recipe(tmp_path / "r.json")


def test_what_is_no_regular_file_is_refused_without_reading(tmp_path: Path) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    (tmp_path / "r.safetensors").unlink()
    os.mkfifo(tmp_path / "r.safetensors")
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(tmp_path / "r.json")


# What is in the way.


def test_without_force_nothing_is_replaced(tmp_path: Path) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    before = files(tmp_path)
    with pytest.raises(OutputExists, match=r"r\.json exists"):
        with_tensors(tmp_path, "core", seed=1).save(tmp_path / "r.json")
    (tmp_path / "r.json").rename(tmp_path / "other.json")
    with pytest.raises(OutputExists, match=r"r\.safetensors exists"):
        with_tensors(tmp_path, "core", seed=1).save(tmp_path / "r.json")
    assert sorted(files(tmp_path).values()) == sorted(before.values())


def test_with_force_both_files_are_replaced(tmp_path: Path) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    new = with_tensors(tmp_path, "factors", seed=1)
    new.save(tmp_path / "r.json", force=True)
    assert load_recipe(tmp_path / "r.json") == new and files(tmp_path).keys() == {"r.json", "r.safetensors"}


def test_with_force_tensors_that_no_longer_belong_to_the_recipe_go(tmp_path: Path) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    make_recipe(tmp_path).save(tmp_path / "r.json", force=True)
    assert files(tmp_path).keys() == {"r.json"} and load_recipe(tmp_path / "r.json") == make_recipe(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("name", ["model", "adapter_model"])
def test_the_weights_of_a_model_or_an_adapter_are_never_replaced_or_removed(
    tmp_path: Path, name: str, metadata: dict[str, str] | None
) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    before = files(tmp_path)
    for force in (False, True):
        with pytest.raises(OutputExists, match="holds something else"):
            check_recipe_path(tmp_path / f"{name}.json", force=force, kind="core")
        with pytest.raises(OutputExists, match="holds something else"):
            with_tensors(tmp_path, "core").save(tmp_path / f"{name}.json", force=force)
    assert files(tmp_path) == before
    make_recipe(tmp_path).save(tmp_path / f"{name}.json", force=True)
    make_recipe(tmp_path).save(tmp_path / f"{name}.json", force=True)
    assert files(tmp_path)[f"{name}.safetensors"] == before[f"{name}.safetensors"]


def test_what_looks_like_tensors_by_its_name_alone_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    save_file({"x": torch.zeros(1, 1)}, tmp_path / "ours", metadata=METADATA)
    (tmp_path / "link.safetensors").symlink_to("ours")
    for name in ("text", "folder", "dangling", "link"):
        with pytest.raises(OutputExists, match="holds something else"):
            with_tensors(tmp_path, "core").save(tmp_path / f"{name}.json", force=True)
        make_recipe(tmp_path).save(tmp_path / f"{name}.json", force=True)
        assert os.path.lexists(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["r.safetensors", "r.txt", "r", ".json"])
def test_a_recipe_with_tensors_ends_in_json_so_that_no_two_share_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.json"):
        with_tensors(tmp_path, "core").save(tmp_path / name, force=True)
    assert files(tmp_path) == {}
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    make_recipe(tmp_path).save(tmp_path / "r.txt", force=True)
    assert load_recipe(tmp_path / "r.json").mixing.kind == "core"


# What is interrupted.


@pytest.mark.parametrize("failing", ["loracli.recipe.tensors.write_tensors", "loracli.recipe.recipe.write_file"])
def test_a_full_disk_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    before = files(tmp_path)

    def full(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OutOfResources):
        with_tensors(tmp_path, "core", seed=1).save(tmp_path / "r.json", force=True)
    assert files(tmp_path) == before


def test_the_tensors_get_their_name_first_and_a_crash_in_between_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tensors(tmp_path, "core").save(tmp_path / "r.json")
    new, rename = with_tensors(tmp_path, "core", seed=1), os.replace

    def crash(source: Path, target: Path) -> None:
        if Path(target).name == "r.json":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path / "r.json", force=True)
    monkeypatch.undo()
    with pytest.raises(IntegrityError):
        load_recipe(tmp_path / "r.json")
    new.save(tmp_path / "r.json", force=True)
    assert load_recipe(tmp_path / "r.json") == new


# What --force of a fit replaces.


@pytest.mark.parametrize("kind", [*KINDS, "module"])
def test_what_is_replaced_is_kept_whole_with_its_tensors_under_one_name(tmp_path: Path, kind: MixingKind) -> None:
    def recipe(seed: int) -> Recipe:
        made = make_recipe(tmp_path) if kind == "module" else with_tensors(tmp_path, kind, seed)
        return replace(made, versions={**made.versions, "torch": f"2.{seed}"})

    path, kept = tmp_path / "r.json", tmp_path / "r.bak.json"
    assert recipe(0).save(path, keep=True) is None
    for seed in (1, 2):
        before = path.read_bytes()
        assert recipe(seed).save(path, force=True, keep=True) == kept
        assert kept.read_bytes() == before
        assert load_recipe(kept).versions["torch"] == f"2.{seed - 1}"
        now = files(tmp_path)
        assert recipe(seed).save(path, force=True, keep=True) is None  # the same again loses nothing
        assert files(tmp_path) == now
    with_tensors(tmp_path, "core", 3).save(path, force=True, keep=True)
    make_recipe(tmp_path).save(path, force=True, keep=True)
    assert load_recipe(kept).mixing.kind == "core"
    assert set(files(tmp_path)) == {"r.json", "r.bak.json", "r.bak.safetensors"}


def test_a_copy_survives_a_replacement_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new tensors are there and the new recipe is not: done again, the copy is still the old pair."""
    first, second = with_tensors(tmp_path, "core", 0), with_tensors(tmp_path, "core", 1)
    first.save(tmp_path / "r.json")
    old = files(tmp_path)
    real = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target).name == "r.json":
            raise OSError(errno.EIO, "the disk fails")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(LoracatError, match="cannot be written"):
            second.save(tmp_path / "r.json", force=True, keep=True)
    with pytest.raises(IntegrityError):
        load_recipe(tmp_path / "r.json")
    second.save(tmp_path / "r.json", force=True, keep=True)
    found = files(tmp_path)
    assert {name: found[name.replace("r.", "r.bak.", 1)] for name in old} == old
    assert load_recipe(tmp_path / "r.json").mixing.tensors_sha256 == second.mixing.tensors_sha256


@pytest.mark.parametrize("name", ["r.bak.json", "r.bak.safetensors", "r.bak.json.activations.safetensors"])
def test_what_is_not_a_recipe_of_ours_is_not_replaced_by_a_copy(tmp_path: Path, name: str) -> None:
    with_tensors(tmp_path, "core", 0).save(tmp_path / "r.json")
    (tmp_path / name).write_text('{"precious": 1}')
    before = files(tmp_path)
    with pytest.raises(OutputExists, match=name):
        with_tensors(tmp_path, "core", 1).save(tmp_path / "r.json", force=True, keep=True)
    assert files(tmp_path) == before
