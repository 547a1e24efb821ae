"""A GGUF adapter, read back with the gguf package, is the composition with llama.cpp's names and row order."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from loracli.errors import BaseModelMismatch, OutOfResources, UsageError
from loracli.export.export import export_adapter
from loracli.export.gguf import ARCHITECTURES, LlamaCppBase
from loracli.export.request import ExportRequest
from loracli.recipe.recipe import Recipe
from tests.cli.project import run
from tests.export.test_export import CASES, Made
from tests.export.test_mlx import exact
from tests.tiny import make_adapter, make_base

HEADS, KV_HEADS, LAYERS = 4, 2, 3  # of tests.tiny's models
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors of a GGUF file, in float64 with the rows first."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.reshape([int(n) for n in tensor.shape][::-1]).copy()).double()
    return fields, tensors


def scale(fields: dict[str, Any], lora_b: torch.Tensor) -> float:
    """llama_adapter_lora_weight::get_scale at a user scale of 1."""
    alpha = fields["adapter.lora.alpha"]
    return alpha / lora_b.shape[1] if alpha else 1.0


def transformers_rows(update: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a q or k matrix, put back: llama.cpp keeps row `half * size + i` of a head at `2 * i + half`."""
    size = update.shape[0] // heads
    result = torch.empty_like(update)
    for head in range(heads):
        for row in range(size):
            half, i = divmod(row, size // 2)
            result[head * size + row] = update[head * size + 2 * i + half]
    return result


def recipe_of(made: Made) -> Recipe:
    """Its recipe, as if fitted on its base."""
    digest = sha256((made.base / "config.json").read_bytes()).hexdigest()
    return replace(made.recipe, base=replace(made.recipe.base, config_sha256=digest))


def assert_holds(made: Made, path: Path, *, permuted: bool, atol: float) -> None:
    fields, tensors = read_gguf(path)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    changed = {name for adapter in made.adapters for name in adapter.modules}
    seen = set()
    for i in range(LAYERS):
        for module, name in NAMES.items():
            full = f"model.layers.{i}.{module}"
            a, b = (tensors.pop(f"blk.{i}.{name}.weight.lora_{side}", None) for side in "ab")
            if a is None or b is None:
                assert full not in changed
                continue
            update = scale(fields, b) * b @ a
            if permuted and name in ("attn_q", "attn_k"):
                update = transformers_rows(update, HEADS if name == "attn_q" else KV_HEADS)
            expected = exact(made, full) if full in changed else torch.zeros_like(update)
            torch.testing.assert_close(update, expected, rtol=0, atol=atol * max(1.0, float(expected.norm())))
            seen.add(full)
    assert not tensors
    assert changed <= seen


@pytest.mark.parametrize(
    ("case", "profile"),
    [
        ("mixed ranks", "portable"),
        ("both rslora", "portable"),
        ("some layers only", "portable"),
        ("some layers only", "peft"),
        ("disjoint targets", "peft"),
        ("disjoint targets", "mlx"),
        ("biased linear", "portable"),
        ("gemma2", "portable"),
    ],
)
def test_gguf_holds_the_composition(tmp_path: Path, case: str, profile: str) -> None:
    made = Made(tmp_path, case)
    export_adapter(
        ExportRequest(recipe_of(made), profile=profile, gguf=True, base=str(made.base), dtype="float32"),
        tmp_path / "out",
    )
    assert_holds(made, tmp_path / "out" / "adapter.gguf", permuted=CASES[case][0] == "llama", atol=1e-6)
    recorded = json.loads((tmp_path / "out" / "loracat.json").read_text())["certificate"]["sha256"]
    assert recorded["adapter.gguf"] == sha256((tmp_path / "out" / "adapter.gguf").read_bytes()).hexdigest()


def test_all_linear_layers_of_a_llama_go_in_with_their_rows_where_they_belong(tmp_path: Path) -> None:
    CASES["all linear"] = ("llama", [{"targets": [m.rpartition(".")[2] for m in NAMES]}, {}])
    made = Made(tmp_path, "all linear")
    for dtype, atol in (("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)):
        out = tmp_path / dtype
        export_adapter(ExportRequest(recipe_of(made), gguf=True, base=str(made.base), dtype=dtype), out)
        assert_holds(made, out / "adapter.gguf", permuted=True, atol=atol)
        assert read_gguf(out / "adapter.gguf")[0]["general.architecture"] == "llama"


def test_the_row_order_gives_the_same_attention_with_llama_cpps_rotation() -> None:
    """Scores of rotated queries and keys: halves of a head rotated, as transformers does, and neighbours, as GGML's
    normal rope does, on the reordered rows."""
    torch.manual_seed(0)
    base = LlamaCppBase(ARCHITECTURES["LlamaForCausalLM"], layers=1, heads=HEADS, kv_heads=HEADS, tied=False)
    tokens, size, width = 5, 8, 32
    x = torch.randn(tokens, width, dtype=torch.float64)
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(size // 2) * 2 / size)

    def rotated(weight: torch.Tensor, *, neighbours: bool) -> torch.Tensor:
        heads = (x @ weight.T).reshape(tokens, HEADS, size)
        pairs = heads.unflatten(-1, (size // 2, 2) if neighbours else (2, size // 2))
        first, second = pairs.unbind(-1 if neighbours else -2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        both = torch.stack([first * cos - second * sin, second * cos + first * sin], -1 if neighbours else -2)
        return both.flatten(-2)

    q, k = (torch.randn(HEADS * size, width, dtype=torch.float64) for _ in range(2))
    wanted = torch.einsum("thd,shd->hts", rotated(q, neighbours=False), rotated(k, neighbours=False))
    q, k = base.lora_b("model.layers.0.self_attn.q_proj", q), base.lora_b("model.layers.0.self_attn.k_proj", k)
    found = torch.einsum("thd,shd->hts", rotated(q, neighbours=True), rotated(k, neighbours=True))
    torch.testing.assert_close(found, wanted)


def test_an_embedding_is_looked_up_by_rows_of_lora_a(tmp_path: Path) -> None:
    made = Made(tmp_path, "embeddings")
    export_adapter(ExportRequest(recipe_of(made), gguf=True, base=str(made.base)), tmp_path / "out")
    fields, tensors = read_gguf(tmp_path / "out" / "adapter.gguf")
    a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    wanted = exact(made, "model.embed_tokens")  # (dim, vocab)
    torch.testing.assert_close(scale(fields, b) * a @ b.T, wanted.T, rtol=0, atol=1e-6 * float(wanted.norm()))


def test_a_head_goes_into_output(tmp_path: Path) -> None:
    made = Made(tmp_path, "head")
    export_adapter(ExportRequest(recipe_of(made), gguf=True, base=str(made.base)), tmp_path / "out")
    fields, tensors = read_gguf(tmp_path / "out" / "adapter.gguf")
    b = tensors["output.weight.lora_b"]
    wanted = exact(made, "lm_head")
    update = scale(fields, b) * b @ tensors["output.weight.lora_a"]
    torch.testing.assert_close(update, wanted, rtol=0, atol=1e-6 * float(wanted.norm()))


def test_a_method_writes_one_too_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for out in ("one", "two"):
        export_adapter(ExportRequest(method="sum", adapters=[str(adapter)], base=str(base), gguf=True), tmp_path / out)
    first, second = ((tmp_path / out / "adapter.gguf").read_bytes() for out in ("one", "two"))
    assert first == second


def test_the_command_takes_a_base_for_gguf_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    words = ["export", "--method", "sum", "--adapters", str(make_adapter(tmp_path / "adapter", base)), "--json"]
    done = run(*words, "-o", str(tmp_path / "out"), "--base", str(base), "--gguf")
    assert done.exit_code == 0, done.stdout
    assert Path(json.loads(done.stdout)["gguf"]) == tmp_path / "out" / "adapter.gguf"
    assert "--gguf" in (tmp_path / "out" / "README.md").read_text()
    assert run("export", "nothing.json", "--base", str(base)).exit_code == 2


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, "plain")

    def full(*args: Any) -> None:
        raise OSError("1024 requested and 0 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutOfResources):
        export_adapter(ExportRequest(recipe_of(made), gguf=True, base=str(made.base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "named"),
    [("tied embeddings", "model.embed_tokens"), ("conv1d", "GPT2LMHeadModel")],
)
def test_what_no_gguf_can_hold_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, case: str, named: str
) -> None:
    made = Made(tmp_path, case)
    with pytest.raises((UsageError, BaseModelMismatch), match=named):
        export_adapter(ExportRequest(recipe_of(made), gguf=True, base=str(made.base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_local_copy_of_a_base_on_the_hub_is_as_good(tmp_path: Path) -> None:
    """The recorded commit is the Hub's, and no revision of the directory."""
    made = Made(tmp_path, "plain")
    recipe = recipe_of(made)
    recipe = replace(recipe, base=replace(recipe.base, commit="c" * 40))
    export_adapter(ExportRequest(recipe, gguf=True, base=str(made.base)), tmp_path / "out")
    assert (tmp_path / "out" / "adapter.gguf").is_file()
    with pytest.raises(UsageError, match="has no revision main"):
        export_adapter(ExportRequest(recipe, gguf=True, base=str(made.base), base_revision="main"), tmp_path / "other")


def test_another_base_than_the_recipes_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    with pytest.raises(BaseModelMismatch, match="not the config of the base"):
        export_adapter(ExportRequest(made.recipe, gguf=True, base=str(made.base)), tmp_path / "out")


def test_without_the_package_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, "plain")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError) as refused:
        export_adapter(ExportRequest(recipe_of(made), gguf=True, base=str(made.base)), tmp_path / "out")
    assert refused.value.hint == "pip install 'loracat[gguf]'"


def test_float64_is_refused_before_anything_is_written_and_float32_is_asked_for(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dtype=torch.float64)
    request = ExportRequest(adapters=[str(adapter)], weights=[1.0], base=str(base), gguf=True)
    with pytest.raises(UsageError, match="float64") as caught:
        export_adapter(request, tmp_path / "out")
    assert caught.value.hint == "give --dtype float32"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    export_adapter(replace(request, dtype="float32"), tmp_path / "out")
    _, tensors = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert "blk.0.attn_q.weight.lora_a" in tensors
