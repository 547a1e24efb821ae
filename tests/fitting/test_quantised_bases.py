"""Bases whose linear layers are quantised, as they are. Those of bitsandbytes need that package."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.errors import BaseModelMismatch, IntegrityError, LoracatError, OutOfResources, UsageError
from loracli.export.export import export_adapter
from loracli.export.loss import loss_of_export, read_loss_data
from loracli.export.request import ExportRequest
from loracli.fitting.job import identity_of
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model import quantisation
from loracli.model.base import load_base, plan_base
from loracli.model.placement import Placement
from loracli.model.reference import BaseReference, find_base, stored_quantisation
from loracli.model.session import Opening, as_fitted, runs_here
from loracli.recipe.record import RecipeBase
from loracli.system.files import file_sha256
from tests.heard import Heard
from tests.stub_hub import StubHub
from tests.tiny import make_adapter, make_base, make_tokenizer, random_records, write_jsonl

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
QUICK = FitSettings(passes=2, ridge=0.01, control="none")


# The words of config.json, and what is said of them.
BY_METHOD: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "fbgemm_fp8": {"activation_scale_ub": 1200.0},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}, "skip_modules": ["lm_head"]},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "mxfp4": {"modules_to_not_convert": ["model.layers.*.self_attn"]},
    "nvfp4": {"group_size": 16},
    "quanto": {"weights": "int8", "activations": None},
    "auto-round": {"bits": 4, "group_size": 128},
    "mlx": {"bits": 4, "group_size": 64, "mode": "affine"},
    "x" * 50: {},
}
# And whatever else this transformers knows.
BY_METHOD |= {
    name: {}
    for name in AUTO_QUANTIZATION_CONFIG_MAPPING
    if name not in BY_METHOD and not name.startswith("bitsandbytes")
}
REFUSED = {
    **{
        method: ({"quant_method": method, **fields}, f"quantised by {method[:40]!r}, which adapters are not attached")
        for method, fields in BY_METHOD.items()
    },
    "mlx, unnamed": (BY_METHOD["mlx"], "quantised by 'mlx'"),
    "compressed-tensors, unnamed": (BY_METHOD["compressed-tensors"], "quantised by 'compressed-tensors'"),
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


@pytest.mark.parametrize("chosen", [{}, {"select_by": "contains", "max_new_tokens": 3}])
def test_a_fit_on_a_quantised_base_is_the_fit_on_the_weights_that_its_bits_stand_for(
    tmp_path: Path, chosen: dict[str, Any]
) -> None:
    stored, dense = quantised_base(tmp_path, "nf4")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    adapters = [str(make_adapter(tmp_path / name, dense, seed=seed)) for seed, name in enumerate(("first", "second"))]
    data = write_jsonl(tmp_path / "data.jsonl", random_records(30))
    held = write_jsonl(tmp_path / "held.jsonl", random_records(25, seed=1))
    settings = replace(QUICK, **chosen)
    on_bits, on_numbers = (
        fit_mixing(adapters, data, eval_data=held, base=str(base), settings=settings) for base in (stored, dense)
    )
    assert (on_bits.base.quantisation, on_numbers.base.quantisation) == ("nf4", None)
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


def test_experts_that_are_packed_one_by_one_are_refused_in_words(tmp_path: Path) -> None:
    """As bases for QLoRA held them when each expert was a linear layer; transformers keeps them in one parameter."""
    functional = pytest.importorskip("bitsandbytes").functional
    base = make_base(tmp_path / "base", "qwen3-moe")
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        packed[name] = tensor
        if "experts" in name:
            packed[name], state = functional.quantize_4bit(tensor, quant_type="nf4")
            packed |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(packed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatch, match=r"lacks the weights model.layers.0.mlp.experts.down_proj in the shape"):
        load_base(with_config(base, FORMS["nf4"]), device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_base_that_is_quantised_on_loading_is_the_one_that_is_stored_so(tmp_path: Path, dtype: str) -> None:
    stored, _ = quantised_base(tmp_path, "nf4")
    answers = []
    for base, quantise in ((stored, None), (stored, "nf4"), (tmp_path / "plain", "nf4")):
        loaded = load_base(BaseReference("org/base", base, None), dtype=dtype, device="cpu", quantise=quantise)
        assert loaded.quantisation is not None and loaded.quantisation.form == "nf4"
        answers.append(loaded.model(input_ids=torch.arange(3, 20)[None]).logits)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    with pytest.raises(UsageError, match="is stored in nf4, which --quantise int8 does not change"):
        plan_base(BaseReference("org/base", stored, None), quantise="int8")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes as it seems to be there, for what does not load a base."""
    monkeypatch.setattr("loracli.model.quantisation.find_spec", lambda name: name)


