"""The certificate of a fit: gradients of single records against finite differences, the sampled Gauss-Newton matrix
against the exact Fisher information, the algebra against closed forms, and standard errors against refits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, make_batch, plan_batches
from loracli.calibration.render import Example
from loracli.fitting.certificate import RecordGradients, _certify, _from_rows, _noise, _record_gradients, can_certify
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import DiagonalMixing, Layout, make_diagonal, make_layout, make_mixing
from loracli.fitting.settings import FitSettings
from loracli.model import loss as loss_module
from loracli.model.attach import attach
from loracli.model.loss import Objective, make_objective
from loracli.model.session import _checkpointed
from loracli.progress import SILENT
from loracli.recipe.record import FitCertificate, MixingKind
from loracli.system.document import decode, encode
from tests.faults.fork_server import ForkServer
from tests.fitting.processes_started import forked
from tests.tiny import make_adapter, make_base

# The first two normalise in float64; RMSNorm goes through float32, on which small differences drown.
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gpt2": (("c_attn", "wte"), ("c_attn",)),  # hooks, an embedding
    "neox": (("query_key_value", "lm_head"), ("query_key_value", "dense_4h_to_h")),  # an adapted head
    "gemma2": (("q_proj",), ("q_proj", "up_proj")),  # acts after its head
    "llama": (("q_proj", "v_proj"), ("q_proj",)),
}


@contextmanager
def attached_objective(
    folder: Path, kind: str, mixing_kind: MixingKind = "module", dtype: torch.dtype = torch.float64, size: float = 0.3
) -> Iterator[tuple[Objective, DiagonalMixing]]:
    base = make_base(folder / "base", kind)
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    adapters: list[LoraAdapter] = [
        read_adapter(
            str(make_adapter(folder / name, base, targets=targets, rank=rank, seed=rank, size=size, **options))
        )
        for name, targets, rank in zip("ab", TARGETS[kind], (3, 2), strict=True)
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(False)
    layout = make_layout(adapters)
    with attach(model, adapters, layout.modules) as attached:
        objective = make_objective(attached, make_batch(examples(2), range(2)))
        yield objective, make_diagonal(layout, mixing_kind)


def examples(
    count: int, *, weights: tuple[float, ...] = (0.25, 3.0), longest: int = 12, seed: int = 0
) -> list[Example]:
    """Records of random tokens, of different lengths, from files of different weights."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for line in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        flags = [False, *(torch.rand(length - 1, generator=generator) < 0.6).tolist()]
        flags[-1] = True
        result.append(Example(f"val.jsonl:{line}", tuple(ids), tuple(flags), weights[line % len(weights)]))
    return result


