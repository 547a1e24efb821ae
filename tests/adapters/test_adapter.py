"""An adapter directory as factors: against PEFT's own `get_delta_weight`, and what must be refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loracli.adapters.adapter import LoraAdapter, open_adapter, read_adapter, widest_dtype
from loracli.adapters.compatible import _problems_of
from loracli.adapters.saved_modules import saved_modules
from loracli.errors import InputError, IntegrityError, MalformedAdapter, UnsupportedAdapter
from tests.steps import steps

SHAPES = {"layers.0.q_proj": (6, 5), "layers.0.up_proj": (9, 5), "layers.1.q_proj": (6, 5), "layers.1.up_proj": (9, 5)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(5, 6), nn.Linear(5, 9)


class Tiny(nn.Module):
    """Two layers of two Linears of different shapes, an embedding and a Conv1D: all that PEFT needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.c_attn = Conv1D(7, 5)  # 5 in, 7 out


def save_tiny(folder: Path, *, seed: int = 0, **config: Any) -> PeftModel:
    """A PEFT model of `Tiny` with random factors, saved by PEFT itself."""
    torch.manual_seed(seed)
    model = get_peft_model(Tiny(), LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 4, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def delta_of_peft(model: PeftModel, module: str) -> Tensor:
    """What PEFT itself would add to the module's weight, as (out, in)."""
    layer = model.base_model.model.get_submodule(module)
    delta: Tensor = layer.get_delta_weight("default").detach().double()
    return delta


def assert_same_updates(adapter: LoraAdapter, model: PeftModel, shapes: dict[str, tuple[int, int]]) -> None:
    assert set(adapter.modules) == set(shapes)
    for name, shape in shapes.items():
        delta = adapter.modules[name].factors.delta_weight()
        assert delta.shape == shape
        torch.testing.assert_close(delta, delta_of_peft(model, name), rtol=1e-5, atol=1e-5)


PATTERNS = {
    "rank_pattern": {"layers.1.q_proj": 2, "up_proj": 3},
    "alpha_pattern": {"^layers.0.q_proj": 7, "up_proj": 2},
}


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 5, "r": 3},
        {"lora_alpha": 5, "use_rslora": True},
        {"lora_alpha": 8, "rank_pattern": PATTERNS["rank_pattern"]},
        {"lora_alpha": 8, "alpha_pattern": PATTERNS["alpha_pattern"]},
        {"lora_alpha": 8, **PATTERNS},
        {"lora_alpha": 8, "use_rslora": True, **PATTERNS},
        {"lora_alpha": 8, "r": 12},
    ],
    ids=str,
)
def test_every_update_is_the_one_that_peft_would_add(tmp_path: Path, config: dict[str, Any]) -> None:
    model = save_tiny(tmp_path, **config)
    assert_same_updates(read_adapter(str(tmp_path)), model, SHAPES)


