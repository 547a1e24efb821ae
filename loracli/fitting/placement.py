"""Where a base model goes that is too big for one device: over the CUDA devices of one process, or shared out over
several processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loracli.errors import OutOfResources, UsageError
from loracli.fitting.checkpointing import decoder_layers
from loracli.system.launch import read_launch

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
                f"--device {self.device} is no device of torch", hint="cpu, cuda, cuda:1 or mps, for example"
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
