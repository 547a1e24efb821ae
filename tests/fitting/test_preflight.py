"""The memory estimate against what is really allocated, and what is decided from it."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MixtralConfig

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import make_batch
from loracli.calibration.render import Example
from loracli.errors import OutOfResources
from loracli.fitting.mixing import make_layout
from loracli.model.attach import attach
from loracli.model.base import BasePlan, load_base, plan_base
from loracli.model.loss import Objective, make_objective
from loracli.model.preflight import MemoryEstimate, _rank_rows, decide_memory, estimate_memory
from loracli.model.reference import BaseReference
from loracli.model.session import _checkpointed
from tests import tiny
from tests.fitting.allocations import allocated_bytes, saved_bytes
from tests.tiny import make_adapter, make_base

SHARED = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512}
WIDE_MLP = dict(
    hidden_size=64,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
)
WIDE_ATTENTION = dict(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
)
ROWS, LENGTH = 2, 128


def plan_of(base: Path, dtype: str = "float32") -> BasePlan:
    return plan_base(BaseReference("tiny/base", base, None), dtype=dtype, device="cpu")


def built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type, sizes: dict[str, int]
) -> tuple[Path, list[LoraAdapter]]:
    monkeypatch.setitem(tiny.CONFIGS, "measured", lambda: kind(**SHARED, **sizes))
    base = make_base(folder / "base", "measured")
    experts = kind is MixtralConfig
    mlp = ([], ["gate_up_proj"], ["down_proj"]) if experts else (["up_proj"], [], [])
    first = make_adapter(folder / "a", base, targets=("q_proj", "v_proj", *mlp[0]), parameters=mlp[1], rank=16)
    last = () if experts else ("down_proj",)
    second = make_adapter(folder / "b", base, targets=(*last, "v_proj"), parameters=mlp[2], rank=8)
    return base, [read_adapter(str(first)), read_adapter(str(second))]


@pytest.mark.parametrize(
    ("kind", "sizes", "dtype"),
    [
        (LlamaConfig, WIDE_MLP, "float32"),
        (MixtralConfig, {**WIDE_MLP, "num_local_experts": 8, "num_experts_per_tok": 2}, "float32"),
        (LlamaConfig, WIDE_ATTENTION, "bfloat16"),
        (Gemma2Config, WIDE_ATTENTION, "float32"),  # its attention is not fused
    ],
)
def test_the_estimate_is_within_half_of_what_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, sizes: dict[str, int], dtype: str
) -> None:
    """What autograd saves in a forward; and the peak of forward and backward with the head, both ways."""
    path, adapters = built(tmp_path, monkeypatch, kind, sizes)
    estimate = estimate_memory(plan_of(path, dtype), adapters, batch_tokens=ROWS * LENGTH, max_length=LENGTH)
    base = load_base(BaseReference("tiny/base", path, None), dtype=dtype, device="cpu")
    ids = torch.randint(3, 259, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    scored = (False,) + (True,) * (LENGTH - 1)
    batch = make_batch([Example(i, tuple(row.tolist()), scored) for i, row in enumerate(ids)], range(ROWS))
    modules = make_layout(adapters).modules
    weights = torch.ones(len(modules), 2, requires_grad=True)
    peaks = []
    for recompute in (False, True):
        with (
            attach(base.model, adapters, modules) as attached,
            _checkpointed(base.model) if recompute else nullcontext(),
        ):
            objective = make_objective(attached, batch)
            attached.set_weights(weights)
            if not recompute:
                saved = saved_bytes(base.model, lambda: base.model.base_model(input_ids=ids, use_cache=False))

            def gradient(objective: Objective = objective) -> object:
                return torch.autograd.grad(objective.nats(batch).sum(), weights)

            peaks.append(allocated_bytes(gradient)[1])
    assert estimate.checkpointed is not None
    assert 1 / 1.5 < estimate.activations / saved < 1.5
    assert 1 / 1.5 < (estimate.activations + estimate.head) / peaks[0] < 1.5
    assert 1 / 1.5 < (estimate.checkpointed + estimate.head) / peaks[1] < 1.5


def test_a_token_meets_the_ranks_of_the_experts_that_it_is_sent_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rank 16 in gate_up_proj of 8 experts, 2 a token; and of q_proj and v_proj in each layer."""
    sizes = {**WIDE_MLP, "num_local_experts": 8, "num_experts_per_tok": 2}
    path, (first, _) = built(tmp_path, monkeypatch, MixtralConfig, sizes)
    skeleton = plan_of(path).skeleton
    layers = len([name for name in first.targets if name.endswith("gate_up_proj")])
    assert layers and _rank_rows(skeleton, first) == layers * (2 * 16 + 2 * 16)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_weights_are_the_numbers_in_the_file_in_the_dtype_of_the_fit(tmp_path: Path, kind: str) -> None:
    """A tied head is stored, and counted, once."""
    raw = (make_base(tmp_path, kind) / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stored = sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        estimate = estimate_memory(plan_of(tmp_path, dtype), [], batch_tokens=64, max_length=64)
        assert estimate.weights == stored * size


def test_adapters_are_counted_stacked_in_the_dtype_of_the_fit(tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    adapters = [read_adapter(str(path)) for path in two_adapters]
    numbers = 3 * (4 * (32 + 32) + 4 * (32 + 16) + 4 * (32 + 48)) + 3 * (2 * (32 + 32) * 2)
    estimate = estimate_memory(plan_of(tiny_base, "bfloat16"), adapters, batch_tokens=64, max_length=64)
    assert estimate.adapters == 2 * numbers


def test_layers_below_the_lowest_adapted_one_are_not_counted(tmp_path: Path, tiny_base: Path) -> None:
    def activations(*layers: int, targets: tuple[str, ...] = ("v_proj",)) -> int:
        options = {"layers_to_transform": list(layers)} if layers else {}
        path = make_adapter(tmp_path / f"{layers}{targets}", tiny_base, targets=targets, rank=1, **options)
        return estimate_memory(plan_of(tiny_base), [read_adapter(str(path))], batch_tokens=1, max_length=1).activations

    z = 4  # bytes, of the one rank in one layer
    one = activations(2) - z
    assert one > 0
    assert activations(1, 2) == 2 * (one + z)
    assert activations(0) == 3 * one + z
    assert activations(targets=("embed_tokens",)) == 3 * one + z
    assert activations(targets=("lm_head",)) == z


def test_a_sharded_base_takes_a_share_and_the_layers_in_use(tiny_base: Path) -> None:
    plan = plan_of(tiny_base)
    numbers = sum(p.numel() for p in plan.skeleton.parameters())
    layer = sum(p.numel() for p in plan.skeleton.model.layers[0].parameters())
    estimate = estimate_memory(plan, [], batch_tokens=64, max_length=64, shards=4)
    assert estimate.weights == 4 * (numbers // 4 + 2 * layer + 259 * 32)


def test_the_head_is_a_chunk_of_logits_unless_the_model_acts_on_them(tmp_path: Path) -> None:
    """32,768 tokens times 259 logits are half of a chunk of 64 MB; twice as many tokens are a whole chunk."""
    heads = {}
    for kind in ("llama", "gemma2"):
        plan = plan_of(make_base(tmp_path / kind, kind))
        heads[kind] = [
            estimate_memory(plan, [], batch_tokens=tokens, max_length=8).head - 2 * tokens * 32 * 4
            for tokens in (1 << 15, 1 << 16, 1 << 18)
        ]
    assert heads["llama"][0] == (1 << 15) * 259 * 8
    assert heads["llama"][1] == heads["llama"][2] == (64 << 20) // (4 * 259) * 259 * 8
    assert heads["gemma2"][2] == 4 * heads["gemma2"][1] == 8 * heads["gemma2"][0]


ESTIMATE = MemoryEstimate(weights=600, adapters=50, activations=400, checkpointed=100, head=50)


def test_layers_are_run_again_only_where_that_is_needed(tiny_base: Path) -> None:
    plan = plan_of(tiny_base)
    enough = decide_memory(ESTIMATE, 1300, plan)
    assert (enough.checkpointing, enough.tight) == (False, False)
    assert enough.note == "memory: about 1.1 kB, with 1.3 kB free on cpu"
    scarce = decide_memory(ESTIMATE, 1100, plan)
    assert (scarce.checkpointing, scarce.tight) == (True, False)
    assert "about 800 B instead of 1.1 kB, with 1.1 kB free on cpu; layers are run again" in scarce.note
    tight = decide_memory(ESTIMATE, 700, plan)
    assert (tight.checkpointing, tight.tight) == (True, True)
    assert "memory may run out: about 800 B" in tight.note
    assert "a smaller --batch-tokens or a smaller --max-length or --dtype bfloat16" in tight.note
    unable = decide_memory(replace(ESTIMATE, checkpointed=None), 1100, plan)
    assert (unable.checkpointing, unable.tight) == (False, True)
    assert "run again" not in unable.note


def test_processes_on_one_device_share_its_memory(tiny_base: Path) -> None:
    plan = plan_of(tiny_base)
    assert not decide_memory(ESTIMATE, 2400, plan).checkpointing
    half = decide_memory(ESTIMATE, 2400, plan, processes=2)
    assert half.checkpointing and "1.2 kB free on cpu for each of 2 processes" in half.note


def test_weights_that_cannot_fit_are_refused_with_what_is_needed_and_the_ways_out(tiny_base: Path) -> None:
    with pytest.raises(
        OutOfResources, match="tiny/base and the adapters take 650 B, and there are 640 B free"
    ) as raised:
        decide_memory(ESTIMATE, 640, plan_of(tiny_base))
    for way in ("--dtype bfloat16", "--device-map auto"):
        assert way in str(raised.value.hint)
    with pytest.raises(OutOfResources) as raised:
        decide_memory(ESTIMATE, 640, plan_of(tiny_base, "bfloat16"), sharded=True)
    assert raised.value.hint == "try more processes"


def test_nothing_is_refused_where_the_memory_is_unknown(tiny_base: Path) -> None:
    decision = decide_memory(replace(ESTIMATE, weights=1 << 60), None, plan_of(tiny_base))
    assert (decision.checkpointing, decision.tight) == (False, False)
