"""W' = W + dW, file by file: what is added, how it is rounded, and the stream from base to result.

dW is two thin matrices, left (rows, R) and right (R, columns), and W' is rounded once, a few rows at a time. For an
output in bfloat16 or float16 both are rounded to float32 once and W + left @ right is summed there; for float32 and
float64, and where W is computed from a quantised weight, it is summed in float64. With eps = 2^-24 or 2^-53, the number
before the last rounding is off by at most

    (R + 4) eps (|W| + |left_i| |right_j|)        |.| of row i of left and column j of right: Euclidean norms

since a sum of R + 1 products is off by at most (R + 1) eps times the sum of their sizes (Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1), whatever its order, and by Cauchy and Schwarz. That is far below the spacing of
bfloat16 numbers: the result is the correctly rounded one unless the exact sum lies so close to the middle between two.

The two matrices lie as the tensor of the base does:

nn.Linear                   W (out, in)       dW = B A          left = B         right = A
Conv1D                      W (in, out)       dW^T = A^T B^T    left = A^T       right = B^T
embedding                   W (vocab, dim)    (B A)^T           left = A^T       right = B^T
experts in one parameter    W (E, ., .)       as Linear or Conv1D, each by itself, stacked
a part of an expert         rows of W_e       as Linear         left = rows of B

One file of weights, from the base to the result, in blocks: read, folded, written and hashed at the same time.

    reader thread   pread of the base's file in order, and its sha256
    workers         W + dW where there is an update, a block each
    writer thread   the result's bytes to the disk, and their sha256

At most three blocks wait between two of them, so memory does not grow with the tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.names import numbered_name
from loracli.algebra.factors import Factors, pad_rank
from loracli.composition.composition import Composition
from loracli.errors import BaseModelMismatch, UsageError
from loracli.fusing.plan import FusedShard, FusedTensor
from loracli.fusing.quantised import Decoder, Quantised
from loracli.model.checkpoint import Shard, StoredTensor, read_bytes
from loracli.system.document import dtype_name
from loracli.system.files import open_regular
from loracli.system.machine import in_order
from loracli.system.tensor_file import FLOATS

BLOCK_BYTES = 2 << 20  # of a tensor's rows that are worked on at a time


@dataclass(frozen=True)
class Fold:
    """What is added to a matrix, or to each of several, left @ right; both in the precision of the sum."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Replacement:
    """What stands in the place of a tensor, in the output's dtype."""

    values: Tensor


def make_fold(left: Tensor, right: Tensor, precision: torch.dtype) -> Fold:
    """The update of a tensor in the precision of the sum."""
    return Fold(left.to(precision).contiguous(), right.to(precision).contiguous())


def precision_for(output: torch.dtype) -> torch.dtype:
    """Of the sum: well beyond the output's own."""
    return torch.float32 if output.itemsize == 2 else torch.float64


def _fold_rows(name: str, weight: Tensor, start: int, fold: Fold | None, output: torch.dtype) -> Tensor:
    """Rows of W' from rows of W.

    Args:
        name: of the tensor, for errors.
        weight: (rows, ...) of the base, beginning with row `start`; of experts one matrix each.
        start: their place in the tensor.
        fold: what is added, None to round alone.
        output: the dtype of the result.
    Raises:
        BaseModelMismatch: if the base's own numbers are not finite.
        UsageError: if the result overflows the output's dtype.
    """
    total = weight.to(fold.left.dtype if fold is not None else weight.dtype, copy=fold is not None)
    if fold is not None:
        stop = start + len(weight)
        if total.dim() == 3:
            total.baddbmm_(fold.left[start:stop], fold.right[start:stop])
        else:
            total.addmm_(fold.left[start:stop], fold.right)
    result = total.to(output)
    # A finite sum is proof of finite terms, at a tenth of the price of a look at each. The narrow range of float16,
    # and the rare number that only rounding makes infinite, show in the largest.
    wide = total.abs().amax() if output == torch.float16 else total.sum()
    if not torch.isfinite(wide) or float(wide.abs()) > torch.finfo(output).max:
        _refuse(name, weight, result, output)
    return result


def make_replacement(name: str, values: Tensor, output: torch.dtype) -> Replacement:
    """A saved tensor, rounded once.

    Raises:
        UsageError: if it overflows the output's dtype.
    """
    rounded = values.to(output)
    if not bool(torch.isfinite(rounded).all()):
        raise _overflow(name, output)
    return Replacement(rounded)


def _overflow(name: str, output: torch.dtype) -> UsageError:
    dtype = dtype_name(output)
    return UsageError(f"{name} overflows {dtype}", hint="fuse with --dtype float32 or bfloat16")


