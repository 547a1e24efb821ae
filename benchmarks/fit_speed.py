"""The cost of one step of the fit, beside the bare base model and beside PEFT's layers.

    python benchmarks/fit_speed.py
    python benchmarks/fit_speed.py --widths 2048 --adapters 2 4 8 16 --dtype bfloat16

Timed in turns in one process, on the same batch and with the same head on the scored half of the tokens:

    bare     the base model alone: forward, and the gradient of its input
    ours     all adapters attached, and the gradient of one weight for each module and adapter
    PEFT     PEFT's layers with all adapters active and a learnable scaling for each module and adapter, which is what
             the code of LoRA Soups runs

The total rank stays the same however many adapters share it. `share` is the low-rank products' part of the bare
model's floating-point operations. `kept` is what the backward pass of the weights needs beside the bare model's own.
`error` is how far the two gradients are apart, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.made_inputs import LINEAR, write_adapter
from benchmarks.measuring import BenchmarkParser, spent_by
from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import Batch, make_batch
from loracli.calibration.render import Example
from loracli.model.attach import AttachedModel, attach
from loracli.model.loss import FrozenHead

VOCABULARY = 4096


def make_adapters(base: LlamaForCausalLM, count: int, rank: int) -> list[LoraAdapter]:
    """Adapters on all linear layers, written and read."""
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(LINEAR)
    }
    with tempfile.TemporaryDirectory() as folder:
        return [
            read_adapter(str(write_adapter(Path(folder) / f"a{i}", shapes, rank, seed=i, base_id="random/llama")))
            for i in range(count)
        ]


def make_base(width: int, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A llama of that width with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(width * 2.75),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def make_two_records(tokens: int) -> Batch:
    """Two records whose second halves are scored."""
    length = tokens // 2
    ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    scored = tuple(place >= length // 2 for place in range(length))
    return make_batch([Example(f"record {i}", tuple(row), scored) for i, row in enumerate(ids.tolist())], (0, 1))


def loss(model: Any, head: nn.Linear, batch: Batch, inputs: Tensor) -> Tensor:
    """Total nats, with the head on scored positions alone."""
    hidden = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    rows = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    nats: Tensor = FrozenHead.apply(rows, head.weight, None, batch.labels)  # type: ignore[no-untyped-call]
    return nats.sum()


def bare_step(base: LlamaForCausalLM, batch: Batch) -> None:
    inputs = base.model.embed_tokens(batch.input_ids).requires_grad_(True)
    torch.autograd.grad(loss(base.model, base.lm_head, batch, inputs), inputs)


def our_step(attached: AttachedModel, adapters: int, batch: Batch, *, through: bool = False) -> Tensor:
    """`through`: the graph reaches down to the input, as in the bare model, so that what is kept can be compared."""
    weights = torch.full((len(attached.modules), adapters), 0.5, requires_grad=True)
    attached.set_weights(weights)
    base = attached.model
    inputs = base.model.embed_tokens(batch.input_ids).requires_grad_(through)
    return torch.autograd.grad(loss(base.model, base.lm_head, batch, inputs), weights)[0]


def peft_step(scalings: list[Tensor], peft: PeftModel, batch: Batch, *, through: bool = False) -> Tensor:
    base = peft.base_model.model
    inputs = base.model.embed_tokens(batch.input_ids).requires_grad_(through)
    return torch.stack(torch.autograd.grad(loss(base.model, base.lm_head, batch, inputs), scalings))


def make_peft(base: LlamaForCausalLM, adapters: list[LoraAdapter]) -> tuple[PeftModel, list[Tensor]]:
    """PEFT's model with all adapters active at weight 1/2, and the scalings, module after module, as leaves."""
    rank = next(iter(adapters[0].modules.values())).factors.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEAR))

    def frozen(factor: Tensor) -> nn.Parameter:
        return nn.Parameter(factor.to(base.device, base.dtype), requires_grad=False)

    names = [f"a{i}" for i in range(len(adapters))]
    peft = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    peft.base_model.set_adapter(names)
    peft.eval().requires_grad_(False)
    scalings: list[Tensor] = []
    layers = {name: m for name, m in peft.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    for name in sorted(layers):
        for label, adapter in zip(names, adapters, strict=True):
            factors = adapter.modules[name].factors
            layers[name].lora_A[label].weight = frozen(factors.lora_A)
            layers[name].lora_B[label].weight = frozen(factors.lora_B)
            scaling = torch.tensor(0.5 * factors.scaling, dtype=base.dtype, device=base.device, requires_grad=True)
            layers[name].scaling[label] = scaling
            scalings.append(scaling)
    return peft, scalings


def kept_bytes(step: Callable[[], Any]) -> int:
    """Bytes of the activations that a step keeps for its backward pass, each storage once; weights are no part."""
    seen: dict[int, int] = {}
    live: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            live.append(tensor)
        return tensor

    weights: set[int] = set(kept_bytes.weights)  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def measure(width: int, count: int, args: argparse.Namespace) -> list[str]:
    dtype = getattr(torch, args.dtype)
    batch = make_two_records(args.tokens)
    base = make_base(width, args.layers, dtype)
    adapters = make_adapters(base, count, args.total_rank // count)
    modules = tuple(sorted(adapters[0].modules))
    peft, scalings = make_peft(make_base(width, args.layers, dtype), adapters)
    times: dict[str, list[float]] = {"bare": [], "ours": [], "PEFT": []}
    for turn in range(args.repeats + 1):
        spent = {"bare": spent_by(lambda: bare_step(base, batch))}
        with attach(base, adapters, modules) as attached:
            spent["ours"] = spent_by(lambda: our_step(attached, count, batch))  # noqa: B023
            if turn == 0:
                kept_bytes.weights = {s.data_ptr() for s in _constants(attached, base, peft)}  # type: ignore[attr-defined]
                ours = our_step(attached, count, batch)
                kept = [kept_bytes(lambda: our_step(attached, count, batch, through=True))]  # noqa: B023
        spent["PEFT"] = spent_by(lambda: peft_step(scalings, peft, batch))
        if turn:  # the first is warm-up
            for name, found in spent.items():
                times[name].append(found.seconds)
        else:
            theirs = peft_step(scalings, peft, batch).view(len(modules), count)
            error = float((ours - 2.0 * theirs).abs().max() / ours.abs().max())
            kept = [
                kept_bytes(lambda: bare_step(base, batch)),
                *kept,
                kept_bytes(lambda: peft_step(scalings, peft, batch, through=True)),
            ]
    low = sum(a.modules[m].factors.rank * (sum(base.get_submodule(m).weight.shape)) for a in adapters for m in modules)
    dense = sum(base.get_submodule(m).weight.numel() for m in modules) + VOCABULARY * width // 2
    ratio = _ratio(times["ours"], times["bare"])
    extra = [max(kept[i] - kept[0], 1) for i in (1, 2)]
    return [
        f"{width}",
        f"{count}",
        f"{low / dense:.3f}",
        f"{ratio:.3f}",
        f"{ratio - 1 - low / dense:+.3f}",
        f"{_ratio(times['PEFT'], times['ours']):.2f}",
        f"{extra[0] / args.tokens / 1e3:.1f}",
        f"{extra[1] / args.tokens / 1e3:.1f}",
        f"{extra[1] / extra[0]:.0f}",
        f"{error:.0e}",
    ]


def _constants(attached: AttachedModel, base: nn.Module, peft: nn.Module) -> list[Any]:
    tensors = [t for stack in attached.stacks for t in (stack.lora_A, stack.lora_B)]
    tensors += [*base.parameters(), *peft.parameters(), *base.buffers(), *peft.buffers()]
    return [tensor.untyped_storage() for tensor in tensors]


def _ratio(left: list[float], right: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], quick=[64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8, 16], quick=[2])
    parser.add_argument("--total-rank", type=int, default=64, quick=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, quick=32)
    parser.add_argument("--repeats", type=int, default=7, quick=1)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.tokens} tokens, total rank {args.total_rank}\n")
    columns = "width, N, share, ours / bare, beyond share, PEFT / ours, ours kept (kB/token), PEFT kept, ratio, error"
    print("| " + " | ".join(columns.split(", ")) + " |")
    print("|" + "--:|" * len(columns.split(", ")))
    for width in args.widths:
        for count in args.adapters:
            print("| " + " | ".join(measure(width, count, args)) + " |", flush=True)


if __name__ == "__main__":
    main()
