"""The base model with all adapters attached, whose only free quantities are the mixing weights; and with modules that
adapters saved whole in the place of its own.

Per module, with the adapters stacked to A (R, in) and B (out, R):

    z = A x                    (T, R)
    y = W x + B (M z)          M: a diagonal (R,), one diagonal for each record (b, 1, R), or full (R, R)

Two products whatever the number of adapters, and of the activations only z is kept for the backward pass: A, B and W
are frozen, so the gradient of M needs z and u = B^T dL/dy alone (dL/dM = sum_t u_t z_t^T), and that of x needs no
activation. The paper's code keeps a (T, out) tensor for each adapter and module instead.

The bias of a lora_B (PEFT's lora_bias) acts as one more rank row whose input is always 1, with its adapter's weight:

    y = W x + [B, b_1, ...] (M' [z; 1])          M' = (c, w_1 s_1, ...), for diagonal M with a weight per adapter alone

The experts of a mixture are such linear layers too, each for its own tokens, with one M for all, computed together
(`model/experts.py`).

A plain nn.Linear gets a forward of its own for the time being: both products land in the buffers of W x and of
dL/dx, where a hook after the fact would copy them. Everything else (Conv1D, embeddings, subclasses of nn.Linear, layers
that accelerate has wrapped) takes the hook.

Both act where the model calls the layer, as PEFT's wrapper does. A layer whose weight the model takes without calling
it is not reached (`fitting/reach.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.kinds import ModuleKind
from loracli.adapters.saved_modules import SavedModules
from loracli.algebra.basis import canonical_stack
from loracli.algebra.factors import Factors
from loracli.errors import BaseModelMismatch
from loracli.model.experts import ExpertLinear, Routing, expert_stack, experts_forward, grouped, weight_forward
from loracli.model.quantisation import is_quantised


def _mixed(z: Tensor, core: Tensor) -> Tensor:
    """M z for z (T, R): multiplied in the core's precision, rounded once."""
    if core.dim() == 2:
        return F.linear(z.to(core.dtype), core).to(z.dtype)
    z_of = z.view(len(core), -1, z.shape[1]) if core.dim() == 3 else z
    return torch.mul(z_of, core, out=torch.empty_like(z_of)).view(z.shape)  # rounded as it is stored, in one kernel


def _with_ones(z: Tensor, lora_B: Tensor) -> Tensor:
    """z (T, R) with a column of ones for each column of `lora_B` that holds a bias."""
    biases = lora_B.shape[-1] - z.shape[1]
    return F.pad(z, (0, biases), value=1.0) if biases else z


