"""The attached model: the formula, its gradient, what it keeps, and that it leaves no trace."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.algebra.basis import canonical_stack
from loracli.calibration.dataset import make_batch
from loracli.calibration.render import Example
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from loracli.recipe.record import MIXING_KINDS, MixingKind
from tests.tiny import logits, make_adapter, make_base


def load(base: Path, dtype: torch.dtype = torch.float32) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(False)


def read(*paths: Path) -> list[LoraAdapter]:
    return [read_adapter(str(path)) for path in paths]


def attached_logits(model: object, adapters: list[LoraAdapter], per_adapter: list[float]) -> torch.Tensor:
    modules = make_layout(adapters).modules
    with attach(model, adapters, modules) as attached:
        attached.set_weights(torch.tensor([per_adapter] * len(modules), dtype=torch.float64))
        return logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_zero_reproduce_the_base_bit_for_bit(
    tiny_base: Path, two_adapters: tuple[Path, Path], dtype: torch.dtype
) -> None:
    model = load(tiny_base, dtype)
    assert torch.equal(attached_logits(model, read(*two_adapters), [0.0, 0.0]), logits(model))


@pytest.mark.parametrize("index", [0, 1])
def test_one_adapter_at_weight_one_is_that_adapter_as_peft_runs_it(
    tiny_base: Path, two_adapters: tuple[Path, Path], index: int
) -> None:
    weights = [float(i == index) for i in range(2)]
    ours = attached_logits(load(tiny_base), read(*two_adapters), weights)
    theirs = logits(PeftModel.from_pretrained(load(tiny_base), two_adapters[index]).eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_both_adapters_at_any_weights_are_the_dense_formula(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = read(*two_adapters)
    ours = attached_logits(load(tiny_base, torch.float64), adapters, [0.7, -1.3])
    model = load(tiny_base, torch.float64)
    for weight, adapter in zip([0.7, -1.3], adapters, strict=True):
        for name, module in adapter.modules.items():
            model.get_submodule(name).weight += weight * module.factors.delta_weight()
    torch.testing.assert_close(ours, logits(model), rtol=1e-9, atol=1e-9)


def test_a_module_update_is_linear_in_the_weights(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    model, adapters = load(tiny_base, torch.float64), read(*two_adapters)
    modules = make_layout(adapters).modules
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def update(weights: list[float]) -> torch.Tensor:
        target = model.get_submodule("model.layers.0.self_attn.q_proj")
        with attach(model, adapters, modules) as attached:
            attached.set_weights(torch.tensor([weights] * len(modules), dtype=torch.float64))
            return target(x) - torch.nn.functional.linear(x, target.weight)

    torch.testing.assert_close(update([0.2, 3.0]), 0.2 * update([1.0, 0.0]) + 3.0 * update([0.0, 1.0]))
    assert update([1.0, 0.0]).abs().max() > 1e-3


def test_leaving_the_context_leaves_no_trace_even_after_an_error(
    tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    model, adapters = load(tiny_base), read(*two_adapters)
    before = logits(model)
    with (
        pytest.raises(RuntimeError, match="stop"),
        attach(model, adapters, make_layout(adapters).modules) as a,
    ):
        a.set_weights(torch.ones(len(a.modules), 2))
        assert not torch.equal(logits(model), before)
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


# These two normalise in float64; Llama's RMSNorm goes through float32, on which differences of 1e-5 drown.
@pytest.mark.parametrize("kind", ["gpt2", "neox"])
@pytest.mark.parametrize("level", MIXING_KINDS)
def test_gradient_of_every_level_equals_finite_differences_in_float64(
    tmp_path: Path, kind: str, level: MixingKind
) -> None:
    """Of every number, or of forty where there are more."""
    base = make_base(tmp_path / "base", kind)
    names = {
        "gpt2": (("c_attn", "wte"), ("c_attn",)),
        "neox": (("query_key_value", "embed_in"), ("query_key_value", "dense_4h_to_h")),
    }[kind]
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    adapters = read(
        make_adapter(tmp_path / "a", base, targets=names[0], rank=3, seed=1, **options),
        make_adapter(tmp_path / "b", base, targets=names[1], rank=2, seed=2, use_rslora=True, **options),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (11,), generator=generator).tolist()
    batch = make_batch([Example("val.jsonl:1", tuple(ids), (False,) * 4 + (True,) * 7)], [0])
    layout = make_layout(adapters)
    with attach(load(base, torch.float64), adapters, layout.modules, canonical=True) as attached:
        objective, mixing = make_objective(attached, batch), make_mixing(attached, layout, level)

        def loss(theta: torch.Tensor) -> torch.Tensor:
            mixing.apply(attached, theta)
            return objective.nats(batch).sum()

        theta = mixing.constant([0.8, -0.6]).double()
        theta += 0.3 * torch.randn(mixing.numbers, generator=generator, dtype=torch.float64)
        leaf = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        step = 1e-5
        for place in torch.randperm(mixing.numbers, generator=generator)[:40].tolist():
            shift = torch.zeros_like(theta)
            shift[place] = step
            with torch.no_grad():
                expected = float(loss(theta + shift) - loss(theta - shift)) / (2 * step)
            assert abs(float(gradient[place]) - expected) < 1e-6 * max(1.0, abs(expected))
    assert gradient.abs().max() > 1e-3


def test_nothing_of_the_modules_width_is_kept_for_the_weights(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    """Of a module's activations only z (T, R) is saved: with N adapters stacked, no (T, out) or (T, in) tensor."""
    adapters = read(*two_adapters)
    tokens, width = 50, 32
    linear = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
    model = torch.nn.ModuleDict({"q_proj": linear})
    module = adapters[0].modules["model.layers.0.self_attn.q_proj"]
    other = adapters[1].modules["model.layers.0.self_attn.q_proj"]
    renamed = [
        type(a)(a.source, a.path, a.commit, a.config, {"q_proj": m}, {}, a.dtype, a.sha256)
        for a, m in zip(adapters, (module, other), strict=True)
    ]
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(tokens, width, requires_grad=True)
    with attach(model, renamed, ("q_proj",)) as attached, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        attached.set_weights(torch.ones(1, 2, requires_grad=True))
        linear(x).sum()
    assert (tokens, 4 + 2) in kept
    assert not [shape for shape in kept if shape[:1] == (tokens,) and shape != (tokens, 6)]


