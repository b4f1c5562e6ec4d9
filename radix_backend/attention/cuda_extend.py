"""Attention of prefill chunks over paged KV in Triton language; needs no plan but a list of tiles.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

Ints = npt.NDArray[np.int32]


def tile_tokens(dtype: torch.dtype, group: int) -> int:
    """Tokens in a tile: its rows are the queries of these tokens that share a KV head."""
    rows = 32 if dtype == torch.float32 else 64
    return max(rows // int(triton.next_power_of_2(group)), 1)


def tiles(firsts: Ints, num_tokens: Ints, slots: Ints, cached: Ints, tokens: int) -> Ints:
    """[tiles, 5] for chunks given by columns: first token, number of tokens, end of its KV, slot, KV before it.

    The longest come first: a short one that starts last keeps no other waiting.
    """
    parts = -(-num_tokens // tokens)
    chunk = np.repeat(np.arange(len(parts)), parts)
    offset = (np.arange(len(chunk)) - np.repeat(np.cumsum(parts) - parts, parts)) * tokens
    count = np.minimum(num_tokens[chunk] - offset, tokens)
    before = cached[chunk] + offset
    columns = np.stack([firsts[chunk] + offset, count, before + count, slots[chunk], before], axis=1).astype(np.int32)
    return np.ascontiguousarray(columns[np.argsort(-columns[:, 2], kind="stable")])


def cut(firsts: Ints, ends: Ints, tokens: slice) -> tuple[npt.NDArray[np.int64], Ints, Ints]:
    """What ``tokens`` have of chunks that begin and end there: which chunks, the first token of each, how many."""
    begins, until = np.maximum(firsts, np.int32(tokens.start)), np.minimum(ends, np.int32(tokens.stop))
    (chosen,) = np.nonzero(begins < until)
    return chosen, begins[chosen], (until - begins)[chosen]


def extend(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, tile_list: Tensor, out: Tensor) -> None:
    """Fill the tokens of ``out`` [tokens, heads, head_dim] that ``tile_list`` [tiles, 5] int32 covers.

    Each query sees the KV of its request up to itself, the chunk's own included, which is in the pages already.
    """
    if not len(tile_list):
        return
    _, kv_heads, page_size, head_dim = keys.shape
    group = q.shape[1] // kv_heads
    full = keys.dtype == torch.float32
    _extend[(len(tile_list), kv_heads)](
        q,
        keys,
        values,
        page_table,
        tile_list,
        out,
        q.stride(0),
        out.stride(0),
        page_table.stride(0),
        keys.stride(0),
        head_dim**-0.5 * 1.4426950408889634,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        TOKENS=tile_tokens(keys.dtype, group),
        DIM=head_dim,
        DIM_PAD=max(triton.next_power_of_2(head_dim), 16),
        PAGE=page_size,
        BLOCK=32 if full else 64,
        STAGES=1 if full else 2,
        num_warps=4,
    )


@triton.jit
def _extend(
    q,
    keys,
    values,
    page_table,
    tile_list,
    out,
    q_stride,
    out_stride,
    page_table_stride,
    page_stride,
    scale,  # of the scores, in base 2
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tile_list + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    first, count, length = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    table = page_table + tl.load(tile + 3).to(tl.int64) * page_table_stride
    before = tl.load(tile + 4)
    rows = tl.arange(0, TOKENS * GROUP_PAD)
    offset, g = rows // GROUP_PAD, rows % GROUP_PAD
    d = tl.arange(0, DIM_PAD)
    n = tl.arange(0, BLOCK)
    live = ((offset < count) & (g < GROUP))[:, None] & (d < DIM)[None, :]
    token = (first + offset).to(tl.int64)
    head = ((kv_head * GROUP + g) * DIM)[:, None] + d[None, :]
    query = tl.load(q + token[:, None] * q_stride + head, mask=live, other=0)
    position = before + offset
    highest = tl.full([TOKENS * GROUP_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([TOKENS * GROUP_PAD], tl.float32)
    acc = tl.zeros([TOKENS * GROUP_PAD, DIM_PAD], tl.float32)
    # Up to here every query sees everything: no mask.
    visible = (before + 1) // BLOCK * BLOCK
    for start in tl.range(0, visible, BLOCK, num_stages=STAGES):
        there = start + n
        ids = tl.load(table + there // PAGE).to(tl.int64)
        at = ids * page_stride + (kv_head * PAGE + there % PAGE) * DIM
        mask = (d < DIM)[None, :]
        k = tl.load(keys + at[:, None] + d[None, :], mask=mask, other=0)
        v = tl.load(values + at[:, None] + d[None, :], mask=mask, other=0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        mass = mass * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        highest = new_highest
    for start in tl.range(visible, length, BLOCK, num_stages=STAGES):
        there = start + n
        exists = there < length
        ids = tl.load(table + there // PAGE, mask=exists, other=0).to(tl.int64)
        at = ids * page_stride + (kv_head * PAGE + there % PAGE) * DIM
        mask = exists[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + at[:, None] + d[None, :], mask=mask, other=0)
        v = tl.load(values + at[:, None] + d[None, :], mask=mask, other=0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(there[None, :] <= position[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        mass = mass * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        highest = new_highest
    tl.store(out + token[:, None] * out_stride + head, acc / mass[:, None], mask=live)
