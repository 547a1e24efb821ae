"""Adapters of mlx-lm: against what its own layer computes, written out, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loracli.adapters.adapter import read_adapter
from loracli.adapters.compatible import inspect_adapters
from loracli.errors import InputError, MalformedAdapter, UnsupportedAdapter
from loracli.hub.fetch import _base_claim, fetch_adapter
from tests.stub_hub import StubHub

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (6, 5), UP: (9, 5)}  # (out, in)
RANK, SCALE = 3, 10.0


def save_mlx(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, width) in SHAPES.items():
        tensors[f"{name}.lora_a"] = torch.randn(width, RANK, generator=generator).to(dtype)
        tensors[f"{name}.lora_b"] = torch.randn(RANK, out, generator=generator).to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    fields = {
        "fine_tune_type": "lora",
        "model": "org/base",
        "num_layers": 1,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
        "adam": {"unknown": True},
        "iters": 1000,
        "train": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return tensors


def refused(folder: Path, kind: type[InputError]) -> InputError:
    with pytest.raises(InputError) as caught:
        read_adapter(str(folder))
    assert type(caught.value) is kind and str(folder) in str(caught.value)
    return caught.value


def test_the_base_of_one_that_is_fetched_is_what_its_config_calls_model(tmp_path: Path) -> None:
    save_mlx(tmp_path)
    assert (
        _base_claim(fetch_adapter(str(tmp_path))).base_model
        == read_adapter(str(tmp_path)).config.base_model
        is not None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_what_the_mlx_layer_adds(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = save_mlx(tmp_path, dtype=dtype)
    adapter = read_adapter(str(tmp_path))
    assert set(adapter.modules) == set(SHAPES) and adapter.dtype == dtype
    for name, (out, width) in SHAPES.items():
        module = adapter.modules[name]
        assert module.kind == "linear" and module.factors.lora_A.shape == (RANK, width)
        x = torch.randn(4, width, dtype=torch.float64)
        a, b = (tensors[f"{name}.{part}"].double() for part in ("lora_a", "lora_b"))
        added = SCALE * ((x @ a) @ b)  # LoRALinear.__call__
        assert added.shape == (4, out)
        torch.testing.assert_close(x @ module.factors.delta_weight().T, added)


def test_the_adapter_tells_where_it_is_from(tmp_path: Path) -> None:
    save_mlx(tmp_path)
    adapter = read_adapter(str(tmp_path))
    assert (adapter.config.base_model, adapter.config.rank, adapter.ranks) == ("org/base", RANK, (RANK,))
    for name in ("adapter_config.json", "adapters.safetensors"):
        assert adapter.sha256[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    (summary,) = inspect_adapters([str(tmp_path)]).adapters
    assert (summary.scaling, summary.lora_alpha, summary.leaves) == ((10.0, 10.0), 30.0, ("q_proj", "up_proj"))


def test_a_scale_that_alpha_over_rank_does_not_give_back_is_kept_to_the_bit(tmp_path: Path) -> None:
    scale = 0.1
    assert scale * RANK / RANK != scale
    save_mlx(tmp_path, lora_parameters={"rank": RANK, "scale": scale, "dropout": 0.0})
    assert read_adapter(str(tmp_path)).modules[Q].factors.scaling == scale


@pytest.mark.parametrize(
    ("alpha", "other"), [(16.0, 160 / 3), (1, 10 / 3), (RANK, None), (3.0, None), (None, None)], ids=str
)
def test_an_early_alpha_beside_scale_is_warned_of_where_it_would_matter(
    tmp_path: Path, alpha: float | None, other: float | None
) -> None:
    """mlx-lm of April to June 2024: scale * alpha / rank; later versions wrote alpha and did not use it."""
    save_mlx(tmp_path, lora_parameters={"rank": RANK, "alpha": alpha, "scale": SCALE, "dropout": 0.0})
    adapter = read_adapter(str(tmp_path))
    assert adapter.modules[Q].factors.scaling == SCALE
    assert len(adapter.warnings) == (other is not None)
    if other is not None:
        (said,) = adapter.warnings
        assert f"scale = {SCALE:g}" in said and f"scale * alpha / rank = {other:g}" in said
        meant = float(re.search(r"set scale to ([\d.]+) and alpha to 3", said)[1])  # type: ignore[index]
        save_mlx(tmp_path, lora_parameters={"rank": RANK, "alpha": RANK, "scale": meant, "dropout": 0.0})
        again = read_adapter(str(tmp_path))
        assert again.warnings == () and again.modules[Q].factors.scaling == pytest.approx(other, rel=1e-5)


def test_an_update_of_zero_is_warned_of_and_a_scale_of_zero_refused(tmp_path: Path) -> None:
    tensors = save_mlx(tmp_path)
    save_file({n: t * n.endswith("lora_a") for n, t in tensors.items()}, tmp_path / "adapters.safetensors")
    assert "changes nothing" in read_adapter(str(tmp_path)).warnings[0]
    save_mlx(tmp_path, lora_parameters={"rank": RANK, "scale": 0.0, "dropout": 0.0})
    assert "scale is 0" in refused(tmp_path, UnsupportedAdapter).what


def test_a_config_of_mlx_vlm_is_refused_for_what_it_is(tmp_path: Path) -> None:
    """Its scaling is alpha, or alpha / rank, by its version."""
    save_file({f"language_model.{Q}.A": torch.ones(5, 3)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 3, "alpha": 0.1, "dropout": 0.0}))
    error = refused(tmp_path, UnsupportedAdapter)
    assert "mlx-vlm" in error.what and "mlx-lm or PEFT" in str(error.hint)


def test_an_old_config_without_a_type_is_a_lora(tmp_path: Path) -> None:
    save_mlx(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["fine_tune_type"]
    path.write_text(json.dumps(fields))
    assert set(read_adapter(str(tmp_path)).modules) == set(SHAPES)


@pytest.mark.parametrize("kind", ["dora", "full", None, 1])
def test_another_fine_tune_type_is_refused_by_name(tmp_path: Path, kind: object) -> None:
    save_mlx(tmp_path, fine_tune_type=kind)
    error = refused(tmp_path, UnsupportedAdapter)
    assert repr(kind) in error.what and error.hint


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        (f"{Q}.m", UnsupportedAdapter, "DoRA"),
        ("model.layers.1.mlp.switch_mlp.up_proj.lora_a", UnsupportedAdapter, "experts"),
        ("model.embed_tokens.lora_a", UnsupportedAdapter, "embedding"),
        (f"{Q}.linear.weight", MalformedAdapter, "linear.weight"),
        (f"{Q}.lora_A.weight", MalformedAdapter, "lora_A.weight"),
        ("model..q.lora_a", MalformedAdapter, "model..q"),
        ("model.layers.0.self_attn.q_proj.lora_a", MalformedAdapter, "layers.0.self_attn.q_proj.lora_b'"),
    ],
)
def test_another_tensor_is_refused_by_name(tmp_path: Path, name: str, kind: type[InputError], said: str) -> None:
    tensors = save_mlx(tmp_path)
    for odd in (torch.ones(5, RANK), torch.ones(2, 5, RANK)):
        save_file(tensors | {name: odd}, tmp_path / "adapters.safetensors")
        assert said in refused(tmp_path, kind).what


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        [],
        {"scale": 1.0},
        {"rank": RANK},
        {"rank": 4, "scale": 1.0},
        {"rank": True, "scale": 1.0},
        {"rank": 0, "scale": 1.0},
        {"rank": RANK, "scale": "10"},
        {"rank": RANK, "scale": True},
        {"rank": RANK, "scale": 1e10},
        {"rank": RANK, "scale": 1.0, "dropout": "x"},
    ],
    ids=str,
)
def test_rank_and_scale_are_never_guessed(tmp_path: Path, parameters: object) -> None:
    save_mlx(tmp_path, lora_parameters=parameters)
    refused(tmp_path, MalformedAdapter)


def test_factors_as_peft_turns_them_are_refused(tmp_path: Path) -> None:
    tensors = save_mlx(tmp_path)
    save_file({name: t.T.contiguous() for name, t in tensors.items()}, tmp_path / "adapters.safetensors")
    assert "(3, 5)" in refused(tmp_path, MalformedAdapter).what


def test_pefts_file_beside_it_wins(tmp_path: Path) -> None:
    save_mlx(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(InputError, match="peft_type"):
        read_adapter(str(tmp_path))


def test_it_is_fetched_with_the_two_files_it_needs_and_no_checkpoint(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mlx(tmp_path / "mlx")
    files = {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}
    hub.add("org/mlx", files | {"0000100_adapters.safetensors": b"no"})
    options: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    fetched = fetch_adapter("org/mlx", **options)
    assert [file.name for file in fetched.files] == ["adapter_config.json", "adapters.safetensors"]
    assert {path.name for path in fetched.path.iterdir()} == {"adapter_config.json", "adapters.safetensors"}
    assert set(read_adapter(fetched).modules) == set(SHAPES)
    before = len(hub.requests)
    assert fetch_adapter(f"org/mlx@{fetched.commit}", **options).path == fetched.path
    assert len(hub.requests) == before  # cached and whole


def test_where_both_formats_are_pefts_is_fetched(hub: StubHub, tmp_path: Path) -> None:
    both = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"p", "adapters.safetensors": b"m"}
    hub.add("org/both", both)
    fetched = fetch_adapter("org/both", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert [file.name for file in fetched.files] == ["adapter_config.json", "adapter_model.safetensors"]