def with_config(base: Path, config: dict[str, Any], key: str = "quantization_config") -> BaseReference:
    """A base that says that it is quantised so."""
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {key: config}))
    return BaseReference("org/base", base, None)


def test_without_the_package_both_ways_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracli.model.quantisation.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--quantise needs the package bitsandbytes") as caught:
        Placement(quantise="nf4")
    assert caught.value.hint == "pip install 'loracat[bitsandbytes]'"
    stored = with_config(make_base(tmp_path / "base"), FORMS["nf4"])
    with pytest.raises(UsageError, match="quantised by bitsandbytes in nf4, and that package is not installed"):
        plan_base(stored)


def test_peft_comes_by_one_door_that_lets_bitsandbytes_take_no_code_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "kernels": "",
        "bitsandbytes": "try:\n    import kernels as taken\nexcept ImportError:\n    taken = None\n",
    }
    words["peft"] = "from bitsandbytes import taken\n"
    for name, text in words.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert quantisation.import_peft().taken is None
        assert importlib.import_module("kernels").__file__ == str(tmp_path / "kernels.py")  # for whoever has use for it
    finally:
        for name in words:
            sys.modules.pop(name, None)  # what was there before comes back
    package = Path(quantisation.__file__).parents[1]
    by = [path.name for path in package.rglob("*.py") if re.search(r"^\s*(import|from) peft\b", path.read_text(), re.M)]
    assert by == ["quantisation.py"]


def test_what_is_quantised_takes_less_memory_and_belongs_to_what_a_fit_goes_on_from(
    tmp_path: Path, installed: None
) -> None:
    pytest.importorskip("bitsandbytes")  # whose version a fit goes on with
    reference = BaseReference("org/base", make_base(tmp_path / "base"), None)
    opened = {
        form: Opening(reference, (), 64, 64, placement=Placement(quantise=form)) for form in (None, "int8", "nf4")
    }
    weights = [opening.memory(opening.plan())[0].weights for opening in opened.values()]
    assert weights[0] > weights[1] > weights[2]
    states = [identity_of(reference, {}, {}, opening.placement) for opening in opened.values()]
    for state, form in zip(states, opened, strict=True):
        of = {} if form is None else {"version of bitsandbytes": version("bitsandbytes")}
        assert state == states[0] | {"--quantise": str(form)} | of
    assert len({str(state) for state in states}) == 3


def test_a_form_that_no_base_is_made_and_sharing_it_out_are_refused(installed: None) -> None:
    with pytest.raises(UsageError, match="--quantise fp4 is not one of nf4, int8, none"):
        Placement(quantise="fp4")
    with pytest.raises(UsageError, match="a quantised base cannot be shared out"):
        Placement(quantise="nf4", shard=True)


def fitted_on(reference: BaseReference, form: Any) -> RecipeBase:
    """What a recipe that was fitted on it records, with linear layers kept in a form."""
    return RecipeBase(reference.id, reference.commit, file_sha256(reference.path / "config.json"), form)


