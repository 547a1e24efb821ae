"""What records cost a model, in nats per scored token, and the gradient of that.

    loss = sum of v -log p(token) over all scored positions / sum of v, with v the weight of the position's file

whatever the batches: sums are kept, and divided once. The head runs on scored positions only, in chunks, with its
gradient taken in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.calibration.dataset import Batch
from loracli.errors import BaseModelMismatch
from loracli.model.attach import AttachedModel, Core


@dataclass(frozen=True)
class Scores:
    """What each of n records costs.

    Args:
        nats: (n,) sums over the record's scored tokens, each as many times as it counts, float64.
        tokens: (n,) how many those are, counted likewise.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    def part(self, records: Sequence[int]) -> Scores:
        """The scores of some of the n records."""
        return Scores(self.nats[list(records)], self.tokens[list(records)])

    def pooled(self, units: Tensor) -> Scores:
        """The scores of m units, each the sum of those of its records; `units` (n,) has the place of each record's."""
        zeros = self.nats.new_zeros(int(units.max()) + 1)  # (m,)
        return Scores(zeros.index_add(0, units, self.nats), zeros.index_add(0, units, self.tokens.to(zeros.dtype)))


CHUNK_BYTES = 64 << 20  # of float32 logits at a time
_DRAWS = 1 << 24  # what a draw is a multiple of one of
_PARTS = 1 << 38  # of a probability as a whole number: with a draw's parts it stays within 64 bits
_NOT_ROUNDING = 0.02  # of the largest logit: more than bfloat16 loses, far less than a look at the future changes


class FrozenHead(torch.autograd.Function):
    """-log softmax(W h + b)[label] at each position, for a head that is not trained.

    The gradient of a position's loss in h is (p - onehot) W. It is computed while the logits of a chunk are at hand, so
    what is kept is as large as h, not as the logits. The idea is Liger Kernel's; this is plain torch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """hidden (s, d), weight (vocab, d), labels (s,); returns (s,) in float32 or better."""
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        nats = []
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(labels), rows):
            part, wanted = hidden[start : start + rows], labels[start : start + rows, None]
            logits = _widened(F.linear(part, weight, bias))  # (rows, vocab)
            log_p = torch.log_softmax(logits, dim=-1)
            nats.append(-log_p.gather(1, wanted).squeeze(1))
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
                gradient[start : start + rows] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nats[:, None].to(gradient.dtype), None, None, None


class Objective:
    """The loss of an attached model on batches. Made by `make_objective`."""

    def __init__(self, attached: AttachedModel, head: nn.Module, *, own_head: bool) -> None:
        self.attached = attached
        self._head = head
        self._own_head = own_head
        self._names_of_head = _names_of(attached.model, head)
        self._kept: WeakKeyDictionary[Batch, dict[tuple[str, torch.device], Tensor]] = WeakKeyDictionary()

    def nats(self, batch: Batch) -> Tensor:
        """(s,): -log p of every scored token of the batch, as many times as it counts, at the attached weights,
        differentiable in them."""
        states = self._states(batch)
        nats = self._nats(states, self._on(states.device, batch, "labels"))
        return nats if batch.weights is None else nats * self._on(nats.device, batch, "weights", nats.dtype)

    def nats_and_sampled_nats(self, batch: Batch, draws: Tensor) -> tuple[Tensor, Tensor]:
        """(s,) and (s,): -log p of every scored token, and of a token sampled from the model's own distribution in its
        place, each once whatever its weight. Both come from one forward pass, differentiable in the attached weights.

        Args:
            batch: b records.
            draws: (s,) in [0, 1), multiples of 2^-24, which float32 holds: a position is given the first token at which
                the cumulated probability exceeds its draw.
        """
        states = self._states(batch)
        sampled = self._sampled(states.detach(), draws)
        return self._nats(states, self._on(states.device, batch, "labels")), self._nats(states, sampled)

    def set_weights_of_records(self, batch: Batch, c: Tensor) -> None:
        """Gives each record of the batch mixing weights of its own, (b, sum R_l), one for each rank row."""
        attached = self.attached
        attached.set_diagonal(c)

        def of_scored(core: Core) -> Tensor:
            assert isinstance(core, Tensor)
            return core[self._on(core.device, batch, "owners")]

        # An adapted head sees scored positions instead of records.
        attached.cores = tuple(
            of_scored(core) if name in self._names_of_head else core
            for name, core in zip(attached.modules, attached.cores, strict=True)
        )

    def _states(self, batch: Batch) -> Tensor:
        """What the loss at the scored positions is computed from: (s, d) hidden states for our head, otherwise the
        model's own logits (s, vocab)."""
        if not self._own_head:
            return self._logits(batch)
        weight: Tensor = self._head.weight  # type: ignore[assignment]
        return self._hidden(batch).to(weight.device)

    def _on(self, device: torch.device, batch: Batch, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the batch on a device, where it is brought once: whatever is copied there is waited for."""
        tensor: Tensor = getattr(batch, name)
        if device.type == "cpu":
            return tensor if dtype is None else tensor.to(dtype)
        kept = self._kept.setdefault(batch, {})
        if (name, device) not in kept:
            kept[name, device] = (tensor if dtype is None else tensor.to(dtype)).to(device)
        return kept[name, device]

    def _nats(self, states: Tensor, labels: Tensor) -> Tensor:
        if self._own_head:
            head = self._head
            result: Tensor = FrozenHead.apply(states, head.weight, head.bias, labels)  # type: ignore[no-untyped-call]
            return result
        return F.cross_entropy(states, labels, reduction="none")

    def _sampled(self, states: Tensor, draws: Tensor) -> Tensor:
        """(s,): tokens by inverse transform sampling."""
        weight: Tensor | None = self._head.weight if self._own_head else None  # type: ignore[assignment]
        bias: Tensor | None = self._head.bias if self._own_head else None  # type: ignore[assignment]
        vocab = states.shape[1] if weight is None else len(weight)
        rows = max(1, CHUNK_BYTES // (4 * vocab))
        sampled = []
        for part, draw in zip(torch.split(states, rows), torch.split(draws, rows), strict=True):
            logits = part if weight is None else F.linear(part, weight, bias)
            p, draw = torch.softmax(_widened(logits), dim=-1), draw.to(logits.device)[:, None]
            if p.device.type == "cpu":
                cumulated = p.cumsum(dim=-1)  # (rows, vocab)
                wanted = draw.to(p) * cumulated[:, -1:]  # rounding leaves the sum a little off 1
            else:  # whose kernels add floats in any order
                cumulated = (p * _PARTS).long().cumsum(dim=-1)
                wanted = ((draw * _DRAWS).long() * cumulated[:, -1:]) // _DRAWS
            tokens = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
            sampled.append(tokens.clamp_(max=vocab - 1))  # beyond the last one where the logits are no numbers
        return torch.cat(sampled)

    def record_sums(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b,) and (b,): nats of each record of the batch and how many scored tokens count, float64, without
        gradient."""
        with torch.no_grad():
            nats = self.nats(batch).cpu().double()
        weights = torch.ones_like(nats) if batch.weights is None else batch.weights
        empty = torch.zeros(len(batch.indices), dtype=torch.float64)
        return empty.index_add(0, batch.owners, nats), empty.index_add(0, batch.owners, weights)

    def score(self, batches: Sequence[Batch], records: int) -> Scores:
        """The sums of each record, without gradient."""
        nats, tokens = torch.zeros(records, dtype=torch.float64), torch.zeros(records, dtype=torch.float64)
        for batch in batches:
            places = torch.tensor(batch.indices)
            nats[places], tokens[places] = self.record_sums(batch)
        return Scores(nats, tokens)

    def _hidden(self, batch: Batch) -> Tensor:
        """(s, d): what reaches the head at the scored positions; the head itself gets nothing to do."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            caught.append(self._scored_rows(args[0], batch))
            return (args[0][:, :0],)

        with _pre_hook(self._head, catch):
            self._run(batch)
        return caught[0]

    def _logits(self, batch: Batch) -> Tensor:
        """(s, vocab): the model's own logits, with whatever it does after the head."""

        def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (self._scored_rows(args[0], batch)[None],)

        with _pre_hook(self._head, select):
            return _widened(self._run(batch).logits[0])

    def _scored_rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1])[self._on(hidden.device, batch, "positions")]

    def _run(self, batch: Batch) -> Any:
        with _each_row_one_sequence():
            return self.attached.model(input_ids=self._on(self.attached.device, batch, "input_ids"), use_cache=False)


