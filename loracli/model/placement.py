"""Where a base model goes and what it takes: how much memory there is and what running out of it looks like, activation
checkpointing, devices and processes.

Activation checkpointing: each decoder layer keeps its input only, and runs a second time in the backward pass.

Costs one more forward (3 units a token instead of 2) and keeps T x hidden numbers a layer. transformers has a switch
for the same, but it works in training mode alone, where dropout is on too.

Where a base model goes that is too big for one device: over the CUDA devices of one process, or shared out over
several processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loracli.errors import OutOfResources, UsageError
from loracli.system.machine import read_launch, says_memory_ran_out


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into OutOfResources; any other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            raise _ours() from error
        raise


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or says_memory_ran_out(error)


def _ours() -> OutOfResources:
    return OutOfResources(
        "memory ran out",
        hint="try --dtype bfloat16; for a fit also --checkpointing, a smaller --batch-tokens or a smaller --max-length",
    )


def available_memory(device: str, *, every: bool = False, root: Path = Path("/")) -> int | None:
    """Bytes that a new tensor could take on the device now; None if nothing tells.

    Of a CUDA device what its driver calls free. Of the CPU what Linux calls available, or less where a control group
    (a container, a batch job) allows less; elsewhere the free pages, or all pages where those are not told.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...
        every: all CUDA devices together, as a device map uses them.
        root: of the file system with `proc` and `sys`.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if every else [device]
        return sum(int(torch.cuda.mem_get_info(one)[0]) for one in devices)
    if kind != "cpu":
        return None
    meminfo = _numbers(root / "proc/meminfo")
    free = meminfo["MemAvailable"] * 1024 if "MemAvailable" in meminfo else _free_pages()  # kB
    rooms = [room for room in (free, *_group_rooms(root)) if room is not None]
    return max(min(rooms), 0) if rooms else None


def _free_pages() -> int | None:
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not of this system
            continue
    return None


def _group_rooms(root: Path) -> list[int]:
    """What each control group above this process leaves: limit - used + file cache that can be dropped."""
    rooms = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path may be the host's; what the container sees of it then stands at the top.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            folder = root.joinpath(top, *parts[:depth])
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal():  # "max" is no limit
                rooms.append(int(most) - int(now) + _numbers(folder / "memory.stat").get(cache, 0))
    return rooms


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name value`, as the kernel writes them."""
    words = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can be run again, in order: the outermost ones of the class that transformers gives them; none
    for the few models that do without it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in decoder_layers(child)]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Makes every decoder layer recompute itself in the backward pass, and undoes it at the end.

    The gradients are the same to the bit. Layers that take part in no gradient, those below the lowest adapted one,
    keep nothing, as without. Between a forward and its backward pass nothing may change: neither the mixing weights nor
    the hooks, for the second run would see the change.

    Args:
        model: frozen, in evaluation mode, and with whatever acts inside its layers attached before or after.
    Raises:
        UsageError: if the model has no such layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UsageError(
            f"activation checkpointing is not possible with {type(model).__name__}: transformers does not mark its "
            "layers",
            hint="leave it out, and give a smaller --batch-tokens or --max-length",
        )
    # Not `__call__`: what hooks do around a layer, such as gathering a sharded layer's weights, is done once a pass.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _recomputed(layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


def _recomputed(forward: Any) -> Any:
    # There is no dropout whose random numbers would have to be drawn again.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Placement:
    """Where and how a base model runs; of this, only `dtype` and `device` can change a result.

    Args:
        dtype: `auto`, or float32, bfloat16, float16, float64.
        device: `auto`, or a torch device; with several processes, of this one.
        device_map: `auto` to spread the base over all devices of this machine, in place of `device`.
        checkpointing: run layers again in the backward pass, for less memory; without it the estimate decides.
        shard: share the base out over all processes of this fit, in place of a copy in each.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    checkpointing: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for what no machine has, before anything is looked for."""
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of auto, {', '.join(DTYPES)}")
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            raise UsageError(
                f"--device {self.device} is not a device of torch", hint="cpu, cuda, cuda:1 or mps, for example"
            ) from None

    def check_processes(self, world_size: int) -> None:
        """Raises UsageError for a base that is to be shared out over one process."""
        if self.shard and world_size == 1:
            raise UsageError(
                "--shard shares the base model out over processes, and this is the only one",
                hint="start them with torchrun --nproc-per-node, or leave --shard out",
            )


def placement_options(device: str, device_map: str | None, shard: int | None) -> dict[str, Any]:
    """What `from_pretrained` is told beside the usual; nothing, where the model goes to one device.

    Raises:
        UsageError: if the options contradict each other or the way this process was started.
    """
    if device_map is None and shard is None:
        return {}
    if device_map is not None and shard is not None:
        raise UsageError(
            "--device-map puts the base model on the devices of one process, --shard over several: give one"
        )
    processes = read_launch().world_size
    if shard is None:
        if device_map != "auto":
            raise UsageError(f"--device-map {device_map} is not in this version", hint="it has auto")
        if device != "auto":
            raise UsageError(f"--device-map auto chooses the devices: leave --device {device} out")
        if processes > 1:
            raise UsageError(
                f"--device-map auto is for one process, and these are {processes}",
                hint="leave torchrun out",
            )
        return {"device_map": "auto"}
    if shard < 2 or shard != processes:
        raise UsageError(
            f"the base model is to be sharded over {shard} processes, and there are {processes}",
            hint="start them with torchrun --nproc-per-node",
        )
    _check_shard_device(device)
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(fsdp_size=shard)}
    except (ImportError, TypeError) as error:
        raise UsageError("this version of transformers cannot shard a model", hint="upgrade transformers") from error


def _check_shard_device(device: str) -> None:
    """transformers shards over this machine's kind of accelerator, whatever else is asked for."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    if device != "auto" and torch.device(device).type != kind:
        raise UsageError(f"--shard takes this machine's {kind} devices, not --device {device}: leave --device out")


def check_device_map(device_map: Mapping[str, Any]) -> None:
    """Wants every layer on a device that computes.

    accelerate would bring the others in for the forward pass and take them away before the backward pass needs them.

    Raises:
        OutOfResources: naming the layers that found no place.
    """
    devices = {name: str(device) for name, device in device_map.items()}
    kinds = set(devices.values())
    idle = {"disk", "meta"} if kinds <= {"cpu", "disk", "meta"} else {"cpu", "disk", "meta"}
    left_over = [name for name, device in devices.items() if device in idle]
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise OutOfResources(
            f"the CUDA devices have no room for {left_over[0]}{more} of the base model: --device-map auto would keep "
            f"them on {devices[left_over[0]]}, and gradients through such layers are not reliable",
            hint="give --dtype bfloat16, more devices, or --device cpu",
        )


def check_sharded(model: nn.Module) -> None:
    """Wants every decoder layer sharded, which transformers does for models whose layers it finds by name.

    Raises:
        UsageError: naming the model's class.
    """
    from torch.distributed.fsdp import FSDPModule

    layers = decoder_layers(model)
    if not layers or not all(isinstance(layer, FSDPModule) for layer in layers):
        name = type(model).__name__.removeprefix("FSDP")
        raise UsageError(
            f"transformers has no plan to shard the layers of a {name}",
            hint="leave --shard out, so that each process holds it whole; or --device-map auto without torchrun",
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are shared out over several processes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def whole(weight: Tensor) -> Tensor:
    """The weight, gathered from all processes where it is sharded: all must ask for it."""
    full: Any = getattr(weight, "full_tensor", None)
    gathered: Tensor = weight if full is None else full()
    return gathered
