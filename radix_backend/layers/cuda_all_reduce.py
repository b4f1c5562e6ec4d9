"""All-reduce of a few megabytes between GPUs that write each other's memory, fused with the norm after it.

A rank writes its part into a buffer of every other (one-shot), or into that of one rank, which passes the sum on
(two-shot: less to send with more than two ranks). Nobody is told that a part has come: what is not there yet reads as
negative zero, which no part has, as in the Lamport kernels of TensorRT-LLM. Calls take turns with three buffers. When a
rank begins a call, all others have begun the one before, so they are through with the one before that, whose buffer can
be emptied.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BYTES = 4 << 20  # of a part: 512 rows of Qwen3-8B; up to there faster than NCCL (see docs/performance.md)
_ONE_SHOT_BYTES = 256 << 10  # of a part: beyond, two shots are faster where ranks are more than two
_MAX_ROWS = 1024  # of which each is a program: they wait for those of other ranks, so all should run at once
_TURNS = 3
_WORDS = {2: torch.int16, 4: torch.int32}  # by bytes of a number
_TL_WORDS = {2: tl.int16, 4: tl.int32}
_TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class CudaAllReduce:
    """Sums of [rows, width], made in the order of ranks: every rank gets the same bits."""

    def __init__(
        self,
        rank: int,
        buffers: Sequence[Tensor],
        width: int,
        dtype: torch.dtype,
        one_shot_bytes: int | None = None,
    ) -> None:
        """``buffers`` [ranks] are all ranks' memory, each [`buffer_bytes`] uint8.

        All ranks must have come here before one of them adds up. Parts of more than ``one_shot_bytes`` take two shots.
        """
        if one_shot_bytes is None:
            one_shot_bytes = MAX_BYTES if len(buffers) == 2 else _ONE_SHOT_BYTES
        self._one_shot_bytes = one_shot_bytes
        self._rank, self._size, self._width, self._dtype = rank, len(buffers), width, dtype
        self._max_rows = _max_rows(width, dtype)
        self._buffers = buffers  # to keep them
        self._words = buffers[rank].view(_WORDS[dtype.itemsize])
        self._words.fill_(torch.iinfo(self._words.dtype).min)
        addresses = [each.data_ptr() for each in buffers]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=self._words.device)
        self._turns = torch.zeros(self._max_rows, dtype=torch.int32, device=self._words.device)

    def takes(self, part: Tensor) -> bool:
        return part.dtype == self._dtype and len(part) <= self._max_rows and part.shape[1] == self._width

    def sum(self, part: Tensor) -> Tensor:
        """[rows, width] the sum of all ranks' ``part``, which `takes` accepts."""
        return self._launch(part, None, None, 0.0)

    def add_rms_norm(self, residual: Tensor, part: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`Ops.add_rms_norm` of the sum of all ranks' ``part``."""
        return self._launch(part, residual, weight, eps)

    def _launch(self, part: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
        out = torch.empty_like(part)
        block = triton.next_power_of_2(self._width)
        dependent = {"launch_pdl": True} if part.is_cuda else {}
        _all_reduce[(len(part),)](
            part,
            part if residual is None else residual,
            part if weight is None else weight,
            out,
            self._words,
            self._addresses,
            self._turns,
            eps,
            RANK=self._rank,
            SIZE=self._size,
            ROWS=self._max_rows,
            WIDTH=self._width,
            BLOCK=block,
            WORD=_TL_WORDS[self._dtype.itemsize],
            DTYPE=_TL_DTYPES[self._dtype],
            EMPTY=torch.iinfo(self._words.dtype).min,
            NORM=residual is not None,
            TWO_SHOT=part.nbytes > self._one_shot_bytes,
            DEPENDENT=part.is_cuda,
            num_warps=min(max(block // 256, 1), 16),
            **dependent,
        )
        return out


def _max_rows(width: int, dtype: torch.dtype) -> int:
    return min(max(MAX_BYTES // (width * dtype.itemsize), 1), _MAX_ROWS)


def buffer_bytes(size: int, width: int, dtype: torch.dtype) -> int:
    return _TURNS * size * _max_rows(width, dtype) * width * dtype.itemsize


@triton.jit
def _all_reduce(
    part,
    residual,
    weight,
    out,
    words,
    addresses,
    turns,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WORD: tl.constexpr,
    DTYPE: tl.constexpr,
    EMPTY: tl.constexpr,
    NORM: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < WIDTH
    at = row * WIDTH + i
    if NORM:
        gain = tl.load(weight + i, mask=mask, other=0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    turn = tl.load(turns + row)
    here = turn * (SIZE * ROWS * WIDTH) + at  # in every buffer, the part of rank 0
    mine = _not_empty(tl.load(part + at, mask=mask, other=0))
    adder = row % SIZE  # of two shots: the rank that makes the sum
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            wanted = mask
            if TWO_SHOT:
                wanted = mask & (adder == rank)
            tl.store(_at(addresses + rank, here + RANK * ROWS * WIDTH, DTYPE), mine, mask=wanted)
    before = (turn + 2) % 3 * (SIZE * ROWS * WIDTH) + at
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            tl.store(words + before + rank * ROWS * WIDTH, tl.full([BLOCK], EMPTY, WORD), mask=mask)
    if TWO_SHOT:
        if adder == RANK:
            total = _not_empty(_added(mine, words + here, mask, RANK, SIZE, ROWS * WIDTH, EMPTY, DTYPE).to(DTYPE))
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    tl.store(_at(addresses + rank, here + RANK * ROWS * WIDTH, DTYPE), total, mask=mask)
        else:
            total = _come(words + here + adder * ROWS * WIDTH, mask, EMPTY, DTYPE)
        x = total.to(tl.float32)
    else:
        x = _added(mine, words + here, mask, RANK, SIZE, ROWS * WIDTH, EMPTY, DTYPE)
    tl.store(turns + row, (turn + 1) % 3)
    if NORM:
        x += tl.load(residual + at, mask=mask, other=0)
        tl.store(residual + at, x, mask=mask)
        x *= 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / WIDTH + eps) * gain
    tl.store(out + at, x, mask=mask)


@triton.jit
def _at(address, offset, DTYPE: tl.constexpr):
    return tl.load(address).to(tl.pointer_type(DTYPE)) + offset


@triton.jit
def _not_empty(x):
    return tl.where(x == 0, tl.zeros_like(x), x)


@triton.jit
def _added(
    mine,
    words,
    mask,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    EMPTY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The sum of all ranks' parts in f32, in the order of ranks."""
    total = tl.zeros(mine.shape, tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            total += mine.to(tl.float32)
        else:
            total += _come(words + rank * STRIDE, mask, EMPTY, DTYPE).to(tl.float32)
    return total


@triton.jit
def _come(words, mask, EMPTY: tl.constexpr, DTYPE: tl.constexpr):
    """What another rank writes to ``words``, once all of it is there."""
    word = tl.load(words, mask=mask, other=0, volatile=True)
    while tl.max((word == EMPTY).to(tl.int32), axis=0) > 0:
        word = tl.load(words, mask=mask, other=0, volatile=True)
    return word.to(DTYPE, bitcast=True)
