"""Decode attention over paged KV in Triton language, without a plan: it runs in a CUDA graph on lengths it finds there.

The work is split as in stream-K (https://arxiv.org/abs/2301.03598): the pages of all rows are laid end to end and
every program takes an equal share of them for one KV head, whatever the rows' lengths. Where a share covers (part of)
a row it leaves a **piece**: the weighted sum of the values and the log of the sum of weights. A second kernel merges
the pieces of each row. Share *c* and row *r* meet in piece *c + r*, which no other pair has: from one piece to the
next at least one of the two advances. Of few rows the last program to leave a piece of a row merges that row itself.

**Cascade**: pages that neighbouring rows have in common (attention/shared_prefix.py) are read once for a tile of
rows, whose queries are multiplied together. Tiles are laid out before the rows, which then begin after their tile's
pages; a tile's piece holds all its queries.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MIN_TOKENS = 64  # a share has at least: less is not worth a piece
_TILE_QUERIES = 32  # of a KV head that are multiplied with a shared page together
CASCADE_ROWS = 8  # fewer are decoded without looking for tiles


def tile_rows(group: int) -> int:
    """Rows in a tile whose KV heads serve ``group`` heads each; 1: there are no tiles."""
    return max(_TILE_QUERIES // int(triton.next_power_of_2(group)), 1)


@dataclass(frozen=True)
class DecodeTiles:
    """What rows share, int32 on the device. Always of the same size: unused tiles have no pages."""

    firsts: Tensor  # [tiles] first row
    counts: Tensor  # [tiles] rows
    page_ends: Tensor  # [tiles] cumulative sum of their pages
    skips: Tensor  # [rows] leading pages of a row that its tile reads
    places: Tensor  # [rows] tile * tile_rows + place in it; -1: in no tile


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
    """The kernels with their room for pieces, for up to ``max_rows`` rows."""

    def __init__(self, max_rows: int, num_heads: int, keys: Tensor, shape: DecodeShape, max_tiles: int = 0) -> None:
        """``keys`` [pages, kv_heads, page_size, head_dim]: any layer's."""
        _, self._kv_heads, self._page_size, self._head_dim = keys.shape
        self._num_heads, self._shape = num_heads, shape
        self._group = num_heads // self._kv_heads
        self._group_pad = int(triton.next_power_of_2(self._group))
        self._queries = tile_rows(self._group) * self._group_pad
        self._rows_pad = triton.next_power_of_2(max_rows)

        def pieces(count: int, queries: int) -> tuple[Tensor, Tensor]:
            sums = torch.empty(count, queries, self._head_dim, dtype=torch.float32, device=keys.device)
            return sums, torch.empty(count, queries, dtype=torch.float32, device=keys.device)

        self._pieces = pieces(shape.shares + max_rows, num_heads)
        self._tile_pieces = pieces(shape.shares + max_tiles if max_tiles else 1, self._kv_heads * self._queries)
        self._left = torch.zeros(max_rows, self._kv_heads, dtype=torch.int32, device=keys.device)

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
        tiles: DecodeTiles | None = None,
    ) -> None:
        """Fill ``out`` [rows, heads, head_dim] from ``q`` (the same shape, rows may be apart).

        ``slots``, ``lengths`` (tokens attended to; 0: the row is padding) and ``page_ends`` (cumulative sum of the
        rows' pages, those of their tiles left out) are [rows] int32; ``page_table`` [slots, pages] int32. Without
        ``tiles`` a row of padding is not filled.
        """
        rows, shape, head_dim = len(q), self._shape, self._head_dim
        min_pages = -(-_MIN_TOKENS // self._page_size)
        dim_pad = max(triton.next_power_of_2(head_dim), 16)
        num_tiles = 0 if tiles is None else len(tiles.firsts)
        firsts, counts, tile_ends, skips, places = (
            (slots, slots, slots, slots, slots)
            if tiles is None
            else (tiles.firsts, tiles.counts, tiles.page_ends, tiles.skips, tiles.places)
        )
        _decode[(self._kv_heads, shape.shares)](
            q,
            keys,
            values,
            page_table,
            slots,
            lengths,
            page_ends,
            firsts,
            counts,
            tile_ends,
            skips,
            *self._pieces,
            *self._tile_pieces,
            self._left,
            out,
            rows,
            q.stride(0),
            out.stride(0),
            page_table.stride(0),
            keys.stride(0),
            head_dim**-0.5 * 1.4426950408889634,
            TILES=num_tiles,
            TILES_PAD=triton.next_power_of_2(max(num_tiles, 1)),
            QUERIES=self._queries,
            SHARES=shape.shares,
            MIN_PAGES=min_pages,
            ROWS_PAD=self._rows_pad,
            HEADS=self._num_heads,
            KV_HEADS=self._kv_heads,
            GROUP=self._group,
            GROUP_POWER=self._group_pad,
            GROUP_PAD=max(self._group_pad, 16),
            DIM=head_dim,
            DIM_PAD=dim_pad,
            PAGE=self._page_size,
            BLOCK=shape.block,
            STAGES=shape.stages,
            DEPENDENT=q.is_cuda,
            num_warps=shape.warps,
            **({"launch_pdl": True} if q.is_cuda else {}),
        )
        if tiles is None:
            return
        _merge[(rows, self._num_heads)](
            *self._pieces,
            *self._tile_pieces,
            page_ends,
            tile_ends,
            places,
            out,
            rows,
            out.stride(0),
            TILES=num_tiles,
            QUERIES=self._queries,
            SHARES=shape.shares,
            MIN_PAGES=min_pages,
            HEADS=self._num_heads,
            KV_HEADS=self._kv_heads,
            GROUP=self._group,
            GROUP_POWER=self._group_pad,
            DIM=head_dim,
            DIM_PAD=dim_pad,
            num_warps=2,
        )


@triton.jit
def _attend(
    query,
    keys,
    values,
    table,
    page_stride,
    kv_head,
    begin,
    length,
    scale,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of ``query`` [QUERIES, DIM_PAD] over the tokens ``begin`` … ``length - 1``: a piece."""
    d = tl.arange(0, DIM_PAD)
    n = tl.arange(0, BLOCK)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    mass = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    for start in tl.range(begin, length, BLOCK, num_stages=STAGES):
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
    return acc / mass[:, None], highest + tl.log2(mass)


@triton.jit(do_not_specialize=["rows"])
def _decode(
    q,
    keys,
    values,
    page_table,
    slots,
    lengths,
    page_ends,
    tile_firsts,
    tile_counts,
    tile_ends,
    skips,
    sums,
    logs,
    tile_sums,
    tile_logs,
    left,
    out,
    rows,
    q_stride,
    out_stride,
    page_table_stride,
    page_stride,
    scale,  # of the scores, in base 2
    TILES: tl.constexpr,
    TILES_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARES: tl.constexpr,
    MIN_PAGES: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_POWER: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    kv_head, share = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DIM_PAD)
    total = tl.load(page_ends + rows - 1)
    shared = 0
    if TILES > 0:
        shared = tl.load(tile_ends + TILES - 1)
        total += shared
    per_share = tl.maximum(tl.cdiv(total, SHARES), MIN_PAGES)
    page = share * per_share
    stop = tl.minimum(page + per_share, total)
    if DEPENDENT:
        # All that is read above was there before the kernel ahead of this one began: it waits before it lets go.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if TILES > 0:
        shared_stop = tl.minimum(stop, shared)
        if page < shared_stop:
            every_tile = tl.arange(0, TILES_PAD)
            ends = tl.load(tile_ends + every_tile, mask=every_tile < TILES, other=2147483647)
            tile = tl.sum((ends <= page).to(tl.int32))
            m = tl.arange(0, QUERIES)
            member, of_group = m // GROUP_POWER, m % GROUP_POWER
            while page < shared_stop:
                tile_end = tl.load(tile_ends + tile)
                tile_begin = tl.load(tile_ends + tile - 1, mask=tile > 0, other=0)
                until = tl.minimum(shared_stop, tile_end)
                first = tl.load(tile_firsts + tile)
                live = (member < tl.load(tile_counts + tile)) & (of_group < GROUP)
                query = tl.load(
                    q
                    + (first + member).to(tl.int64)[:, None] * q_stride
                    + (kv_head * GROUP + of_group)[:, None] * DIM
                    + d[None, :],
                    mask=live[:, None] & (d < DIM)[None, :],
                    other=0,
                )
                piece, log = _attend(
                    query,
                    keys,
                    values,
                    page_table + tl.load(slots + first).to(tl.int64) * page_table_stride,
                    page_stride,
                    kv_head,
                    (page - tile_begin) * PAGE,
                    (until - tile_begin) * PAGE,
                    scale,
                    QUERIES,
                    DIM,
                    DIM_PAD,
                    PAGE,
                    BLOCK,
                    STAGES,
                )
                at = ((share + tile) * KV_HEADS + kv_head) * QUERIES + m
                tl.store(tile_sums + at[:, None] * DIM + d[None, :], piece, mask=live[:, None] & (d < DIM)[None, :])
                tl.store(tile_logs + at, log, mask=live)
                page = until
                tile += 1
        page -= shared
        stop -= shared
    every = tl.arange(0, ROWS_PAD)
    row = tl.sum((tl.load(page_ends + every, mask=every < rows, other=2147483647) <= page).to(tl.int32))
    g = tl.arange(0, GROUP_PAD)
    q_mask = (g < GROUP)[:, None] & (d < DIM)[None, :]
    while page < stop:
        row_end = tl.load(page_ends + row)
        row_begin = tl.load(page_ends + row - 1, mask=row > 0, other=0)
        until = tl.minimum(stop, row_end)
        if until > page:
            skip = 0
            if TILES > 0:
                skip = tl.load(skips + row)
            query = tl.load(
                q + row.to(tl.int64) * q_stride + (kv_head * GROUP + g)[:, None] * DIM + d[None, :],
                mask=q_mask,
                other=0,
            )
            piece, log = _attend(
                query,
                keys,
                values,
                page_table + tl.load(slots + row).to(tl.int64) * page_table_stride,
                page_stride,
                kv_head,
                (page - row_begin + skip) * PAGE,
                tl.minimum((until - row_begin + skip) * PAGE, tl.load(lengths + row)),
                scale,
                GROUP_PAD,
                DIM,
                DIM_PAD,
                PAGE,
                BLOCK,
                STAGES,
            )
            heads = (share + row) * HEADS + kv_head * GROUP + g
            tl.store(sums + heads[:, None] * DIM + d[None, :], piece, mask=q_mask)
            tl.store(logs + heads, log, mask=g < GROUP)
            if TILES == 0:
                # Acquire and release: who counts the last piece sees all others.
                tl.debug_barrier()
                begun = row_begin // per_share
                count = (row_end - 1) // per_share - begun + 1
                before = tl.atomic_add(left + row * KV_HEADS + kv_head, 1, sem="acq_rel")
                if before == count - 1:
                    tl.store(left + row * KV_HEADS + kv_head, 0)
                    _merge_group(
                        sums,
                        logs,
                        out + row.to(tl.int64) * out_stride + kv_head * GROUP * DIM,
                        (begun + row) * HEADS + kv_head * GROUP,
                        count,
                        HEADS,
                        GROUP,
                        GROUP_POWER,
                        DIM,
                        DIM_PAD,
                    )
        page = until
        row += 1


@triton.jit
def _merge_group(
    sums,
    logs,
    out,
    first,
    count,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_POWER: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Write the heads of a row that share a KV head; ``first`` is the first head of their first piece."""
    g = tl.arange(0, GROUP_POWER)
    d = tl.arange(0, DIM_PAD)
    highest = tl.full([GROUP_POWER], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_POWER], tl.float32)
    acc = tl.zeros([GROUP_POWER, DIM_PAD], tl.float32)
    for start in range(0, count, 16):
        piece = start + tl.arange(0, 16)
        there = (piece < count)[:, None] & (g < GROUP)[None, :]
        at = first + piece[:, None] * HEADS + g[None, :]
        log = tl.load(logs + at, mask=there, other=float("-inf"))
        part = tl.load(
            sums + at[:, :, None] * DIM + d[None, None, :], mask=there[:, :, None] & (d < DIM)[None, None, :], other=0
        )
        new_highest = tl.maximum(highest, tl.max(log, axis=0))
        new_highest = tl.where(g < GROUP, new_highest, 0.0)
        weights = tl.exp2(log - new_highest[None, :])
        decay = tl.exp2(highest - new_highest)
        mass = mass * decay + tl.sum(weights, axis=0)
        acc = acc * decay[:, None] + tl.sum(part * weights[:, :, None], axis=0)
        highest = new_highest
    tl.store(out + g[:, None] * DIM + d[None, :], acc / mass[:, None], mask=(g < GROUP)[:, None] & (d < DIM)[None, :])


@triton.jit
def _add_pieces(sums, logs, first, stride, count, highest, mass, acc, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Take ``count`` pieces of a head, ``stride`` apart, into a sum that is being built."""
    d = tl.arange(0, DIM_PAD)
    for start in range(0, count, 8):
        piece = start + tl.arange(0, 8)
        at = first + piece * stride
        log = tl.load(logs + at, mask=piece < count, other=float("-inf"))
        part = tl.load(
            sums + at[:, None] * DIM + d[None, :], mask=(piece < count)[:, None] & (d < DIM)[None, :], other=0
        )
        new_highest = tl.maximum(highest, tl.max(log, axis=0))
        weights = tl.exp2(log - new_highest)
        decay = tl.exp2(highest - new_highest)
        mass = mass * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(part * weights[:, None], axis=0)
        highest = new_highest
    return highest, mass, acc


@triton.jit(do_not_specialize=["rows"])
def _merge(
    sums,
    logs,
    tile_sums,
    tile_logs,
    page_ends,
    tile_ends,
    places,
    out,
    rows,
    out_stride,
    TILES: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARES: tl.constexpr,
    MIN_PAGES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_POWER: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    shared = tl.load(tile_ends + TILES - 1)
    total = tl.load(page_ends + rows - 1) + shared
    per_share = tl.maximum(tl.cdiv(total, SHARES), MIN_PAGES)
    begin = tl.load(page_ends + row - 1, mask=row > 0, other=0) + shared
    end = tl.load(page_ends + row) + shared
    d = tl.arange(0, DIM_PAD)
    acc = tl.zeros([DIM_PAD], tl.float32)
    if end > begin:
        highest = tl.full((), float("-inf"), tl.float32)
        mass = tl.full((), 0.0, tl.float32)
        first = begin // per_share
        count = (end - 1) // per_share - first + 1
        highest, mass, acc = _add_pieces(
            sums, logs, (first + row) * HEADS + head, HEADS, count, highest, mass, acc, DIM, DIM_PAD
        )
        place = tl.load(places + row)
        if place >= 0:
            tile = place // (QUERIES // GROUP_POWER)
            query = place % (QUERIES // GROUP_POWER) * GROUP_POWER + head % GROUP
            first = tl.load(tile_ends + tile - 1, mask=tile > 0, other=0) // per_share
            count = (tl.load(tile_ends + tile) - 1) // per_share - first + 1
            at = ((first + tile) * KV_HEADS + head // GROUP) * QUERIES + query
            highest, mass, acc = _add_pieces(
                tile_sums, tile_logs, at, KV_HEADS * QUERIES, count, highest, mass, acc, DIM, DIM_PAD
            )
        acc = acc / mass
    tl.store(out + row.to(tl.int64) * out_stride + head * DIM + d, acc, mask=d < DIM)