def test_scaling_is_the_formula_and_factors_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    save_tiny(tmp_path, lora_alpha=8, use_rslora=True, **PATTERNS)
    adapter = read_adapter(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        "layers.0.q_proj": (4, 7 / math.sqrt(4)),
        "layers.0.up_proj": (3, 2 / math.sqrt(3)),
        "layers.1.q_proj": (2, 8 / math.sqrt(2)),
        "layers.1.up_proj": (3, 2 / math.sqrt(3)),
    }
    for name, (rank, scaling) in expected.items():
        factors = adapter.modules[name].factors
        assert (factors.rank, factors.scaling) == (rank, pytest.approx(scaling, rel=1e-15))
        assert torch.equal(factors.lora_A, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(factors.lora_B, tensors[f"base_model.model.{name}.lora_B.weight"])
    assert adapter.ranks == (2, 3, 4)


def test_conv1d_is_read_like_a_linear(tmp_path: Path) -> None:
    """PEFT stores Conv1D's factors as (r, in) and (out, r) too; its own delta is transposed to the base's (in, out)."""
    model = save_tiny(tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, lora_alpha=3)
    adapter = read_adapter(str(tmp_path))
    assert adapter.config.fan_in_fan_out and adapter.modules["c_attn"].kind == "linear"
    delta = adapter.modules["c_attn"].factors.delta_weight()
    assert delta.shape == (7, 5)
    torch.testing.assert_close(delta.T, delta_of_peft(model, "c_attn"), rtol=1e-5, atol=1e-5)


def test_embeddings_have_the_vocabulary_as_in(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, target_modules=["embed", "q_proj"], lora_alpha=6)
    adapter = read_adapter(str(tmp_path))
    assert {name: module.kind for name, module in adapter.modules.items()} == {
        "embed": "embedding",
        "layers.0.q_proj": "linear",
        "layers.1.q_proj": "linear",
    }
    factors = adapter.modules["embed"].factors
    assert (factors.in_features, factors.out_features, factors.rank, factors.scaling) == (11, 5, 4, 1.5)
    torch.testing.assert_close(factors.delta_weight().T, delta_of_peft(model, "embed"), rtol=1e-5, atol=1e-5)


def test_the_base_copy_beside_an_embedding_is_no_factor(tmp_path: Path) -> None:
    """With `save_embedding_layers` PEFT writes the base's own matrix into the file."""
    model = save_tiny(tmp_path, target_modules=["embed"])
    own = model.base_model.model.embed.base_layer.weight.detach()
    for name in ("base_model.model.embed.base_layer.weight", "base_model.model.embed.weight"):
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        rewrite(tmp_path, {k: v for k, v in tensors.items() if "lora" in k} | {name: own})
        adapter = read_adapter(str(tmp_path))
        assert set(adapter.modules) == set(adapter.base_copies) == {"embed"}
        assert torch.equal(adapter.read_base_copy("embed"), own)


def test_the_adapter_remembers_where_it_came_from(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    adapter = read_adapter(str(tmp_path))
    assert (adapter.reference, adapter.path, adapter.commit) == (str(tmp_path), tmp_path, None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert adapter.sha256[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert list(adapter.modules) == sorted(adapter.modules)


# Spellings.


def spelled(name: str, how: str) -> str:
    """PEFT's name as another trainer or an old PEFT would have left it."""
    bare = name.removeprefix("base_model.model.")
    module, part = bare[: bare.index(".lora_")], bare[bare.index(".lora_") + 1 :]
    first, _, rest = module.partition(".")
    inside = f"{part}.default" if "embedding" in part else part.replace(".weight", ".default.weight")
    return {
        "no prefix": bare,
        "two prefixes": f"base_model.model.{name}",
        "three prefixes": f"base_model.model.base_model.model.{name}",
        "adapter name": f"base_model.model.{module}.{inside}",
        "adapter name, no prefix": f"{module}.{inside.replace('default', 'my-skill_2')}",
        "compiled": f"_orig_mod.{name}",
        "compiled inside": f"base_model.model._orig_mod.{bare}",
        "compiled layer": f"base_model.model.{first}.{rest}{'.' if rest else ''}_orig_mod.{part}",
        "fsdp": f"_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.{bare}",
        "checkpointed": f"base_model.model.{first}._checkpoint_wrapped_module.{rest}.{part}".replace("..", "."),
        "all wrappers": f"module.base_model.model._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.{bare}",
        "ddp": f"module.module.{name}",
        "wrapped twice": f"base_model.model.{module}.base_layer.base_layer.{part}",
    }[how]


SPELLINGS = [
    "no prefix", "two prefixes", "three prefixes", "adapter name", "adapter name, no prefix", "compiled",
    "compiled inside", "compiled layer", "fsdp", "checkpointed", "all wrappers", "ddp", "wrapped twice",
]  # fmt: skip


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_of_the_names_gives_the_updates_that_peft_would_add(tmp_path: Path, how: str) -> None:
    model = save_tiny(tmp_path, target_modules=["embed", "q_proj"], lora_alpha=6, rank_pattern={"layers.1.q_proj": 2})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, {spelled(name, how): tensor for name, tensor in tensors.items()})
    adapter = read_adapter(str(tmp_path))
    assert set(adapter.modules) == {"embed", "layers.0.q_proj", "layers.1.q_proj"}
    for name, module in adapter.modules.items():
        theirs = delta_of_peft(model, name)
        ours = module.factors.delta_weight()
        torch.testing.assert_close(ours.T if name == "embed" else ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_base_copy_is_found_in_other_spellings_too(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, target_modules=["embed"])
    own = model.base_model.model.embed.base_layer.weight.detach()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("embed.weight", "_orig_mod.base_model.model.embed.base_layer.weight", "embed.base_layer.weight"):
        rewrite(tmp_path, tensors | {name: own})
        assert torch.equal(read_adapter(str(tmp_path)).read_base_copy("embed"), own)


@pytest.mark.parametrize("how", SPELLINGS)
def test_two_tensors_of_one_name_are_refused_by_both_names(plain: tuple[Path, dict[str, Tensor]], how: str) -> None:
    folder, tensors = plain
    name = f"{Q}.lora_B.weight"
    other = spelled(name, how)
    rewrite(folder, tensors | {other: tensors[name] + 1})
    message = refused(folder, MalformedAdapter).what
    assert f"'{name}'" in message and f"'{other}'" in message


def test_two_adapters_in_one_file_are_refused(plain: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = plain
    both = {name.replace(".weight", f".{own}.weight"): t for name, t in tensors.items() for own in ("first", "second")}
    rewrite(folder, both)
    message = refused(folder, MalformedAdapter).what
    assert ".first.weight" in message and ".second.weight" in message


def test_a_component_that_is_the_bases_own_stays(plain: tuple[Path, dict[str, Tensor]]) -> None:
    """`module` without PEFT's prefix behind it, and `base_layer` of experts, tell matrices apart."""
    folder, tensors = plain
    names = ("module.q", "base_model.model.a.module.q", "experts.base_layer", "experts")
    A, B = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    rewrite(folder, {f"{n}.lora_{s}.weight": t for n in names for s, t in (("A", A), ("B", B))})
    assert set(read_adapter(str(folder)).modules) == {"module.q", "a.module.q", "experts.base_layer", "experts"}


# Dtypes.


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ([torch.float16], torch.float16),
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float64, torch.bfloat16], torch.float64),
    ],
    ids=str,
)
def test_the_widest_dtype_holds_every_other_without_loss(dtypes: list[torch.dtype], widest: torch.dtype) -> None:
    assert widest_dtype(dtypes) == widest
    for dtype in dtypes:
        value = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, 1 + torch.finfo(dtype).eps], dtype=dtype)
        assert torch.equal(value.to(widest).to(dtype), value)


