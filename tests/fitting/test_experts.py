"""Adapters on experts and routers act in a fit as their dense updates would, whatever the router does with the
records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.render import Example
from loracli.errors import BaseModelMismatch, UsageError
from loracli.fitting.certificate import _record_gradients
from loracli.fitting.mixing import check_mixing, make_diagonal, make_layout
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach
from loracli.model.experts import check_experts, grouped
from loracli.model.loss import make_objective
from loracli.model.modules import check_shapes
from tests.mixtures import BOTH, ROUTERS, add, load, peft_deltas
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

KINDS = ("mixtral", "qwen3-moe", "gpt-oss")


class Mixture:
    """A tiny mixture in float64 and two adapters, of different ranks and targets."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.base, router = make_base(folder / "base", kind), (f"{ROUTERS[kind]}.weight",)
        q, both = ("q_proj",), (*BOTH, *router)
        self.paths = [
            make_adapter(folder / "a", self.base, targets=q, parameters=both, rank=3, alpha=6, seed=1),
            make_adapter(folder / "b", self.base, targets=(), parameters=(*BOTH[1:], *router), rank=2, alpha=1, seed=2),
        ]
        self.adapters = [read_adapter(str(path)) for path in self.paths]

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        return load(self.base, dtype)


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp("one"), "mixtral")


def batch_of(*lengths: int) -> tuple[Batch, list[Example]]:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for line, length in enumerate(lengths):
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        examples.append(Example(f"x:{line}", tuple(ids), (False, *[True] * (length - 1))))
    return plan_batches(examples, batch_tokens=1000)[0], examples


