"""What is converted computes what the trained model computed, by stock PEFT on the untouched base; the errors that are
stated are those of the dense matrices; what cannot be converted is refused with its reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from torch import Tensor

from loracli.adapters.adapter import read_adapter
from loracli.conversion.convert import Converted, ConvertRequest, convert_adapter
from loracli.errors import (
    BaseModelMismatch,
    IncompatibleAdapters,
    MalformedAdapter,
    OutputExists,
    UnsupportedAdapter,
    UsageError,
)
from tests.conversion.training import Trained, reload, train
from tests.heard import Heard
from tests.tiny import BASE_ID, logits, make_adapter, make_base

FULL = 32  # no module of the tiny models has a higher rank


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("gpt2") / "base", "gpt2")


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    return train(tmp_path_factory.mktemp("dora"), tiny_base, use_dora=True)


@pytest.fixture(scope="module")
def pissa(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    return train(tmp_path_factory.mktemp("pissa"), tiny_base, init_lora_weights="pissa", initial="pissa_init")


def written(folder: Path) -> dict[str, Tensor]:
    """dW (out, in) of each module by PEFT's rule, float64; of an embedding (width, vocabulary)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
    return {
        name.removeprefix("base_model.model.").removesuffix(f".{a}"): config["lora_alpha"]
        / config["r"]
        * (tensors[name.removesuffix(a) + b].double() @ tensors[name].double())
        for a, b in pairs.items()
        for name in tensors
        if name.endswith(a)
    }


def check_same_model(trained: Trained, base: Path, made: Converted, *, transposed: bool = False) -> None:
    """Logits, and every module's change in the base."""
    assert (logits(reload(base, made.exported.path)) - trained.logits).abs().max() < 2e-4
    found = written(made.exported.path)
    assert found.keys() == trained.changes.keys()
    for name, change in trained.changes.items():
        assert torch.allclose(found[name].T if transposed else found[name], change, atol=2e-5), name


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 3},
        {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"use_dora": True, "init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_what_the_base_is_enough_for_computes_the_same_as_the_trained_model(
    tmp_path: Path, tiny_base: Path, config: dict[str, Any]
) -> None:
    trained = train(tmp_path / "adapter", tiny_base, **config)
    rank = FULL if "use_dora" in config else None
    made = convert_adapter(ConvertRequest(str(trained.path), base=str(tiny_base), rank=rank), tmp_path / "out")
    check_same_model(trained, tiny_base, made)
    assert made.exported.layout.rank == (rank or 8)  # twice the adapter's, without DoRA
    assert made.relative_error < 1e-6


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ({"use_dora": True}, ("c_attn", "c_fc")),
        ({"init_lora_weights": "pissa"}, ("c_attn", "c_fc")),
        ({"use_dora": True, "init_lora_weights": "pissa"}, ("c_attn",)),
    ],
    ids=str,
)
def test_a_conv1d_stores_its_weight_the_other_way_round(
    tmp_path: Path, gpt2: Path, config: dict[str, Any], targets: tuple[str, ...]
) -> None:
    trained = train(tmp_path / "adapter", gpt2, targets=targets, fan_in_fan_out=True, **config)
    rank = FULL if "use_dora" in config else None
    made = convert_adapter(ConvertRequest(str(trained.path), base=str(gpt2), rank=rank), tmp_path / "out")
    check_same_model(trained, gpt2, made, transposed=True)


def test_dora_on_an_embedding_and_on_the_head_of_tied_weights(tmp_path: Path) -> None:
    """The vocabulary is the embedding's input dimension, that the norm goes over."""
    base = make_base(tmp_path / "base", "llama-tied")
    trained = train(tmp_path / "adapter", base, targets=("embed_tokens", "q_proj"), use_dora=True)
    made = convert_adapter(ConvertRequest(str(trained.path), base=str(base), rank=FULL), tmp_path / "out")
    assert (logits(reload(base, made.exported.path)) - trained.logits).abs().max() < 2e-4
    found = written(tmp_path / "out")["model.embed_tokens"]
    assert torch.allclose(found.T, trained.changes["model.embed_tokens"], atol=2e-5)