def test_factors_of_two_dtypes_are_widened_together(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    mixed = {k: v.half() if "lora_A" in k else v.bfloat16() for k, v in tensors.items()}
    rewrite(tmp_path, mixed)
    adapter = read_adapter(str(tmp_path))
    assert adapter.dtype == torch.float32
    for name, module in adapter.modules.items():
        assert module.factors.lora_A.dtype == module.factors.lora_B.dtype == torch.float32
        assert torch.equal(module.factors.lora_A, mixed[f"base_model.model.{name}.lora_A.weight"].float())
        assert torch.equal(module.factors.lora_B, mixed[f"base_model.model.{name}.lora_B.weight"].float())


# What is refused.


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, kind: type[InputError]) -> InputError:
    with pytest.raises(InputError) as caught:
        read_adapter(str(folder))
    assert type(caught.value) is kind
    assert str(folder / "adapter_model.safetensors") in str(caught.value)
    return caught.value


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    save_tiny(tmp_path)
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


Q = "base_model.model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        (f"{Q}.lora_magnitude_vector.weight", "DoRA"),
        (f"{Q}.lora_magnitude_vector.default.weight", "DoRA"),
        (f"{Q}.lora_magnitude_vector", "DoRA"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "modules_to_save"),
        ("base_model.model.lm_head.original_module.weight", "modules_to_save"),
        ("base_model.model.lm_head.weight", "modules_to_save"),
        ("lm_head.weight", "modules_to_save"),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta", "trainable tokens"),
        (f"{Q}.bias", "biases"),
        (f"{Q}.lora.down.weight", "diffusers"),
    ],
)
def test_a_tensor_of_another_feature_is_refused_by_the_features_name(
    plain: tuple[Path, dict[str, Tensor]], name: str, feature: str
) -> None:
    folder, tensors = plain
    for odd in (torch.ones(2, 2), torch.ones(6)):  # most of these are vectors, and no vector is a factor
        rewrite(folder, tensors | {name: odd})
        error = refused(folder, UnsupportedAdapter)
        assert feature in error.what and name in error.what
        assert error.hint
        assert (feature == "DoRA") == error.hint.endswith("loracat convert ADAPTER --base MODEL")


