"""Attention in plain torch: runs everywhere, in every dtype; the reference for other backends.

Where numba works, single queries on a CPU take a compiled kernel instead.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from radix_backend.attention.base import AttentionStep, DecodeRows
from radix_backend.attention.kv_pool import KVPool

if TYPE_CHECKING:
    from radix_backend.attention.decode_kernel import DecodeKernel, Queries

log = logging.getLogger(__name__)

# Queries times KV tokens up to which a chunk is computed as so many single queries: the start of a
# scaled_dot_product_attention costs about as much.
_SMALL_CHUNK = 4096
_LONGEST_SPAN = 1024  # queries: their mask has as many columns as there are tokens of KV


def compile_decode(pool: KVPool, num_heads: int) -> DecodeKernel | None:
    """The kernel for single queries, or None with a warning: then everything is plain torch, only slower."""
    try:
        from radix_backend.attention.decode_kernel import DecodeKernel

        return DecodeKernel(pool, num_heads)
    except Exception as error:  # numba fails in many ways, none of which is worth a server
        log.warning("no compiled decode attention, plain torch instead: %s: %s", type(error).__name__, error)
        return None


@dataclass(frozen=True)
class _Span:
    """``num_tokens`` queries of one request from token ``first`` on, over ``length`` tokens of KV."""

    first: int
    num_tokens: int
    length: int
    slot: int


@dataclass(frozen=True)
class _Plan:
    page_table: Tensor
    write_pages: Tensor  # [tokens] int32
    write_offsets: Tensor  # [tokens] int32
    queries: Queries | None  # for the kernel
    spans: list[tuple[_Span, Tensor, Tensor]]  # for torch: with pages [pages] int64 and mask [num_tokens, length]


class TorchNative:
    """`AttentionBackend` for a pool on any device; with a ``kernel`` on the CPU."""

    def __init__(self, pool: KVPool, kernel: DecodeKernel | None) -> None:
        self._pool = pool
        self._kernel = kernel

    def plan(self, step: AttentionStep) -> _Plan:
        single: list[_Span] = []
        spans: list[_Span] = []
        for span in _spans(step):
            small = span.num_tokens == 1 or span.num_tokens * span.length <= _SMALL_CHUNK
            (single if small and self._kernel is not None else spans).append(span)
        slots, positions = step.token_slots.long(), step.positions
        page_size = self._pool.page_size
        return _Plan(
            step.page_table,
            step.page_table[slots, positions.long() // page_size],
            positions % page_size,
            _queries(single) if single else None,
            [(span, self._pages(step.page_table, span), self._mask(span, step.page_table)) for span in spans],
        )

    def _pages(self, page_table: Tensor, span: _Span) -> Tensor:
        return page_table[span.slot, : -(-span.length // self._pool.page_size)].long()

    def _mask(self, span: _Span, page_table: Tensor) -> Tensor:
        """Zero where a query sees a token, minus infinity where that comes after it."""
        hidden = torch.full(
            (span.num_tokens, span.length), -torch.inf, dtype=self._pool.dtype, device=page_table.device
        )
        return hidden.triu_(span.length - span.num_tokens + 1)

    def attend(self, plan: _Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._pool.layer(layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self._kernel is not None:
            self._kernel.write(k, v, keys, values, plan.write_pages, plan.write_offsets)
        else:
            keys[plan.write_pages.long(), :, plan.write_offsets.long()] = k
            values[plan.write_pages.long(), :, plan.write_offsets.long()] = v
        if self._kernel is not None and plan.queries is not None:
            self._kernel.attend(q, keys, values, plan.page_table, plan.queries, out)
        for span, pages, mask in plan.spans:
            tokens = slice(span.first, span.first + span.num_tokens)
            out[tokens] = _attend(q[tokens], _gather(keys, pages), _gather(values, pages), mask)
        return out.flatten(1)


def _spans(step: AttentionStep) -> list[_Span]:
    spans = []
    for batch in step.sub_batches:
        if isinstance(batch, DecodeRows):
            rows = zip(batch.slots.tolist(), batch.lengths.tolist(), strict=True)
            spans += [_Span(batch.first + i, 1, length, slot) for i, (slot, length) in enumerate(rows)]
        else:
            for start in range(0, batch.num_tokens, _LONGEST_SPAN):
                count = min(_LONGEST_SPAN, batch.num_tokens - start)
                spans.append(_Span(batch.first + start, count, batch.cached + start + count, batch.slot))
    return spans


def _queries(spans: list[_Span]) -> Queries:
    from radix_backend.attention.decode_kernel import Queries

    tokens = np.concatenate([np.arange(span.first, span.first + span.num_tokens, dtype=np.int32) for span in spans])
    lengths = np.concatenate([np.arange(span.length - span.num_tokens, span.length, dtype=np.int32) for span in spans])
    slots = np.repeat(np.array([span.slot for span in spans], np.int32), [span.num_tokens for span in spans])
    lengths += 1
    return Queries(torch.from_numpy(tokens), torch.from_numpy(slots), torch.from_numpy(lengths), int(lengths.sum()))


def _gather(pool: Tensor, pages: Tensor) -> Tensor:
    """[1, kv_heads, tokens of these pages, head_dim]."""
    return pool.transpose(0, 1)[:, pages].flatten(1, 2)[None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """[tokens, heads, head_dim], like ``q``.

    The query heads that share a KV head become a batch over the same keys and values: ``enable_gqa`` is 20 to 100 times
    slower in bf16 on a CPU.
    """
    tokens, length = mask.shape
    kv_heads = keys.shape[1]
    grouped = q.view(tokens, kv_heads, -1, q.shape[2]).permute(2, 1, 0, 3)
    shape = (len(grouped), -1, -1, -1)
    out = F.scaled_dot_product_attention(
        grouped, keys[:, :, :length].expand(shape), values[:, :, :length].expand(shape), attn_mask=mask
    )
    return out.permute(2, 1, 0, 3).reshape(q.shape)