def prepare_corda(model: Any, lora: Any) -> None:
    lora.corda_config = CordaConfig(corda_method="kpm")
    preprocess_corda(model, lora, run_model=lambda: model(torch.arange(3, 67)[None]))


def prepare_lora_ga(model: Any, lora: Any) -> None:
    lora.lora_ga_config = LoraGAConfig()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.target_modules:  # what PEFT's preprocess_loraga leaves there
            module._peft_loraga_grad = torch.randn(module.weight.shape)


@pytest.mark.parametrize(
    ("kind", "prepare"),
    [("pissa_niter_4", None), ("corda", prepare_corda), ("lora_ga", prepare_lora_ga)],
    ids=["pissa_niter_4", "corda", "lora_ga"],
)
def test_with_the_adapter_before_its_training_no_weight_of_the_base_is_read(
    tmp_path: Path, tiny_base: Path, kind: str, prepare: Any
) -> None:
    config = {"init_lora_weights": kind}
    trained = train(tmp_path / "adapter", tiny_base, initial="before", prepare=prepare, **config)
    with pytest.raises(UnsupportedAdapter, match="cannot be computed again") as caught:
        convert_adapter(ConvertRequest(str(trained.path), base=str(tiny_base)), tmp_path / "out")
    assert "--initial" in str(caught.value.hint)
    made = convert_adapter(ConvertRequest(str(trained.path), initial=str(trained.path / "before")), tmp_path / "out")
    check_same_model(trained, tiny_base, made)
    assert made.uncertainty == 0.0
    assert read_adapter(str(tmp_path / "out")).config.base_model == BASE_ID


def test_the_initial_adapter_is_found_where_pefts_examples_save_it(tmp_path: Path, pissa: Trained) -> None:
    made = convert_adapter(ConvertRequest(str(pissa.path)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "loracat.json").read_text())["conversion"]["initial"] == "given"
    for name, matrix in written(made.exported.path).items():
        assert torch.allclose(matrix, pissa.changes[name], atol=2e-5)


def test_the_initial_adapter_helps_where_the_config_hides_the_initialisation(
    tmp_path: Path, tiny_base: Path, pissa: Trained
) -> None:
    """PEFT's documentation has the field set to true before anything is saved."""
    shutil.copytree(pissa.path, tmp_path / "adapter")
    edit(tmp_path / "adapter", init_lora_weights=True)
    with pytest.raises(UsageError, match="plain LoRA already") as caught:
        convert_adapter(ConvertRequest(str(tmp_path / "adapter"), base=str(tiny_base)), tmp_path / "out")
    assert "--initial" in str(caught.value.hint)
    made = convert_adapter(
        ConvertRequest(str(tmp_path / "adapter"), initial=str(tmp_path / "adapter" / "pissa_init")), tmp_path / "out"
    )
    check_same_model(pissa, tiny_base, made)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Errors.


def test_dora_at_a_rank_is_the_best_approximation_and_its_error_that_of_the_dense_matrix(
    tmp_path: Path, tiny_base: Path, dora: Trained
) -> None:
    made = convert_adapter(ConvertRequest(str(dora.path), base=str(tiny_base), rank=5), tmp_path / "out")
    certificates = {module.name: module for module in made.exported.certificate.modules}
    lost = size = 0.0
    for name, matrix in written(tmp_path / "out").items():
        u, s, vh = torch.linalg.svd(dora.changes[name])
        assert torch.allclose(matrix, (u[:, :5] * s[:5]) @ vh[:5], atol=2e-5)
        rest, whole = float(s[5:].square().sum()), float(s.square().sum())
        assert 0.01 < (rest / whole) ** 0.5
        assert certificates[name].relative_error == pytest.approx((rest / whole) ** 0.5, rel=1e-3)
        lost, size = lost + rest, size + whole
    assert made.relative_error == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert made.relative_error == pytest.approx(
        json.loads((tmp_path / "out" / "loracat.json").read_text())["conversion"]["relative_error"], rel=1e-5
    )


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_a_tolerance_takes_the_smallest_rank_of_each_module_that_keeps_it(
    tmp_path: Path, tiny_base: Path, name: str, request: pytest.FixtureRequest
) -> None:
    trained: Trained = request.getfixturevalue(name)
    made = convert_adapter(ConvertRequest(str(trained.path), base=str(tiny_base), tolerance=0.15), tmp_path / "out")
    for module in made.exported.certificate.modules:
        s = torch.linalg.svdvals(trained.changes[module.name]).square()
        errors = [(float(s[k:].sum()) / float(s.sum())) ** 0.5 for k in range(len(s) + 1)]
        smallest = next(k for k, error in enumerate(errors) if error <= 0.15)
        assert module.rank == smallest
        assert module.relative_error == pytest.approx(errors[smallest], rel=1e-3, abs=1e-6)
    assert made.relative_error <= 0.15