def _refuse(name: str, weight: Tensor, result: Tensor, output: torch.dtype) -> None:
    if torch.isfinite(result).all():
        return  # only the sum of all overflowed
    if not torch.isfinite(weight).all():
        raise BaseModelMismatch(f"the base model's {name} holds values that are infinite or not a number")
    raise _overflow(name, output)


def rounding_bounds(weight: Tensor, left: Tensor, right: Tensor, output: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that each entry of W' may have, by the bound at the top.

    Args:
        weight: rows of W, in any dtype, or one matrix for each of some experts.
        left: (rows, R) of exactly these rows, float64; of experts with one dimension more in front.
        right: (R, columns), float64, likewise.
        output: of W'.
    """
    exact = weight.double() + left @ right
    eps = 2.0**-24 if precision_for(output) == torch.float32 else 2.0**-53
    sizes = left.norm(dim=-1)[..., None] * right.norm(dim=-2)[..., None, :] + weight.double().abs()
    slack = sizes.mul_((left.shape[-1] + 4) * eps)
    return (exact - slack).to(output), (exact + slack).to(output)


def update_of(composition: Composition, tensor: FusedTensor) -> tuple[Tensor, Tensor] | None:
    """left (..., rows, R) and right (..., R, columns) in float64; None where nothing is added.

    Raises:
        ValueError: if its method does not suit its adapters.
    """
    if tensor.module is None:
        return None
    if len(tensor.shape) == 2:
        left, right = _sides(composition.compose(tensor.module).factors, tensor)
        return (left if tensor.rows is None else left[slice(*tensor.rows)]), right
    names = [numbered_name(tensor.module, expert) for expert in range(tensor.shape[0])]
    updates = [composition.compose(name).factors for name in names]
    rank = max(update.rank for update in updates)
    lefts, rights = zip(*(_sides(pad_rank(update, rank), tensor) for update in updates), strict=True)
    return torch.stack(lefts), torch.stack(rights)


def _sides(update: Factors, tensor: FusedTensor) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = update.lora_A.double(), update.scaling * update.lora_B.double()
    return (lora_A.T, lora_B.T) if tensor.transposed else (lora_B, lora_A)


_WAITING = 3
_FLUSH_BYTES = 64 << 20  # that are written before they are sent to the disk
WIDENED = 16  # at most, from bytes that are stored to a number in float64

FoldOf = Callable[[FusedTensor], Fold | Replacement | None]
DecoderOf = Callable[[Quantised], Decoder]


@dataclass(frozen=True)
class Hashes:
    """The sha256 of a file of the base and of the one that was made of it."""

    base: str
    fused: str


@dataclass(frozen=True)
class _Block:
    """Bytes of a tensor's source: rows from `start` on; of a tensor that is only copied, any bytes."""

    tensor: FusedTensor | None  # None of bytes that are read for their hash alone
    start: int
    offset: int
    size: int


def write_shard(
    base: Shard,
    shard: FusedShard,
    path: Path,
    fold_of: FoldOf,
    decoder_of: DecoderOf,
    told: Callable[[int], object],
    *,
    workers: int,
) -> Hashes:
    """Writes a new file and flushes it to the disk.

    Args:
        base: the file of the base.
        shard: what goes into the new one.
        path: must not exist.
        fold_of: the update of a tensor in the layout of its weight, or what replaces it; asked for once each, in order.
        decoder_of: what computes a quantised tensor, likewise.
        told: the bytes that are done, now and then.
        workers: blocks that are folded at once.
    """
    with open_regular(base.path) as source, _created(path) as output:
        digest = hashlib.sha256(base.header)
        with _reader(source.fileno(), _blocks(shard), digest) as blocks, _writer(output) as writer:
            writer.put(torch.frombuffer(bytearray(shard.header), dtype=torch.uint8))
            work = _with_updates(blocks, fold_of, decoder_of)
            for size, result in in_order(lambda one: (one.data.numel(), _transformed(one)), work, workers=workers):
                writer.put(result)
                told(size)
        return Hashes(digest.hexdigest(), writer.sha256())


@dataclass(frozen=True)
class _Work:
    """The bytes of a block, and what becomes of them."""

    tensor: FusedTensor
    start: int
    data: Tensor
    fold: Fold | Replacement | None
    decode: Decoder | None


def _with_updates(blocks: Iterator[tuple[_Block, Tensor]], fold_of: FoldOf, decoder_of: DecoderOf) -> Iterator[_Work]:
    """The blocks of tensors, each with the update of its tensor."""
    current, fold, decode = None, None, None
    for block, data in blocks:
        if block.tensor is None:
            continue
        if block.tensor is not current:
            current, fold = block.tensor, fold_of(block.tensor)
            decode = None if current.quantised is None else decoder_of(current.quantised)
        yield _Work(current, block.start, data, fold, decode)


def _blocks(shard: FusedShard) -> Iterator[_Block]:
    own: list[tuple[FusedTensor | None, StoredTensor]] = [(t, t.source) for t in shard.tensors if not t.added]
    own += [(None, tensor) for tensor in shard.left_out]
    added = [(tensor, tensor.source) for tensor in shard.tensors if tensor.added]
    for tensor, source in [*sorted(own, key=lambda pair: pair[1].begin), *added]:
        if tensor is None:
            yield from (
                _Block(None, 0, source.begin + o, min(BLOCK_BYTES, source.size - o))
                for o in range(0, source.size, BLOCK_BYTES)
            )
            continue
        whole = source.size // tensor.shape[0] if tensor.changed and source.shape and source.size else 1
        limit = BLOCK_BYTES if tensor.quantised is None else BLOCK_BYTES // WIDENED
        size = max(whole, limit // whole * whole)
        for offset in range(0, source.size, size):
            yield _Block(tensor, offset // whole, source.begin + offset, min(size, source.size - offset))


def _transformed(work: _Work) -> Tensor:
    tensor, start, data = work.tensor, work.start, work.data
    if not tensor.changed:
        return data
    if isinstance(work.fold, Replacement):
        return replaced_rows(tensor, start, data.numel(), work.fold.values).contiguous().flatten().view(torch.uint8)
    if work.decode is not None:
        weight = work.decode(data, start)
    else:
        weight = data.view(FLOATS[tensor.source.dtype])
        if tensor.source.shape:
            weight = weight.view(-1, *tensor.source.shape[1:])
    return _fold_rows(tensor.name, weight, start, work.fold, FLOATS[tensor.dtype]).flatten().view(torch.uint8)


def replaced_rows(tensor: FusedTensor, start: int, size: int, values: Tensor) -> Tensor:
    """The values in the place of `size` bytes of a tensor's source that begin with row `start`."""
    if not tensor.shape or not tensor.source.size:
        return values
    return values[start : start + size * tensor.shape[0] // tensor.source.size]


@contextmanager
def _reader(descriptor: int, blocks: Iterator[_Block], digest: Any) -> Iterator[Iterator[tuple[_Block, Tensor]]]:
    """The blocks with their bytes, read ahead by a thread that also hashes what is no tensor's second reading."""
    queue: Queue[tuple[_Block, Tensor] | BaseException | None] = Queue(_WAITING)
    stopped: list[bool] = []

    def work() -> None:
        try:
            for block in blocks:
                if stopped:
                    return
                data = read_bytes(descriptor, block.offset, block.size)
                if block.tensor is None or not block.tensor.added:
                    digest.update(data.numpy().data)
                queue.put((block, data))
            queue.put(None)
        except BaseException as error:  # for the thread that takes it out
            queue.put(error)

    def taken() -> Iterator[tuple[_Block, Tensor]]:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.append(True)
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(0.01)


class _Writer:
    """Takes the bytes of a file and writes and hashes them in a thread of its own; a second one sends them to the disk
    meanwhile, so that not all are left for the end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._queue: Queue[Tensor | None] = Queue(_WAITING)
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, data: Tensor) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(data)

    def finish(self) -> None:
        self.stop()
        if self._error is None and self._flush is not None:
            self._flush.result()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is not None:
                continue  # until the other thread notices
            try:
                view = data.numpy().data
                self._digest.update(view)
                while view:
                    view = view[os.write(self._descriptor, view) :]
                self._send_on(data.numel())
            except BaseException as error:
                self._error = error

    def _send_on(self, size: int) -> None:
        """Begins to flush what was written, unless that is little or the last flush is not done."""
        self._unflushed += size
        if self._unflushed < _FLUSH_BYTES or (self._flush is not None and not self._flush.done()):
            return
        if self._flush is not None:
            self._flush.result()  # its error, which the kernel tells once
        self._flush, self._unflushed = self._pool.submit(os.fsync, self._descriptor), 0


@contextmanager
def _writer(descriptor: int) -> Iterator[_Writer]:
    writer = _Writer(descriptor)
    try:
        yield writer
    except BaseException:
        writer.stop()
        raise
    writer.finish()


@contextmanager
def _created(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
