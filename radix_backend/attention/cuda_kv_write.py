"""q/k norm, rope and the KV write of one layer in one kernel (Triton language): what lies between two products.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rotate_and_write(
    heads: Tensor,
    num_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    slots: Tensor,
    page_table: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Norm and rotate queries in place; write normed and rotated keys, and values, into their pages.

    ``heads`` [tokens, num_heads + 2 * kv_heads, head_dim] holds queries, keys, values; ``norms`` and ``table`` as in
    `Ops.norm_and_rotate`. ``positions`` and ``slots`` [tokens] int32: a token whose slot is -1 (padding) writes
    nothing. ``keys`` and ``values`` as in `KVPool`, ``page_table`` [slots, pages] int32.
    """
    tokens, all_heads, head_dim = heads.shape
    if not tokens:
        return
    kv_heads = (all_heads - num_heads) // 2
    q_norm, k_norm = norms or (heads, heads)
    _rotate_and_write[(tokens,)](
        heads,
        q_norm,
        k_norm,
        eps,
        positions,
        table,
        slots,
        page_table,
        page_table.stride(0),
        keys,
        values,
        keys.stride(0),
        NORM=norms is not None,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEADS_PAD=triton.next_power_of_2(num_heads),
        KV_HEADS_PAD=triton.next_power_of_2(kv_heads),
        HALF=head_dim // 2,
        HALF_PAD=triton.next_power_of_2(head_dim // 2),
        PAGE=keys.shape[2],
        DEPENDENT=heads.is_cuda,
        num_warps=4,
        **({"launch_pdl": True} if heads.is_cuda else {}),
    )


@triton.jit
def _norm_rotated(first, second, weight, cos, sin, eps, half, in_half, NORM: tl.constexpr, HALF: tl.constexpr):
    """Both halves of heads [heads, HALF_PAD] f32, normed and rotated; lanes outside the half hold zeros."""
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = 1.0 / tl.sqrt_rn(squares / (2 * HALF) + eps)
        first = first * scale[:, None] * tl.load(weight + half, mask=in_half, other=0).to(tl.float32)[None, :]
        second = second * scale[:, None] * tl.load(weight + HALF + half, mask=in_half, other=0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rotate_and_write(
    heads,
    q_norm,
    k_norm,
    eps,
    positions,
    table,
    slots,
    page_table,
    page_table_stride,
    keys,
    values,
    page_stride,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + token)
    half = tl.arange(0, HALF_PAD)
    in_half = half < HALF
    cos = tl.load(table + position.to(tl.int64) * 2 * HALF + half, mask=in_half, other=0)[None, :]
    sin = tl.load(table + position.to(tl.int64) * 2 * HALF + HALF + half, mask=in_half, other=0)[None, :]
    page = tl.load(page_table + slot * page_table_stride + position // PAGE, mask=slot >= 0, other=0).to(tl.int64)
    if DEPENDENT:
        # All that is read above was there before the kernel ahead of this one began: it waits before it lets go.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = heads + token * ((HEADS + 2 * KV_HEADS) * 2 * HALF)

    head = tl.arange(0, HEADS_PAD)
    at = row + head[:, None] * (2 * HALF) + half[None, :]
    mask = (head < HEADS)[:, None] & in_half[None, :]
    first = tl.load(at, mask=mask, other=0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0).to(tl.float32)
    first, second = _norm_rotated(first, second, q_norm, cos, sin, eps, half, in_half, NORM, HALF)
    tl.store(at, first, mask=mask)
    tl.store(at + HALF, second, mask=mask)

    head = tl.arange(0, KV_HEADS_PAD)
    at = row + (HEADS + head)[:, None] * (2 * HALF) + half[None, :]
    mask = (head < KV_HEADS)[:, None] & in_half[None, :]
    to = page * page_stride + (head[:, None] * PAGE + position % PAGE) * (2 * HALF) + half[None, :]
    writes = mask & (slot >= 0)
    first = tl.load(at, mask=mask, other=0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0).to(tl.float32)
    first, second = _norm_rotated(first, second, k_norm, cos, sin, eps, half, in_half, NORM, HALF)
    tl.store(keys + to, first, mask=writes)
    tl.store(keys + to + HALF, second, mask=writes)
    at += KV_HEADS * 2 * HALF
    tl.store(values + to, tl.load(at, mask=mask), mask=writes)
    tl.store(values + to + HALF, tl.load(at + HALF, mask=mask), mask=writes)
