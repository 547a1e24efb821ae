"""A device that there is not: `gpu:0` and `gpu:1`, whose tensors hold their numbers on the CPU.

torch lets a backend be written in Python. This one computes nothing of its own: it runs each operation on the CPU and
keeps what a real device is strict about. Tensors of two devices may not meet, float64 may be refused as MPS does, and
launches of kernels and waits for the device are counted. Whole fits run on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
_CPU = torch.device("cpu")
_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}
_NO_LAUNCH = {"_local_scalar_dense", "_unsafe_view", "lift_fresh"}


@dataclass
class Seen:
    """What a simulated device was asked for, and how strict it is.

    Attributes:
        launches: operations that start a kernel, by name.
        waits: places where the program waited for the device: numbers that were read, and copies to it and from it.
        refuses_float64: as MPS does.
    """

    refuses_float64: bool = False
    launches: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()


_off = Seen()
_seen = _off


@contextmanager
def simulated(*, refuses_float64: bool = False) -> Iterator[Seen]:
    """The device, as long as this lasts; skips the test where torch has no backends in Python."""
    global _seen
    _register()
    _seen = Seen(refuses_float64)
    try:
        # Of a backend in Python torch's threads know one device; so all runs in this one.
        with torch.autograd.set_multithreading_enabled(False):
            yield _seen
    finally:
        _seen = _off


class OnDevice(torch.Tensor):
    """A tensor of the simulated device; `inner` holds its numbers."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> OnDevice:
        if _seen.refuses_float64 and inner.dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        tensor: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(device.type, device.index or 0),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()


@dataclass(frozen=True)
class _Operation:
    """What is known of an operation by its schema."""

    name: str
    takes_index: bool
    reads: bool
    launches: bool


@cache
def _operation(func: Any) -> _Operation:
    name = func._schema.name.removeprefix("aten::")
    views = [value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns]
    free = any(views) or name in _NO_LAUNCH or name.startswith(("empty", "new_empty"))
    return _Operation(name, name in ("index", "index_put_", "_index_put_impl_"), name in _READS, not free)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the inner tensors; what comes out is on the device that was asked for, or on theirs."""
    operation, asked = _operation(func), kwargs.get("device")
    given: list[torch.Tensor] = []
    ours: dict[int, OnDevice] = {}

    def inner(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [inner(each) for each in x]
        if isinstance(x, torch.Tensor):
            given.append(x)
        if isinstance(x, OnDevice):
            ours[id(x.inner)] = x
            return x.inner
        return x

    inner_args, inner_kwargs = inner(args), {name: inner(value) for name, value in kwargs.items()}
    device = next(iter(ours.values())).device if asked is None else torch.device(asked)
    if operation.name == "copy_":
        device = args[0].device
        _copied(args[1], device, args[0].dtype)
    elif operation.name == "_to_copy":
        _copied(args[0], device, kwargs.get("dtype"))
    else:
        _counted(operation, given)
    if asked is not None:
        inner_kwargs["device"] = _CPU
    made = func(*inner_args, **inner_kwargs)
    if device.type == "cpu":
        return made
    assert all(x.shape == x.inner.shape for x in ours.values()), f"{operation.name} changed a shape in its place"

    def placed(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(placed(each) for each in x)
        if not isinstance(x, torch.Tensor):
            return x
        return ours[id(x)] if id(x) in ours else OnDevice(x, device)  # what was written to stays what it is

    return placed(made)


def _copied(source: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> None:
    """Of one device to itself or to the next it is a kernel; between the CPU and a device the program waits."""
    if source.device.type == device.type:
        _seen.launches.append("copy")
        return
    if _seen.refuses_float64 and dtype == torch.float64 and source.dtype != torch.float64:
        raise TypeError(NO_FLOAT64)  # the cast comes first, on the device
    _wait(f"copy of {source.numel()}")


def _counted(operation: _Operation, given: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError as CUDA does, where tensors of two devices meet: a number of the CPU may."""
    device = next((x.device for x in given if isinstance(x, OnDevice)), None)
    for x in given:
        index = operation.takes_index and x.dtype in (torch.long, torch.bool)
        if x.device != device and x.dim() and not index:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {x.device}, {device} ({operation.name})"
            )
        if index and (x.device != device or x.dtype == torch.bool):  # it is brought there, and a mask is counted
            _wait(operation.name)
    if operation.name == "cumsum" and given[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")
    if operation.reads:
        _wait(operation.name)
    if operation.launches:
        _seen.launches.append(operation.name)


def _wait(what: str) -> None:
    """Notes where in the package, or else in what it uses, the program waits."""
    frame, place = sys._getframe(1), ""
    while frame is not None and not place.startswith("loracli"):
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(("loracli.", "transformers.")):
            place = f"{module}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    _seen.waits.append(f"{what} at {place}")


@cache
def _register() -> None:
    """Once in a process: a name for the device, and the kernels that no tensor of its own leads to."""
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        pytest.skip("this torch has no backends in Python")
    setup("gpu", _Backend())
    aten = torch.ops.aten
    for made in (aten.empty.memory_format, aten.empty_strided, aten.arange, aten.arange.start, aten.arange.start_step):
        overload = made if isinstance(made, torch._ops.OpOverload) else made.default
        _KERNELS.impl(overload.name().removeprefix("aten::"), partial(_made, overload), "PrivateUse1")
    _KERNELS.impl("_copy_from", _copy_from, "PrivateUse1")


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """There only while a test uses it, so that nothing else takes it for this machine's accelerator."""

    def is_available(self) -> bool:
        return _seen is not _off

    def device_count(self) -> int:
        return 2

    def empty_cache(self) -> None:
        _seen.launches.append("empty_cache")


_KERNELS = torch.library.Library("aten", "IMPL")  # as long as the process


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(func, args, kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _run(torch.ops.aten.copy_.default, (target, source), {})
    return target