@pytest.mark.parametrize(
    ("config", "feature"), [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["c_attn"]}, "c_attn.bias")], ids=str
)
def test_what_peft_saves_with_such_a_feature_is_refused_even_if_the_config_denies_it(
    tmp_path: Path, config: dict[str, Any], feature: str
) -> None:
    save_tiny(tmp_path, **config)
    reconfigure(tmp_path, **dict.fromkeys(config))
    assert feature in refused(tmp_path, UnsupportedAdapter).what


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_bias_is_decided_by_the_tensors(tmp_path: Path, bias: str) -> None:
    """PEFT saves the biases of the base, where it has any; where it has none, W + s B A is all."""
    model = save_tiny(tmp_path / "biased", bias=bias)
    assert ".bias" in refused(tmp_path / "biased", UnsupportedAdapter).what
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.bias = None
    model.base_model.model.c_attn.bias = None
    model.save_pretrained(tmp_path / "none", save_embedding_layers=False)
    assert json.loads((tmp_path / "none" / "adapter_config.json").read_text())["bias"] == bias
    assert_same_updates(read_adapter(str(tmp_path / "none")), model, SHAPES)


def test_mica_is_the_update_that_peft_adds_to_an_unchanged_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = Tiny()
    weights = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights="mica")
    model = get_peft_model(before, lora)
    for name in SHAPES:
        assert torch.equal(model.base_model.model.get_submodule(name).base_layer.weight, weights[f"{name}.weight"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_same_updates(read_adapter(str(tmp_path)), model, SHAPES)


@pytest.mark.parametrize(
    ("config", "out"),
    [
        ({"velora_config": VeloraConfig(num_groups=1)}, "lora_velora_embed"),
        ({"monteclora_config": MontecloraConfig(num_samples=2)}, "lora_monteclora_sampler"),
    ],
    ids=["velora", "monteclora"],
)
def test_the_way_out_of_a_variant_leads_to_the_update_that_it_adds(
    tmp_path: Path, config: dict[str, Any], out: str
) -> None:
    model = save_tiny(tmp_path, **config)
    (field,) = config
    with pytest.raises(UnsupportedAdapter, match=field) as caught:
        read_adapter(str(tmp_path))
    assert field in str(caught.value.hint) and out in str(caught.value.hint)
    reconfigure(tmp_path, **{field: None})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, {name: tensor for name, tensor in tensors.items() if out not in name})
    adapter = read_adapter(str(tmp_path))
    x = torch.randn(3, 5)
    for name in SHAPES:
        layer = model.base_model.model.get_submodule(name).eval()
        added = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(x.double() @ adapter.modules[name].factors.delta_weight().T, added.double(),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("shape", [(0,), (0, 5)], ids=str)
def test_what_fsdp_and_zero_3_leave_of_a_shard_is_named(
    plain: tuple[Path, dict[str, Tensor]], shape: tuple[int, ...]
) -> None:
    folder, tensors = plain
    for changed in ({name: torch.zeros(shape) for name in tensors}, {}):
        rewrite(folder, changed)
        error = refused(folder, MalformedAdapter)
        assert "is empty, of shape" in error.what if changed else "no LoRA factors" in error.what
        assert "ZeRO-3" in str(error.hint) and "FULL_STATE_DICT" in str(error.hint)


@pytest.mark.parametrize("saved", [[], ["norm", "lm_head"]], ids=["factors", "saved"])
def test_twice_as_many_modules_patterns_and_saved_modules_are_twice_as_much_work(
    tmp_path: Path, saved: list[str]
) -> None:
    def work(count: int) -> int:
        folder = tmp_path / f"{count}"
        folder.mkdir()
        tensors = {}
        for i in range(count):
            prefix = f"base_model.model.model.layers.{i}"
            tensors[f"{prefix}.mlp.up_proj.lora_A.weight"] = torch.ones(2, 3)
            tensors[f"{prefix}.mlp.up_proj.lora_B.weight"] = torch.ones(3, 2)
            tensors |= {f"{prefix}.{name}.weight": torch.ones(3) for name in saved}
        save_file(tensors, folder / "adapter_model.safetensors")
        ranks = {f"model.layers.{i}.mlp.up_proj": 2 for i in range(count)}
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": ranks, "alpha_pattern": ranks}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": saved}))
        adapters: list[LoraAdapter] = []
        lines = steps(lambda: adapters.extend(open_adapter(str(folder)) for _ in range(2)))
        assert len(adapters[0].modules) == count and len(adapters[0].saved) == count * len(saved)
        lines += steps(lambda: saved_modules("average" if saved else "refuse", adapters))
        return lines + steps(lambda: _problems_of(adapters))

    once, twice = work(100), work(200)
    assert twice < 2.2 * once


