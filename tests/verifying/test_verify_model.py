"""A fused model that is base plus update passes; a weight, a file or a base that was changed does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.errors import IntegrityError, UsageError
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.fusing.test_fuse import shard
from tests.tiny import make_base
from tests.verifying.test_verify_adapter import change, flip, only_the_recipe_is_missing

WEIGHTS = "model.safetensors"


def problems(folder: Path, **options: Any) -> str:
    with pytest.raises(IntegrityError) as caught:
        verify_directory(folder, **options)
    return "\n".join(getattr(caught.value, "problems", ()) or [str(caught.value)])


def record(folder: Path, name: str) -> None:
    """Makes the certificate agree with a changed file."""
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(folder / "loracat-fuse.json", lambda d: d["certificate"]["files"].update({name: digest}))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def fused(folder: Path, case: str = "plain", **options: Any) -> tuple[Path, dict[str, Any], Made]:
    made = Made(folder, case)
    fuse_model(FuseRequest(made.recipe, base=str(made.base), **options), folder / "out")
    return folder / "out", {"adapters": [str(path) for path in made.paths], "base": str(made.base)}, made


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("tied embeddings", {}),
        ("conv1d of two shapes", {}),
        ("embeddings", {"dtype": "bfloat16"}),
        ("mixed ranks", {"dtype": "float16"}),
    ],
)
def test_an_untouched_model_passes_with_every_tensor_compared(
    tmp_path: Path, case: str, options: dict[str, Any]
) -> None:
    out, where, _ = fused(tmp_path, case, **options)
    found = verify_directory(out, **where)
    assert found.kind == "model" and only_the_recipe_is_missing(found)
    assert found.tensors == len(load_file(out / WEIGHTS))


def test_a_sharded_half_precision_base_passes(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    base = make_base(tmp_path / "half", dtype=torch.bfloat16)
    shard(base, 3)
    fuse_model(FuseRequest(made.recipe, base=str(base)), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=[str(p) for p in made.paths], base=str(base))
    assert only_the_recipe_is_missing(found)


@pytest.mark.parametrize("hash_too", [False, True])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_flipped_bit_of_one_weight_is_found(tmp_path: Path, name: str, hash_too: bool) -> None:
    out, where, _ = fused(tmp_path)
    rewrite(out, lambda tensors: flip(tensors, name))
    if hash_too:
        record(out, WEIGHTS)
    said = problems(out, **where)
    assert f"{name}: 1 entries" in said
    assert ("model.safetensors is not the file" in said) == (not hash_too)


def test_a_bit_of_a_rounded_weight_is_found(tmp_path: Path) -> None:
    out, where, _ = fused(tmp_path, dtype="bfloat16")
    rewrite(out, lambda tensors: flip(tensors, "model.layers.1.self_attn.q_proj.weight"))
    record(out, WEIGHTS)
    assert "self_attn.q_proj.weight: 1 entries" in problems(out, **where)


def test_changed_files_are_found_also_with_their_hashes(tmp_path: Path) -> None:
    out, where, _ = fused(tmp_path)
    (out / "extra.py").write_text("code")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    (out / "tokenizer.json").unlink()
    said = problems(out)
    assert "extra.py is not in the record" in said and "tokenizer.json is missing" in said
    assert "config.json is not the file" in said
    record(out, "config.json")
    assert "config.json is not the base model's" in problems(out, **where)
    rewrite(out, lambda tensors: tensors.pop("model.norm.weight"))
    assert "no tensor for its model.norm.weight" in problems(out)


def test_without_base_or_ingredients_it_says_what_was_not_checked(tmp_path: Path) -> None:
    out, where, _ = fused(tmp_path)
    assert "say where with --adapters" in verify_directory(out).not_checked[1].why
    found = verify_directory(out, adapters=where["adapters"])
    assert "say where it is with --base" in found.not_checked[1].why and found.tensors == 0
    assert found.checked[-2:] == (
        "the sha256 of every other file",
        "that transformers finds a tensor for every parameter",
    )


def test_a_changed_base_is_found(tmp_path: Path) -> None:
    out, where, made = fused(tmp_path)
    rewrite(made.base, lambda tensors: flip(tensors, "model.norm.weight"))
    assert "model.safetensors of the base model" in problems(out, **where)


def test_a_model_fused_from_an_adapters_directory_or_a_method_is_computed_again(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    paths = [str(path) for path in made.paths]
    fuse_model(FuseRequest(paths[0], base=str(made.base)), tmp_path / "one")
    assert not verify_directory(tmp_path / "one", adapters=paths[:1], base=str(made.base)).not_checked
    fuse_model(FuseRequest(adapters=paths, method="uniform", base=str(made.base)), tmp_path / "two")
    assert not verify_directory(tmp_path / "two", adapters=paths, base=str(made.base)).not_checked
    with pytest.raises(UsageError, match="another order"):
        verify_directory(tmp_path / "two", adapters=paths[::-1], base=str(made.base))
