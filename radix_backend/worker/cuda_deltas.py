"""The kernels that bring a step's deltas to a slot's columns on the device, and advance its decode rows.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from radix_backend.attention.cuda import DecodeBatch
from radix_backend.sampling.cuda import SETTINGS

NEW = 4 + SETTINGS  # words of a new request: slot, its first token among `tokens`, how many, length, settings
_BLOCK = 1024


def apply_deltas(
    news: Tensor,
    tokens: Tensor,
    pages: Tensor,
    token_ids: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    settings: Tensor,
) -> None:
    """Enter ``news`` [requests, NEW] with their ``tokens``, and write ``pages`` [slots, indices, ids; writes]."""
    num_pages = pages.shape[1]
    _apply[(len(news) + triton.cdiv(num_pages, _BLOCK),)](
        news,
        tokens,
        pages,
        len(news),
        num_pages,
        token_ids,
        token_ids.stride(0),
        page_table,
        page_table.stride(0),
        lengths,
        settings,
        NEW=NEW,
        SETTINGS=SETTINGS,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def begin_decode(batch: DecodeBatch, lengths: Tensor, token_ids: Tensor, rows: int, page_size: int) -> None:
    """Fill the first ``rows`` of ``batch`` with what its slots compute next, and advance ``lengths``."""
    _begin_decode[(1,)](
        batch.slots,
        lengths,
        token_ids,
        token_ids.stride(0),
        batch.token_ids,
        batch.positions,
        batch.lengths,
        batch.page_ends,
        batch.tiles.skips,
        rows,
        ROWS_PAD=triton.next_power_of_2(len(batch.slots)),
        PAGE=page_size,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_new", "num_pages"])
def _apply(
    news,
    tokens,
    pages,
    num_new,
    num_pages,
    token_ids,
    token_ids_stride,
    page_table,
    page_table_stride,
    lengths,
    settings,
    NEW: tl.constexpr,
    SETTINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if program < num_new:
        new = news + program * NEW
        slot, first, count = tl.load(new).to(tl.int64), tl.load(new + 1), tl.load(new + 2)
        tl.store(lengths + slot, tl.load(new + 3))
        setting = tl.arange(0, SETTINGS)
        tl.store(settings + slot * SETTINGS + setting, tl.load(new + 4 + setting))
        for start in range(0, count, BLOCK):
            token = tl.load(tokens + first + start + i, mask=start + i < count)
            tl.store(token_ids + slot * token_ids_stride + start + i, token, mask=start + i < count)
    else:
        write = (program - num_new) * BLOCK + i
        there = write < num_pages
        of = tl.load(pages + write, mask=there, other=0).to(tl.int64)
        index = tl.load(pages + num_pages + write, mask=there, other=0)
        page = tl.load(pages + 2 * num_pages + write, mask=there, other=0)
        tl.store(page_table + of * page_table_stride + index, page, mask=there)


@triton.jit(do_not_specialize=["rows"])
def _begin_decode(
    slots,
    lengths,
    token_ids,
    token_ids_stride,
    row_tokens,
    row_positions,
    row_lengths,
    page_ends,
    skips,
    rows,
    ROWS_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    row = tl.arange(0, ROWS_PAD)
    there = row < rows
    slot = tl.load(slots + row, mask=there, other=-1)
    live = slot >= 0
    position = tl.load(lengths + slot, mask=live, other=0)
    token = tl.load(token_ids + slot.to(tl.int64) * token_ids_stride + position, mask=live, other=0)
    tl.store(row_tokens + row, token, mask=there)
    tl.store(row_positions + row, position, mask=there)
    tl.store(row_lengths + row, tl.where(live, position + 1, 0), mask=there)
    pages = tl.where(live, (position + PAGE) // PAGE - tl.load(skips + row, mask=live, other=0), 0)
    tl.store(page_ends + row, tl.cumsum(pages, axis=0), mask=there)
    tl.store(lengths + slot, position + 1, mask=live)