def make_objective(attached: AttachedModel, probe: Batch) -> Objective:
    """The objective with our head where it is the model's, and the model's own head where that does more.

    Some models act after the head (Gemma-2's soft cap, the scales of Granite and Cohere), some adapters change it. Both
    paths see the same rows of one record, so only equal logits, to the bit, let ours in. One record, as the logits of a
    whole batch are more memory than the fit itself takes at the head.
    """
    probe = probe.first_records(1)
    head = attached.model.get_output_embeddings()
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    plain = linear and _names_of(attached.model, head).isdisjoint(attached.modules)
    own = Objective(attached, head, own_head=plain)
    if plain:
        with torch.no_grad():
            ours = _widened(F.linear(own._hidden(probe), head.weight, head.bias))
            theirs = own._logits(probe)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            return Objective(attached, head, own_head=False)
    return own


def check_causal(model: Any, name: str, batch: Batch) -> None:
    """Changes the last token of a record and wants every earlier prediction to stay.

    The batches rely on it: padding stands on the right and no mask is given.

    Raises:
        BaseModelMismatch: if earlier predictions change by more than rounding can explain.
    """
    ids = batch.input_ids[:1].to(next(model.parameters()).device)  # (1, t)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        before, after = (_widened(model(input_ids=x, use_cache=False).logits[0, :-1]) for x in (ids, other))
    if float((before - after).abs().max()) > _NOT_ROUNDING * float(before.abs().max()):
        raise BaseModelMismatch(
            f"the base model {name} is not causal: its predictions change with tokens that come later",
            hint="only causal language models can be fitted",
        )


def gradient_of(terms: Tensor, leaf: Tensor, *, retain_graph: bool = False) -> Tensor:
    """d sum(terms) / d leaf; zeros where no module that the leaf acts on was reached on the way to the terms."""
    if not terms.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(
        terms, leaf, torch.ones_like(terms), retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return found


def _names_of(model: nn.Module, module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, own in model.named_modules(remove_duplicate=False) if own is module)


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _each_row_one_sequence() -> Iterator[None]:
    """Spares transformers the look at positions for several sequences in a row, which waits for the device: each row is
    one from its start."""
    from transformers import masking_utils

    look = getattr(masking_utils, "find_packed_sequence_indices", None)
    try:
        if look is not None:
            masking_utils.find_packed_sequence_indices = lambda position_ids: None
        yield
    finally:
        if look is not None:
            masking_utils.find_packed_sequence_indices = look


def _widened(logits: Tensor) -> Tensor:
    """Losses are taken in float32, or in float64 for a float64 model."""
    return logits if logits.dtype == torch.float64 else logits.float()