def test_dora_without_a_rank_is_within_a_tenth_or_refused(
    tmp_path: Path, tiny_base: Path, dora: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = convert_adapter(ConvertRequest(str(dora.path), base=str(tiny_base)), tmp_path / "out")
    assert 0.01 < made.exported.certificate.largest_error <= 0.1
    monkeypatch.setattr("loracli.conversion.convert.DEFAULT_MOST", 2)
    with pytest.raises(UsageError, match=r"rank 2 has a relative error of \d+.\d%, more than 10%") as caught:
        convert_adapter(ConvertRequest(str(dora.path), base=str(tiny_base)), tmp_path / "no")
    assert "--rank" in str(caught.value.hint)
    assert not (tmp_path / "no").exists()


def test_in_bfloat16_the_rounding_is_on_the_scale_of_the_change(tmp_path: Path, tiny_base: Path) -> None:
    """Factors side by side, as PEFT converts, would be rounded on the scale of what cancels: a hundred times more."""
    trained = train(tmp_path / "adapter", tiny_base, init_lora_weights="pissa", initial="pissa_init", rate=1e-4)
    made = convert_adapter(ConvertRequest(str(trained.path), dtype="bfloat16"), tmp_path / "out")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (trained.path / "pissa_init", trained.path)
    )
    for module in made.exported.certificate.modules:
        key = f"base_model.model.{module.name}.lora_"
        A = torch.cat([after[f"{key}A.weight"], before[f"{key}A.weight"]])
        B = 1.5 * torch.cat([after[f"{key}B.weight"], -before[f"{key}B.weight"]], dim=1)
        exact = B.double() @ A.double()
        side_by_side = float((B.bfloat16().double() @ A.bfloat16().double() - exact).norm() / exact.norm())
        assert module.relative_error < 0.005
        assert side_by_side > 100 * module.relative_error


