"""Activation checkpointing: the same gradients from less memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.errors import UsageError
from loracli.fitting.mixing import make_layout
from loracli.model.attach import attach
from loracli.model.placement import decoder_layers
from loracli.model.session import _checkpointed
from tests.fitting.allocations import allocated_bytes, saved_bytes
from tests.tiny import logits, make_adapter, make_base


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)


IDS = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))


def gradient(model: Any, adapters: list[LoraAdapter], *, recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and the gradient of the weights of a loss on them."""
    modules = make_layout(adapters).modules
    weights = torch.linspace(-0.5, 1.0, len(modules) * len(adapters)).view(-1, len(adapters)).requires_grad_(True)
    with attach(model, adapters, modules) as attached, _checkpointed(model) if recompute else nullcontext():
        attached.set_weights(weights)
        out = model(input_ids=IDS, use_cache=False).logits
        (slope,) = torch.autograd.grad(out.logsumexp(-1).sum(), weights)
    return out.detach(), slope


def forward_bytes(model: Any, adapters: list[LoraAdapter], *, recompute: bool) -> tuple[int, int]:
    """What autograd saves in a forward pass, and all that lives after it."""
    modules = make_layout(adapters).modules
    with attach(model, adapters, modules) as attached, _checkpointed(model) if recompute else nullcontext():
        attached.set_weights(torch.ones(len(modules), len(adapters), requires_grad=True))

        def forward() -> Any:
            return model.model(input_ids=IDS, use_cache=False)

        assert forward().last_hidden_state.requires_grad
        return saved_bytes(model, forward), allocated_bytes(forward)[0]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ("q_proj", "down_proj")),
        ("gemma2", ("v_proj", "up_proj")),
        ("gpt2", ("c_attn", "c_fc", "wte")),
        ("neox", ("query_key_value", "embed_in")),
    ],
)
def test_gradients_are_the_same_to_the_bit(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    base = make_base(tmp_path / "base", kind)
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    adapters = [
        read_adapter(str(make_adapter(tmp_path / "a", base, targets=targets, seed=1, **options))),
        read_adapter(str(make_adapter(tmp_path / "b", base, targets=targets[:1], rank=2, seed=2, **options))),
    ]
    model = load(base)
    plain, recomputed = (gradient(model, adapters, recompute=recompute) for recompute in (False, True))
    assert torch.equal(plain[0], recomputed[0])
    assert torch.equal(plain[1], recomputed[1])
    assert plain[1].abs().max() > 0


def test_what_is_kept_is_a_layers_input(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    """Autograd saves a fraction; and all that lives after the forward is a (2, 40, 32) tensor for each of 3 layers,
    with the final norm's and some tables beside."""
    model = load(tiny_base)
    adapters = [read_adapter(str(path)) for path in two_adapters]
    plain, recomputed = (forward_bytes(model, adapters, recompute=recompute) for recompute in (False, True))
    hidden = IDS.numel() * 32 * 4
    assert recomputed[0] < plain[0] / 4
    assert recomputed[1] < plain[1] / 3
    assert 3 * hidden < recomputed[1] < 8 * hidden


def test_layers_below_the_lowest_adapted_one_stay_without_a_graph(tmp_path: Path, tiny_base: Path) -> None:
    adapter = read_adapter(str(make_adapter(tmp_path / "top", tiny_base, layers_to_transform=[2])))
    model = load(tiny_base)
    modules = make_layout([adapter]).modules
    outputs: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda *seen: outputs.append(seen[2])) for layer in model.model.layers]
    with attach(model, [adapter], modules) as attached, _checkpointed(model):
        attached.set_weights(torch.ones(len(modules), 1, requires_grad=True))
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    assert [output.requires_grad for output in outputs] == [False, False, True]
    assert all(output.grad_fn is None for output in outputs[:2])


def test_the_second_run_happens_once_for_each_layer_and_not_without_a_gradient(
    tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    model, runs = load(tiny_base), [0]
    adapters = [read_adapter(str(path)) for path in two_adapters]

    def count(*seen: Any) -> None:
        runs[0] += 1

    handles = [layer.input_layernorm.register_forward_hook(count) for layer in model.model.layers]
    gradient(model, adapters, recompute=True)
    assert runs == [2 * 3]
    with _checkpointed(model):
        logits(model)
    assert runs == [3 * 3]
    for handle in handles:
        handle.remove()


def test_the_layers_are_as_before_at_the_end_even_after_an_error(tiny_base: Path) -> None:
    model = load(tiny_base)
    layers = decoder_layers(model)
    assert len(layers) == 3 and not model.training
    own = layers[0].forward
    layers[0].forward = own  # as accelerate leaves a module that it has hooked
    with pytest.raises(RuntimeError, match="stop"), _checkpointed(model):
        assert all("forward" in vars(layer) for layer in layers)
        raise RuntimeError("stop")
    assert layers[0].forward is own
    assert not any("forward" in vars(layer) for layer in layers[1:])


def test_a_model_without_such_layers_is_refused_by_name() -> None:
    with (
        pytest.raises(UsageError, match="activation checkpointing is not possible with Sequential"),
        _checkpointed(torch.nn.Sequential(torch.nn.Linear(2, 2))),
    ):
        pass