def some_theta(mixing: DiagonalMixing) -> Tensor:
    return 0.5 + 0.3 * torch.randn(mixing.numbers, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def nats_at(objective: Objective, mixing: DiagonalMixing, theta: Tensor, records: list[Example]) -> Tensor:
    """(n,) nats of each record, each as many times as it counts."""
    batch = make_batch(records, range(len(records)))
    with torch.no_grad():
        mixing.apply(objective.attached, theta)
    return objective.score([batch], len(records)).nats


@pytest.mark.parametrize(("records", "certain"), [(12, True), (11, False), (13, True)])
def test_four_records_for_each_effective_number_are_enough_to_be_certain(records: int, certain: bool) -> None:
    found = FitCertificate(records, 3, 0.1, 1.0, 0.0, 0.0, 0.0, 3.0, {}, {})
    assert found.certain is certain


# What belongs to a record.


@pytest.mark.parametrize(("kind", "mixing_kind"), [("gpt2", "module"), ("neox", "module"), ("neox", "adapter")])
def test_the_gradient_of_each_record_equals_finite_differences(
    tmp_path: Path, kind: str, mixing_kind: MixingKind
) -> None:
    records = examples(5)
    with attached_objective(tmp_path, kind, mixing_kind) as (objective, mixing):
        theta = some_theta(mixing)
        batch = make_batch(records, range(len(records)))
        found = _record_gradients(objective, mixing, theta, batch, records, seed=0)
        step = 1e-5
        for number, shift in enumerate(step * torch.eye(mixing.numbers, dtype=torch.float64)):
            high, low = (nats_at(objective, mixing, theta + sign * shift, records) for sign in (1, -1))
            torch.testing.assert_close(found.gradients[:, number], (high - low) / (2 * step), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.nats, nats_at(objective, mixing, theta, records))
    assert found.tokens.tolist() == [record.weight * record.scored_tokens for record in records]
    assert found.gradients.abs().min() > 0
    assert ("lm_head" in mixing.layout.modules) is (kind == "neox")


@pytest.mark.parametrize("kind", list(TARGETS))
def test_the_gradients_of_the_records_sum_to_that_of_the_batch(tmp_path: Path, kind: str) -> None:
    records = examples(6)
    with attached_objective(tmp_path, kind) as (objective, mixing):
        theta = some_theta(mixing).requires_grad_(True)
        batch = make_batch(records, range(6))
        mixing.apply(objective.attached, theta)
        (whole,) = torch.autograd.grad(objective.nats(batch).sum(), theta)
        found = _record_gradients(objective, mixing, theta.detach(), batch, records, seed=0)
    torch.testing.assert_close(found.gradients.sum(dim=0), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_sampled_labels_are_decided_by_seed_and_record_alone(tmp_path: Path, kind: str) -> None:
    """Not by the other records of the batch, their order, their file or their places; a label drawn otherwise would
    change h_n by more than a tenth of it."""
    records = examples(6)
    moved = [replace(record, place=f"elsewhere.jsonl:{i}") for i, record in enumerate(reversed(records))]
    with attached_objective(tmp_path, kind) as (objective, mixing):
        theta = some_theta(mixing)

        def rows(of: list[Example], indices: list[int], seed: int = 3) -> Tensor:
            return _record_gradients(objective, mixing, theta, make_batch(of, indices), of, seed=seed).rows()

        together = rows(records, [0, 1, 2, 3, 4, 5])
        alone = torch.cat([rows(records, [i]) for i in range(6)])
        moved_rows = torch.cat([rows(moved, [4, 1, 3]), rows(moved, [0, 5, 2])])
        other = rows(records, [0, 1, 2, 3, 4, 5], seed=4)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved_rows, together[[1, 4, 2, 5, 0, 3]], rtol=1e-5, atol=1e-6)
    assert torch.equal(_from_rows(other).gradients, _from_rows(together).gradients)
    change = (_from_rows(other).sampled - _from_rows(together).sampled).norm(dim=1)
    assert (change > 0.1 * _from_rows(together).sampled.norm(dim=1)).all()


def test_recomputed_layers_give_the_same_bits_and_the_model_is_left_at_theta(tmp_path: Path) -> None:
    """Both backward passes run through one graph, with activation checkpointing too."""
    records = examples(4)
    batch = make_batch(records, range(4))
    results = []
    with attached_objective(tmp_path, "llama", dtype=torch.float32) as (objective, mixing):
        theta = some_theta(mixing)
        for recompute in (False, True):
            with _checkpointed(objective.attached.model) if recompute else nullcontext():
                results.append(_record_gradients(objective, mixing, theta, batch, records, seed=0).rows())
        left = objective.nats(batch)
        mixing.apply(objective.attached, theta)
        assert torch.equal(left, objective.nats(batch))
    assert torch.equal(*results)
    assert not left.requires_grad


def test_two_processes_give_the_same_bits_and_a_base_sharded_over_them_the_same_numbers(
    server: ForkServer, tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """A sharded model gives its weights up in a backward pass, so there each of the two has a forward of its own."""
    for name, path in zip(("base", "first", "second"), (tiny_base, *two_adapters), strict=True):
        shutil.copytree(path, tmp_path / name)
    first, second = forked(server, 2, str(tmp_path), program="certificate_program")
    assert (first.code, second.code) == (0, 0), (first, second)
    outcome = json.loads(first.stdout)
    assert outcome["equal"]
    assert max(outcome["sharded"]) < 1e-5


def test_softmax_weights_are_refused(tmp_path: Path) -> None:
    with attached_objective(tmp_path, "llama") as (objective, mixing):
        mixing = replace(mixing, softmax=True)
        assert not can_certify(mixing)
        with pytest.raises(ValueError, match="softmax"):
            _record_gradients(objective, mixing, some_theta(mixing), make_batch(examples(1), [0]), examples(1), seed=0)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_each_token_is_sampled_as_often_as_its_probability_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Draws that are spread evenly give every token its share to within one draw, in chunks of any size."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 259 * 1000)
    count = 1 << 14
    batch = make_batch([Example("val.jsonl:1", (5, 9), (False, True))], [0])
    with attached_objective(tmp_path, kind, dtype=torch.float32) as (objective, _), torch.no_grad():
        states = objective._states(batch)
        p = torch.softmax(objective.attached.model(input_ids=batch.input_ids).logits[0, 0].double(), dim=-1)
        sampled = objective._sampled(states.expand(count, -1), torch.arange(count) / count)
    assert objective._own_head is (kind == "gpt2")
    shares = torch.bincount(sampled, minlength=259) / count
    assert ((shares - p).abs() < 1.1 / count).all()


def exact_fisher(objective: Objective, mixing: DiagonalMixing, theta: Tensor, records: list[Example]) -> Tensor:
    """(P, P) sum_t v_t sum_y p(y) d log p(y) d log p(y)^T over the whole vocabulary, from central differences."""
    batch = make_batch(records, range(len(records)))
    assert batch.weights is not None

    def log_p(at: Tensor) -> Tensor:
        with torch.no_grad():
            mixing.apply(objective.attached, at)
            logits = objective.attached.model(input_ids=batch.input_ids).logits
        return torch.log_softmax(logits.flatten(0, 1)[batch.positions], dim=-1)  # (s, vocab)

    shifts = 1e-5 * torch.eye(mixing.numbers, dtype=torch.float64)
    slopes = torch.stack([(log_p(theta + shift) - log_p(theta - shift)) / 2e-5 for shift in shifts], dim=-1)
    return torch.einsum("s,sv,svp,svq->pq", batch.weights, log_p(theta).exp(), slopes, slopes)


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_sampled_labels_estimate_the_fisher_information_of_the_weighted_loss(tmp_path: Path, kind: str) -> None:
    records = examples(4, longest=8)
    batch = make_batch(records, range(4))
    with attached_objective(tmp_path, kind, "adapter", size=0.1) as (objective, mixing):
        theta = some_theta(mixing)
        exact = exact_fisher(objective, mixing, theta, records)
        draws = []
        for seed in range(200):
            h = _record_gradients(objective, mixing, theta, batch, records, seed=seed).sampled
            draws.append(h.T @ h)
    found, error = torch.stack(draws).mean(dim=0), torch.stack(draws).std(dim=0) / len(draws) ** 0.5
    assert (error.diagonal() < 0.12 * exact.diagonal()).all()  # so that the next line says something
    assert ((found - exact).abs() < 4 * error).all()


# The algebra.

LAYOUT = Layout(
    ("model.layers.0.k", "model.layers.0.q", "model.layers.1.q"), ((3, 0), (3, 2), (3, 2))
)  # 5 weights of modules
MIXING = make_diagonal(LAYOUT, "module")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread_of(matrix: Tensor) -> Tensor:
    """(P, P): rows h_n with sum h_n h_n^T equal to the matrix."""
    return torch.linalg.cholesky(matrix).T


class Quadratic:
    """Records with nats_n(w) = t_n/2 (w - x_n)^T A (w - x_n), whose sum has the optimum in closed form.

    Args:
        points: (n, P) x_n.
        tokens: (n,) t_n.
    """

    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.3, 2.0, 0.1], dtype=torch.float64)) + 0.05  # A

    def __init__(self, points: Tensor, tokens: Tensor) -> None:
        self.points, self.tokens = points, tokens

    def at(self, theta: Tensor) -> RecordGradients:
        away = theta - self.points
        gradients = self.tokens[:, None] * (away @ self.matrix)
        nats = (gradients * away).sum(dim=1) / 2
        # G is to be A exactly; its rows are made as many as the records by zeros.
        sampled = torch.zeros_like(self.points)
        sampled[:5] = spread_of(self.matrix * self.tokens.sum())
        return RecordGradients(nats, self.tokens, gradients, sampled)

    def loss(self, theta: Tensor, start: Tensor, ridge: float) -> float:
        mean = self.at(theta).nats.sum() / self.tokens.sum()
        return float(mean + ridge / 2 * (theta - start).square().sum())

    def optimum(self, start: Tensor, ridge: float) -> Tensor:
        mean = (self.tokens[:, None] * self.points).sum(dim=0) / self.tokens.sum()
        h = self.matrix + ridge * torch.eye(5, dtype=torch.float64)
        return torch.linalg.solve(h, self.matrix @ mean + ridge * start)