def _core_gradients(u: Tensor, z: Tensor, core: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """dL/dz (T, R) in z's dtype and dL/dM in the shape of the core, each if wanted, from u (T, R)."""
    u = u.to(core.dtype)
    if core.dim() == 2:
        return (u @ core).to(z.dtype) if wanted[0] else None, u.T @ z.to(core.dtype) if wanted[1] else None
    if core.dim() == 3:
        by_record = u.view(len(core), -1, u.shape[1])  # (b, t, R)
        grad_core = (by_record * z.view(by_record.shape)).sum(dim=1, keepdim=True) if wanted[1] else None
        grad_z = torch.mul(by_record, core, out=z.new_empty(by_record.shape)).view(z.shape) if wanted[0] else None
        return grad_z, grad_core
    grad_z = torch.mul(u, core, out=torch.empty_like(z)) if wanted[0] else None
    return grad_z, (u * z).sum(dim=0) if wanted[1] else None


def _product(x: Tensor, matrix: Tensor, ends: Tensor | None) -> Tensor:
    """x (T, in) times a matrix (in, out); with the ends of the rows of each expert, times its own of (E, in, out)."""
    return x @ matrix if ends is None else grouped(x, matrix, ends)


def _add_product(y: Tensor, x: Tensor, matrix: Tensor, ends: Tensor | None) -> Tensor:
    """y (T, out) with `_product` added in its place."""
    return y.addmm_(x, matrix) if ends is None else y.add_(grouped(x, matrix, ends))


class MixedLinear(torch.autograd.Function):
    """W x + b + B M A x for a frozen linear layer, keeping z = A x for the backward pass and nothing of width in or
    out; or for all experts of a parameter, with a W, A and B for each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        core: Tensor,
        ends: Tensor | None = None,
    ) -> Tensor:
        """x (..., in), weight (out, in), lora_A (R, in), lora_B (out, R), or with biases behind; core in float32 or
        better. With the `ends` of a `Routing` matrices have one dimension more in front, and there is no bias."""
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        y = F.linear(flat, weight, bias) if ends is None else grouped(flat, weight.mT, ends)
        z = _with_ones(_product(flat, lora_A.mT, ends), lora_B)
        _add_product(y, _mixed(z, core), lora_B.mT, ends)
        ctx.save_for_backward(z, weight, lora_A, lora_B, core, ends)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, lora_A, lora_B, core, ends = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        wants_x = ctx.needs_input_grad[0]
        u = _product(grad_y, lora_B, ends)
        grad_z, grad_core = _core_gradients(u, z, core, (wants_x, ctx.needs_input_grad[5]))
        grad_x = None
        if wants_x:
            grad_x = _product(grad_y, weight, ends)
            _add_product(grad_x, grad_z[:, : lora_A.shape[-2]], lora_A, ends)  # type: ignore[index]
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, None, grad_core, None


class AddedUpdate(torch.autograd.Function):
    """y + B M z, keeping z (T, R) for the backward pass and nothing of width in or out."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, lora_B: Tensor, core: Tensor) -> Tensor:
        """y (..., out), z (T, R), lora_B (out, R) in the model's dtype; core in float32 or better."""
        ctx.save_for_backward(z, lora_B, core)
        return torch.addmm(y.reshape(-1, y.shape[-1]), _mixed(z, core), lora_B.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, lora_B, core = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grad_z, grad_core = _core_gradients(grad_y.reshape(-1, grad_y.shape[-1]) @ lora_B, z, core, wanted)
        return grad_y, grad_z, None, grad_core


@dataclass(frozen=True)
class Stack:
    """The adapters of one module, stacked along the rank; of experts with one dimension more in front.

    Args:
        lora_A: (R, in).
        lora_B: (out, R), without scaling; behind it the biases of the adapters that have one, without scaling too, or
            zeros.
        scaling: (R,) s_i of each row, in the precision of the sums; 1 in the canonical basis.
        embed_scale: what the module multiplies its rows with, None if it is no embedding.
        entries: (R + what is behind,) which rank row's weight each column of `lora_B` takes; None if nothing is.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    embed_scale: Tensor | None
    entries: Tensor | None = None


Core = Tensor | tuple[Tensor, ...]


class AttachedModel:
    """A model under whose modules the adapters act. Made by `attach`.

    Args:
        model: the base.
        modules: L names.
        stacks: the adapters of each.
        owner: (sum R_l,) which adapter each rank row belongs to.
        precision: of the mixing weights and of what is summed for their gradient.
    Attributes:
        cores: L mixing matrices, as they were set last.
        reached: places of the modules that the model has called; whoever wants to know clears it before.
    """

    def __init__(
        self, model: Any, modules: tuple[str, ...], stacks: Sequence[Stack], owner: Tensor, precision: torch.dtype
    ) -> None:
        self.model = model
        self.modules = modules
        self.device: torch.device = next(model.parameters()).device
        self.precision = precision
        self.stacks = tuple(stacks)
        self._sizes = [len(stack.scaling) for stack in stacks]
        self._scaling = torch.cat([s.scaling for s in stacks]) if stacks else torch.zeros(0, dtype=precision)
        self._owner = owner
        self._row = torch.repeat_interleave(torch.arange(len(modules)), torch.tensor(self._sizes, dtype=torch.long))
        self.cores: tuple[Core, ...] = ()
        self.reached: set[int] = set()
        self.set_diagonal(torch.zeros(len(owner), dtype=precision))

    def set_weights(self, weights: Tensor) -> None:
        """Takes (L, N) weights of modules and adapters."""
        self.set_diagonal(weights[self._row, self._owner])

    def set_diagonal(self, c: Tensor) -> None:
        """Takes one weight for each rank row, (sum R_l,), or for each record of the next batch too, (b, sum R_l)."""
        scaled = c.to(self.precision) * self._scaling
        cores = self._placed(scaled[:, None] if scaled.dim() == 2 else scaled, self._sizes)
        self.cores = tuple(
            core if stack.entries is None else core[..., stack.entries]
            for core, stack in zip(cores, self.stacks, strict=True)
        )

    def set_matrices(self, matrices: Sequence[Tensor]) -> None:
        """Takes L matrices (R, R).

        Raises:
            ValueError: outside the canonical basis, where a scaling stands beside the factors.
        """
        if not bool((self._scaling == 1).all()):
            raise ValueError("mixing matrices need factors in the canonical basis")
        # Cast first, so that the gradient is widened on the CPU: MPS has no float64.
        flat = torch.cat([matrix.flatten() for matrix in matrices]).to(self.precision)
        parts = self._placed(flat, [matrix.numel() for matrix in matrices])
        self.cores = tuple(part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True))

    def set_factors(self, factors: Sequence[tuple[Tensor, ...]]) -> None:
        """Takes L pairs of lora_A (R, in) and lora_B (out, R) in the place of the adapters' own, scaling 1, of a linear
        module with the bias (out,) of lora_B behind them or without; of experts (E, R, in) and (E, out, R)."""
        homes = (stack.lora_A.device for stack in self.stacks)
        self.cores = tuple(tuple(f.to(home) for f in one) for one, home in zip(factors, homes, strict=True))

    def _placed(self, whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The parts (..., size) of what belongs to the modules, each where its module is: one copy for each device,
        and of the gradient one back, as each is waited for."""
        homes = [stack.lora_A.device for stack in self.stacks]
        parts = {home: torch.split(whole.to(home), list(sizes), dim=-1) for home in dict.fromkeys(homes)}
        return [parts[home][row] for row, home in enumerate(homes)]

    def core_for(self, row: int) -> Core:
        """The mixing matrix of a module that is being called."""
        self.reached.add(row)
        return self.cores[row]

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """L pairs of the stacked lora_A (R, in) and lora_B (out, R) with the scaling in B, on the CPU in float32 or
        better."""
        return [(s.lora_A.cpu().to(self.precision), s.lora_B.cpu().to(self.precision) * s.scaling) for s in self.stacks]


@contextmanager
def attach(
    model: Any, adapters: Sequence[LoraAdapter], modules: tuple[str, ...], *, canonical: bool = False
) -> Iterator[AttachedModel]:
    """Attaches the adapters at weight 0, which leaves the model's outputs as they are to the bit, and detaches them at
    the end. Experts, which transformers computes in one of several orders, are as they are up to rounding.

    Args:
        model: a frozen model in evaluation mode; factors are cast to its modules' dtypes.
        adapters: N adapters that fit it.
        modules: L names, the union of what the adapters change, of experts their parameter; row l of the weights
            belongs to the l-th.
        canonical: factors in the canonical basis (`algebra.basis`) instead of the files' own.
    Raises:
        ValueError: in the canonical basis, if an adapter has biases or experts.
    """
    precision = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    every = [adapter.targets for adapter in adapters]
    present = [[(i, targets[name]) for i, targets in enumerate(every) if name in targets] for name in modules]
    ways = [_WAYS[here[0][1][0].kind] for here in present]
    stacks = [
        way.stack(model, name, [[m.factors for m in updates] for _, updates in here], precision, canonical)
        for way, name, here in zip(ways, modules, present, strict=True)
    ]
    rows = [(i, max(m.factors.rank for m in updates)) for here in present for i, updates in here]
    owner = torch.tensor([i for i, rank in rows for _ in range(rank)], dtype=torch.long)
    attached = AttachedModel(model, modules, stacks, owner, precision)
    undo: list[Callable[[], None]] = []
    try:
        for way in dict.fromkeys(ways):
            for restore in way.act(attached, [row for row, other in enumerate(ways) if other is way]):
                undo.append(restore)
        yield attached
    finally:
        for restore in undo:
            restore()


def _replaced(target: nn.Module, name: str, forward: Any) -> Callable[[], None]:
    """Gives a module another forward, and returns what takes it away again."""
    own = vars(target).get(name)
    setattr(target, name, forward)
    return partial(delattr, target, name) if own is None else partial(setattr, target, name, own)


def _own_forward(target: nn.Module) -> str:
    """Where a module's forward is: accelerate's moves what it is given and calls the one that it found."""
    return "_old_forward" if "_old_forward" in vars(target) else "forward"


def _in_layers(attached: AttachedModel, rows: Sequence[int]) -> Iterator[Callable[[], None]]:
    """Makes linear layers and embeddings add the updates of these modules; yields what takes each away again."""
    for row in rows:
        target, stack = attached.model.get_submodule(attached.modules[row]), attached.stacks[row]
        if type(target) is nn.Linear and "forward" not in vars(target):
            yield _replaced(target, "forward", _linear_forward(target, attached, row, stack))
        else:
            yield target.register_forward_hook(_hook(attached, row, stack)).remove


def _in_weights(attached: AttachedModel, rows: Sequence[int]) -> Iterator[Callable[[], None]]:
    """As `_in_layers`, of modules that do something of their own with their weight."""
    for row in rows:
        target = attached.model.get_submodule(attached.modules[row])
        updates = partial(_weight_updates, attached, row, attached.stacks[row])
        own = _own_forward(target)
        yield _replaced(target, own, weight_forward(target, getattr(target, own), updates))


def _in_experts(attached: AttachedModel, rows: Sequence[int]) -> Iterator[Callable[[], None]]:
    """As `_in_layers`, of parameters with experts, of which a module may have several."""
    experts: dict[nn.Module, dict[str, ExpertLinear]] = {}
    for row in rows:
        path, _, parameter = attached.modules[row].rpartition(".")
        linears = experts.setdefault(attached.model.get_submodule(path), {})
        linears[parameter] = _expert_linear(attached, row, attached.stacks[row])
    for target, linears in experts.items():
        yield _replaced(target, _own_forward(target), experts_forward(target, linears))


def _expert_stack(
    model: Any, name: str, updates: Sequence[Sequence[Factors]], precision: torch.dtype, canonical: bool
) -> Stack:
    if canonical:
        raise ValueError("the experts of a parameter have no canonical basis in common")
    lora_A, lora_B, scaling, entries = expert_stack(updates, model.get_parameter(name), precision)
    return Stack(lora_A, lora_B, scaling, None, entries)


def _stack(
    model: Any,
    name: str,
    updates: Sequence[Sequence[Factors]],
    precision: torch.dtype,
    canonical: bool,
    *,
    embedding: bool = False,
) -> Stack:
    module, factors = model.get_submodule(name), [own for own, *_ in updates]
    weight: Tensor = module.weight
    biased = [place for place, f in enumerate(factors) if f.bias is not None]
    if canonical:
        if biased:
            raise ValueError("an update with a bias has no canonical basis")
        whole = canonical_stack(factors)
        factors = [Factors(whole.lora_A, whole.lora_B)]
    dtype = model.dtype if is_quantised(module) else weight.dtype
    lora_A = torch.cat([f.lora_A.to(weight.device, dtype) for f in factors])  # (R, in)
    lora_B = torch.cat([f.lora_B.to(weight.device, dtype) for f in factors], dim=1)  # (out, R)
    scaling = torch.cat([torch.full((f.rank,), f.scaling, dtype=precision) for f in factors])
    scale = getattr(module, "embed_scale", 1.0)
    embed_scale = torch.as_tensor(scale, device=weight.device) if embedding else None
    if not biased:
        return Stack(lora_A, lora_B, scaling, embed_scale)
    firsts = [sum(f.rank for f in factors[:place]) for place in biased]  # any rank row of the adapter has its weight
    entries = torch.tensor([*range(len(scaling)), *firsts], device=weight.device)
    biases = torch.stack([f.bias.to(weight.device, dtype) for f in factors if f.bias is not None], dim=1)
    return Stack(lora_A, torch.cat([lora_B, biases], dim=1), scaling, embed_scale, entries)


def _linear_forward(module: nn.Linear, attached: AttachedModel, row: int, stack: Stack) -> Any:
    def forward(x: Tensor) -> Tensor:
        core = attached.core_for(row)
        if isinstance(core, tuple):
            return F.linear(x, module.weight, module.bias) + _trained_update(x, core)
        y: Tensor = MixedLinear.apply(x, module.weight, module.bias, stack.lora_A, stack.lora_B, core)  # type: ignore[no-untyped-call]
        return y

    return forward


def _expert_linear(attached: AttachedModel, row: int, stack: Stack) -> ExpertLinear:
    def linear(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        core = attached.core_for(row)
        if isinstance(core, tuple):
            return grouped(x, weight.mT, routing.ends) + _trained_update(x, core, routing.ends)
        core = core.to(x.device)
        if core.dim() == 3:  # each row is a record of its own, with the weights of the record that its token is of
            core = core[routing.tokens // (routing.batch // len(core))]
        y: Tensor = MixedLinear.apply(x, weight, None, stack.lora_A, stack.lora_B, core, routing.ends)  # type: ignore[no-untyped-call]
        return y

    return linear


def _weight_updates(attached: AttachedModel, row: int, stack: Stack) -> list[Tensor]:
    """B M A (out, in) in the precision of M: of all tokens, or of those of each record."""
    core = attached.core_for(row)
    if isinstance(core, tuple):
        return [core[1] @ core[0]]
    core = core.to(stack.lora_A.device)
    lora_A, lora_B = stack.lora_A.to(core.dtype), stack.lora_B.to(core.dtype)
    if core.dim() == 2:
        return [lora_B @ core @ lora_A]
    return [(lora_B * weights) @ lora_A for weights in core.view(-1, core.shape[-1])]


def _hook(attached: AttachedModel, row: int, stack: Stack) -> Any:
    # An embedding's A stands transposed, so that looking up a token is reading a row.
    lora_A = stack.lora_A if stack.embed_scale is None else stack.lora_A.T.contiguous()

    def add_update(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        core, x = attached.core_for(row), args[0].to(y.device)
        if stack.embed_scale is not None:
            rows = core[0].to(lora_A.dtype).T if isinstance(core, tuple) else lora_A
            z = F.embedding(x, rows).view(-1, rows.shape[1]) * stack.embed_scale.to(rows.dtype)  # (T, R)
            if isinstance(core, tuple):
                return y + F.linear(z, core[1].to(z.dtype)).view(y.shape)
        elif isinstance(core, tuple):
            return y + _trained_update(x, core)
        else:
            z = F.linear(x.reshape(-1, x.shape[-1]), lora_A)  # (T, R); A is frozen, so x is not kept
            z = _with_ones(z, stack.lora_B)
        updated: Tensor = AddedUpdate.apply(y, z, stack.lora_B, core.to(y.device))  # type: ignore[no-untyped-call]
        return updated

    return add_update


def _trained_update(x: Tensor, factors: tuple[Tensor, ...], ends: Tensor | None = None) -> Tensor:
    """B A x, or B A x + b, with all in the dtype of x; here x and A x are kept for the backward pass."""
    lora_A, lora_B, *bias = (factor.to(x.device, x.dtype) for factor in factors)
    if ends is not None:
        return grouped(grouped(x, lora_A.mT, ends), lora_B.mT, ends)
    return F.linear(F.linear(x, lora_A), lora_B, *bias)


@dataclass(frozen=True)
class _Way:
    """How adapters act in the modules of a kind.

    Args:
        stack: the adapters of one module: of the model, its name, the updates of each adapter, the precision, and
            whether the basis is canonical.
        act: makes the modules of these rows add their updates; yields what takes each of that away again.
    """

    stack: Callable[[Any, str, Sequence[Sequence[Factors]], torch.dtype, bool], Stack]
    act: Callable[[AttachedModel, Sequence[int]], Iterator[Callable[[], None]]]


_WAYS: Mapping[ModuleKind, _Way] = {
    "linear": _Way(_stack, _in_layers),
    "embedding": _Way(partial(_stack, embedding=True), _in_layers),
    "parameter": _Way(_stack, _in_weights),
    "experts": _Way(_expert_stack, _in_experts),
}


def replace_modules(model: nn.Module, saved: SavedModules | None) -> None:
    """Gives the model the saved parameters, each rounded once to the dtype of its own, which they replace for good.

    A parameter that was tied to another, as a head to the embeddings, is tied no longer: PEFT wraps a copy too.

    Args:
        model: whole on this process.
        saved: what replaces it, None for nothing.
    Raises:
        BaseModelMismatch: if the model has no such parameter, or in another shape.
    """
    if saved is None:
        return
    check_saved(model, saved)
    for path in saved.sources:
        module, _, name = path.rpartition(".")
        own = model.get_parameter(path)
        replaced = saved.read(path).to(own.device, own.dtype)
        setattr(model.get_submodule(module), name, nn.Parameter(replaced, requires_grad=False))


@contextmanager
def modules_replaced(model: nn.Module, saved: SavedModules | None) -> Iterator[None]:
    """As `replace_modules`, for the time being: at the end the model has its own parameters again, tied as before.

    Raises:
        BaseModelMismatch: as `replace_modules`.
    """
    if saved is not None:
        check_saved(model, saved)
    own = {path: model.get_parameter(path) for path in (() if saved is None else saved.sources)}
    replace_modules(model, saved)
    try:
        yield
    finally:
        for path, parameter in own.items():
            module, _, name = path.rpartition(".")
            setattr(model.get_submodule(module), name, parameter)


def check_saved(model: nn.Module, saved: SavedModules) -> None:
    """Whether the model, which may be without numbers, has the parameters that are to be replaced.

    Raises:
        BaseModelMismatch: as `replace_modules`.
    """
    for path, shape in saved.shapes.items():
        try:
            own = tuple(model.get_parameter(path).shape)
        except AttributeError:
            raise BaseModelMismatch(
                f"an adapter saved {path}, which the base model does not have",
                hint="the adapter was trained on another model or model class; check --base",
            ) from None
        if own != shape:
            raise BaseModelMismatch(
                f"an adapter saved {path} in the shape {shape}; the base model has {own}",
                hint="if its vocabulary was resized for training, give the resized model with --base",
            )
