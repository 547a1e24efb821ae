"""Nats per scored token: equal to the model's own loss, whatever the head does, and whatever the batches are."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.calibration.dataset import make_batch, plan_batches
from loracli.calibration.render import Example
from loracli.errors import BaseModelMismatch
from loracli.fitting.mixing import make_layout
from loracli.model import loss as loss_module
from loracli.model.attach import attach
from loracli.model.loss import FrozenHead, check_causal, make_objective
from tests.tiny import make_adapter, make_base


def examples(count: int = 7) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for line in range(count):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        flags = [False, *(torch.rand(length - 1, generator=generator) < 0.6).tolist()]
        flags[-1] = True
        result.append(Example(f"val.jsonl:{line}", tuple(ids), tuple(flags)))
    return result


def reference_nats(model: object, example: Example) -> float:
    """Each record alone, from the model's full logits, by a loop."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()  # type: ignore[operator]
    return sum(
        float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, example.input_ids[place]])
        for place, flag in enumerate(example.scored)
        if flag
    )


@pytest.mark.parametrize(
    ("kind", "own_head"), [("llama", True), ("llama-tied", True), ("qwen2", True), ("neox", True), ("gpt2", True),
                           ("gemma2", False), ("granite", False), ("cohere", False)]
)  # fmt: skip
def test_the_loss_is_the_models_own_on_every_architecture(tmp_path: Path, kind: str, own_head: bool) -> None:
    base = make_base(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    records = examples()
    batches = plan_batches(records, batch_tokens=64)
    with attach(model, [], ()) as attached:
        objective = make_objective(attached, batches[0])
        scores = objective.score(batches, len(records))
    assert objective._own_head is own_head
    expected = torch.tensor([reference_nats(model, record) for record in records], dtype=torch.float64)
    torch.testing.assert_close(scores.nats, expected, rtol=1e-5, atol=1e-5)
    assert scores.tokens.tolist() == [record.scored_tokens for record in records]


def test_an_adapted_head_is_scored_through_the_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = read_adapter(str(make_adapter(tmp_path / "a", base, targets=("lm_head", "q_proj"))))
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    records = examples()
    batches = plan_batches(records, batch_tokens=64)
    modules = make_layout([adapter]).modules
    with attach(model, [adapter], modules) as attached:
        objective = make_objective(attached, batches[0])
        attached.set_weights(torch.ones(len(modules), 1))
        scores = objective.score(batches, len(records))
        expected = torch.tensor([reference_nats(model, record) for record in records], dtype=torch.float64)
    assert not objective._own_head
    torch.testing.assert_close(scores.nats, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_the_loss_does_not_depend_on_the_batch_size(tiny_base: Path, batch_tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval().requires_grad_(False)
    records = examples(20)
    with attach(model, [], ()) as attached:
        one_by_one = plan_batches(records, batch_tokens=1)
        objective = make_objective(attached, one_by_one[0])
        alone = objective.score(one_by_one, len(records))
        together = objective.score(plan_batches(records, batch_tokens=batch_tokens), len(records))
    torch.testing.assert_close(together.nats, alone.nats, rtol=1e-6, atol=1e-6)
    assert abs(together.nats_per_token - float(alone.nats.sum() / alone.tokens.sum())) < 1e-6


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 259 * 3, 1 << 30])
def test_the_heads_loss_and_gradient_are_autograds_in_chunks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(259, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(259, generator=generator, dtype=torch.float64)
    labels = torch.randint(259, (8,), generator=generator)
    scale = torch.randn(8, generator=generator, dtype=torch.float64)
    results = []
    for compute in (
        lambda h: FrozenHead.apply(h, weight, bias, labels),
        lambda h: F.cross_entropy(F.linear(h, weight, bias), labels, reduction="none"),
    ):
        leaf = hidden.clone().requires_grad_(True)
        nats = compute(leaf)
        (gradient,) = torch.autograd.grad((nats * scale).sum(), leaf)
        results.append((nats.detach(), gradient))
    torch.testing.assert_close(results[0], results[1])


def test_the_head_sees_scored_positions_only(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval().requires_grad_(False)
    batch = make_batch(examples(), range(7))
    rows = []
    with attach(model, [], ()) as attached:
        objective = make_objective(attached, batch)
        handle = model.lm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1].numel()))
        objective.nats(batch)
        handle.remove()
    assert rows == [0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "neox", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass_the_probe_for_causality(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base", kind), dtype=dtype).eval()
    check_causal(model, "x", plan_batches(examples(), batch_tokens=64)[0])


def test_a_model_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base", "bert")).eval()
    with pytest.raises(BaseModelMismatch, match="x is not causal"):
        check_causal(model, "x", plan_batches(examples(), batch_tokens=64)[0])