def test_a_recipe_is_compared_and_exported_on_the_numbers_that_it_was_fitted_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = make_base(tmp_path / "base", "shallow")
    adapters = [str(make_adapter(tmp_path / name, base, seed=seed)) for seed, name in enumerate(("first", "second"))]
    data = write_jsonl(tmp_path / "data.jsonl", random_records(20))
    held, place = write_jsonl(tmp_path / "held.jsonl", random_records(20, seed=1)), Placement("float32")
    recipe = fit_mixing(
        adapters, data, eval_data=held, base=str(base), settings=QUICK, placement=replace(place, quantise="nf4")
    )
    assert recipe.versions["bitsandbytes"] == version("bitsandbytes")
    recipe.save(path := tmp_path / "recipe.json")
    exported = export_adapter(ExportRequest(recipe=path), tmp_path / "out")
    fitted, heard = next(row.nats_per_token for row in recipe.held_out.rows if row.name == "fit"), Heard()
    on_base: dict[str, Any] = {"base": str(base), "progress": heard}
    settings = CompareSettings(methods=("uniform",))
    found = compare_adapters(held, recipe=path, settings=settings, placement=place, **on_base)
    assert next(row.nats_per_token for row in found.rows if row.name == "fit") == pytest.approx(fitted, rel=1e-6)
    scored = read_loss_data(held)
    assert loss_of_export(exported, scored, placement=place, **on_base).before == pytest.approx(fitted, rel=1e-6)
    assert sum("are kept in nf4, as when" in note for note in heard.notes) == 2 and heard.warnings == []
    full = loss_of_export(exported, scored, placement=replace(place, quantise="none"), **on_base)
    assert abs(full.before - fitted) > 1e-4 and len(heard.warnings) == 1


AS_FITTED: dict[str, tuple[str | None, dict[str, Any], str | None, list[str]]] = {
    "no recipe": (None, {}, None, []),
    "in full precision": (None, {"fit": None}, None, []),
    "quantised": (None, {"a": "int8", "b": "int8"}, "int8", ["are kept in int8, as when a and b were fitted"]),
    "in two ways": (None, {"a": "nf4", "b": None}, None, ["a was fitted with linear layers of the base in nf4"]),
    "as no base is made": (None, {"fit": "fp4"}, None, ["base in fp4, and here they are in full precision"]),
    "none is asked for": ("none", {"fit": "nf4"}, "none", ["base in nf4, and here they are in full precision"]),
    "otherwise": ("int8", {"fit": "nf4"}, "int8", ["base in nf4, and here they are in int8"]),
    "full precision alone": ("int8", {"fit": None}, "int8", ["in full precision, and here they are in int8"]),
}


@pytest.mark.parametrize("case", AS_FITTED)
def test_a_base_in_full_precision_is_quantised_as_a_recipe_was_fitted_unless_otherwise_asked(
    tmp_path: Path, installed: None, case: str
) -> None:
    asked, fits, form, said = AS_FITTED[case]
    reference, heard = BaseReference("org/base", make_base(tmp_path / "base"), None), Heard()
    bases = {name: fitted_on(reference, form) for name, form in fits.items()}
    assert as_fitted(Placement(quantise=asked), reference, bases, progress=heard) == Placement(quantise=form)
    assert len(heard.said) == len(said) and all(words in line for words, line in zip(said, heard.said, strict=True))


def test_a_base_that_is_stored_so_stays_so_whatever_a_recipe_says(tmp_path: Path, installed: None) -> None:
    stored, heard = with_config(make_base(tmp_path / "base"), FORMS["nf4"]), Heard()
    same = {"fit": fitted_on(stored, "nf4")}
    assert as_fitted(Placement(), stored, same, progress=heard) == Placement() and heard.said == []
    other = {"fit": fitted_on(stored, None)}
    assert as_fitted(Placement(), stored, other, progress=heard) == Placement() and len(heard.warnings) == 1