def theta_of(adapters: list[LoraAdapter], kind: str = "module") -> tuple[Any, torch.Tensor]:
    mixing = make_diagonal(make_layout(adapters), kind)  # type: ignore[arg-type]
    theta = torch.randn(mixing.numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mixing, theta


def dense_nats(mixture: Mixture, mixing: Any, theta: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The loss of the bare model with dense updates in its parameters, differentiable in theta."""
    model, table = mixture.model(), mixing.table(theta)
    parameters = dict(model.named_parameters())
    for index, path in enumerate(mixture.paths):
        for name, delta in peft_deltas(path, mixture.base).items():
            key = name if name in parameters else f"{name}.weight"
            parameters[key] = parameters[key] + table[mixing.groups.index(name), index] * delta
    logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": batch.input_ids}).logits
    scored = logits.flatten(0, 1)[batch.positions]
    return torch.nn.functional.cross_entropy(scored, batch.labels, reduction="sum")


@pytest.mark.parametrize("kind", ["adapter", "layer", "module"])
def test_the_mixed_experts_are_the_bare_model_with_the_dense_updates_added(mixture: Mixture, kind: str) -> None:
    """PEFT's own dW of each expert, in the base's layout, (E, out, in) or (E, in, out)."""
    mixing, theta = theta_of(mixture.adapters, kind)
    expected, model = mixture.model(), mixture.model()
    weights = mixing.by_group(theta)
    for index, path in enumerate(mixture.paths):
        for name, delta in peft_deltas(path, mixture.base).items():
            group = {"adapter": "*", "layer": ".".join(name.split(".")[:3]), "module": name}[kind]
            add(expected, {name: delta}, weights[group][index])
    with attach(model, mixture.adapters, mixing.layout.modules) as attached:
        mixing.apply(attached, theta)
        assert torch.allclose(logits(model), logits(expected), rtol=0, atol=1e-6)
        mixing.apply(attached, torch.zeros_like(theta))
        assert torch.allclose(logits(model), logits(mixture.model()), rtol=0, atol=1e-12)
        moved = float((logits(expected) - logits(model)).abs().max())
    assert moved > 1e-2
    assert torch.equal(logits(model), logits(mixture.model())), "detached, the model is what it was"


def test_experts_whose_forward_accelerate_has_replaced_give_the_same(mixtral: Mixture) -> None:
    """As on several devices: the forward that moves the inputs stays, around the experts with their adapters."""
    mixing, theta = theta_of(mixtral.adapters)
    plain, hooked = mixtral.model(), mixtral.model()
    dispatch_model(hooked, dict.fromkeys(("model", "lm_head"), "cpu"), force_hooks=True)
    experts = hooked.get_submodule("model.layers.0.mlp.experts")
    own = experts.forward, experts._old_forward
    assert "forward" in vars(experts)
    found = []
    for model in (plain, hooked):
        with attach(model, mixtral.adapters, mixing.layout.modules) as attached:
            mixing.apply(attached, theta)
            found.append(logits(model))
    assert torch.equal(*found)
    assert (experts.forward, experts._old_forward) == own


def test_the_gradient_of_the_weights_is_that_of_the_dense_updates(mixture: Mixture) -> None:
    """That of autograd through W + sum_i w_i dW_i; and of finite differences, as far as the model's own float32 norms
    let them."""
    mixing, theta = theta_of(mixture.adapters)
    batch, _ = batch_of(9, 6)
    model = mixture.model()
    with attach(model, mixture.adapters, mixing.layout.modules) as attached:
        objective = make_objective(attached, batch)

        def loss(theta: torch.Tensor) -> torch.Tensor:
            mixing.apply(attached, theta)
            return objective.nats(batch).sum()

        given = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(given), given)
        step = 1e-3
        for place in range(len(theta)):
            move = torch.zeros_like(theta)
            move[place] = step
            with torch.no_grad():
                slope = (loss(theta + move) - loss(theta - move)) / (2 * step)
            assert float(gradient[place]) == pytest.approx(float(slope), rel=2e-2, abs=2e-2)
    dense = theta.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(dense_nats(mixture, mixing, dense, batch), dense)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert float(gradient.abs().min()) > 1e-3


@pytest.mark.parametrize("both", [True, False])
def test_all_experts_at_once_in_float32_have_the_gradient_of_float64(mixture: Mixture, both: bool) -> None:
    """Of adapters whose ranks, 5 together, are not aligned, and of one that leaves gate_up_proj alone; for all
    records, and for each."""
    adapters = mixture.adapters if both else mixture.adapters[1:]
    mixing, theta = theta_of(adapters)
    batch, examples = batch_of(9, 6)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = mixture.model(dtype)
        with attach(model, adapters, mixing.layout.modules) as attached:
            objective, given = make_objective(attached, batch), theta.clone().requires_grad_(True)
            mixing.apply(attached, given)
            (gradient,) = torch.autograd.grad(objective.nats(batch).sum(), given)
            of_records = _record_gradients(objective, mixing, theta, batch, examples, seed=0).gradients
            found.append(torch.stack([gradient, *of_records]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 8), (torch.float32, 7), (torch.float32, 1), (torch.float64, 8)]
)
def test_rows_meet_the_matrix_of_their_expert_and_experts_may_have_none(dtype: torch.dtype, width: int) -> None:
    """In torch's grouped product, of rows that it refuses, and of a dtype that it refuses."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor([1, 1, 1, 3, 4, 4])
    ends = torch.tensor([0, 3, 3, 4, 6, 6], dtype=torch.int32)
    x = torch.randn(6, width, generator=generator).to(dtype).requires_grad_(True)
    matrices = torch.randn(6, width, 4, generator=generator).to(dtype)
    y, expected = grouped(x, matrices, ends), torch.einsum("si,sio->so", x, matrices[experts])
    torch.testing.assert_close(y, expected)
    (found,), (gradient,) = (torch.autograd.grad(z.square().sum(), x) for z in (y, expected))
    torch.testing.assert_close(found, gradient)


def test_each_record_has_its_own_gradient_though_the_router_mixes_their_tokens(mixture: Mixture) -> None:
    """What the certificate is made of: of three records in one batch, of different lengths, the same as alone."""
    mixing, theta = theta_of(mixture.adapters)
    batch, examples = batch_of(9, 4, 7)
    model = mixture.model()
    with attach(model, mixture.adapters, mixing.layout.modules) as attached:
        objective = make_objective(attached, batch)
        together = _record_gradients(objective, mixing, theta, batch, examples, seed=0)
        for place, index in enumerate(batch.indices):
            alone = plan_batches([examples[index]], batch_tokens=1000)[0]
            own = _record_gradients(objective, mixing, theta, alone, [examples[index]], seed=0)
            assert torch.allclose(together.gradients[place], own.gradients[0], rtol=1e-8, atol=1e-9)
            assert torch.allclose(together.sampled[place], own.sampled[0], rtol=1e-8, atol=1e-9)
    assert not torch.allclose(together.gradients[0], together.gradients[1])


def test_a_fit_of_experts_lowers_the_loss_and_certifies_it(tmp_path: Path, mixtral: Mixture) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    names = [str(path) for path in mixtral.paths]
    settings = FitSettings(passes=8, control="none")
    recipe = fit_mixing(names, data, eval_data=data, base=str(mixtral.base), settings=settings)
    assert set(recipe.mixing.weights) == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in (*BOTH, "mlp.gate", "self_attn.q_proj")
    }
    assert recipe.mixing.weights["model.layers.0.mlp.experts.gate_up_proj"][1] is None
    assert {module.kind for module in recipe.modules if "experts" in module.name} == {"experts"}
    assert recipe.fit.certificate is not None
    rows = {row.name: row.nats_per_token for row in recipe.held_out.rows}
    assert rows["fit"] < rows["sum"]


@pytest.mark.parametrize("kind", ["rank", "core", "factors", "auto"])
def test_levels_with_more_than_a_weight_for_each_adapter_are_refused_by_name(mixtral: Mixture, kind: str) -> None:
    with pytest.raises(UsageError, match=rf"updates of experts, which --mixing {kind} cannot weigh"):
        check_mixing(mixtral.adapters, kind)


def test_experts_that_compute_in_their_own_way_are_refused_by_name(mixtral: Mixture) -> None:
    model = mixtral.model()
    experts = model.get_submodule("model.layers.1.mlp.experts")
    experts.__class__ = type("OwnExperts", (torch.nn.Module,), {})
    with pytest.raises(BaseModelMismatch, match=r"layers\.1\.mlp\.experts.*OwnExperts compute in a way"):
        check_experts(model, mixtral.adapters)


def test_a_base_with_other_experts_is_refused_by_name(tmp_path: Path, mixtral: Mixture) -> None:
    other = load(make_base(tmp_path / "qwen", "qwen3-moe"))
    with pytest.raises(
        BaseModelMismatch, match=r"down_proj to be \(experts, in, out\) = \(4, 48, 32\); .* \(4, 24, 32\)"
    ):
        check_shapes(other, mixtral.adapters[1:])
    dense = load(make_base(tmp_path / "llama"))
    with pytest.raises(BaseModelMismatch, match="no parameter of that name with a matrix for each expert"):
        check_shapes(dense, mixtral.adapters[1:])