def quadratic(seed: int = 0, count: int = 60) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 9, (count,), generator=generator).double()
    return Quadratic(1.0 + random(count, 5, seed=seed) / tokens.sqrt()[:, None], tokens)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_on_a_quadratic_everything_is_its_closed_form(ridge: float) -> None:
    problem, theta, start = quadratic(), random(5, seed=1), random(5, seed=2)
    certificate = _certify(MIXING, theta, start, problem.at(theta), ridge=ridge)
    loss, best = (problem.loss(w, start, ridge) for w in (theta, problem.optimum(start, ridge)))
    assert certificate.loss == pytest.approx(loss, rel=1e-12)
    assert certificate.decrement == pytest.approx(loss - best, rel=1e-9)
    h = problem.matrix + ridge * torch.eye(5, dtype=torch.float64)
    assert certificate.effective_numbers == pytest.approx(
        float(torch.linalg.solve(h, problem.matrix).trace()), rel=1e-9
    )
    gradient = h @ (theta - problem.optimum(start, ridge))
    assert certificate.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert (certificate.records, certificate.directions, certificate.unseen_gradient_norm) == (60, 5, 0.0)
    assert certificate.ridge == ridge


def test_at_the_optimum_nothing_is_left_to_gain() -> None:
    problem, start = quadratic(), random(5, seed=2)
    optimum = problem.optimum(start, 0.2)
    certificate = _certify(MIXING, optimum, start, problem.at(optimum), ridge=0.2)
    assert certificate.decrement < 1e-25
    assert certificate.gradient_norm < 1e-12


