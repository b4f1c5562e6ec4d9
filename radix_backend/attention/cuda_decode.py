"""Decode attention over paged KV in Triton language, without a plan: it runs in a CUDA graph on lengths it finds there.

The work is split as in stream-K (https://arxiv.org/abs/2301.03598): the pages of all rows are laid end to end and
every program takes an equal share of them for one KV head, whatever the rows' lengths. Where a share covers (part of)
a row it leaves a **piece**: the weighted sum of the values and the log of the sum of weights. A second kernel merges
the pieces of each row. Share *c* and row *r* meet in piece *c + r*, which no other pair has: from one piece to the
next at least one of the two advances.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MIN_PAGES = 64  # tokens a share has at least: less is not worth a piece


@dataclass(frozen=True)
class DecodeShape:
    """How the kernel is cut for one device and model."""

    shares: int  # programs a KV head
    block: int  # tokens a program loads at once
    warps: int
    stages: int


def decode_shape(dtype: torch.dtype, head_dim: int, kv_heads: int, num_sms: int) -> DecodeShape:
    """What measured best (docs/performance.md)."""
    if dtype == torch.float32:
        return DecodeShape(max(num_sms // kv_heads, 1), 32, 4, 1)
    return DecodeShape(max(3 * num_sms // kv_heads, 1), 64, 4, 3)


class CudaDecode:
    """Both kernels with their room for pieces, for up to ``max_rows`` rows."""

    def __init__(self, max_rows: int, num_heads: int, keys: Tensor, shape: DecodeShape) -> None:
        """``keys`` [pages, kv_heads, page_size, head_dim]: any layer's."""
        _, self._kv_heads, self._page_size, self._head_dim = keys.shape
        self._num_heads, self._shape = num_heads, shape
        self._rows_pad = triton.next_power_of_2(max_rows)
        pieces = shape.shares + max_rows
        self._sums = torch.empty(pieces, num_heads, self._head_dim, dtype=torch.float32, device=keys.device)
        self._logs = torch.empty(pieces, num_heads, dtype=torch.float32, device=keys.device)

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        page_table: Tensor,
        slots: Tensor,
        lengths: Tensor,
        page_ends: Tensor,
        out: Tensor,
    ) -> None:
        """Fill ``out`` [rows, heads, head_dim] from ``q`` (the same shape, rows may be apart).

        ``slots``, ``lengths`` (tokens attended to; 0: the row is padding) and ``page_ends`` (cumulative sum of the
        rows' pages) are [rows] int32; ``page_table`` [slots, pages] int32.
        """
        rows, group = len(q), self._num_heads // self._kv_heads
        shape, head_dim = self._shape, self._head_dim
        min_pages = -(-_MIN_PAGES // self._page_size)
        _decode[(self._kv_heads, shape.shares)](
            q,
            keys,
            values,
            page_table,
            slots,
            lengths,
            page_ends,
            self._sums,
            self._logs,
            rows,
            q.stride(0),
            page_table.stride(0),
            keys.stride(0),
            head_dim**-0.5 * 1.4426950408889634,
            SHARES=shape.shares,
            MIN_PAGES=min_pages,
            ROWS_PAD=self._rows_pad,
            HEADS=self._num_heads,
            GROUP=group,
            GROUP_PAD=max(triton.next_power_of_2(group), 16),
            DIM=head_dim,
            DIM_PAD=max(triton.next_power_of_2(head_dim), 16),
            PAGE=self._page_size,
            BLOCK=shape.block,
            STAGES=shape.stages,
            num_warps=shape.warps,
        )
        _merge[(rows, self._num_heads)](
            self._sums,
            self._logs,
            page_ends,
            out,
            rows,
            out.stride(0),
            SHARES=shape.shares,
            MIN_PAGES=min_pages,
            PIECES_PAD=triton.next_power_of_2(shape.shares + 1),
            HEADS=self._num_heads,
            DIM=head_dim,
            DIM_PAD=max(triton.next_power_of_2(head_dim), 16),
            num_warps=2,
        )


@triton.jit(do_not_specialize=["rows"])
def _decode(
    q,
    keys,
    values,
    page_table,
    slots,
    lengths,
    page_ends,
    sums,
    logs,
    rows,
    q_stride,
    page_table_stride,
    page_stride,
    scale,  # of the scores, in base 2
    SHARES: tl.constexpr,
    MIN_PAGES: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    kv_head, share = tl.program_id(0), tl.program_id(1)
    total = tl.load(page_ends + rows - 1)
    per_share = tl.maximum(tl.cdiv(total, SHARES), MIN_PAGES)
    page = share * per_share
    stop = tl.minimum(page + per_share, total)
    every = tl.arange(0, ROWS_PAD)
    row = tl.sum((tl.load(page_ends + every, mask=every < rows, other=2147483647) <= page).to(tl.int32))
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    n = tl.arange(0, BLOCK)
    q_mask = (g < GROUP)[:, None] & (d < DIM)[None, :]
    while page < stop:
        row_end = tl.load(page_ends + row)
        row_begin = tl.load(page_ends + row - 1, mask=row > 0, other=0)
        until = tl.minimum(stop, row_end)
        if until > page:
            table = page_table + tl.load(slots + row).to(tl.int64) * page_table_stride
            length = tl.minimum((until - row_begin) * PAGE, tl.load(lengths + row))
            query = tl.load(
                q + row.to(tl.int64) * q_stride + (kv_head * GROUP + g)[:, None] * DIM + d[None, :],
                mask=q_mask,
                other=0,
            )
            highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
            mass = tl.zeros([GROUP_PAD], tl.float32)
            acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
            for start in tl.range((page - row_begin) * PAGE, length, BLOCK, num_stages=STAGES):
                token = start + n
                seen = token < length
                ids = tl.load(table + token // PAGE, mask=seen, other=0).to(tl.int64)
                at = ids * page_stride + (kv_head * PAGE + token % PAGE) * DIM
                mask = seen[:, None] & (d < DIM)[None, :]
                k = tl.load(keys + at[:, None] + d[None, :], mask=mask, other=0)
                v = tl.load(values + at[:, None] + d[None, :], mask=mask, other=0)
                scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
                scores = tl.where(seen[None, :], scores, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(scores, axis=1))
                weights = tl.exp2(scores - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
                mass = mass * decay + tl.sum(weights, axis=1)
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
                highest = new_highest
            heads = (share + row) * HEADS + kv_head * GROUP + g
            tl.store(sums + heads[:, None] * DIM + d[None, :], acc / mass[:, None], mask=q_mask)
            tl.store(logs + heads, highest + tl.log2(mass), mask=g < GROUP)
        page = until
        row += 1


@triton.jit(do_not_specialize=["rows"])
def _merge(
    sums,
    logs,
    page_ends,
    out,
    rows,
    out_stride,
    SHARES: tl.constexpr,
    MIN_PAGES: tl.constexpr,
    PIECES_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    total = tl.load(page_ends + rows - 1)
    per_share = tl.maximum(tl.cdiv(total, SHARES), MIN_PAGES)
    begin = tl.load(page_ends + row - 1, mask=row > 0, other=0)
    end = tl.load(page_ends + row)
    d = tl.arange(0, DIM_PAD)
    acc = tl.zeros([DIM_PAD], tl.float32)
    if end > begin:
        first = begin // per_share
        count = (end - 1) // per_share - first + 1
        every = tl.arange(0, PIECES_PAD)
        highest = tl.max(
            tl.load(logs + (first + row + every) * HEADS + head, mask=every < count, other=float("-inf")), axis=0
        )
        mass = 0.0
        for start in range(0, count, 16):
            piece = start + tl.arange(0, 16)
            at = (first + row + piece) * HEADS + head
            log = tl.load(logs + at, mask=piece < count, other=float("-inf"))
            weights = tl.exp2(log - highest)
            mass += tl.sum(weights, axis=0)
            part = tl.load(
                sums + at[:, None] * DIM + d[None, :], mask=(piece < count)[:, None] & (d < DIM)[None, :], other=0
            )
            acc += tl.sum(part * weights[:, None], axis=0)
        acc = acc / mass
    tl.store(out + row.to(tl.int64) * out_stride + head * DIM + d, acc, mask=d < DIM)
