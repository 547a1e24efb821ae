"""Where and how a base model runs: its dtype, its device or devices, and whether its layers run a second time in the
backward pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic
from torch import nn

from loracli.arguments import check_declared
from loracli.errors import UsageError
from loracli.model.quantisation import UNQUANTISED, check_quantise
from loracli.system.display import count_text
from loracli.system.machine import says_memory_ran_out
from loracli.system.near import did_you_mean


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or says_memory_ran_out(error)


def free_cached_memory(device: torch.device) -> None:
    """Gives back what torch keeps of a device for later: in pieces of other sizes it may be of no use to a smaller
    micro-batch."""
    if device.type != "cpu":
        empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()


@contextmanager
def exact_kernels(device: torch.device, *, one_order: bool = True) -> Iterator[None]:
    """Products that are summed in float32 at least, by kernels that add in the same order every time, for the time
    being.

    On the CPU all are so. On CUDA products of bfloat16 and float16 may be summed in themselves, and the backward pass
    of attention, for one, adds in any order unless torch is told. An operation that has no such kernel raises, which
    `lacks_exact_kernel` recognises.

    Args:
        device: that the work is on.
        one_order: whether the order of sums matters.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    products: Any = torch.backends.cuda.matmul
    narrow = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    allowed = {name: getattr(products, name) for name in narrow}
    try:
        torch.set_deterministic_debug_mode("error" if one_order else before)
        memory.fill_uninitialized_memory = False  # what is never read need not be the same
        for name in narrow:
            setattr(products, name, False)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        for name, value in allowed.items():
            setattr(products, name, value)
        memory.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(before)


def lacks_exact_kernel(error: Exception) -> bool:
    """Whether torch says that an operation has no kernel for one order of sums, under `exact_kernels`."""
    return isinstance(error, RuntimeError) and "deterministic" in str(error)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can be run again, in order: the outermost ones of the class that transformers gives them; none
    for the few models that do without it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in decoder_layers(child)]


def has_float64(device: str | torch.device) -> bool:
    """Whether a device computes in float64: MPS does not."""
    if torch.device(device).type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def check_device(asked: str) -> None:
    """Whether torch sees the device; nothing is started on it.

    Raises:
        UsageError: if not.
    """
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UsageError(
            f"--device {asked} is not a device of torch", hint="cpu, cuda, cuda:1 or mps, for example"
        ) from None
    try:
        module: Any = torch.get_device_module(device)
        there = module.device_count() if module.is_available() else 0
    except RuntimeError:  # it has no devices of its own
        there = 0
    if (device.index or 0) >= there:
        seen = count_text(there, f"{device.type} device")
        raise UsageError(
            f"--device {asked} is not here: torch {torch.__version__} sees {seen}",
            hint="leave --device out, or give --device cpu",
        )


def resolve_device(asked: str) -> str:
    """The device, once it is seen to be there.

    Raises:
        UsageError: if it cannot be used, with the reason.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the same bits again; read when CUDA starts
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked).item()  # the device `meta` has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {asked} cannot be used: {reason}") from None
    return asked


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Placement:
    """Where and how a base model runs; of this, only `dtype`, `device` and `quantise` can change a result.

    Args:
        dtype: `auto`, or float32, bfloat16, float16, float64.
        device: `auto`, or a torch device; with several processes, of this one.
        device_map: `auto` to spread the base over all devices of this machine, in place of `device`.
        checkpointing: run layers again in the backward pass, for less memory; without it the estimate decides.
        shard: share the base out over all processes of this fit, in place of a copy in each.
        quantise: `nf4` or `int8`, to keep the linear layers of a base in full precision so; `none` to leave them as
            they are, also where a recipe was fitted otherwise.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    checkpointing: bool = False
    shard: bool = False
    quantise: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what this machine does not have, before anything is looked for."""
        check_declared(self)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(
                f"--dtype {self.dtype} is not one of auto, {', '.join(DTYPES)}", hint=did_you_mean(self.dtype, DTYPES)
            )
        check_quantise(self.quantise)
        if self.form is not None and self.shard:
            raise UsageError("a quantised base cannot be shared out", hint="leave out --quantise or --shard")
        if self.device != "auto":
            check_device(self.device)
            if self.dtype == "float64" and not has_float64(self.device):
                raise UsageError(f"--device {self.device} has no float64", hint="give another dtype, or --device cpu")

    @property
    def form(self) -> str | None:
        """What the linear layers of a base in full precision are made."""
        return None if self.quantise == UNQUANTISED else self.quantise

    def algebra_device(self) -> torch.device:
        """Where cuts and methods are computed, in float64: on the device that was named, if it has float64, and else on
        the CPU.

        Raises:
            UsageError: if the device cannot be used.
        """
        named = "cpu" if self.device == "auto" else resolve_device(self.device)
        return torch.device(named if has_float64(named) else "cpu")

    def check_processes(self, world_size: int) -> None:
        """Raises UsageError for a base that is to be shared out over one process."""
        if self.shard and world_size == 1:
            raise UsageError(
                "--shard shares the base model out over processes, and this is the only one",
                hint="start them with torchrun --nproc-per-node, or leave --shard out",
            )
