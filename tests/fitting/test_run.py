"""A whole fit from files: what is recorded, that it repeats, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.cli._tables import weights_text
from loracli.errors import (
    BaseModelMismatch,
    CalibrationError,
    IncompatibleAdapters,
    InputError,
    NonFiniteLoss,
    UsageError,
)
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.placement import Placement
from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import INLINE_KINDS, MIXING_KINDS
from tests.heard import Heard
from tests.tiny import BASE_ID, make_adapter, make_base, make_tokenizer, random_records, write_jsonl

QUICK = FitSettings(passes=3)
FEW = replace(QUICK, control="none")  # of fits where the control does not matter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "val.jsonl", random_records(50))


@pytest.fixture
def shallow(shallow_base: Path, two_shallow_adapters: tuple[Path, Path]) -> tuple[str, list[str]]:
    """A base of one layer, and two adapters on it."""
    return str(shallow_base), references(two_shallow_adapters)


def references(paths: tuple[Path, ...]) -> list[str]:
    return [str(path) for path in paths]


def test_two_fits_give_the_same_recipe_to_the_byte(tmp_path: Path, shallow: tuple[str, list[str]], data: Path) -> None:
    base, adapters = shallow
    for name in ("one.json", "two.json"):
        fit_mixing(adapters, data, base=base, settings=QUICK).save(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_the_recipe_tells_what_was_fitted_and_scores_every_method_on_the_held_out_records(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    recipe = fit_mixing(references(two_adapters), data, base=str(tiny_base), settings=QUICK)
    recipe.save(tmp_path / "recipe.json")
    loaded = load_recipe(tmp_path / "recipe.json")
    assert loaded.base.id == BASE_ID
    assert (loaded.held_out.records, loaded.data[0].records, loaded.held_out.parts) == (50, 50, 4)
    names = [row.name for row in loaded.held_out.rows]
    assert names == ["base", *(a.reference for a in loaded.adapters), "uniform", "sum", "fit"]
    assert loaded.weights_of("model.layers.0.mlp.up_proj")[1] is None
    assert {m.name for m in loaded.modules} >= {f"model.layers.{i}.self_attn.o_proj" for i in range(3)}
    assert loaded.fit.passes <= 3 * loaded.fit.folds == 12
    assert str(tmp_path) not in (tmp_path / "recipe.json").read_text()


@pytest.mark.parametrize("kind", MIXING_KINDS)
def test_the_losses_of_the_fit_are_those_of_the_exported_adapter_in_peft(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], kind: str
) -> None:
    """Held-out and training loss, of every level, through the recipe as it is on disk; five records are fitted on
    without a choice. Where there is a certificate the training loss is from it, under a ridge that is not zero."""
    from peft import PeftModel

    held = write_jsonl(tmp_path / "test.jsonl", random_records(25, seed=9))
    few = write_jsonl(tmp_path / "few.jsonl", random_records(5))
    settings = FitSettings(mixing=kind, passes=8, control="none")
    recipe = fit_mixing(references(two_adapters), few, eval_data=held, base=str(tiny_base), settings=settings)
    assert recipe.mixing.kind == kind and (recipe.fit.largest_move > 0 or kind == "adapter")
    certificate = recipe.fit.certificate
    assert (certificate is not None) == (kind in INLINE_KINDS)
    assert kind not in ("layer", "module") or certificate.ridge > 0
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "out").eval()
    nats, tokens = _loss(model, held)
    assert tokens == recipe.held_out.scored_tokens
    assert abs(recipe.held_out.row("fit").nats_per_token - nats / tokens) < 1e-4
    nats, tokens = _loss(model, few)
    assert abs(recipe.fit.training_nats_per_token - nats / tokens) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_certificate_of_a_coarse_dtype_says_how_rough_its_loss_is(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], dtype: str
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", random_records(5))
    settings = FitSettings(mixing="module", passes=8, control="none")
    recipe = fit_mixing(
        references(two_adapters), few, base=str(tiny_base), settings=settings, placement=Placement(dtype=dtype)
    )
    recipe.save(tmp_path / "recipe.json")
    noise = load_recipe(tmp_path / "recipe.json").fit.certificate.noise
    assert noise is None if dtype == "float32" else 1e-6 < noise < 1e-2


@pytest.mark.parametrize(
    ("size", "rate", "chosen"), [(1e-4, None, "nothing"), (0.05, 0.1, "half of each"), (0.3, None, "core")]
)
def test_auto_ends_with_a_new_lora_or_half_of_one_where_the_adapters_are_of_little_use(
    tmp_path: Path, shallow_base: Path, size: float, rate: float | None, chosen: str
) -> None:
    """Adapters that change next to nothing, and all answers alike; with others of a usual size it starts from them.
    At a rate that is far too high half of each is better than both."""
    from peft import PeftModel

    adapters = [make_adapter(tmp_path / name, shallow_base, seed=seed, size=size) for seed, name in enumerate("ab")]
    data = write_jsonl(tmp_path / "val.jsonl", [record | {"completion": "bcd"} for record in random_records(16)])
    held = write_jsonl(tmp_path / "test.jsonl", [r | {"completion": "bcd"} for r in random_records(20, seed=9)])
    settings = FitSettings(mixing="auto", cv=2, control="none", learning_rate=rate)
    recipe = fit_mixing(
        [str(path) for path in adapters], data, eval_data=held, base=str(shallow_base), settings=settings
    )
    assert recipe.mixing.kind == "factors" and recipe.fit.rungs[-1].chosen == chosen
    below, *others = recipe.fit.rungs[-1].starts
    assert [start.name for start in others] == ["nothing", "half of each"]
    assert recipe.held_out.row("fit").nats_per_token < recipe.held_out.row("base").nats_per_token - 0.1
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "out")
    said, carded = {
        "nothing": ("a new LoRA, which has nothing of the adapters", "It is a new LoRA, trained from nothing"),
        "half of each": ("the mean of trained factors and of a new LoRA", "It is the mean of two that were trained"),
        "core": ("factors", "Its factors started from theirs"),
    }[chosen]
    assert weights_text(recipe).endswith(f" ({said})") and carded in (tmp_path / "out/README.md").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shallow_base), tmp_path / "out").eval()
    nats, tokens = _loss(model, held)
    assert abs(recipe.held_out.row("fit").nats_per_token - nats / tokens) < 1e-4


def _loss(model: torch.nn.Module, path: Path) -> tuple[float, int]:
    """Nats of the completions, with the end of sequence, and how many tokens these are."""
    nats, tokens = 0.0, 0
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt, target = ([3 + b for b in _byte_ranks(record[key])] for key in ("prompt", "completion"))
        ids = [1, *prompt, *target, 2]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        for place in range(1 + len(prompt), len(ids)):
            nats, tokens = nats - float(log_p[place - 1, ids[place]]), tokens + 1
    return nats, tokens


def _byte_ranks(text: str) -> list[int]:
    """Token numbers of letters in the tiny tokenizer, less its three special tokens."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letters.index(letter) for letter in text]