@pytest.mark.parametrize(
    ("stored", "fitted", "words"),
    [
        (None, None, "config.json of org/base is not the one that fit was fitted on; only shapes are checked"),
        ("nf4", "nf4", "config.json of org/base is not the one that fit was fitted on; only shapes are checked"),
        ("nf4", None, "its loss is another"),
        (None, "fp4", "its loss is another"),
    ],
)
def test_another_config_than_the_fit_had_is_said_once_unless_it_is_that_of_a_copy_in_another_form(
    tmp_path: Path, installed: None, stored: str | None, fitted: Any, words: str
) -> None:
    heard, folder = Heard(), make_base(tmp_path / "base")
    reference = BaseReference("org/base", folder, None) if stored is None else with_config(folder, FORMS[stored])
    before = RecipeBase("org/base", None, "0" * 64, fitted)
    as_fitted(Placement(), reference, {"fit": before}, progress=heard)
    assert len(heard.warnings) == 1 and words in heard.warnings[0]


def test_another_config_at_the_recorded_commit_is_refused(tmp_path: Path) -> None:
    reference = BaseReference("org/base", make_base(tmp_path / "base"), "c" * 40)
    with pytest.raises(IntegrityError, match="is not the one that fit was fitted on"):
        as_fitted(Placement(), reference, {"fit": RecipeBase("org/base", "c" * 40, "0" * 64)})


@pytest.mark.parametrize(
    ("config", "quantise", "error", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, None, BaseModelMismatch, "org/base is quantised by 'awq'"),
        (FORMS["int8"], "nf4", UsageError, "org/base is stored in int8, which --quantise nf4 does not change"),
        ({}, None, OutOfResources, "the weights of org/base and the adapters take .* there are 9.0 kB free on cpu"),
    ],
    ids=["a form that is not run", "another form than is asked for", "more than the memory holds"],
)
def test_what_is_not_run_is_refused_before_its_weights_are_fetched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: None,
    config: dict[str, Any],
    quantise: str | None,
    error: type[LoracatError],
    said: str,
) -> None:
    base = make_base(tmp_path / "base")
    with_config(base, config)
    monkeypatch.setattr("loracli.model.session._available_memory", lambda *_, **__: 9000)
    with StubHub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
        with pytest.raises(error, match=said):
            find_base((), "org/base", check=runs_here(Placement(quantise=quantise), ()))
        fetched = [path for method, path in hub.requests if method == "GET"]
        assert any("config.json" in path for path in fetched)
        assert not any("safetensors" in path or "tokenizer" in path for path in fetched)
        assert (find_base((), "org/base").path / "model.safetensors").is_file()  # for who does not run it, as before
    huggingface_hub.close_session()


@pytest.mark.parametrize("why", REFUSED)
def test_a_base_that_is_quantised_otherwise_is_refused_by_name_with_the_way_out(tmp_path: Path, why: str) -> None:
    config, said = REFUSED[why]
    stored = with_config(make_base(tmp_path / "base"), config)
    (stored.path / "model.safetensors").unlink()  # no weight is there yet
    for refused in (
        lambda: plan_base(stored),
        lambda: find_base((), str(stored.path), check=runs_here(Placement(), ())),
    ):
        with pytest.raises(BaseModelMismatch, match=re.escape(said)) as caught:
            refused()
        assert caught.value.hint == "give the unquantised model with --base"


@pytest.mark.parametrize(
    ("key", "config", "said"),
    [
        ("quantization", BY_METHOD["mlx"], "is quantised by 'mlx'"),  # as MLX wrote it at first
        ("compression_config", BY_METHOD["compressed-tensors"], "is quantised by 'compressed-tensors'"),
        (
            "text_config",
            {"quantization_config": BY_METHOD["gptq"]},
            "a part of it is quantised: text_config.quantization_config",
        ),
    ],
)
def test_what_is_quantised_is_seen_under_other_keys_too(
    tmp_path: Path, key: str, config: dict[str, Any], said: str
) -> None:
    stored = with_config(make_base(tmp_path / "base"), config, key)
    with pytest.raises(BaseModelMismatch, match=re.escape(said)):
        stored_quantisation("org/base", stored.path)
