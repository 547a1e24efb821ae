"""Adapters go by the base's names: those of other versions of transformers, of a model around the text model, and of
the text model inside another one. The factors of experts in the orders of unsloth and of older PEFT are read as they
were trained, and what a config leaves open is named and tried."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.compatible import inspect_adapters
from loracli.adapters.kinds import BaseModule, ModuleKind
from loracli.adapters.names import BasePlace
from loracli.adapters.on_base import by_base_names, named_apart, older_places, open_orders, read_places, recorded_places
from loracli.calibration.records import parse_sources, read_records
from loracli.calibration.render import render_file
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings
from loracli.composition.base_table import table_of_adapters
from loracli.errors import BaseModelMismatch
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.model.base import BaseReference, on_base
from loracli.recipe.recipe import load_recipe
from loracli.verifying.verify import verify_directory
from tests.heard import Heard
from tests.mixtures import BOTH, EXPERTS, expert_layers, load, peft_deltas
from tests.test_whole_way import assert_whole_way, fit_case, nats_of_peft
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

WEIGHTS = "adapter_model.safetensors"
SPELLINGS = {
    "new": ("model.layers", "model.language_model.layers"),
    "old": ("model.layers", "language_model.model.layers"),
}


def moved_inside(peft: Path, folder: Path, how: str, *, beside: bool = False) -> Path:
    """The same numbers by the names of a model around the text model; `beside`: with a module of another part."""
    folder.mkdir()
    tensors = load_file(peft / WEIGHTS)
    inside = {name.replace(*SPELLINGS[how]): tensor for name, tensor in tensors.items()}
    if beside:
        A, B = (next(t for n, t in sorted(tensors.items()) if part in n) for part in ("lora_A", "lora_B"))
        name = "base_model.model.model.visual.blocks.0.q_proj"
        inside |= {f"{name}.lora_A.weight": A.clone(), f"{name}.lora_B.weight": B.clone()}
    save_file(inside, folder / WEIGHTS)
    (folder / "adapter_config.json").write_bytes((peft / "adapter_config.json").read_bytes())
    return folder


@pytest.mark.parametrize("how", SPELLINGS)
def test_they_go_the_whole_way_beside_one_of_the_text_model(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], how: str
) -> None:
    inside = moved_inside(two_adapters[0], tmp_path / "inside", how)
    recipe = fit_case(tmp_path, tiny_base, [inside, two_adapters[1]])
    assert all("language_model" not in name for name in recipe.mixing.weights)
    assert_whole_way(tmp_path, tiny_base, recipe, list(two_adapters))


def test_a_method_and_a_comparison_see_the_same(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    names = [str(moved_inside(two_adapters[0], tmp_path / "inside", "new")), str(two_adapters[1])]
    write_jsonl(tmp_path / "val.jsonl", random_records(24))
    write_jsonl(tmp_path / "test.jsonl", random_records(20, seed=1))
    export_adapter(ExportRequest(method="sum", adapters=names, base=str(tiny_base)), tmp_path / "sum")
    found = compare_adapters(
        tmp_path / "test.jsonl", adapters=names, base=str(tiny_base), settings=CompareSettings(("sum",))
    )
    rows = {row.name: row.nats_per_token for row in found.rows}
    for row, witness in ((names[0], two_adapters[0]), ("sum", tmp_path / "sum")):
        assert rows[row] == pytest.approx(nats_of_peft(tiny_base, witness, tmp_path / "test.jsonl"), rel=2e-5)


def test_without_every_module_in_the_base_nothing_is_renamed(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    inside = moved_inside(two_adapters[0], tmp_path / "inside", "new", beside=True)
    with pytest.raises(BaseModelMismatch, match="language_model"):
        fit_case(tmp_path, tiny_base, [inside])


def table_of(names: Iterable[str], kind: ModuleKind = "linear", experts: int = 0) -> dict[str, BaseModule]:
    return {name: BaseModule(name, kind, 32, 32, experts) for name in names}


def test_a_base_that_has_them_keeps_them(tmp_path: Path, two_adapters: tuple[Path, Path]) -> None:
    """By a recipe from before names were kept: then its table of the base tells."""
    adapter = read_adapter(str(moved_inside(two_adapters[0], tmp_path / "inside", "new")))
    own = set(adapter.modules)
    plain = {name.replace("language_model.", "") for name in own}
    for base in (own, own | plain, set[str]()):
        assert by_base_names(adapter, older_places(adapter, table_of(base)), table_of(base)) is adapter
    named = by_base_names(adapter, older_places(adapter, table_of(plain)), table_of(plain))
    assert set(named.modules) == plain


def test_saved_modules_and_copies_go_by_the_same_names(tmp_path: Path, tiny_base: Path) -> None:
    peft = make_adapter(tmp_path / "a", tiny_base, targets=("embed_tokens",), modules_to_save=["layers.0.mlp"])
    tensors = load_file(peft / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = load_file(tiny_base / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    save_file({n.replace("base_model.model.model.", "base_model.model.model.language_model."): t
               for n, t in tensors.items()}, peft / WEIGHTS)  # fmt: skip
    base = table_of(["model.embed_tokens"], "embedding")
    adapter = read_adapter(str(peft))
    found = by_base_names(adapter, older_places(adapter, base), base)
    assert list(found.modules) == list(found.base_copies) == ["model.embed_tokens"]
    assert list(found.saved) == ["model.layers.0.mlp"]
    assert all(path.startswith("model.layers.0.mlp.") for path in found.saved["model.layers.0.mlp"])
    assert json.loads((peft / "adapter_config.json").read_text())["modules_to_save"] == ["layers.0.mlp"]


def test_a_saved_module_goes_by_the_bases_name_where_nothing_else_has_another(tmp_path: Path, tiny_base: Path) -> None:
    adapter = read_adapter(str(make_adapter(tmp_path / "a", tiny_base, modules_to_save=["layers.0.mlp"])))
    [owner] = adapter.saved
    found = by_base_names(adapter, {owner: BasePlace("model.language_model.layers.0.mlp")}, {})
    assert list(found.modules) == list(adapter.modules)
    assert list(found.saved) == ["model.language_model.layers.0.mlp"]
    assert sorted(found.saved["model.language_model.layers.0.mlp"]) == [
        path.replace("model.", "model.language_model.", 1) for path in sorted(adapter.saved[owner])
    ]


class Gemma:
    """A model of text and images, an adapter of its text model under three names, and stock PEFT's own of it."""

    def __init__(self, folder: Path) -> None:
        self.base = make_base(folder / "base", "gemma3-vision")
        targets = r".*language_model.*\.(q_proj|v_proj)"
        self.new, self.other, self.twin = (folder / name for name in ("new", "other", "twin"))
        for seed, path in enumerate((self.new, self.other)):
            make_adapter(path, self.base, targets=targets, seed=seed)
        self.old = self.respelt(self.other, folder / "old", "language_model.model.")
        self.text = self.respelt(self.other, folder / "text", "model.")

    @staticmethod
    def respelt(peft: Path, folder: Path, front: str) -> Path:
        """As transformers before 4.52 had the names, or as the text model has them alone."""
        folder.mkdir()
        tensors = load_file(peft / WEIGHTS)
        save_file({n.replace("model.model.language_model.", f"model.{front}"): t for n, t in tensors.items()},
                  folder / WEIGHTS)  # fmt: skip
        config = json.loads((peft / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
        return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Gemma:
    return Gemma(tmp_path_factory.mktemp("gemma"))


@pytest.mark.parametrize("how", ["old", "text"])
def test_names_of_other_versions_and_of_the_text_model_alone_go_the_whole_way(
    tmp_path: Path, gemma: Gemma, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The witness is stock PEFT with the adapter by today's names; a recipe holds what the base calls otherwise."""
    monkeypatch.chdir(tmp_path)  # which local adapters are named from
    other: Path = getattr(gemma, how)
    recipe = fit_case(tmp_path, gemma.base, [gemma.new, other])
    assert_whole_way(tmp_path, gemma.base, recipe, [gemma.new, gemma.other])
    recipe.save(tmp_path / "recipe.json")
    front = {"old": "language_model.model", "text": "model"}[how]
    loaded = load_recipe(tmp_path / "recipe.json")
    assert loaded.adapters == recipe.adapters and loaded.adapters[0].renamed is None
    assert {name: place.base for name, place in (loaded.adapters[1].renamed or {}).items()} == {
        f"{front}.layers.*.self_attn.{leaf}": f"model.language_model.layers.*.self_attn.{leaf}"
        for leaf in ("q_proj", "v_proj")
    }
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "again")
    fuse_model(FuseRequest(str(tmp_path / "recipe.json"), base=str(gemma.base)), tmp_path / "fused")
    for made in ("again", "fused"):
        verify_directory(tmp_path / made, recipe=tmp_path / "recipe.json", base=str(gemma.base))


def test_stock_peft_runs_the_old_names_as_a_fusion_has_them(tmp_path: Path, gemma: Gemma) -> None:
    fuse_model(FuseRequest(str(gemma.old), base=str(gemma.base)), tmp_path / "fused")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the vision tower's modules, which the list names too
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gemma.base), str(gemma.old)).eval()
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert torch.allclose(logits(fused), logits(theirs), rtol=0, atol=1e-4)
    assert not torch.allclose(logits(fused), logits(AutoModelForCausalLM.from_pretrained(gemma.base)), atol=1e-2)


