"""Modules that adapters saved whole: the policy, what the fit sees, what is written, against stock PEFT."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.adapters.compatible import inspect_adapters
from loracli.adapters.saved_modules import saved_modules, settled_policy
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings, Controls
from loracli.errors import (
    BaseModelMismatch,
    IncompatibleAdapters,
    IntegrityError,
    MalformedAdapter,
    UnsupportedAdapter,
    UsageError,
)
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.run import fit_mixing, run_fit
from loracli.fitting.settings import FitSettings
from loracli.model.placement import Placement
from loracli.recipe.recipe import load_recipe
from tests.heard import Heard
from tests.test_whole_way import assert_whole_way, fit_case, nats_of_peft
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice

WEIGHTS = "adapter_model.safetensors"


def make_saving(folder: Path, base: Path, modules: list[str], *, seed: int, **options: Any) -> Path:
    """An adapter that stock PEFT saved with these modules, all changed by training."""
    make_adapter(folder, base, seed=seed, modules_to_save=modules, **options)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(n for n in tensors if "lora_" not in n):
        tensors[name] = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    return folder


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "lora_" not in name}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base; an adapter that saved head and last norm, one that saved the head, one that saved nothing."""
    folder = tmp_path_factory.mktemp("saved")
    base = make_base(folder / "base")
    return base, [
        make_saving(folder / "first", base, ["lm_head", "model.norm"], seed=1),
        make_saving(folder / "second", base, ["lm_head"], seed=2, targets=("o_proj",)),
        make_adapter(folder / "third", base, seed=3),
    ]


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("llama", ["lm_head", "embed_tokens", "model.norm"]),
        ("llama-tied", ["lm_head"]),
        ("llama-tied", ["embed_tokens"]),
        ("qwen2", ["layers.1.mlp"]),
        ("gpt2", ["wte", "ln_f"]),
    ],
    ids=str,
)
def test_a_fit_with_one_adapters_modules_is_what_peft_runs(tmp_path: Path, kind: str, modules: list[str]) -> None:
    base = make_base(tmp_path / "base", kind)
    options: Any = {"targets": ("c_attn",), "fan_in_fan_out": True} if kind == "gpt2" else {}
    adapter = make_saving(tmp_path / "a", base, modules, seed=1, **options)
    plain = make_adapter(tmp_path / "b", base, seed=2, **options)
    saved = saved_tensors(adapter)
    assert saved and all(name.removeprefix("base_model.model.") for name in saved)
    recipe = fit_case(tmp_path, base, [adapter, plain], modules_to_save="pick:a")
    assert recipe.fit.settings["modules_to_save"] == "pick:#1"
    data = tmp_path / "test.jsonl"
    # The first alone is what PEFT runs with all of its file.
    alone = recipe.held_out.row(recipe.adapters[0].reference).nats_per_token
    assert alone == pytest.approx(nats_of_peft(base, adapter, data), rel=2e-5)
    export_adapter(ExportRequest(recipe), tmp_path / "out")
    fitted = recipe.held_out.row("fit").nats_per_token
    assert fitted == pytest.approx(nats_of_peft(base, tmp_path / "out", data), rel=2e-5)
    written = saved_tensors(tmp_path / "out")
    assert written.keys() == saved.keys() and all(torch.equal(written[n], saved[n]) for n in saved)
    # The modules matter: without them the loss is another.
    tensors = {name: t for name, t in load_file(adapter / WEIGHTS).items() if "lora_" in name}
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(tensors, bare / WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (bare / "adapter_config.json").write_text(json.dumps(config))
    assert abs(nats_of_peft(base, bare, data) - alone) > 1e-3


def test_the_average_is_the_mean_of_those_who_saved_it(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    recipe = fit_case(tmp_path, base, paths, modules_to_save="average")
    recipe.save(tmp_path / "recipe.json")
    recipe = load_recipe(tmp_path / "recipe.json")
    assert recipe.fit.settings["modules_to_save"] == "average"
    exported = export_adapter(ExportRequest(recipe, merge=True, rank=8), tmp_path / "out")
    first, second, written = (saved_tensors(path) for path in (paths[0], paths[1], tmp_path / "out"))
    head, norm = "base_model.model.lm_head.weight", "base_model.model.model.norm.weight"
    assert written.keys() == {head, norm}
    assert torch.equal(written[head], ((first[head].double() + second[head].double()) / 2).float())
    assert torch.equal(written[norm], first[norm])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.norm"]
    assert exported.layout.profile == "peft" and "lm_head" in str(exported.layout.reason)
    assert "Only PEFT reads" in (tmp_path / "out" / "README.md").read_text()
    fitted = recipe.held_out.row("fit").nats_per_token
    assert fitted == pytest.approx(nats_of_peft(base, tmp_path / "out", tmp_path / "test.jsonl"), rel=2e-5)
    with pytest.raises(UsageError, match="modules_to_save"):
        export_adapter(ExportRequest(recipe, profile="portable"), tmp_path / "other")
    again = read_adapter(str(tmp_path / "out"))  # what we write, we read
    assert list(again.saved) == ["lm_head", "model.norm"]


def test_a_recipe_goes_on_picking_the_same_adapter_where_it_has_moved(
    tmp_path: Path, made: tuple[Path, list[Path]]
) -> None:
    base, paths = made
    recipe = fit_case(tmp_path, base, paths, modules_to_save="pick:second", control=None)
    (tmp_path / "elsewhere").mkdir()
    recipe.save(tmp_path / "elsewhere" / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "elsewhere" / "recipe.json"), tmp_path / "out")
    written, theirs = saved_tensors(tmp_path / "out"), saved_tensors(paths[1])
    assert written.keys() == theirs.keys() == {"base_model.model.lm_head.weight"}
    assert torch.equal(written["base_model.model.lm_head.weight"], theirs["base_model.model.lm_head.weight"])


@pytest.mark.parametrize("name", ["#2", "second"])
def test_an_adapter_is_picked_by_its_place_or_name(made: tuple[Path, list[Path]], name: str) -> None:
    adapters = [read_adapter(str(path)) for path in made[1]]
    names = [f"../x/{path.name}" for path in made[1]]
    assert settled_policy(f"pick:{name}", adapters, names) == "pick:#2"
    assert settled_policy(f"pick:{names[1]}", adapters, names) == "pick:#2"
    assert settled_policy(f"pick:{adapters[1].reference}", adapters, names) == "pick:#2"


def test_what_a_picked_adapter_has_not_is_left_out_and_said(made: tuple[Path, list[Path]]) -> None:
    listener = Heard()
    found = saved_modules("pick:second", [read_adapter(str(path)) for path in made[1]], progress=listener)
    assert found is not None and found.modules == ("lm_head",)
    assert len(listener.said) == 1 and "first" in listener.said[0] and "model.norm" in listener.said[0]


def test_inspect_tells_of_them(made: tuple[Path, list[Path]]) -> None:
    found = inspect_adapters([str(path) for path in made[1]])
    assert [a.modules_to_save for a in found.adapters] == [("lm_head", "model.norm"), ("lm_head",), ()]
    assert found.problems == ()


def test_a_method_and_a_comparison_follow_the_policy(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    names = [str(path) for path in paths]
    with pytest.raises(UnsupportedAdapter, match="modules_to_save"):
        export_adapter(ExportRequest(method="sum", adapters=names), tmp_path / "no")
    export_adapter(ExportRequest(method="ties", adapters=names, modules_to_save="pick:#2"), tmp_path / "ties")
    assert " --modules-to-save 'pick:#2' --adapters path/to/" in (tmp_path / "ties" / "README.md").read_text()
    head = "base_model.model.lm_head.weight"
    assert torch.equal(saved_tensors(tmp_path / "ties")[head], saved_tensors(paths[1])[head])
    data = write_jsonl(tmp_path / "test.jsonl", random_records(20))

    def compare(controls: Controls = Controls()) -> Any:  # noqa: B008
        settings = CompareSettings(("ties",), fit=FitSettings(modules_to_save="pick:second"), controls=controls)
        return compare_adapters(data, adapters=names, base=str(base), settings=settings)

    rows = {row.name: row.nats_per_token for row in compare().rows}
    for row, directory in (("ties", tmp_path / "ties"), (names[1], paths[1])):
        assert rows[row] == pytest.approx(nats_of_peft(base, directory, data), rel=2e-5)
    with pytest.raises(UsageError, match="datamix"):
        compare(Controls(datamix=names[2]))
    with pytest.raises(UnsupportedAdapter, match="modules_to_save"):
        compare_adapters(data, adapters=names, base=str(base))


def test_a_comparison_of_a_recipe_takes_the_policy_from_it(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    recipe = fit_case(tmp_path, base, paths, modules_to_save="average")
    recipe.save(tmp_path / "recipe.json")
    found = compare_adapters(
        tmp_path / "test.jsonl",
        recipe=tmp_path / "recipe.json",
        base=str(base),
        settings=CompareSettings(("sum",)),
    )
    rows = {row.name: row.nats_per_token for row in found.rows}
    for name in ("base", "sum", "fit"):
        assert rows[name] == pytest.approx(recipe.held_out.row(name).nats_per_token, rel=1e-6)


# What is refused.


def test_by_default_they_are_refused_with_the_way_out(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    with pytest.raises(UnsupportedAdapter) as caught:
        fit_case(tmp_path, base, paths)
    assert "lm_head, model.norm" in caught.value.what and "--modules-to-save" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("policy", "chosen", "said"),
    [
        ("pick:", None, "not one of"),
        ("first", None, "not one of"),
        ("pick:nobody", None, "none of the adapters"),
        ("pick:#4", None, "no adapter #4"),
        ("pick:third", None, "no modules_to_save"),
        ("average", [2], "no adapter has"),
        ("pick:third", [2], "no adapter has"),
        ("pick:first", [0, 0], "several"),
    ],
)
def test_a_policy_that_decides_nothing_is_refused(
    made: tuple[Path, list[Path]], policy: str, chosen: list[int] | None, said: str
) -> None:
    adapters = [read_adapter(str(made[1][i])) for i in chosen or range(3)]
    with pytest.raises(UsageError, match=said):
        settled_policy(policy, adapters, [a.reference for a in adapters])


def test_a_module_that_another_adapter_adapts_cannot_be_replaced(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    base, paths = made
    other = make_adapter(tmp_path / "head", base, targets=("lm_head",), seed=5)
    first, head = read_adapter(str(paths[0])), read_adapter(str(other))
    with pytest.raises(IncompatibleAdapters) as caught:
        saved_modules("average", [first, head])
    assert f"{other} adapts lm_head, which {paths[0]} replaces as one of its modules_to_save" in caught.value.what
    both = replace(head, saved=first.saved)
    with pytest.raises(IncompatibleAdapters) as caught:
        saved_modules("average", [both])
    assert f"{other} adapts lm_head, which it replaces as one of its modules_to_save" in caught.value.what


def test_modules_of_other_shapes_are_no_average_and_do_not_fit_the_base(
    tmp_path: Path, made: tuple[Path, list[Path]]
) -> None:
    """As after training with a resized vocabulary."""
    base, paths = made
    tensors = load_file(paths[1] / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.ones(261, 32)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_bytes((paths[1] / "adapter_config.json").read_bytes())
    with pytest.raises(IncompatibleAdapters, match="other tensors or shapes"):
        saved_modules("average", [read_adapter(str(paths[0])), read_adapter(str(tmp_path))])
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    with pytest.raises(BaseModelMismatch, match=r"\(261, 32\)"):
        fit_mixing([str(tmp_path)], data, base=str(base), settings=FitSettings(passes=2, modules_to_save="average"))


def rewritten(paths: list[Path], folder: Path, rename: dict[str, str], **fields: Any) -> Path:
    tensors = {rename.get(name, name): tensor for name, tensor in load_file(paths[1] / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((paths[1] / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "_orig_mod.base_model.model.lm_head.weight",
        "lm_head.weight",
    ],
)
def test_other_spellings_are_the_same_module(tmp_path: Path, made: tuple[Path, list[Path]], name: str) -> None:
    adapter = read_adapter(str(rewritten(made[1], tmp_path, {HEAD: name})))
    (tensor,) = adapter.saved["lm_head"].values()
    assert list(adapter.saved["lm_head"]) == ["lm_head.weight"]
    assert torch.equal(adapter.read_saved(tensor), saved_tensors(made[1][1])[HEAD])


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"modules_to_save": None}, UnsupportedAdapter, HEAD),
        ({"modules_to_save": ["norm"]}, UnsupportedAdapter, HEAD),
        ({"modules_to_save": "lm_head"}, MalformedAdapter, "modules_to_save"),
        ({"modules_to_save": [1]}, MalformedAdapter, "modules_to_save"),
        ({"ensure_weight_tying": True}, UnsupportedAdapter, "ensure_weight_tying"),
    ],
    ids=str,
)
def test_a_config_that_says_something_else_is_refused(
    tmp_path: Path, made: tuple[Path, list[Path]], fields: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said.replace(".", r"\.")):
        read_adapter(str(rewritten(made[1], tmp_path, {}, **fields)))


def test_tying_is_refused_before_the_tied_tensor_that_the_config_does_not_name(
    tmp_path: Path, made: tuple[Path, list[Path]]
) -> None:
    """As PEFT saves it: the tied head beside the embeddings, which alone are named."""
    folder = rewritten(made[1], tmp_path, {}, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": tensors[HEAD].clone()}, folder / WEIGHTS)
    with pytest.raises(UnsupportedAdapter, match="ensure_weight_tying is not supported"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["classifier", "score"]},  # as PEFT writes it for classification
        {"modules_to_save": ["embed_out"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_a_name_of_which_no_tensor_is_there_replaces_nothing(
    tmp_path: Path, made: tuple[Path, list[Path]], fields: dict[str, Any]
) -> None:
    """As in stock PEFT, which the plain adapter and this one give the same logits."""
    base, paths = made
    adapter = rewritten([paths[0], paths[2]], tmp_path, {}, **fields)
    read, plain = read_adapter(str(adapter)), read_adapter(str(paths[2]))
    assert read.saved == {} and settled_policy("refuse", [read], ["a"]) == "refuse"
    assert read.modules.keys() == plain.modules.keys()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`")
        models = [
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path) for path in (adapter, paths[2])
        ]
    assert torch.equal(*map(logits, models))


def test_names_of_a_classifier_beside_its_tensor_are_no_matter(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    adapter = read_adapter(str(rewritten(made[1], tmp_path, {}, modules_to_save=["lm_head", "score"])))
    assert list(adapter.saved) == ["lm_head"]


def test_stock_peft_gives_the_logits_of_the_composed_model(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    """The dense formula: the second's head, and the sum of all updates."""
    base, paths = made
    export_adapter(
        ExportRequest(method="sum", adapters=[str(p) for p in paths], modules_to_save="pick:second"), tmp_path / "sum"
    )
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    theirs = logits(PeftModel.from_pretrained(model, tmp_path / "sum").eval())
    dense = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    dense.lm_head.weight = torch.nn.Parameter(saved_tensors(paths[1])[HEAD], requires_grad=False)
    for path in paths:
        for name, module in read_adapter(str(path)).modules.items():
            dense.get_submodule(name).weight += module.factors.delta_weight().float()
    expected = logits(dense)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_whole_way_with_saved_modules_and_a_bias(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_saving(tmp_path / "a", base, ["lm_head"], seed=1, lora_bias=True)
    recipe = fit_case(tmp_path, base, [adapter], modules_to_save="pick:#1")
    assert_whole_way(tmp_path, base, recipe, [adapter])


def test_a_file_that_has_changed_since_it_was_checked_is_refused(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    adapter = read_adapter(str(rewritten(made[1], tmp_path, {})))
    found = saved_modules("average", [adapter])
    assert found is not None
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {HEAD: tensors[HEAD].half()}, tmp_path / WEIGHTS)
    with pytest.raises(IntegrityError):
        found.read("lm_head.weight")


def test_a_base_that_is_shared_out_is_refused_before_it_is_loaded(
    tmp_path: Path, made: tuple[Path, list[Path]]
) -> None:
    base, paths = made
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    settings = FitSettings(modules_to_save="average")
    inputs = prepare_fit([str(paths[0])], data, base=str(base), settings=settings)
    with pytest.raises(UsageError, match="modules_to_save"):
        run_fit(inputs, placement=Placement(shard=True))


def test_more_names_than_a_config_ever_has_are_refused(tmp_path: Path, made: tuple[Path, list[Path]]) -> None:
    with pytest.raises(MalformedAdapter, match="more than 256"):
        read_adapter(str(rewritten(made[1], tmp_path, {}, modules_to_save=["lm_head"] * 257)))
