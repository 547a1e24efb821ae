"""What a module's factors see on records: the second moment of z = A x, (R, R) numbers that stand for all of x.

    G = E[z z^T]        over every token that reaches the module, x its input, A (R, in) of the composition

With it |dW x|^2 has the mean trace(B G B^T), so a cut can be judged by what it does to the activations that occur
without an (in, in) matrix. A fit leaves G in its recipe, from one more forward of a few of its training records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loracli.adapters.adapter import LoraAdapter, kernels_of, module_names
from loracli.adapters.kinds import kind_of
from loracli.adapters.names import is_numbered
from loracli.calibration.dataset import Batch, plan_batches, shuffled
from loracli.calibration.render import Example
from loracli.errors import UsageError
from loracli.fitting.engine import Engine
from loracli.fitting.mixing import Applied, Mixing, TrainedFactors
from loracli.model.loss import Objective
from loracli.model.placement import has_float64
from loracli.progress import Progress, amount_text
from loracli.recipe.record import RecipeActivations
from loracli.recipe.tensors import MOMENT, sidecar_sha256

_MOST_RECORDS = 64  # of a fit: some thousand tokens, against R of some dozens
_MOST_BYTES = 256 << 20  # of all G in float64, which every record's part has too


def check_weighable(adapters: Sequence[LoraAdapter], *, hint: str) -> None:
    """Refuses adapters whose modules do not each have inputs of their own to weigh.

    Args:
        adapters: that are composed.
        hint: the way out.
    Raises:
        UsageError: if an expert is changed, which sees the tokens that are routed to it, or a convolution.
    """
    convolution = next(iter(kernels_of(adapters)), None)
    expert = next((name for name in module_names(adapters) if is_numbered(name)), None)
    for what, name in (("convolution", convolution), ("expert", expert)):
        if name is not None:
            raise UsageError(f"the activations of the {what} {name} cannot be weighed", hint=hint)


def second_moments(
    engine: Engine,
    mixing: Applied,
    theta: Tensor,
    lora_A: Mapping[str, Tensor],
    batches: Sequence[Batch],
    examples: Sequence[Example],
    *,
    key: str | None = None,
) -> dict[str, Tensor]:
    """G (R, R) of each module in float64, the same bits for any number of processes.

    Args:
        engine: of the attached model.
        mixing, theta: what is attached meanwhile.
        lora_A: A (R, in) of each module; products with it are in float32 or the model's wider dtype.
        batches: one record each, so that no padding is counted.
        examples: that the batches are made of.
        key: of what is remembered.
    """
    sizes = [len(A) ** 2 for A in lora_A.values()]
    with _watched(engine.objective, lora_A) as sums_of:
        total = engine.summed(mixing, theta, batches, examples, sums_of, sum(sizes) + len(sizes), key=key)
    *sums, rows = torch.split(total, [*sizes, len(sizes)])
    return {
        name: part.view(len(A), len(A)) / max(float(count), 1.0)
        for (name, A), part, count in zip(lora_A.items(), sums, rows, strict=True)
    }


@contextmanager
def _watched(objective: Objective, lora_A: Mapping[str, Tensor]) -> Iterator[Callable[[Batch], Tensor]]:
    """A function of a batch: the sums of z z^T of all modules, end to end, and then L numbers, over how many rows."""
    model, seen, handles = objective.attached.model, dict[str, list[Tensor]](), []
    device = objective.attached.device
    exact = has_float64(device)

    def watch(name: str, module: nn.Module) -> Any:
        precision = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        A = lora_A[name].to(module.weight.device, precision)  # type: ignore[arg-type]
        scale = float(getattr(module, "embed_scale", 1.0))

        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(module, nn.Embedding):
                z = F.embedding(x.reshape(-1), A.T) * scale
            else:
                z = F.linear(x.reshape(-1, x.shape[-1]).to(A), A)
            seen.setdefault(name, []).append(z.double() if exact else z)  # (T, R); a model may run a layer twice

        return module.register_forward_pre_hook(look)

    def sums_of(batch: Batch) -> Tensor:
        seen.clear()
        objective.record_sums(batch)
        dtype = torch.float64 if exact else torch.float32
        none = {name: torch.zeros(0, len(A), dtype=dtype) for name, A in lora_A.items()}
        every = [torch.cat(seen[name]) if name in seen else none[name] for name in lora_A]
        # Products where the activations are, and one copy from there for all modules.
        products = torch.cat([(z.T @ z).flatten().to(device) for z in every]).cpu().double()
        return torch.cat([products, torch.tensor([len(z) for z in every]).double()])

    try:
        for name in lora_A:
            handles.append(watch(name, model.get_submodule(name)))
        yield sums_of
    finally:
        for handle in handles:
            handle.remove()


def chosen_records(training: Sequence[Example], *, seed: int) -> list[Example]:
    """The training records that a fit leaves the second moments of."""
    return shuffled(training, seed=seed)[:_MOST_RECORDS]


def fit_activations(
    engine: Engine,
    adapters: Sequence[LoraAdapter],
    mixing: Mixing,
    theta: Tensor,
    training: Sequence[Example],
    *,
    seed: int,
    progress: Progress,
) -> RecipeActivations | None:
    """What a fit leaves in its recipe; None, and it is said, where it would be too large or is not finite, and where
    experts are changed, whose inputs no cut goes by.

    Args:
        engine: of the attached model.
        adapters: of the fit.
        mixing, theta: that were found.
        training: all records that were fitted on.
        seed: of the choice among them.
        progress: told of what is left out.
    """
    if any(kind_of(module).of_experts for adapter in adapters for module in adapter.modules.values()):
        return None
    engine.meter.stage("looking at the adapters' inputs")
    lora_A = _input_factors(adapters, mixing, theta)
    size = sum(len(A) ** 2 for A in lora_A.values()) * torch.float64.itemsize
    without = "they are left out of the recipe, and export --activation-aware will need --fit-data"
    if size > _MOST_BYTES:
        progress.note(f"the second moments of the activations take {amount_text(size, 'B')}: {without}")
        return None
    examples = chosen_records(training, seed=seed)
    batches = plan_batches(examples, batch_tokens=1)
    found = second_moments(engine, mixing, theta, lora_A, batches, examples, key="activations")
    moments = {f"{name}.{MOMENT}": moment.float() for name, moment in found.items()}
    if not all(bool(torch.isfinite(moment).all()) for moment in moments.values()):
        progress.warn(f"the second moments of the activations are not finite: {without}")
        return None
    tokens = sum(batch.tokens for batch in batches)
    return RecipeActivations(len(examples), tokens, sidecar_sha256(moments), moments)


def _input_factors(adapters: Sequence[LoraAdapter], mixing: Mixing, theta: Tensor) -> dict[str, Tensor]:
    """A (R, in) of each module as an export has it: the trained one, or those of the adapters' files, stacked."""
    modules = mixing.layout.modules
    if isinstance(mixing, TrainedFactors):
        return dict(zip(modules, (lora_A for lora_A, _ in mixing.factors(theta)), strict=True))
    return {
        name: torch.cat([a.modules[name].factors.lora_A.float() for a in adapters if name in a.modules])
        for name in modules
    }