@pytest.mark.parametrize("kind", ["adapter", "layer"])
def test_coarser_mixings_share_their_weights(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path, kind: str
) -> None:
    settings = replace(FEW, mixing=kind, holdout=0.4)
    recipe = fit_mixing(references(two_adapters), data, base=str(tiny_base), settings=settings)
    groups = {"adapter": ["*"], "layer": [f"model.layers.{i}" for i in range(3)]}[kind]
    assert list(recipe.mixing.weights) == groups
    export_adapter(ExportRequest(recipe), tmp_path / "out")


def test_one_adapter_alone_can_be_fitted(shallow: tuple[str, list[str]], data: Path) -> None:
    base, adapters = shallow
    recipe = fit_mixing(adapters[:1], data, base=base, settings=QUICK)
    assert [row.name for row in recipe.held_out.rows][2:] == ["fit"]


def test_few_records_give_a_table_and_no_verdict(tmp_path: Path, shallow: tuple[str, list[str]]) -> None:
    base, adapters = shallow
    small = write_jsonl(tmp_path / "small.jsonl", random_records(12))
    listener = Heard()
    recipe = fit_mixing(adapters, small, base=base, settings=QUICK, progress=listener)
    assert recipe.held_out.verdict == "too few records"
    assert any("too few for a verdict" in said for said in listener.said)