def test_two_conversions_are_the_same_bytes_and_say_where_they_come_from(
    tmp_path: Path, tiny_base: Path, dora: Trained
) -> None:
    for name in ("one", "two"):
        convert_adapter(ConvertRequest(str(dora.path), base=str(tiny_base), rank=3), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json", "loracat.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    document = json.loads((tmp_path / "one" / "loracat.json").read_text())
    assert document["conversion"]["use_dora"] is True and document["conversion"]["rank"] == 3
    assert document["adapters"][0]["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    card = (tmp_path / "one" / "README.md").read_text()
    assert "# LoRA adapter converted from DoRA, compressed to rank 3" in card
    assert "loracat convert --rank 3" in card
    assert str(tmp_path) not in card + json.dumps(document)
    assert read_adapter(str(tmp_path / "one")).ranks == (3,)


# Refusals.


def refused(kind: type[Exception], match: str, adapter: Path, folder: Path, **options: Any) -> str:
    """The hint of the refusal."""
    with pytest.raises(kind, match=match) as caught:
        convert_adapter(ConvertRequest(str(adapter), **options), folder / "refused")
    assert type(caught.value) is kind
    assert not (folder / "refused").exists()
    return str(getattr(caught.value, "hint", None))


def test_options_that_contradict_each_other_or_say_nothing(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    given: dict[str, Any] = {"adapter": dora.path, "folder": tmp_path, "base": str(tiny_base)}
    refused(UsageError, "cannot be given together", rank=3, tolerance=0.1, **given)
    refused(UsageError, "not between 0 and 1", tolerance=1.0, **given)
    refused(UsageError, "below 1", rank=0, **given)
    refused(UsageError, "not one of", dtype="int8", **given)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExists):
        convert_adapter(ConvertRequest(str(dora.path), base=str(tiny_base)), tmp_path / "taken")
    plain = make_adapter(tmp_path / "plain", tiny_base)
    refused(UsageError, "plain LoRA already", plain, tmp_path, base=str(tiny_base))


def test_loftq_and_other_features_stay_refused_by_name(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    for fields, name in (
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "something"}, "something"),
        ({"lora_bias": True}, "lora_bias"),
        ({"from_the_future": 1}, "from_the_future"),
    ):
        shutil.rmtree(tmp_path / "odd", ignore_errors=True)
        shutil.copytree(dora.path, tmp_path / "odd")
        edit(tmp_path / "odd", **fields)
        assert refused(UnsupportedAdapter, name, tmp_path / "odd", tmp_path, base=str(tiny_base)) != "None"


def test_what_convert_can_help_with_is_named_by_everything_that_refuses_it(dora: Trained, pissa: Trained) -> None:
    for trained in (dora, pissa):
        with pytest.raises(UnsupportedAdapter) as caught:
            read_adapter(str(trained.path))
        assert "loracat convert" in str(caught.value.hint)


def test_an_initial_adapter_of_another_form_is_refused(tmp_path: Path, tiny_base: Path, pissa: Trained) -> None:
    for name, options in (
        ("rank", {"rank": 3, "alpha": 4.5}),
        ("scaling", {"alpha": 7}),
        ("modules", {"targets": ("q_proj", "v_proj")}),
    ):
        form: dict[str, Any] = {"rank": 4, "alpha": 6, "targets": ("q_proj", "v_proj", "down_proj")} | options
        other = make_adapter(tmp_path / name, tiny_base, **form)
        assert "twice the rank" in refused(
            IncompatibleAdapters, "before its training", pissa.path, tmp_path, initial=str(other)
        )
    refused(UsageError, "is the adapter itself", pissa.path, tmp_path, initial=str(pissa.path))


def test_a_start_that_is_not_the_adapters_is_said(tmp_path: Path, tiny_base: Path, pissa: Trained) -> None:
    """Another base, and another adapter for the one before the training; nothing of the right ones."""
    shutil.copytree(pissa.path, tmp_path / "alone", ignore=shutil.ignore_patterns("pissa_init"))
    alone, other = str(tmp_path / "alone"), str(make_base(tmp_path / "other", "llama", seed=7))
    form: dict[str, Any] = {"rank": 4, "alpha": 6, "targets": ("q_proj", "v_proj", "down_proj")}
    foreign = str(make_adapter(tmp_path / "foreign", tiny_base, **form))
    for place, (options, warned) in enumerate(
        (
            ({"base": str(tiny_base)}, None),
            ({"initial": str(pissa.path / "pissa_init")}, None),
            ({"base": other}, "the base .* is hardly what"),
            ({"base": str(tiny_base), "initial": foreign}, "--initial is hardly what"),
        )
    ):
        heard = Heard()
        convert_adapter(ConvertRequest(alone, **options), tmp_path / f"out{place}", progress=heard)
        said = [line for line in heard.warnings if "hardly what" in line]
        assert len(said) == (warned is not None) and all(re.match(str(warned), line) for line in said)


def test_an_initialisation_that_the_base_does_not_determine_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    """Two equal singular values at the edge: which of their directions was taken, no one can tell."""
    shutil.copytree(tiny_base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.linalg.qr(torch.randn(FULL, FULL)).Q.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    trained = train(tmp_path / "adapter", tmp_path / "base", init_lora_weights="pissa")
    hint = refused(UnsupportedAdapter, "layers.1.self_attn.q_proj", trained.path, tmp_path, base=str(tmp_path / "base"))
    assert "--initial" in hint


def test_a_module_whose_change_reaches_further_is_refused(tmp_path: Path, gpt2: Path) -> None:
    tied = make_base(tmp_path / "tied", "llama-tied")
    head = make_adapter(tmp_path / "head", tied, targets=("lm_head",), rank=4)
    edit(head, init_lora_weights="pissa")
    refused(UnsupportedAdapter, "tied to model.embed_tokens", head, tmp_path, base=str(tied))
    conv1d = make_adapter(tmp_path / "conv1d", gpt2, targets=("c_attn",), rank=4, fan_in_fan_out=True)
    edit(conv1d, init_lora_weights="olora")
    refused(UnsupportedAdapter, "Conv1D with OLoRA", conv1d, tmp_path, base=str(gpt2))


def test_a_base_that_the_adapter_does_not_fit_is_refused(tmp_path: Path, gpt2: Path, dora: Trained) -> None:
    refused(BaseModelMismatch, "does not have", dora.path, tmp_path, base=str(gpt2))


@pytest.mark.parametrize(
    "spelt",
    [
        lambda name: re.sub(r"(lora_[AB]|lora_magnitude_vector)(\.weight)?$", r"\1.default.weight", name),
        lambda name: re.sub(r"lora_magnitude_vector$", "lora_magnitude_vector.weight", name),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"module.{name}",
        lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
    ],
    ids=["default", "weight", "no prefix", "module", "_orig_mod"],
)
def test_dora_is_read_in_every_spelling_that_a_lora_is(
    tmp_path: Path, tiny_base: Path, dora: Trained, spelt: Callable[[str], str]
) -> None:
    shutil.copytree(dora.path, tmp_path / "spelt")
    tensors = load_file(dora.path / "adapter_model.safetensors")
    save_file({spelt(name): value for name, value in tensors.items()}, tmp_path / "spelt" / "adapter_model.safetensors")
    for path, out in ((dora.path, "out"), (tmp_path / "spelt", "same")):
        convert_adapter(ConvertRequest(str(path), base=str(tiny_base), rank=3), tmp_path / out)
    written = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("out", "same")]
    assert written[0] == written[1]


def test_a_magnitude_in_two_spellings_is_refused(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    shutil.copytree(dora.path, tmp_path / "twice")
    tensors = load_file(dora.path / "adapter_model.safetensors")
    save_file(tensors | {f"{key}.weight": torch.ones(32)}, tmp_path / "twice" / "adapter_model.safetensors")
    refused(MalformedAdapter, "two spellings", tmp_path / "twice", tmp_path, base=str(tiny_base), rank=3)


def test_damaged_magnitudes_are_refused(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors = load_file(dora.path / "adapter_model.safetensors")
    for name, change in (
        ("does not have both", {k: v for k, v in tensors.items() if k != key}),
        (r"magnitude \(31,\) for 32 outputs", tensors | {key: torch.ones(31)}),
        ("not a matrix", tensors | {key.replace("magnitude_vector", "A.weight"): torch.ones(4)}),
        ("infinite or not a number", tensors | {key: torch.full((32,), float("nan"))}),
        ("has a magnitude", tensors | {key: torch.ones(1, 32, 1)}),
    ):
        folder = tmp_path / f"odd-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(dora.path, folder)
        save_file(change, folder / "adapter_model.safetensors")
        refused(MalformedAdapter, name, folder, tmp_path, base=str(tiny_base), rank=3)


def test_a_copy_of_the_base_inside_the_adapter_has_to_follow_from_the_base(tmp_path: Path, tiny_base: Path) -> None:
    """PEFT writes the embedding's matrix beside DoRA's factors, and the head's, less what PiSSA took of it."""
    base = load_file(tiny_base / "model.safetensors")
    for target, config, own in (
        ("embed_tokens", {"use_dora": True}, "model.embed_tokens"),
        ("lm_head", {"init_lora_weights": "pissa"}, "lm_head"),
    ):
        trained = train(tmp_path / target, tiny_base, targets=(target,), **config)
        path = trained.path / "adapter_model.safetensors"
        tensors, weight = load_file(path), base[f"{own}.weight"]
        kept = weight
        if target == "lm_head":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            kept = weight - (u[:, :4] * s[:4]) @ vh[:4]
        save_file(tensors | {f"base_model.model.{own}.base_layer.weight": kept.contiguous()}, path)
        convert_adapter(ConvertRequest(str(trained.path), base=str(tiny_base), rank=8), tmp_path / f"{target}-out")
        save_file(tensors | {f"base_model.model.{own}.base_layer.weight": kept + 0.01}, path)
        refused(BaseModelMismatch, "its own matrix", trained.path, tmp_path, base=str(tiny_base), rank=8)