def test_without_a_ridge_the_standard_error_is_that_of_a_weighted_mean() -> None:
    """The optimum is the mean of the x_n with weights t_n, whatever A is."""
    problem, start = quadratic(), torch.zeros(5, dtype=torch.float64)
    optimum = problem.optimum(start, 0.0)
    found = _certify(MIXING, optimum, start, problem.at(optimum), ridge=0.0).standard_errors
    parts = problem.tokens[:, None] * (problem.points - optimum) / problem.tokens.sum()
    first, second, third, fourth, fifth = parts.square().sum(dim=0).sqrt().tolist()
    assert {group: row for group, row in found.items()} == {
        "model.layers.0.k": (pytest.approx(first), None),
        "model.layers.0.q": (pytest.approx(second), pytest.approx(third)),
        "model.layers.1.q": (pytest.approx(fourth), pytest.approx(fifth)),
    }


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_standard_errors_are_the_spread_over_refits(ridge: float) -> None:
    """Over 2,000 planted data sets with records of different lengths, far from where the ridge pulls to."""
    start = torch.full((5,), -2.0, dtype=torch.float64)
    optima, errors = [], []
    for seed in range(2000):
        problem = quadratic(seed, count=80)
        optima.append(problem.optimum(start, ridge))
        if seed < 40:
            certificate = _certify(MIXING, optima[-1], start, problem.at(optima[-1]), ridge=ridge)
            errors.append([e for row in certificate.standard_errors.values() for e in row if e is not None])
    spread = torch.stack(optima).std(dim=0)
    found = torch.tensor(errors, dtype=torch.float64).square().mean(dim=0).sqrt()
    torch.testing.assert_close(found, spread, rtol=0.1, atol=0.0)


def records_with(gradients: Tensor, sampled: Tensor, *, silent: int = 0) -> RecordGradients:
    """Records of one token each; `silent` more have no gradient."""
    gradients, sampled = (torch.cat([rows, torch.zeros(silent, 5)]) for rows in (gradients, sampled))
    ones = torch.ones(len(gradients), dtype=torch.float64)
    return RecordGradients(ones, ones, gradients, sampled)


def test_three_records_tell_of_three_directions_and_of_no_single_weight() -> None:
    """Without a ridge: the decrement is that within the span of the h_n, and the rest of the gradient is told. The
    other records have no gradient, so that there are not too few in all."""
    h, g, start = random(3, 5), random(3, 5, seed=1), torch.zeros(5, dtype=torch.float64)
    certificate = _certify(MIXING, start, start, records_with(g, h, silent=47), ridge=0.0)
    mean, inverse = g.sum(dim=0) / 50, torch.linalg.pinv(h.T @ h / 50)
    outside = mean - h.T @ torch.linalg.solve(h @ h.T, h @ mean)
    assert certificate.directions == 3
    assert certificate.decrement == pytest.approx(float(mean @ inverse @ mean / 2), rel=1e-9)
    assert certificate.unseen_gradient_norm == pytest.approx(float(outside.norm()), rel=1e-9)
    assert certificate.effective_numbers == pytest.approx(3.0)
    assert all(error is None for row in certificate.standard_errors.values() for error in row)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_weight_without_effect_and_two_that_cannot_be_told_apart_have_no_standard_error(ridge: float) -> None:
    """The second weight does nothing; the third and fourth act alike, but for the rounding of float32."""
    h = random(200, 5)
    h[:, 1] = 0
    h[:, 3] = h[:, 2].float().double() * (1 + 1e-7)
    certificate = _certify(MIXING, random(5), torch.zeros(5), records_with(h, h), ridge=ridge)
    assert [row for row in certificate.standard_errors.values()] == [
        (pytest.approx(200**-0.5, rel=0.3), None),
        (None, None),
        (None, pytest.approx(200**-0.5, rel=0.3)),
    ]
    assert certificate.directions == 3
    assert certificate.effective_numbers == pytest.approx(3.0, abs=0.01)
    assert certificate.unseen_gradient_norm < 1e-6


