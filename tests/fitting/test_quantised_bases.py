"""Bases whose linear layers are quantised, as they are. Those of bitsandbytes need that package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loracli.errors import BaseModelMismatch
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.base import load_base, plan_base
from loracli.model.reference import BaseReference
from tests.tiny import make_adapter, make_base, make_tokenizer, random_records, write_jsonl

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
QUICK = FitSettings(passes=4, ridge=0.01, control="none")


# The words of config.json, and what is said of them.
REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq', which adapters are not attached to here"),
    "no method": ({"bits": 4}, "quantised in an unknown way"),
    "no form": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "in 'nf5'"),
    "no width": ({"quant_method": "bitsandbytes"}, "does not say whether in 4 or in 8 bits"),
    "both widths": ({"load_in_4bit": True, "load_in_8bit": True}, "does not say whether in 4 or in 8 bits"),
    "other bytes": (
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        "its bits kept as bfloat16; uint8 is read",
    ),
    "no names": ({"load_in_8bit": True, "llm_int8_skip_modules": [1]}, "does not hold names"),
}


def quantised_base(folder: Path, form: str) -> tuple[Path, Path]:
    """A tiny base as bitsandbytes stores it, and the same weights in float32, both by transformers alone."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = make_base(folder / "plain", "shallow")
    config = BitsAndBytesConfig(**FORMS[form])
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder / form)
    model.dequantize(torch.float32).save_pretrained(folder / "dequantised")
    for path in (folder / form, folder / "dequantised"):
        make_tokenizer().save_pretrained(path)
    return folder / form, folder / "dequantised"


def test_a_fit_on_a_quantised_base_is_the_fit_on_the_weights_that_its_bits_stand_for(tmp_path: Path) -> None:
    stored, dense = quantised_base(tmp_path, "nf4")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    adapters = [str(make_adapter(tmp_path / name, dense, seed=seed)) for seed, name in enumerate(("first", "second"))]
    data = write_jsonl(tmp_path / "data.jsonl", random_records(30))
    held = write_jsonl(tmp_path / "held.jsonl", random_records(25, seed=1))
    on_bits, on_numbers = (
        fit_mixing(adapters, data, eval_data=held, base=str(base), settings=QUICK) for base in (stored, dense)
    )
    assert on_bits.held_out.verdict == on_numbers.held_out.verdict
    assert on_bits.mixing.weights.keys() == on_numbers.mixing.weights.keys()
    for module, weights in on_numbers.mixing.weights.items():
        assert on_bits.mixing.weights[module] == pytest.approx(weights, abs=1e-2), module


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_are_those_of_the_weights_that_the_bits_stand_for(
    tmp_path: Path, form: str, dtype: str
) -> None:
    """Of bitsandbytes' int8 they would not be: it rounds what comes in as well."""
    answers = []
    for base in quantised_base(tmp_path, form):
        model = load_base(BaseReference("org/base", base, None), dtype=dtype, device="cpu").model
        inputs = model.get_input_embeddings()(torch.arange(3, 20)[None]).requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        answers.append((model(input_ids=torch.arange(3, 20)[None]).logits, inputs.grad))
    for found, expected in zip(*answers, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("why", REFUSED)
def test_a_base_that_is_quantised_otherwise_is_refused_by_name_with_the_way_out(tmp_path: Path, why: str) -> None:
    config, said = REFUSED[why]
    base = make_base(tmp_path / "base")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    with pytest.raises(BaseModelMismatch, match=re.escape(said)) as caught:
        plan_base(BaseReference("org/base", base, None))
    assert caught.value.hint == "give the unquantised model with --base"