def test_the_published_recipe_is_recorded_with_weights_that_sum_to_one(
    tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    settings = FitSettings(paper=True, holdout=0.4, control="none")
    recipe = fit_mixing(references(two_adapters), data, base=str(tiny_base), settings=settings)
    assert recipe.fit.recipe == "paper"
    assert all(abs(sum(w for w in row if w is not None) - 1) < 1e-9 for row in recipe.mixing.weights.values())
    assert recipe.fit.largest_move <= 0.04


def test_a_base_that_does_not_fit_is_refused_by_module(
    tmp_path: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    with pytest.raises(BaseModelMismatch, match=r"model\.layers\.0\.mlp\.up_proj, which the base model does not have"):
        fit_mixing([str(two_adapters[0])], data, base=str(make_base(tmp_path / "gpt2", "gpt2")))
    wide = make_base(tmp_path / "wide", "llama")
    config = json.loads((wide / "config.json").read_text())
    config["num_key_value_heads"] = 4
    shutil.rmtree(wide)
    torch.manual_seed(0)
    from transformers import LlamaConfig

    AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(wide)
    make_base(tmp_path / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokens" / name, wide / name)
    with pytest.raises(
        BaseModelMismatch, match=r"v_proj to be \(out, in\) = \(16, 32\); the base model has \(32, 32\)"
    ):
        fit_mixing([str(two_adapters[0])], data, base=str(wide))


def test_an_embeddings_own_matrix_is_accepted_only_if_it_is_the_bases(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    path = make_adapter(tmp_path / "a", tiny_base, targets=("embed_tokens", "q_proj"))
    tensors = load_file(path / "adapter_model.safetensors")
    own = AutoModelForCausalLM.from_pretrained(tiny_base).get_input_embeddings().weight.detach()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, name: own.clone()}, path / "adapter_model.safetensors", metadata={"format": "pt"})
    recipe = fit_mixing([str(path)], data, base=str(tiny_base), settings=replace(FEW, holdout=0.4))
    export_adapter(ExportRequest(recipe), tmp_path / "out")
    assert name not in load_file(tmp_path / "out" / "adapter_model.safetensors")
    changed = own.clone()
    changed[5, 5] += 1
    save_file({**tensors, name: changed}, path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert read_adapter(str(path)).base_copies
    with pytest.raises(BaseModelMismatch, match="embed_tokens"):
        fit_mixing([str(path)], data, base=str(tiny_base))


def test_combinations_that_cannot_be_fitted_are_refused_before_the_base_is_loaded(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    first = str(two_adapters[0])
    with pytest.raises(UsageError, match="given twice"):
        prepare_fit([first, first], data, base=str(tiny_base))
    with pytest.raises(UsageError, match="at least one adapter"):
        prepare_fit([], data)
    with pytest.raises(UsageError, match="leaves nothing to score on"):
        prepare_fit([first], data, base=str(tiny_base), settings=FitSettings(holdout=0))
    with pytest.raises(InputError, match="it holds adapter_config"):
        trap = shutil.copytree(tiny_base, tmp_path / "trap")
        (trap / "adapter_config.json").write_text("{}")
        prepare_fit([first], data, base=str(trap))
    other = shutil.copytree(two_adapters[1], tmp_path / "other")
    config = other / "adapter_config.json"
    config.write_text(config.read_text().replace(BASE_ID, "other/base"))
    with pytest.raises(IncompatibleAdapters, match="different base models") as caught:
        prepare_fit([first, str(other)], data)
    assert caught.value.hint is not None and caught.value.hint.endswith("name the right base model with --base")
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": "abc"}] * 30)
    with pytest.raises(CalibrationError, match="too few to hold some out"):
        prepare_fit([first], same, base=str(tiny_base))


def test_held_out_records_that_were_calibrated_on_are_reported(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    listener = Heard()
    held = write_jsonl(tmp_path / "held.jsonl", random_records(50)[:3] + random_records(30, seed=5))
    prepare_fit(references(two_adapters), data, eval_data=held, base=str(tiny_base), progress=listener)
    assert any(f"3 records of {held} stand in the calibration data too" in said for said in listener.said)


def test_held_out_records_are_of_files_of_their_own_whatever_their_name(
    tmp_path: Path, shallow: tuple[str, list[str]], data: Path
) -> None:
    base, adapters = shallow
    (tmp_path / "test").mkdir()
    held = write_jsonl(tmp_path / "test" / data.name, random_records(24, seed=4))
    recipe = fit_mixing(adapters, data, eval_data=held, base=base, settings=replace(FEW, mixing="adapter"))
    assert recipe.held_out.name == f"test/{data.name}" and not recipe.splits_data
    with pytest.raises(UsageError, match="--holdout is a share of --data"):
        fit_mixing(adapters, data, eval_data=held, base=base, settings=replace(FEW, holdout=0.4))


def test_a_token_that_the_base_has_no_embedding_of_is_named(tmp_path: Path, shallow: tuple[str, list[str]]) -> None:
    base = shutil.copytree(shallow[0], tmp_path / "more-tokens")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(base)
    records = [*random_records(23), {"prompt": "a", "completion": "<call>b"}]
    data = write_jsonl(tmp_path / "calls.jsonl", records)
    with pytest.raises(BaseModelMismatch, match=f"{data}:24: the tokenizer's token 259, '<call>'"):
        fit_mixing(shallow[1], data, base=str(base), settings=FEW)


def test_a_base_that_lacks_weights_is_refused_instead_of_filled_with_random_ones(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatch, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        fit_mixing([str(two_adapters[0])], data, base=str(base))


def test_equal_records_many_times_over_can_still_be_fitted(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    same = write_jsonl(tmp_path / "same.jsonl", random_records(1) * 12)
    recipe = fit_mixing([str(two_adapters[0])], same, eval_data=data, base=str(tiny_base), settings=FEW)
    assert recipe.data[0].records == 12


def test_a_held_out_loss_that_is_not_finite_names_its_records(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], data: Path
) -> None:
    path = make_adapter(tmp_path / "huge", tiny_base, targets=("embed_tokens",))
    tensors = load_file(path / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    tensors[name][:, _byte_ranks("Z")[0] + 3] = 3e38  # a letter that no calibration record has
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    held = write_jsonl(tmp_path / "held.jsonl", [*random_records(24, seed=4), {"prompt": "ZZ", "completion": "ab"}])
    with pytest.raises(NonFiniteLoss, match=r"records at held\.jsonl:25$"):
        fit_mixing([str(path)], data, eval_data=held, base=str(tiny_base), settings=FEW)