def test_a_weight_that_the_ridge_holds_more_than_the_records_do_has_no_standard_error() -> None:
    h = torch.diag(torch.tensor([0.3, 0.31, 0.32, 0.33, 0.34], dtype=torch.float64))  # G = h^2 / 50
    ridge = float(h[2, 2] ** 2 / 50) + 1e-9
    zeros = torch.zeros(5, dtype=torch.float64)
    certificate = _certify(MIXING, zeros, zeros, records_with(h, h, silent=45), ridge=ridge)
    determined = [error is not None for row in certificate.standard_errors.values() for error in row]
    assert determined == [False, False, False, False, True, True]


@pytest.mark.parametrize(("count", "given"), [(19, 0), (21, 5)])
def test_fewer_than_four_records_for_each_effective_number_give_no_standard_errors(count: int, given: int) -> None:
    h = random(count, 5)
    certificate = _certify(MIXING, random(5), torch.zeros(5), records_with(h, h), ridge=0.0)
    assert certificate.effective_numbers == pytest.approx(5.0)
    assert sum(error is not None for row in certificate.standard_errors.values() for error in row) == given


def test_no_curvature_at_all_is_no_division_by_zero() -> None:
    zeros = torch.zeros(4, 5, dtype=torch.float64)
    certificate = _certify(MIXING, zeros[0], zeros[0], records_with(random(4, 5), zeros), ridge=0.0)
    assert certificate.decrement == certificate.effective_numbers == certificate.directions == 0
    assert certificate.unseen_gradient_norm == certificate.gradient_norm > 0


def test_weights_beyond_two_are_named_by_group_and_adapter() -> None:
    problem = quadratic()
    theta = torch.tensor([2.0, 1.0, -2.1, 7.0, 2.01], dtype=torch.float64)
    certificate = _certify(MIXING, theta, theta, problem.at(theta), ridge=0.1)
    assert certificate.extrapolated == {"model.layers.0.q": (1,), "model.layers.1.q": (0, 1)}


def test_the_noise_of_a_certificate_is_how_far_nearby_losses_are_off(tmp_path: Path) -> None:
    """Beside the same weights and records in float64, whose losses differ from these by a constant and the noise; and
    of the smooth loss in float64 nothing is left."""
    records = examples(8, weights=(1.0, 2.0), longest=60)
    batches = plan_batches(records, batch_tokens=128)
    losses, noise = {}, {}
    rounded: dict[str, Tensor] = {}
    for dtype in (torch.bfloat16, torch.float64):
        with attached_objective(tmp_path / str(dtype), "llama", dtype=dtype) as (objective, mixing):
            if dtype == torch.float64:
                objective.attached.model.load_state_dict(rounded)
            rounded = {name: tensor.double() for name, tensor in objective.attached.model.state_dict().items()}
            theta, engine = some_theta(mixing), Engine(objective, Meter(SILENT))
            generator = torch.Generator().manual_seed(2)
            near = [theta + 0.01 * torch.randn(len(theta), generator=generator).double() for _ in range(60)]
            losses[dtype] = torch.tensor(
                [engine.score(mixing, at, batches, records).nats_per_token for at in near], dtype=torch.float64
            )
            found = [_noise(engine, mixing, theta, records, FitSettings(seed=seed)) for seed in range(20)]
            noise[dtype] = math.hypot(*found) / len(found) ** 0.5
            # Of twice as many records every second one is looked at; here these are the same.
            twice = _noise(engine, mixing, theta, [r for r in records for _ in range(2)], FitSettings(seed=0))
            assert twice == pytest.approx(found[0] / 2**0.5)
    spread = float((losses[torch.bfloat16] - losses[torch.float64]).std())
    assert spread / 2 < noise[torch.bfloat16] < 2 * spread
    assert noise[torch.float64] < 0.01 * spread