def test_a_name_that_is_longer_than_any_modules_is_refused(plain: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = plain
    rewrite(folder, tensors | {"base_model.model." + "a." * 500 + "lora_A.weight": torch.ones(4, 5)})
    assert "at most 1000 are read" in refused(folder, MalformedAdapter).what


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.lora_A",
        f"{Q}.lora_C.weight",
        f"{Q}.lora_A.a.b.weight",
        f"{Q}.lora_embedding_A.a.b",
        f"{Q}.lora_A.weight.default",
        "lora_A.weight",
        "base_model.model.base_model.model.lora_A.weight",
        "_orig_mod._orig_mod",
        "base_model.model",
        "base_model.model..lora_A.weight",
        "base_model.model.a/../../b.lora_A.weight",
        "base_model.model.\x1b[31m.lora_A.weight",
        "base_model.model.q\n.lora_A.weight",
        f"{Q}.lora_A.weight\n",
        "",
    ],
)
def test_a_name_of_no_lora_file_is_refused(plain: tuple[Path, dict[str, Tensor]], name: str) -> None:
    folder, tensors = plain
    rewrite(folder, tensors | {name: torch.ones(4, 5)})
    message = str(refused(folder, MalformedAdapter))
    assert "\x1b" not in message and "\n" not in message


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_of_a_pair_is_refused_with_the_missing_name(plain: tuple[Path, dict[str, Tensor]], part: str) -> None:
    folder, tensors = plain
    del tensors[f"{Q}.{part}.weight"]
    rewrite(folder, tensors)
    assert f"lacks '{Q}.{part}.weight'" in refused(folder, MalformedAdapter).what


