"""A model that is fused into a quantised base has the numbers that the base's tensors stand for, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loracli.cli import app
from loracli.errors import BaseModelMismatch, IntegrityError, UsageError
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.fusing.test_fuse import exact_update, load, shard, tensors
from tests.tiny import logits
from tests.verifying.test_verify_adapter import only_the_recipe_is_missing

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """The scale of every entry, float64."""
    rows = scales.double().repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def scales_for(weight: Tensor, block: tuple[int, int], largest: float, dtype: torch.dtype) -> Tensor:
    """The largest entry of each block over the largest number of the format, rounded to `dtype`."""
    rows, columns = weight.shape
    parts = [[part.abs().amax() for part in row.split(block[1], 1)] for row in weight.split(block[0], 0)]
    scales = torch.stack([torch.stack(row) for row in parts]) / largest
    return (2 ** scales.log2().ceil() if dtype == E8M0 else scales).to(dtype)


Stored = tuple[dict[str, Tensor], Tensor]


def int8_of_bitsandbytes(name: str, weight: Tensor) -> Stored:
    """LLM.int8: the largest of each row is 127."""
    largest = weight.abs().amax(dim=1)
    q = (weight.double() * 127 / largest.double()[:, None]).round().to(torch.int8)
    module = name.removesuffix("weight")
    stored = {name: q, f"{module}SCB": largest, f"{module}weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, q.double() * largest.double()[:, None] / 127


def four_bits(name: str, weight: Tensor, *, nested: bool) -> Stored:
    """Two numbers in a byte, the first in the upper half, from a table of 16, times the largest of each 64."""
    code, flat = torch.linspace(-1, 1, 16) ** 3, weight.flatten()
    absmax = torch.stack([part.abs().amax() for part in flat.split(64)])
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored, exact = {"absmax": absmax}, absmax.double()
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        coarse = torch.stack([part.abs().amax() for part in (absmax - offset).split(8)])
        each = coarse.repeat_interleave(8)[: len(absmax)]
        p = ((absmax - offset) / each)[:, None].sub(table).abs().argmin(dim=1)
        exact = table.double()[p] * each.double() + offset
        stored = {"absmax": p.to(torch.uint8), "nested_absmax": coarse, "nested_quant_map": table}
        state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": offset}
    scale = exact.repeat_interleave(64)[: len(flat)]
    q = (flat / scale)[:, None].sub(code).abs().argmin(dim=1)
    stored |= {
        "quant_map": code,
        "quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode())).byte(),
    }
    packed = (q[0::2] * 16 + q[1::2]).to(torch.uint8)[:, None]
    exact = (code.double()[q] * scale).view(weight.shape)
    return {name: packed, **{f"{name}.{part}": tensor for part, tensor in stored.items()}}, exact


class QuantisedBase:
    """A base whose linear layers are quantised, and the numbers that they stand for by the formula."""

    def __init__(
        self,
        made: Made,
        *,
        suffix: str = "",
        block: Callable[[torch.Size], tuple[int, int]] = tuple,  # type: ignore[assignment]
        weight: torch.dtype = E4M3,
        scale: torch.dtype = torch.float32,
        config: dict[str, Any],
        flat: bool = False,
        store: Callable[[str, Tensor], Stored] | None = None,
    ) -> None:
        self.folder, self.exact = made.base, dict[str, Tensor]()
        largest = 127.0 if weight == torch.int8 else torch.finfo(weight).max
        stored: dict[str, Tensor] = {}
        for name, tensor in load_file(made.base / "model.safetensors").items():
            if "_proj" not in name:
                stored[name] = tensor.bfloat16()
                continue
            if store is not None:
                parts, self.exact[name] = store(name, tensor)
                stored |= parts
                continue
            size = block(tensor.shape)
            scales = scales_for(tensor, size, largest, scale)
            ratio = tensor.double() / spread(scales, tensor.shape, size)
            q = (ratio.round() if weight == torch.int8 else ratio.float()).clamp(-largest, largest).to(weight)
            stored |= {name: q, name.replace("weight", suffix): scales.flatten() if flat else scales}
            stored[name.replace("weight", "input_scale")] = torch.ones(1)
            self.exact[name] = q.double() * spread(scales, tensor.shape, size)
        save_file(stored, made.base / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((made.base / "config.json").read_text())
        (made.base / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))


def fp8(block: list[int] | None = None) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}


def compressed(strategy: str, form: str, kind: str, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


FORMATS: dict[str, dict[str, Any]] = {
    "blocks": {"suffix": "weight_scale_inv", "block": lambda _: (16, 16), "config": fp8([16, 16])},
    "blocks that are cut short": {
        "suffix": "weight_scale_inv",
        "block": lambda _: (20, 12),
        "scale": torch.bfloat16,
        "config": fp8([20, 12]),
    },
    "powers of two, e5m2": {
        "suffix": "weight_scale_inv",
        "block": lambda _: (16, 16),
        "weight": E5M2,
        "scale": E8M0,
        "config": fp8([16, 16]),
    },
    "one scale": {"suffix": "weight_scale_inv", "block": tuple, "config": fp8()},
    "channels": {
        "suffix": "weight_scale",
        "block": lambda shape: (1, shape[1]),
        "weight": torch.int8,
        "scale": torch.bfloat16,
        "config": compressed("channel", "int-quantized", "int"),
    },
    "one scale for a tensor": {
        "suffix": "weight_scale",
        "block": tuple,
        "flat": True,
        "config": compressed("tensor", "float-quantized", "float"),
    },
    "bitsandbytes, 8 bit": {
        "store": int8_of_bitsandbytes,
        "config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    },
    "bitsandbytes, 4 bit": {
        "store": partial(four_bits, nested=False),
        "config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    },
    "bitsandbytes, 4 bit, twice": {
        "store": partial(four_bits, nested=True),
        "config": {"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_8bit": False},
    },
    "groups": {
        "suffix": "weight_scale",
        "block": lambda _: (1, 8),
        "config": compressed("group", "naive-quantized", "float", group_size=8),
    },
}


@pytest.mark.parametrize(("form", "dtype"), [*((form, None) for form in FORMATS), ("blocks", "float32")])
def test_every_weight_is_the_float64_number_rounded_once(tmp_path: Path, form: str, dtype: str | None) -> None:
    made = Made(tmp_path, "mixed ranks")
    base = QuantisedBase(made, **FORMATS[form])
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True, dtype=dtype), tmp_path / "out")
    before, after = load_file(made.base / "model.safetensors"), tensors(tmp_path / "out")
    assert after.keys() == {name for name in before if name.endswith("weight")}
    output = torch.bfloat16 if dtype is None else torch.float32
    for name, weight in after.items():
        assert weight.dtype == output
        exact = base.exact[name] if name in base.exact else before[name].double()
        module = name.removesuffix(".weight")
        if module in made.recipe.mixing.weights:
            exact = exact + exact_update(made.recipe, made, module)
            assert (weight != exact.to(output)).double().mean() < 1e-2  # ties
            torch.testing.assert_close(weight.double(), exact, rtol=torch.finfo(output).eps / 2 * 1.001, atol=1e-14)
        else:
            assert torch.equal(weight, exact.to(output))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == str(output).removeprefix("torch.")
    model = load(tmp_path / "out")
    assert model.dtype == output and bool(torch.isfinite(logits(model)).all())
    paths = [str(path) for path in made.paths]
    assert only_the_recipe_is_missing(verify_directory(tmp_path / "out", adapters=paths, base=str(made.base)))


@pytest.mark.filterwarnings("ignore")  # of transformers, which finds no GPU for the format
def test_transformers_reads_the_same_weights_to_its_last_bit(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **FORMATS["blocks"])
    theirs = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.bfloat16).state_dict()
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "out")
    unchanged = 0
    for name, weight in tensors(tmp_path / "out").items():
        if name.removesuffix(".weight") not in made.recipe.mixing.weights:
            torch.testing.assert_close(weight, theirs[name], rtol=2.0**-7, atol=0)
            assert (weight != theirs[name]).double().mean() < 1e-2
            unchanged += 1
    assert unchanged == 24


def test_scales_in_another_file_and_a_resumed_run_make_no_difference(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **FORMATS["blocks"])
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "one")
    shard(made.base, 5)
    fused = fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "five")
    assert fused.dequantised == "fp8" and fused.dtypes == ("bfloat16",) and fused.shards == 5
    one, five = tensors(tmp_path / "one"), tensors(tmp_path / "five")
    assert one.keys() == five.keys() and all(torch.equal(one[name], five[name]) for name in one)
    index = json.loads((tmp_path / "five" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == five.keys()
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "five")))
    paths = [str(path) for path in made.paths]
    assert only_the_recipe_is_missing(verify_directory(tmp_path / "five", adapters=paths, base=str(made.base)))
    (file,) = [
        f for f in made.base.glob("*.safetensors") if "model.layers.0.mlp.up_proj.weight_scale_inv" in load_file(f)
    ]
    changed = load_file(file)
    changed["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] *= 2
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="is not the file that the update was folded into"):
        verify_directory(tmp_path / "five", adapters=paths, base=str(made.base))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, which --dequantise does not read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is stored as F8_E4M3, which stands for nothing"),
        (compressed("group", "pack-quantized", "int", num_bits=4), "compressed-tensors as pack-quantized"),
        (compressed("channel", "int-quantized", "int") | {"transform_config": {"r1": {}}}, "with a transform_config"),
        (fp8([16]), "has the block size"),
        (fp8([8, 8]), "does not fit"),
    ],
)
def test_other_formats_are_refused_by_name_with_the_way_out(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **{**FORMATS["blocks"], "config": config})
    with pytest.raises(BaseModelMismatch, match=message) as caught:
        fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "out")
    assert "unquantised model with --base" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


NAME = "model.layers.1.self_attn.q_proj"
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.weight_scale_inv"), rf"{NAME}\.weight .* is stored as F8_E4M3, which stands"),
        (lambda t: t.pop(f"{NAME}.weight"), rf"{NAME}\.weight_scale_inv .* scales nothing"),
        (lambda t: t.update({f"{NAME}.weight_zero_point": torch.zeros(2, 2)}), f"{NAME} is quantised around"),
        (lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].view(torch.int8)}), rf"{NAME}.* is stored as I8"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).to(E4M3)}), r"model\.norm\.weight .* is stored as F8"),
    ],
)
def test_a_tensor_whose_numbers_cannot_be_had_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **FORMATS["blocks"])
    stored = load_file(made.base / "model.safetensors")
    change(stored)
    save_file(stored, made.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatch, match=message):
        fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "out")


def test_the_option_is_named_for_a_quantised_base_and_refused_for_another(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    with pytest.raises(UsageError, match="is not quantised"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "out")
    config = made.base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    fuse_model(
        FuseRequest(made.recipe, base=str(made.base)), tmp_path / "null", dry_run=True
    )  # is not quantised either
    QuantisedBase(made, **FORMATS["blocks"])
    with pytest.raises(BaseModelMismatch, match="is quantised") as caught:
        fuse_model(FuseRequest(made.recipe, base=str(made.base)), tmp_path / "out")
    assert "--dequantise" in (caught.value.hint or "")


def endless(state: Tensor) -> Tensor:
    """A state of packed weights with an offset that no float can hold."""
    fields = json.loads(bytes(state.tolist())) | {"nested_offset": 10**400}
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.weight.absmax"), "absmax .* does not fit"),
        (lambda t: t.pop(f"{NAME}.weight.nested_quant_map"), "nested_quant_map .* does not fit"),
        (lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:-1]}), "does not fit"),
        (lambda t: t[f"{NAME}.weight{STATE}"].fill_(0), "is damaged"),
        (lambda t: t.update({f"{NAME}.weight{STATE}": endless(t[f"{NAME}.weight{STATE}"])}), "is damaged"),
        (lambda t: t.pop(f"{NAME}.weight{STATE}"), "stands for nothing known"),
    ],
)
def test_what_stands_beside_packed_weights_has_to_fit_them(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **FORMATS["bitsandbytes, 4 bit, twice"])
    stored = load_file(made.base / "model.safetensors")
    change(stored)
    save_file(stored, made.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatch, match=message):
        fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "out")


def test_a_transposed_layer_of_bitsandbytes_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, "conv1d")
    path = made.base / "config.json"
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(BaseModelMismatch, match="is a Conv1D"):
        fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "out")


@pytest.mark.parametrize("form", ["blocks that are cut short", "bitsandbytes, 4 bit, twice"])
def test_rows_that_are_worked_on_apart_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **FORMATS[form])
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "whole")
    for module in ("loracli.fusing.stream", "loracli.verifying.verify"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", 80 * 16)
    fuse_model(FuseRequest(made.recipe, base=str(made.base), dequantise=True), tmp_path / "parts")
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    found = verify_directory(tmp_path / "parts", adapters=[str(path) for path in made.paths], base=str(made.base))
    assert only_the_recipe_is_missing(found)


def test_the_command_says_what_the_base_was(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    QuantisedBase(made, **FORMATS["channels"])
    made.recipe.save(tmp_path / "recipe.json")
    words = ["fuse", str(tmp_path / "recipe.json"), "--base", str(made.base), "--dequantise"]
    result: Any = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["dequantised"], document["dtypes"]) == ("compressed-tensors", ["bfloat16"])
    assert "quantised (compressed-tensors)" in (tmp_path / "out" / "README.md").read_text()
    refused: Any = CliRunner().invoke(app, [*words[:-1], "-o", str(tmp_path / "other")])
    assert refused.exit_code == 3 and "--dequantise" in refused.output