def test_a_certificate_is_read_back_from_json_as_it_was() -> None:
    problem, theta = quadratic(), 2.5 + random(5, seed=1)
    certificate = _certify(MIXING, theta, random(5), problem.at(theta), ridge=0.2)
    problems: list[str] = []
    text = json.dumps(encode(certificate), allow_nan=False)
    assert decode(FitCertificate, json.loads(text), "", problems) == certificate
    assert not problems
    assert certificate.extrapolated


def test_only_free_weights_of_groups_up_to_two_thousand_are_certified() -> None:
    wide = Layout(tuple(f"model.layers.{i:04}.q" for i in range(1001)), ((1, 1),) * 1001)
    kinds: tuple[MixingKind, ...] = ("adapter", "layer", "module", "rank")
    assert [can_certify(make_diagonal(LAYOUT, kind)) for kind in kinds] == [True, True, True, False]
    assert not can_certify(make_diagonal(wide, "module"))
    assert can_certify(make_diagonal(Layout(wide.modules[1:], wide.ranks[1:]), "module"))
    unused: Any = None
    assert not can_certify(make_mixing(unused, LAYOUT, "core"))


# All of it.


def planted(objective: Objective, mixing: DiagonalMixing, theta: Tensor, count: int) -> list[Example]:
    """Records of 4 random tokens and 4 that the model at theta has drawn, which are scored."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (count, 4), generator=generator)
    with torch.no_grad():
        mixing.apply(objective.attached, theta)
        for _ in range(4):
            p = torch.softmax(objective.attached.model(input_ids=ids).logits[:, -1], dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    flags = (False,) * 4 + (True,) * 4
    return [Example(f"val.jsonl:{i}", tuple(row), flags) for i, row in enumerate(ids.tolist())]


def test_fits_to_planted_records_are_certified_with_the_spread_that_they_have(tmp_path: Path) -> None:
    """24 data sets of 60 records drawn from the model at known weights, each fitted by four steps of Newton; then all
    of them together, and what is left to gain at a point beside the optimum."""
    truth = torch.tensor([0.7, 0.4], dtype=torch.float64)
    optima, errors = [], []
    with attached_objective(tmp_path, "neox", "adapter", torch.float32, size=0.1) as (objective, mixing):
        records = planted(objective, mixing, truth, 24 * 60)
        everything = make_batch(records, range(len(records)))
        found = _record_gradients(objective, mixing, truth, everything, records, seed=1)
        hessian = found.sampled.T @ found.sampled / found.tokens.sum()

        def value_and_gradient(theta: Tensor, batch: Batch) -> tuple[float, Tensor]:
            leaf = theta.clone().requires_grad_(True)
            mixing.apply(objective.attached, leaf)
            mean = objective.nats(batch).sum() / batch.scored_tokens
            return mean.item(), torch.autograd.grad(mean, leaf)[0]

        def fit(batch: Batch) -> tuple[Tensor, FitCertificate]:
            theta = truth
            for _ in range(4):
                theta = theta - torch.linalg.solve(hessian, value_and_gradient(theta, batch)[1])
            return theta, certificate(theta, batch)

        def certificate(theta: Tensor, batch: Batch) -> FitCertificate:
            found = _record_gradients(objective, mixing, theta, batch, records, seed=0)
            return _certify(mixing, theta, truth, found, ridge=0.0)

        for first in range(0, len(records), 60):
            theta, at_fit = fit(make_batch(records, range(first, first + 60)))
            optima.append(theta)
            errors.append(at_fit.standard_errors["*"])
            assert at_fit.decrement < 1e-4
        theta, at_fit = fit(everything)
        beside = theta + torch.tensor([0.1, -0.1], dtype=torch.float64)
        gain = value_and_gradient(beside, everything)[0] - at_fit.loss
        promised = certificate(beside, everything).decrement
    spread = torch.stack(optima).std(dim=0)
    expected = torch.tensor(errors, dtype=torch.float64).square().mean(dim=0).sqrt()
    assert (expected / spread > 0.65).all() and (expected / spread < 1.6).all()
    assert promised == pytest.approx(gain, rel=0.2)
