"""A base model on several devices: what is refused, and that the numbers are the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.errors import BaseModelMismatch, OutOfResources, UsageError
from loracli.fitting.mixing import make_layout
from loracli.model.attach import attach
from loracli.model.base import _check_device_map, _placement_options, check_fits, load_base, plan_base
from loracli.model.reference import BaseReference
from loracli.model.session import _checkpointed
from tests.faults.fork_server import ForkServer
from tests.fitting.processes_started import forked
from tests.tiny import logits, make_adapter, make_base


def reference(base: Path) -> BaseReference:
    return BaseReference("tiny/base", base, None)


def several(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_device_map_on_a_machine_without_cuda_is_the_cpu(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    mapped = load_base(reference(tiny_base), device_map="auto")
    assert {parameter.device.type for parameter in mapped.model.parameters()} == {"cpu"}
    assert torch.equal(logits(mapped.model), logits(load_base(reference(tiny_base)).model))
    check_fits(mapped, [read_adapter(str(path)) for path in two_adapters])


@pytest.mark.parametrize("recompute", [False, True])
def test_modules_whose_forward_accelerate_has_replaced_give_the_same_gradient(
    tiny_base: Path, two_adapters: tuple[Path, Path], recompute: bool
) -> None:
    """As on several devices: each module that has weights gets a `forward` of its own, which moves its inputs."""
    adapters = [read_adapter(str(path)) for path in two_adapters]
    plain, hooked = (load_base(reference(tiny_base)).model for _ in range(2))
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    dispatch_model(hooked, dict.fromkeys(parts, "cpu"), force_hooks=True)
    own = hooked.model.layers[0].forward
    assert "forward" in vars(hooked.model.layers[0].self_attn.q_proj)
    results = [gradient(model, adapters, recompute) for model in (plain, hooked)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert hooked.model.layers[0].forward is own


def gradient(model: Any, adapters: list[LoraAdapter], recompute: bool) -> torch.Tensor:
    modules = make_layout(adapters).modules
    weights = torch.ones(len(modules), 2, requires_grad=True)
    ids = torch.arange(3, 23)[None]
    with attach(model, adapters, modules) as attached, _checkpointed(model) if recompute else nullcontext():
        attached.set_weights(weights)
        (slope,) = torch.autograd.grad(model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum(), weights)
    return slope


@pytest.mark.parametrize(
    ("device_map", "named"),
    [
        (
            {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "cpu"},
            "model.layers.1 and 1",
        ),
        ({"model.layers.0": torch.device("cuda", 1), "model.layers.1": "disk"}, "model.layers.1 of the base"),
        ({"model.layers.0": "cpu", "lm_head": "disk"}, "lm_head of the base"),
        ({"": "meta"}, "meta"),
    ],
)
def test_layers_that_no_device_has_room_for_are_refused_by_name(device_map: dict[str, Any], named: str) -> None:
    with pytest.raises(OutOfResources, match=named) as raised:
        _check_device_map(device_map)
    assert raised.value.exit_code == 6 and "--dtype bfloat16" in str(raised.value.hint)


def test_layers_on_devices_that_compute_are_fine() -> None:
    _check_device_map({"": "cpu"})
    _check_device_map({"model": 0, "lm_head": 1})
    _check_device_map({"model": "cuda:0", "lm_head": torch.device("cuda", 1)})


def test_options_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        (("auto", "balanced", None), "--device-map balanced is not in this version"),
        (("cuda:0", "auto", None), "leave --device cuda:0 out"),
        (("auto", "auto", 2), "give one"),
        (("auto", None, 2), "sharded over 2 processes, and there are 1"),
    ):
        with pytest.raises(UsageError, match=message):
            _placement_options(*options)
    several(monkeypatch, 2)
    with pytest.raises(UsageError, match="--device-map auto is for one process, and these are 2"):
        _placement_options("auto", "auto", None)
    with pytest.raises(UsageError, match="sharded over 4 processes, and there are 2"):
        _placement_options("auto", None, 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(UsageError, match="takes this machine's cpu devices, not --device cuda"):
        _placement_options("cuda", None, 2)
    assert _placement_options("cpu", None, 2)["distributed_config"].fsdp_size == 2


def test_a_sharded_base_gives_the_numbers_of_a_whole_one(server: ForkServer, tmp_path: Path) -> None:
    """Linear layers and experts; two processes, each on other tokens, with and without running layers again; a model
    that transformers has no plan for is refused."""
    base = make_base(tmp_path / "base", "mixtral")
    parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    make_adapter(tmp_path / "first", base, parameters=parameters, size=0.1, seed=1)
    make_adapter(tmp_path / "second", base, targets=("q_proj", "o_proj"), parameters=parameters[1:], rank=2, seed=2)
    make_base(tmp_path / "gpt2", "gpt2")
    first, second = forked(server, 2, str(tmp_path), program="shard_program")
    assert (first.code, second.code) == (0, 0), (first, second)
    for outcome in json.loads(second.stdout):
        assert outcome["local"] == [16, 32]
        assert outcome["whole"] and outcome["modules"]
        assert outcome["recompute False"] < 1e-5 and outcome["recompute True"] < 1e-5
        assert outcome["no plan"] == "transformers has no plan to shard the layers of a GPT2LMHeadModel"


def test_the_plan_of_a_base_has_no_numbers_and_the_dtype_of_the_load(tiny_base: Path) -> None:
    plan = plan_base(reference(tiny_base), dtype="bfloat16", device="cpu")
    base = load_base(reference(tiny_base), dtype="bfloat16", device="cpu")
    assert plan.dtype == base.dtype == torch.bfloat16 and plan.device == "cpu"
    assert all(parameter.is_meta for parameter in plan.skeleton.parameters())
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (plan.skeleton, base.model)]
    assert shapes[0] == shapes[1]


def test_a_base_that_is_no_language_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BaseModelMismatch, match="the base model tiny/base cannot be loaded"):
        plan_base(reference(tmp_path))
