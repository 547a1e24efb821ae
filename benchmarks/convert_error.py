"""How well a plain LoRA stands in for a trained DoRA, PiSSA or OLoRA adapter. Prints Markdown for docs/convert.md.

    python benchmarks/convert_error.py
    python benchmarks/convert_error.py --base DIR --data calibration.jsonl --eval-data test.jsonl --steps 100

Trains each with stock PEFT on every linear layer, converts it, loads what was written with stock PEFT on the untouched
base, and scores the trained model and the converted ones on the same records. The relative error is that of the change
in the base's weights over all modules, as `loracat convert` states it. Without --base: the embedded example.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.measuring import BenchmarkParser
from benchmarks.paper.tasks import EVERY_LINEAR
from benchmarks.paper.training import epoch_of
from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import read_records
from loracli.calibration.render import Example, render_file
from loracli.conversion.convert import ConvertRequest, convert_adapter
from loracli.demo.run import example_folder
from loracli.errors import UsageError
from loracli.model.attach import attach
from loracli.model.base import load_base
from loracli.model.loss import make_objective
from loracli.model.reference import find_base

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}


def main() -> None:
    example = example_folder()
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--base", type=Path, default=example / "base")
    parser.add_argument("--data", type=Path, default=example / "calibration.jsonl")
    parser.add_argument("--eval-data", type=Path, default=example / "test.jsonl")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 2e-3], quick=[2e-3])
    parser.add_argument("--steps", type=int, default=60, quick=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], quick=[8])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), quick=["DoRA"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    base = load_base(find_base([], str(arguments.base)), dtype="float32")
    data, held = (
        render_file(read_records(path), base.tokenizer, max_length=512).examples
        for path in (arguments.data, arguments.eval_data)
    )
    print(
        f"rank {arguments.rank}, {arguments.steps} steps; nats per token of the base: {score(base.model, held):.4f}\n"
    )
    print("| trained | rate | trained model | converted | rank | relative error | nats per token | seconds |")
    print("|---|--:|--:|---|--:|--:|--:|--:|")
    for kind in arguments.kinds:
        for rate in arguments.rates:
            with tempfile.TemporaryDirectory() as folder:
                rows(kind, rate, base.model, data, held, Path(folder), arguments)


def rows(
    kind: str, rate: float, model: Any, data: list[Example], held: list[Example], folder: Path, arguments: Any
) -> None:
    trained = train(kind, rate, copy.deepcopy(model), data, arguments)
    said = score(trained, held)
    trained.save_pretrained(folder / "trained", save_embedding_layers=False)
    wanted = [("--rank", rank) for rank in arguments.ranks] if kind == "DoRA" else []
    for option, rank in [("default", None), *wanted]:
        started = time.monotonic()
        try:
            made = convert_adapter(
                ConvertRequest(str(folder / "trained"), base=str(arguments.base), rank=rank), folder / "out", force=True
            )
        except UsageError as error:
            print(f"| {kind} | {rate:g} | {said:.4f} | {option} | | refused: {error} | | |", flush=True)
            continue
        seconds = time.monotonic() - started
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder / "out")).eval()
        print(
            f"| {kind} | {rate:g} | {said:.4f} | {option} | {made.exported.layout.rank} | {made.relative_error:.1e} | "
            f"{score(loaded, held):.4f} | {seconds:.1f} |",
            flush=True,
        )


def train(kind: str, rate: float, model: Any, data: list[Example], arguments: Any) -> Any:
    """AdamW with linear decay on batches of eight records."""
    torch.manual_seed(0)
    rank = arguments.rank
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(EVERY_LINEAR), task_type="CAUSAL_LM", **KINDS[kind]
    )
    adapted = get_peft_model(model, config).eval()
    adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], rate, weight_decay=0.0)
    rng = random.Random(0)
    batches = [batch for _ in range(1 + 8 * arguments.steps // len(data)) for batch in epoch_of(data, 8, rng)]
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / arguments.steps)
    with attach(adapted, (), ()) as attached:
        objective = make_objective(attached, batches[0])
        for step, batch in enumerate(batches[: arguments.steps]):
            adam.zero_grad()
            (objective.nats(batch).sum() / batch.scored_tokens).backward()
            adam.step()
            schedule.step()
            if step % 20 == 0:
                print(f"{kind} at {rate:g}: step {step}", file=sys.stderr, flush=True)
    return adapted


def score(model: Any, examples: list[Example]) -> float:
    """Nats per scored token."""
    batches = plan_batches(examples, batch_tokens=2048)
    with attach(model, (), ()) as attached:
        return make_objective(attached, batches[0]).score(batches, len(examples)).nats_per_token


if __name__ == "__main__":
    main()
