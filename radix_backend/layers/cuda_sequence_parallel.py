"""Sums of many rows between GPUs, beside products: each rank adds up and norms its share of the rows.

An all-reduce and the norm after it, taken apart (sequence parallelism, Korthikanti et al. 2022): ranks send each other
shares of their parts, each adds up its share, norms it, and returns the result to all; only the owner of a share keeps
its residual stream. Rows are cut into pieces, so that the sum of one is beside the products of another. Copy engines do
the sending, which leaves all multiprocessors to the products. That something has come is told by counters in the
receiver's memory, which its streams wait for.

A piece's memory is used again by its next sum, and nobody is asked: who sends a part has the results of the sum before,
made from what had been received; and who has received all parts of a sum knows that the results before were read.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_backend.layers.cuda_queue import Copy, Counters, CudaQueue, Queue

LEAST_ROWS = 8192  # with fewer, launching takes the CPU longer than the GPU computes
_PIECES = 2  # that rows are cut into: the sum of one is beside products of the other
_ALIGNMENT = 256  # rows of a product's tile
_COUNTER_BYTES = 4


class CudaSequenceParallel:
    """Sums of [rows, width] in the dtype of products, of so many rows that they are worth to be cut."""

    def __init__(
        self,
        rank: int,
        buffers: Sequence[Tensor],
        width: int,
        max_rows: int,
        dtype: torch.dtype,
        queue: Callable[[], Queue] | None = None,
    ) -> None:
        """``buffers`` [ranks] are all ranks' memory, each [`buffer_bytes`] uint8; this rank's must be zeros.

        All ranks must have come here before one of them adds up. ``queue`` makes another (default: a CUDA stream).
        Raises RuntimeError where the GPU cannot wait for its memory.
        """
        self.rank, self.size, self.max_rows = rank, len(buffers), max_rows
        self._current = queue or CudaQueue.current
        make = queue or CudaQueue.beside
        self.copying, self.adding = make(), make()
        self.parts = torch.empty(max_rows, width, dtype=dtype, device=buffers[rank].device)
        rows, end = _received_rows(self.size, max_rows), _row_bytes(self.size, width, max_rows, dtype)
        tensors = [each[:end].view(dtype).view(-1, width) for each in buffers]
        self.received, self.normed = [each[:rows] for each in tensors], [each[rows:] for each in tensors]
        self._counters = [each.data_ptr() + end for each in buffers]
        self.sums = [0] * _PIECES  # of a piece, so far
        self.copying.wait(Counters([self._counters[rank]]), 0)

    def takes(self, rows: int) -> bool:
        return LEAST_ROWS <= rows <= self.max_rows

    def cut(self, rows: int) -> list[slice]:
        """The pieces of so many rows, which `takes` accepts."""
        inner = [rows * piece // _PIECES // _ALIGNMENT * _ALIGNMENT for piece in range(1, _PIECES)]
        return [slice(*piece) for piece in pairwise([0, *inner, rows])]

    def share(self, residual: Tensor, normed: Tensor) -> list[Piece]:
        """The pieces of a step. ``residual`` [rows, width] f32 and ``normed`` of it are whole yet. Can not be captured:
        counters go on."""
        current = self._current()
        pieces = enumerate(self.cut(len(residual)))
        return [Piece(self, number, rows, residual, normed, current) for number, rows in pieces]

    def counter(self, at: int, sender: int, piece: int, results: bool) -> int:
        """Address, in rank ``at``'s memory, of the last sum of which ``sender`` has sent its part, or the results."""
        return self._counters[at] + ((2 * piece + results) * self.size + sender) * _COUNTER_BYTES