def test_adapters_that_name_the_same_layers_differently_need_the_base(tmp_path: Path, gemma: Gemma) -> None:
    """Without it they would be composed side by side, into a file in which PEFT finds one module twice."""
    names = [str(gemma.other), str(gemma.text)]
    export_adapter(ExportRequest(method="sum", adapters=names, base=str(gemma.base)), tmp_path / "sum")
    adapters = [read_adapter(name) for name in names]
    assert named_apart(adapters) and not named_apart(adapters[:1]) and table_of_adapters(adapters) is None
    found = read_adapter(str(tmp_path / "sum")).modules
    for name, module in adapters[0].modules.items():
        assert torch.allclose(found[name].factors.delta_weight(), 2 * module.factors.delta_weight(), atol=1e-6)
    assert found.keys() == adapters[0].modules.keys()


@pytest.mark.parametrize(
    ("fronts", "apart"),
    [
        ({"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}, True),
        ({"model.language_model.": "language_model.model."}, True),
        ({"model.vision_tower.": "vision_tower."}, True),
        ({"model.language_model.": "model.decoder.", "model.vision_tower.encoder.": "model.encoder."}, True),
        ({"model.language_model.": "model.decoder."}, False),
        ({}, False),
    ],
    ids=["both", "text", "tower", "an encoder", "a decoder", "none"],
)
def test_each_stack_of_layers_is_held_against_those_of_its_own_part(
    tmp_path: Path, gemma: Gemma, fronts: dict[str, str], apart: bool
) -> None:
    """A tower with an encoder beside the text model says nothing of the text model's names."""
    paths = [make_adapter(tmp_path / name, gemma.base, seed=i) for i, name in enumerate("ab")]
    tensors = load_file(paths[1] / WEIGHTS)
    for front, other in fronts.items():
        tensors = {name.replace(f"model.{front}", f"model.{other}"): tensor for name, tensor in tensors.items()}
    save_file(tensors, paths[1] / WEIGHTS)
    adapters = [read_adapter(str(path)) for path in paths]
    assert named_apart(adapters) is named_apart(adapters[::-1]) is apart
    assert (table_of_adapters(adapters) is None) is apart


def test_a_layer_that_is_named_twice_is_refused(tmp_path: Path, gemma: Gemma) -> None:
    both = tmp_path / "both"
    both.mkdir()
    save_file(load_file(gemma.old / WEIGHTS) | load_file(gemma.other / WEIGHTS), both / WEIGHTS)
    (both / "adapter_config.json").write_bytes((gemma.old / "adapter_config.json").read_bytes())
    with pytest.raises(BaseModelMismatch, match=r"adapts model\.language_model\..* twice, once as "):
        fuse_model(FuseRequest(str(both), base=str(gemma.base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_are_kept_for_all_layers_at_once_or_each_by_itself() -> None:
    experts = {
        f"m.layers.{i}.experts.{e}.w{w}": BasePlace(f"n.layers.{i}.mlp.experts.up", e, int(w == 3), 2)
        for i in range(3)
        for e in range(4)
        for w in (1, 3)
    }
    turned = {f"m.layers.{i}.experts.down": BasePlace(f"m.layers.{i}.experts.down", turned=True) for i in range(3)}
    shifted = {f"q.{i}": BasePlace(f"layers.{i + 1}.q") for i in range(3)}
    for places, entries in ((experts | turned, 3), (shifted, 3), (shifted | experts, 3 + 2)):
        recorded = recorded_places(places)
        assert len(recorded) == entries and read_places(recorded, [*places, "lm_head"]) == places
    assert read_places(recorded_places(experts), ["m.layers.7.experts.2.w3"]) == {
        "m.layers.7.experts.2.w3": BasePlace("n.layers.7.mlp.experts.up", 2, 1, 2)
    }


def test_a_recipe_from_before_places_were_kept_is_read_as_ever(tmp_path: Path) -> None:
    """Its table names the base's parameters, not how many experts they have; layers go there by their last names."""
    parts = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}
    adapter = read_adapter(str(expert_layers(tmp_path / "a", parts, "block_sparse_moe.experts")))
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    base = {name: BaseModule(name, "experts", 32, 96) if "up" in name else BaseModule(name, "experts", 48, 32)
            for name in names}  # fmt: skip
    found = by_base_names(adapter, older_places(adapter, base), base)
    assert sorted(found.targets) == sorted(names) and all(len(modules) == 4 for modules in found.targets.values())
    gate_up = found.modules["model.layers.1.mlp.experts.gate_up_proj[2]"].factors.delta_weight()
    layers = [adapter.modules[f"model.layers.1.block_sparse_moe.experts.2.{w}"].factors for w in ("w1", "w3")]
    assert torch.allclose(gate_up, torch.cat([layer.delta_weight() for layer in layers]))


RANK = 3
UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}


def rewritten(peft: Path, folder: Path, *, grouped: bool = False, turned: bool = False, **fields: object) -> Path:
    """The same updates with lora_B expert after expert, or with lora_A and lora_B the other way round."""
    tensors = load_file(peft / "adapter_model.safetensors")
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        A = tensors[name].view(EXPERTS, RANK, -1)
        B = tensors[other].view(-1, RANK, EXPERTS).permute(2, 0, 1)  # (E, out, r)
        if turned:
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        order = (1, 0, 2) if grouped else (1, 2, 0)
        tensors[name], tensors[other] = A.flatten(0, 1).contiguous(), B.permute(order).flatten(1).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {**json.loads((peft / "adapter_config.json").read_text()), **fields}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def trained(base: Path, adapter: Path, data: Path) -> Path:
    """The adapter after a few steps of stock PEFT on the records."""
    (source,) = parse_sources(data)
    examples = render_file(read_records(source), AutoTokenizer.from_pretrained(base), max_length=256).examples
    model = PeftModel.from_pretrained(load(base), str(adapter), is_trainable=True)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        for example in examples[:8]:
            ids = torch.tensor([example.input_ids])
            optimiser.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    return adapter


def assert_same(adapter: LoraAdapter, deltas: dict[str, Tensor], *, transposed: bool = False) -> None:
    for name, delta in deltas.items():
        if delta.dim() < 3:
            continue
        own = torch.stack([module.factors.delta_weight() for module in adapter.targets[name]])
        assert torch.allclose(own, delta.mT if transposed else delta, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("kind", "how", "fields"),
    [
        ("qwen3-moe", {"grouped": True}, {"lora_B_layout": "grouped_by_expert"}),
        ("qwen3-moe", {}, {"lora_B_layout": "rank_major", **UNSLOTH}),
        ("qwen3-moe", {"turned": True}, {"peft_version": "0.18.1"}),
        ("qwen3-moe", {"turned": True}, {"peft_version": None}),
        ("qwen3-moe", {"turned": True, "grouped": True}, {"lora_B_layout": "grouped_by_expert"}),
        ("square-moe", {"turned": True}, {"peft_version": "0.19.0"}),
        ("square-moe", {}, {"peft_version": "0.21.1.dev0"}),
        ("gpt-oss", {}, {"peft_version": "0.18.1"}),
        ("gpt-oss", {"turned": True}, {"peft_version": "0.19.1"}),
    ],
    ids=str,
)
def test_a_known_order_is_honoured_wherever_the_adapter_goes(
    tmp_path: Path, kind: str, how: dict[str, bool], fields: dict[str, object]
) -> None:
    """What is exported is in the order of today's PEFT, which loads it with the updates that were trained."""
    base = make_base(tmp_path / "base", kind)
    peft = make_adapter(tmp_path / "peft", base, targets=("q_proj",), parameters=BOTH, rank=RANK)
    path, deltas = rewritten(peft, tmp_path / "a", **how, **fields), peft_deltas(peft, base)
    if how.get("turned") and not how.get("grouped") and kind != "gpt-oss":  # by PEFT 0.18's own formula
        tensors = load_file(path / "adapter_model.safetensors")
        name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
        A, B = (tensors[name.format(side)].double() for side in "AB")
        found = torch.einsum("ore,eri->eio", B.view(len(B), -1, EXPERTS), A.view(EXPERTS, -1, A.shape[1]))
        assert torch.allclose(2 * found * 4 / RANK, deltas["model.layers.0.mlp.experts.down_proj"], atol=1e-6)
    (adapter,) = on_base([read_adapter(str(path))], BaseReference("x", base, None))
    assert_same(adapter, deltas, transposed=kind == "gpt-oss")
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    settings = FitSettings(passes=2, holdout=0.4, control="none")
    recipe = fit_mixing([str(path)], data, base=str(base), settings=settings)
    recipe.save(tmp_path / "recipe.json")
    export_adapter(ExportRequest(tmp_path / "recipe.json"), tmp_path / "fitted")
    export_adapter(ExportRequest(method="sum", adapters=[str(path)], base=str(base)), tmp_path / "sum")
    fitted, summed = (peft_deltas(tmp_path / made, base) for made in ("fitted", "sum"))
    for name, delta in deltas.items():
        weight = recipe.weights_of(name)[0]
        assert weight is not None
        assert torch.allclose(summed[name], delta, rtol=0, atol=1e-6)
        assert torch.allclose(fitted[name], weight * delta, rtol=0, atol=1e-6)
    verify_directory(tmp_path / "fitted", recipe=tmp_path / "recipe.json", base=str(base))
    verify_directory(tmp_path / "sum", adapters=[str(path)], base=str(base))
    assert open_orders(read_adapter(str(tmp_path / "sum"))) == ()


def test_orders_of_several_versions_go_together(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3-moe")
    one, two = (make_adapter(tmp_path / str(i), base, targets=(), parameters=BOTH, rank=RANK, seed=i) for i in (1, 2))
    old = rewritten(two, tmp_path / "old", turned=True, peft_version="0.18.0")
    assert inspect_adapters([str(one), str(old)]).problems == ()
    export_adapter(ExportRequest(method="sum", adapters=[str(one), str(old)], base=str(base)), tmp_path / "sum")
    expected = [peft_deltas(path, base) for path in (one, two)]
    for name, delta in peft_deltas(tmp_path / "sum", base).items():
        assert torch.allclose(delta, expected[0][name] + expected[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "fields", "written", "likelier"),
    [
        ({"grouped": True}, UNSLOTH, "lora_B_layout", "grouped_by_expert"),
        ({}, UNSLOTH, "lora_B_layout", "rank_major"),
        ({"turned": True}, {"peft_version": None}, "peft_version", "0.17.0"),
        ({}, {"peft_version": None}, "peft_version", "0.20.0"),
    ],
    ids=["grouped", "rank-major", "older", "newer"],
)
def test_an_open_order_is_named_and_the_likelier_one_is_said(
    tmp_path: Path, how: dict[str, bool], fields: dict[str, object], written: str, likelier: str
) -> None:
    """The adapter is trained on the records, so that the order of its training costs least there. What is advised
    settles it."""
    base = make_base(tmp_path / "base", "square-moe")
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    peft = trained(base, make_adapter(tmp_path / "peft", base, targets=(), parameters=BOTH, rank=RANK, size=0.1), data)
    path = rewritten(peft, tmp_path / "a", **how, **fields)
    said = Heard()
    inspect_adapters([str(path)], progress=said)
    assert f'write "{written}": ' in said.warnings[0] and "read as PEFT reads them" in said.warnings[0]
    for run in ("fit", "compare"):
        said = Heard()
        if run == "fit":
            few = FitSettings(mixing="adapter", passes=2, holdout=0.4, control="none")
            fit_mixing([str(path)], data, base=str(base), settings=few, progress=said)
        else:
            settings = CompareSettings(("sum",))
            compare_adapters(data, adapters=[str(path)], base=str(base), settings=settings, progress=said)
        (told,) = [warning for warning in said.warnings if "is likelier" in warning]
        assert f'"{likelier}" is likelier; write it into its adapter_config.json' in told
    settled = rewritten(peft, tmp_path / "b", **how, **{**fields, written: likelier})
    assert open_orders(read_adapter(str(settled))) == ()
    (adapter,) = on_base([read_adapter(str(settled))], BaseReference("x", base, None))
    assert_same(adapter, peft_deltas(peft, base))
