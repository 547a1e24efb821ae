"""What an export can hold beside factors, in every layout, is verified too: biases, whole modules, other files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracli.errors import BaseModelMismatch, IntegrityError, UsageError
from loracli.export.export import export_adapter
from loracli.export.layout import ProfileName
from loracli.export.request import ExportRequest
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.tiny import make_adapter, make_base
from tests.verifying.test_verify_adapter import change, only_the_recipe_is_missing

WEIGHTS = "adapter_model.safetensors"


def two(folder: Path, base: Path, *targets: str, **options: Any) -> list[str]:
    """Two adapters that stock PEFT saved."""
    made = [
        make_adapter(folder / f"a{seed}", base, targets=targets, rank=2, alpha=6, seed=seed, **options)
        for seed in (0, 1)
    ]
    return [str(path) for path in made]


def edited(out: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> str:
    """What verifying says of changed tensors whose hash was changed with them."""
    tensors = load_file(out / file)
    edit(tensors)
    save_file(tensors, out / file, metadata={"format": "pt"})
    digest = hashlib.sha256((out / file).read_bytes()).hexdigest()
    change(out / "loracat.json", lambda record: record["certificate"]["sha256"].update({file: digest}))
    with pytest.raises(IntegrityError) as caught:
        verify_directory(out, adapters=[str(out.parent / "a0"), str(out.parent / "a1")])
    return "\n".join(getattr(caught.value, "problems", ()))


@pytest.mark.parametrize("merge", [False, True])
def test_biases_are_compared(tmp_path: Path, tiny_base: Path, merge: bool) -> None:
    paths = two(tmp_path, tiny_base, "q_proj", "down_proj", lora_bias=True)
    export_adapter(ExportRequest(method="uniform", adapters=paths, base=str(tiny_base), merge=merge), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=paths)
    assert not found.not_checked
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.bias"
    said = edited(tmp_path / "out", lambda tensors: tensors[name].neg_())
    assert "model.layers.1.mlp.down_proj" in said and "bias" in said


@pytest.mark.parametrize("profile", [None, "peft"])
def test_a_layout_that_an_unchanged_module_is_the_reason_of_is_no_difference(
    tmp_path: Path, profile: ProfileName | None
) -> None:
    """GPT-2 has another c_proj in its mlp: the record does not name it, the base does."""
    base = make_base(tmp_path / "gpt2", "gpt2")
    paths = two(tmp_path, base, "attn.c_proj", fan_in_fan_out=True)
    for path in paths:
        Path(path, "README.md").write_text("---\nlicense: mit\n---\n")
    out = tmp_path / "out"
    export_adapter(ExportRequest(method="uniform", adapters=paths, base=str(base), profile=profile), out)
    assert "different shapes" in (out / "README.md").read_text()
    assert [one.what for one in verify_directory(out, adapters=paths).not_checked] == ["README.md"]
    assert not verify_directory(out, adapters=paths, base=str(base)).not_checked
    text = (out / "README.md").read_text().replace("different shapes", "another shape")
    (out / "README.md").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    change(out / "loracat.json", lambda record: record["text_sha256"].update({"README.md": digest}))
    with pytest.raises(IntegrityError, match="1 difference"):
        verify_directory(out, adapters=paths, base=str(base))


def test_another_base_is_no_fault_of_the_export(tmp_path: Path, tiny_base: Path) -> None:
    paths = two(tmp_path, tiny_base, "q_proj", "down_proj")
    export_adapter(ExportRequest(method="sum", adapters=paths, base=str(tiny_base)), tmp_path / "out")
    other = make_base(tmp_path / "other", "gpt2")
    with pytest.raises(BaseModelMismatch, match="q_proj|down_proj"):
        verify_directory(tmp_path / "out", adapters=paths, base=str(other))


def test_modules_saved_whole_are_compared(tmp_path: Path, tiny_base: Path) -> None:
    paths = two(tmp_path, tiny_base, "q_proj", modules_to_save=["norm"])
    options = {"adapters": paths, "base": str(tiny_base), "modules_to_save": "average"}
    export_adapter(ExportRequest(method="sum", **options), tmp_path / "out")  # type: ignore[arg-type]
    found = verify_directory(tmp_path / "out", adapters=paths)
    assert [skipped.what for skipped in found.not_checked] == ["what PEFT makes of it"]
    said = edited(tmp_path / "out", lambda tensors: tensors["base_model.model.model.norm.weight"].add_(0.01))
    assert "model.norm.weight is not what the ingredients replace it by" in said


def test_the_layout_of_mlx_is_compared(tmp_path: Path, tiny_base: Path) -> None:
    paths = two(tmp_path, tiny_base, "q_proj", "v_proj")
    export_adapter(ExportRequest(method="sum", adapters=paths, base=str(tiny_base), profile="mlx"), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=paths)
    assert [skipped.what for skipped in found.not_checked] == ["what PEFT makes of it"]
    assert found.tensors == len(load_file(tmp_path / "out" / "adapters.safetensors"))
    file, name = "adapters.safetensors", "model.layers.0.self_attn.v_proj.lora_b"
    assert "model.layers.0.self_attn.v_proj" in edited(tmp_path / "out", lambda t: t[name].mul_(-1), file)


def test_a_gguf_file_is_held_against_its_hash(tmp_path: Path, tiny_base: Path) -> None:
    paths = two(tmp_path, tiny_base, "q_proj", "v_proj")
    export_adapter(ExportRequest(method="sum", adapters=paths, base=str(tiny_base), gguf=True), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=paths)
    assert [skipped.what for skipped in found.not_checked] == ["the tensors of adapter.gguf"]
    data = bytearray((tmp_path / "out" / "adapter.gguf").read_bytes())
    data[-5] ^= 1
    (tmp_path / "out" / "adapter.gguf").write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        verify_directory(tmp_path / "out", adapters=paths)
    assert "adapter.gguf is not the file of the certificate" in "".join(caught.value.problems)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", [{"tolerance": 0.4}, {"energy": 0.8}, {"budget": 12_000}])
@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_ranks_that_were_chosen_by_a_rule_are_verified(tmp_path: Path, rule: dict[str, Any], profile: str) -> None:
    made = Made(tmp_path, "mixed ranks")
    export_adapter(ExportRequest(made.recipe, merge=True, profile=profile, **rule), tmp_path / "out")
    assert only_the_recipe_is_missing(verify_directory(tmp_path / "out", adapters=[str(path) for path in made.paths]))


def test_what_is_no_update_of_a_weight_is_not_folded_in(tmp_path: Path, tiny_base: Path) -> None:
    paths = two(tmp_path, tiny_base, "q_proj", lora_bias=True)
    with pytest.raises(UsageError, match="lora_bias, which is not an update of a weight"):
        fuse_model(FuseRequest(adapters=paths, method="sum", base=str(tiny_base)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_converted_adapter_is_refused_by_name(tmp_path: Path, tiny_base: Path) -> None:
    from loracli.conversion.convert import ConvertRequest, convert_adapter
    from loracli.errors import InputError

    make_adapter(tmp_path / "dora", tiny_base, targets=("q_proj",), rank=2, use_dora=True)
    convert_adapter(ConvertRequest(str(tmp_path / "dora"), base=str(tiny_base), rank=4), tmp_path / "out")
    with pytest.raises(InputError, match="made by `loracat convert`"):
        verify_directory(tmp_path / "out")