class Piece:
    """Some rows of a step: a product writes ``part``, `add_rms_norm` begins its sum, and `normed` waits for that."""

    def __init__(
        self,
        ranks: CudaSequenceParallel,
        number: int,
        rows: slice,
        residual: Tensor,
        normed: Tensor,
        current: Queue,
    ) -> None:
        """``current``: where products are queued."""
        own, size = ranks.rank, ranks.size
        self.rows, self.part = rows, ranks.parts[rows]
        self._ranks, self._number, self._current = ranks, number, current
        self._normed, self._results = normed[rows], ranks.normed[own][rows]
        self._sum = 0
        count = rows.stop - rows.start
        bounds = [rows.start + count * rank // size for rank in range(size + 1)]
        shares = [slice(*share) for share in pairwise(bounds)]
        self.share = shares[own]  # the rows whose residual stream this rank keeps
        longest = -(-count // size)
        received = [rows.start + number * size + rank * longest for rank in range(size)]  # from each rank
        peers = [(own + other) % size for other in range(1, size)]  # no two ranks send to the same at once
        parts, norms = ranks.parts, ranks.normed
        self._sending = [_copy(ranks.received[peer], received[own], parts, shares[peer]) for peer in peers]
        self._returning = [_copy(norms[peer], self.share.start, norms[own], self.share) for peer in peers]
        self._parts_come = Counters([ranks.counter(own, peer, number, False) for peer in peers])
        self._parts_sent = Counters([ranks.counter(peer, own, number, False) for peer in peers])
        self._results_come = Counters([ranks.counter(own, peer, number, True) for peer in range(size)])
        self._results_kept = Counters([ranks.counter(own, own, number, True)])
        self._results_sent = Counters([ranks.counter(peer, own, number, True) for peer in peers])
        self._added = residual[self.share], parts[self.share], ranks.received[own][received[0] :]
        self._stride, self._out = longest * parts.shape[1], norms[own][self.share]

    def add_rms_norm(self, weight: Tensor, eps: float) -> None:
        """Begin `Ops.add_rms_norm` of the sum of all ranks' ``part``."""
        ranks, product = self._ranks, self._current.mark()
        copying, adding = ranks.copying, ranks.adding
        ranks.sums[self._number] += 1
        self._sum, self._normed = ranks.sums[self._number], self._results
        copying.follow(product)
        copying.copy(self._sending)
        copying.write(self._parts_sent, self._sum)
        adding.follow(product)
        adding.wait(self._parts_come, self._sum)
        adding.run(_add_share, *self._added, self._stride, ranks.rank, ranks.size, weight, self._out, eps)
        adding.write(self._results_kept, self._sum)
        copying.follow(adding.mark())
        copying.copy(self._returning)
        copying.write(self._results_sent, self._sum)

    def normed(self) -> Tensor:
        """[rows, width] for the products that are launched next."""
        if self._sum:
            self._current.wait(self._results_come, self._sum)
        return self._normed


def _copy(to: Tensor, row: int, source: Tensor, rows: slice) -> Copy:
    row_bytes = source.shape[1] * source.itemsize
    at, start = to.data_ptr() + row * row_bytes, source.data_ptr() + rows.start * row_bytes
    return at, start, (rows.stop - rows.start) * row_bytes


def _received_rows(size: int, max_rows: int) -> int:
    return max_rows + _PIECES * size  # shares of a piece are all as long as the longest


def _row_bytes(size: int, width: int, max_rows: int, dtype: torch.dtype) -> int:
    return (_received_rows(size, max_rows) + max_rows) * width * dtype.itemsize


def buffer_bytes(size: int, width: int, max_rows: int, dtype: torch.dtype) -> int:
    return _row_bytes(size, width, max_rows, dtype) + 2 * _PIECES * size * _COUNTER_BYTES


def _add_share(
    residual: Tensor,
    part: Tensor,
    received: Tensor,
    stride: int,
    rank: int,
    size: int,
    weight: Tensor,
    out: Tensor,
    eps: float,
) -> None:
    """`Ops.add_rms_norm` of ``part`` [rows, width] and those of other ranks, which are in ``received``, ``stride``
    numbers apart. The sum is made in f32, in the order of ranks."""
    rows, width = part.shape
    block = triton.next_power_of_2(width)
    _add_share_kernel[(rows,)](
        residual,
        part,
        received,
        stride,
        weight,
        out,
        eps,
        RANK=rank,
        SIZE=size,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )


@triton.jit
def _add_share_kernel(
    residual,
    part,
    received,
    stride,
    weight,
    out,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    mask = i < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + i
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            total += tl.load(part + at, mask=mask, other=0).to(tl.float32)
        else:
            total += tl.load(received + rank * stride.to(tl.int64) + at, mask=mask, other=0).to(tl.float32)
    x = tl.load(residual + at, mask=mask, other=0) + total
    tl.store(residual + at, x, mask=mask)
    x *= 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(out + at, x * tl.load(weight + i, mask=mask, other=0).to(tl.float32), mask=mask)