def test_an_embedding_that_scales_its_rows_scales_the_update_as_peft_does(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma3")
    path = make_adapter(tmp_path / "a", base, targets=("embed_tokens", "q_proj"), rank=3)
    ours = attached_logits(load(base), read(path), [1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's advice on tied embeddings
        theirs = logits(PeftModel.from_pretrained(load(base), path).eval())
    assert float((theirs - logits(load(base))).abs().max()) > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def dense_model(base: Path, updates: dict[str, torch.Tensor]) -> AutoModelForCausalLM:
    model = load(base, torch.float64)
    for name, update in updates.items():
        model.get_submodule(name).weight += update
    return model


def test_mixing_matrices_act_between_the_canonical_factors(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = read(*two_adapters)
    modules = make_layout(adapters).modules
    generator = torch.Generator().manual_seed(5)
    updates, matrices = {}, []
    for name in modules:
        stack = canonical_stack([a.modules[name].factors for a in adapters if name in a.modules])
        size = len(stack.present)
        matrices.append(torch.randn(size, size, generator=generator, dtype=torch.float64))
        updates[name] = stack.lora_B @ matrices[-1] @ stack.lora_A
    model = load(tiny_base, torch.float64)
    with attach(model, adapters, modules, canonical=True) as attached:
        attached.set_matrices(matrices)
        ours = logits(model)
    torch.testing.assert_close(ours, logits(dense_model(tiny_base, updates)), rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_mixing_matrix_is_that_of_the_dense_formula(
    tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    adapters = read(*two_adapters)
    modules = make_layout(adapters).modules
    name = "model.layers.1.self_attn.q_proj"
    stack = canonical_stack([a.modules[name].factors for a in adapters if name in a.modules])
    model = load(tiny_base, torch.float64)
    target = model.get_submodule(name)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    with attach(model, adapters, modules, canonical=True) as attached:
        sizes = [len(core) for core in attached.cores]
        matrices = [torch.eye(size, dtype=torch.float64).requires_grad_(True) for size in sizes]
        attached.set_matrices(matrices)
        matrix = matrices[modules.index(name)]
        ours = torch.autograd.grad(target(x).square().sum(), [x, matrix])
    dense = target.weight + stack.lora_B @ matrix @ stack.lora_A
    theirs = torch.autograd.grad((x @ dense.T).square().sum(), [x, matrix])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_weights_of_each_record_give_each_record_its_own_gradient(
    tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    adapters = read(*two_adapters)
    model = load(tiny_base, torch.float64)
    ids = torch.randint(3, 259, (3, 7), generator=torch.Generator().manual_seed(1))
    with attach(model, adapters, make_layout(adapters).modules) as attached:
        rows = sum(len(core) for core in attached.cores)
        each = torch.full((3, rows), 0.6, dtype=torch.float64, requires_grad=True)
        attached.set_diagonal(each)
        (together,) = torch.autograd.grad(model(input_ids=ids).logits.square().sum(), each)
        for record in range(3):
            alone = torch.full((rows,), 0.6, dtype=torch.float64, requires_grad=True)
            attached.set_diagonal(alone)
            (expected,) = torch.autograd.grad(model(input_ids=ids[record : record + 1]).logits.square().sum(), alone)
            torch.testing.assert_close(together[record], expected, rtol=1e-9, atol=1e-9)


def test_trained_factors_stand_in_for_the_adapters_own(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = read(*two_adapters)
    modules = make_layout(adapters).modules
    model = load(tiny_base, torch.float64)
    with attach(model, adapters, modules, canonical=True) as attached:
        generator = torch.Generator().manual_seed(2)
        factors = [
            (a + 0.1 * torch.randn(a.shape, generator=generator, dtype=a.dtype), 0.5 * b) for a, b in attached.factors()
        ]
        attached.set_factors(factors)
        ours = logits(model)
    updates = {name: b @ a for name, (a, b) in zip(modules, factors, strict=True)}
    torch.testing.assert_close(ours, logits(dense_model(tiny_base, updates)), rtol=1e-9, atol=1e-9)
