"""Which of the modules that adapters change a model ever calls.

An adapter acts where its layer is called, in PEFT as here. Two kinds of layers are not:

- **Bypassed.** The model takes the layer's weight and multiplies with it itself: `dt_proj` of Mamba, FalconMamba and
  Jamba, `dense` of a BLOOM that is `slow_but_exact`. The update acts nowhere, neither in a fit nor in PEFT; but it
  would in a weight that it is merged into.
- **Passed by.** The layer is called for what the records do not hold: a vision tower, an expert that no token is sent
  to. The update acts elsewhere, and the records say nothing of its weight.

Which modules are reached is seen on the records. Which weights a model takes is seen without any, and without the
base's numbers: its forward is run once on a few tokens with every layer replaced by one that gives zeros, while each
operation is looked at for the weights that go into it. A router, which takes its own weight when it is called, stays as
it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loracli.calibration.render import Example
from loracli.errors import BaseModelMismatch
from loracli.fitting.engine import Engine
from loracli.model.base import plan_base
from loracli.model.modules import kind_and_shape
from loracli.model.reference import BaseReference
from loracli.model.session import Session
from loracli.progress import Progress

_NAMED = 4  # modules in a message; of the others the number
_TOKENS = 4  # of the trial
_IGNORED = "it is not known which updates the base ignores"


@dataclass(frozen=True)
class Reach:
    """What records do not reach of the modules that adapters change.

    Args:
        unreached: modules that the model calls for none of the records.
        bypassed: of those, the ones whose weight it reads all the same.
    """

    unreached: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()

    @property
    def passed_by(self) -> tuple[str, ...]:
        """Modules that are called, but not for these records."""
        return tuple(name for name in self.unreached if name not in self.bypassed)


@dataclass(frozen=True)
class WeightsRead:
    """Linear layers and embeddings whose weight a model reads outside of the layer.

    Args:
        bypassed: without ever calling the layer.
        shared: besides calling it, as for a second use of one matrix.
        failure: why it could not be tried, None if it was.
    """

    bypassed: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    failure: str | None = None


def find_reach(engine: Engine, session: Session, examples: Sequence[Example]) -> Reach:
    """Which of the attached modules records reach, at what is attached; modules that they do not are warned of.

    Args:
        engine: of the attached model.
        session: of its base.
        examples: the records; run until every module is reached.
    Raises:
        BaseModelMismatch: if none is reached.
    """
    unreached = engine.unreached(session.batches(examples), examples, key="reach")
    if not unreached:
        return Reach()
    base, progress = session.base.reference, session.progress
    found = Reach(unreached, bypassed_of(unreached, base, progress))
    _tell(found, engine.objective.attached.modules, base.id, progress)
    return found


def foresee_bypassed(modules: Sequence[str], base: BaseReference, progress: Progress) -> None:
    """Tells beforehand what `find_reach` will of modules that the base bypasses, from its config alone.

    Raises:
        BaseModelMismatch: if it bypasses all of them.
    """
    bypassed = bypassed_of(modules, base, progress)
    _tell(Reach(bypassed, bypassed), modules, base.id, progress)


def _tell(found: Reach, modules: Sequence[str], base_id: str, progress: Progress) -> None:
    if len(found.unreached) == len(modules):
        raise BaseModelMismatch(
            f"no record reaches a module that the adapters change: {named(found.passed_by or found.bypassed)}"
            + ("; " + taken_text(base_id, found.bypassed) if found.bypassed else ""),
            hint="take adapters of layers that the model calls for text; PEFT ignores these for it too",
        )
    if found.bypassed:
        progress.warn(
            f"{taken_text(base_id, found.bypassed)}: their updates act neither here nor in PEFT, and a fit leaves "
            "their weights where it begins"
        )
    if found.passed_by:
        progress.warn(
            f"no record reaches {named(found.passed_by)}: nothing here says what their updates do, and a fit leaves "
            "weights that are theirs alone where it begins"
        )


def bypassed_of(modules: Iterable[str], base: BaseReference, progress: Progress) -> tuple[str, ...]:
    """Those of the modules that the base bypasses, by its config alone; tells where that could not be tried."""
    read = weights_read(base)
    warn_untried(read, base.id, _IGNORED, progress)
    return tuple(name for name in modules if name in read.bypassed)


def warn_untried(read: WeightsRead, base_id: str, unknown: str, progress: Progress) -> None:
    """Tells of a base whose forward could not be tried, and what is not known for that."""
    if read.failure is not None:
        progress.warn(
            f"whether {base_id} reads weights without calling their layers could not be tried: {read.failure}; "
            f"{unknown}"
        )


def warn_of_merging(base_id: str, bypassed: Sequence[str], progress: Progress) -> None:
    """Tells of an adapter that a merge would make another model of than PEFT runs."""
    progress.warn(
        f"{taken_text(base_id, bypassed)}: PEFT ignores their updates, as a fit does; merge_and_unload and engines "
        "that call these layers add them; loracat fuse leaves them out"
    )


def named(names: Sequence[str]) -> str:
    """The first of some modules, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def taken_text(base_id: str, names: Sequence[str]) -> str:
    """That a base bypasses these modules, for a sentence that says what follows."""
    return f"{base_id} reads the weight of {named(names)} without calling the layer"