@pytest.mark.parametrize("part", ["lora_embedding_A", "lora_embedding_B"])
def test_half_of_an_embeddings_pair_is_refused_with_the_missing_name(tmp_path: Path, part: str) -> None:
    save_tiny(tmp_path, target_modules=["embed"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[f"base_model.model.embed.{part}"]
    rewrite(tmp_path, tensors)
    assert f"lacks 'base_model.model.embed.{part}'" in refused(tmp_path, MalformedAdapter).what


@pytest.mark.parametrize("parts", [("lora_embedding_A", "lora_embedding_B"), ("lora_embedding_A",)], ids=str)
def test_linear_and_embedding_factors_of_one_module_are_refused(
    plain: tuple[Path, dict[str, Tensor]], parts: tuple[str, ...]
) -> None:
    folder, tensors = plain
    rewrite(folder, tensors | {f"{Q}.{part}": torch.ones(4, 4) for part in parts})
    assert "layers.0.q_proj" in refused(folder, MalformedAdapter).what


def test_a_base_matrix_without_factors_is_refused(plain: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = plain
    rewrite(folder, tensors | {"base_model.model.embed.base_layer.weight": torch.ones(11, 5)})
    assert "'embed'" in refused(folder, MalformedAdapter).what


@pytest.mark.parametrize("tensors", [{}, {f"{Q}.base_layer.weight": torch.ones(6, 5)}], ids=["nothing", "only a base"])
def test_a_file_without_factors_is_refused(plain: tuple[Path, dict[str, Tensor]], tensors: dict[str, Tensor]) -> None:
    folder, _ = plain
    rewrite(folder, tensors)
    assert "no LoRA factors" in refused(folder, MalformedAdapter).what


def test_factors_whose_ranks_differ_are_refused(plain: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = plain
    rewrite(folder, tensors | {f"{Q}.lora_B.weight": torch.ones(6, 3)})
    message = refused(folder, MalformedAdapter).what
    assert "(4, 5)" in message and "(6, 3)" in message and "layers.0.q_proj" in message


@pytest.mark.parametrize("config", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}, {"r": 1}], ids=str)
def test_a_rank_that_contradicts_the_config_is_refused(
    plain: tuple[Path, dict[str, Tensor]], config: dict[str, Any]
) -> None:
    folder, _ = plain
    reconfigure(folder, **config)
    message = refused(folder, MalformedAdapter).what
    assert "rank 4 in the tensors" in message and "layers.0.q_proj" in message


def test_a_diverged_adapter_is_refused_with_the_tensor(plain: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = plain
    tensors[f"{Q}.lora_B.weight"][1, 2] = float("nan")
    rewrite(folder, tensors)
    assert f"'{Q}.lora_B.weight' holds 1 values" in refused(folder, MalformedAdapter).what


def test_the_right_factors_hidden_behind_a_config_of_another_type_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    reconfigure(tmp_path, peft_type="ADALORA")
    with pytest.raises(UnsupportedAdapter, match="ADALORA"):
        read_adapter(str(tmp_path))


def test_an_opened_adapter_has_the_factors_of_a_read_one_and_no_tensor_until_asked(tmp_path: Path) -> None:
    save_tiny(tmp_path, lora_alpha=8, rank_pattern=PATTERNS["rank_pattern"])
    opened, read = open_adapter(str(tmp_path)), read_adapter(str(tmp_path))
    assert opened.modules.keys() == read.modules.keys()
    for name, module in read.modules.items():
        stored = opened.modules[name].factors
        assert not any(isinstance(value, Tensor) for value in vars(stored).values())
        assert (stored.rank, stored.in_features, stored.out_features, stored.scaling) == (
            module.factors.rank,
            module.factors.in_features,
            module.factors.out_features,
            module.factors.scaling,
        )
        assert torch.equal(stored.lora_A, module.factors.lora_A) and torch.equal(stored.lora_B, module.factors.lora_B)
        assert torch.equal(stored.delta_weight(), module.factors.delta_weight())
        assert torch.equal(stored.to(torch.float64).lora_A, module.factors.lora_A.double())


def test_factors_of_an_opened_adapter_are_refused_once_their_file_has_changed(tmp_path: Path) -> None:
    save_tiny(tmp_path, lora_alpha=8)
    opened, read = open_adapter(str(tmp_path)), read_adapter(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    save_tiny(tmp_path, seed=1, lora_alpha=8)
    with pytest.raises(IntegrityError, match="has changed since it was checked"):
        _ = opened.modules["layers.0.q_proj"].factors.lora_A
    assert read.modules["layers.0.q_proj"].factors.lora_A.isfinite().all()