def weights_read(base: BaseReference) -> WeightsRead:
    """What the base's own forward does with the weights of its layers, told by its config alone.

    First on the device `meta`, where nothing is computed. Forwards that look at numbers, as routers do, fail there and
    run on the CPU, on zeros that all lie in one place.
    """
    skeleton = plan_base(base, dequantised=True).skeleton
    trial = _Trial(skeleton)
    with _quiet():
        try:
            return trial.run("meta")
        except Exception:  # transformers' code, for a device that it was not written for
            _fill_with_zeros(skeleton)
        try:
            return trial.run("cpu")
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            return WeightsRead(failure=reason)


class _Trial:
    """A model without numbers whose layers are replaced by ones that remember being called and give zeros."""

    def __init__(self, skeleton: Any) -> None:
        self._skeleton = skeleton.eval()
        self._called: set[str] = set()
        self._layers: list[tuple[str, nn.Module]] = []
        for name, module in skeleton.named_modules():
            kind, in_features, out_features = kind_and_shape(module)
            if kind == "parameter":  # a router, whose forward makes more of its weight than W x, and keeps it
                continue
            if kind != "other":
                dtype = module.weight.dtype if kind == "embedding" else None
                module.forward = partial(self._layer, name, out_features, dtype)
                self._layers.append((name, module))
            elif hasattr(module, "has_gate") and hasattr(module, "_apply_gate"):  # experts, see `model/experts.py`
                module.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)

    def run(self, device: str) -> WeightsRead:
        self._called.clear()
        names: dict[int, list[str]] = {}  # tied layers have one weight
        for name, module in self._layers:
            names.setdefault(id(module.weight), []).append(name)
        with torch.no_grad(), _Watch(names.keys()) as watch:
            self._skeleton(input_ids=torch.ones(1, _TOKENS, dtype=torch.long, device=device), use_cache=False)
        bypassed: set[str] = set()
        shared: set[str] = set()
        for weight in watch.read:
            called = [name for name in names[weight] if name in self._called]
            (shared if called else bypassed).update(called or names[weight])
        return WeightsRead(frozenset(bypassed), frozenset(shared))

    def _layer(self, name: str, width: int, looked_up: torch.dtype | None, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros in the shape of W x, or, in the dtype of an embedding, of the rows that x names."""
        self._called.add(name)
        shape = x.shape[:-1] if looked_up is None else x.shape
        return torch.zeros(*shape, width, dtype=looked_up or x.dtype, device=x.device)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which of some tensors, by their ids, go into an operation."""

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ids = frozenset(ids)
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read.update(self._ids.intersection(map(id, tree_leaves((args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


def _fill_with_zeros(skeleton: nn.Module) -> None:
    """Gives every parameter and buffer zeros that take no memory; what is tied stays tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that its id stays its own
    for module in skeleton.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = tensor, nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
                store[name] = made[id(tensor)][1]  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers and torch without what they say of a forward."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
