"""Attention in plain torch: runs everywhere, in every dtype; the reference for other backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from radix_backend.attention.base import AttentionStep, DecodeRows, PrefillChunk
from radix_backend.attention.kv_pool import KVPool


@dataclass(frozen=True)
class _Span:
    """Queries of one request: tokens ``first`` to ``first + num_tokens``, over the KV in ``pages``."""

    first: int
    num_tokens: int
    length: int
    pages: Tensor  # [pages] int64
    mask: Tensor | None  # [num_tokens, length], added to the scores; None: every query sees all


@dataclass(frozen=True)
class _Plan:
    step: AttentionStep
    write_pages: Tensor  # [tokens] int64
    write_offsets: Tensor  # [tokens] int64
    decodes: list[DecodeRows]
    spans: list[_Span]


class TorchNative:
    """Prefill by scaled_dot_product_attention, decode by a compiled kernel where there is one."""

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        self._pool = pool
        self._num_heads = num_heads

    def plan(self, step: AttentionStep) -> _Plan:
        page_size = self._pool.page_size
        slots, positions = step.token_slots.long(), step.positions.long()
        decodes: list[DecodeRows] = []
        spans: list[_Span] = []
        for batch in step.sub_batches:
            if isinstance(batch, PrefillChunk):
                spans.append(self._span(step, batch.first, batch.num_tokens, batch.slot, batch.cached))
            else:
                for row, (slot, length) in enumerate(zip(batch.slots.tolist(), batch.lengths.tolist(), strict=True)):
                    spans.append(self._span(step, batch.first + row, 1, slot, length - 1))
        return _Plan(step, step.page_table[slots, positions // page_size].long(), positions % page_size, decodes, spans)

    def _span(self, step: AttentionStep, first: int, num_tokens: int, slot: int, cached: int) -> _Span:
        length = cached + num_tokens
        mask = None
        if num_tokens > 1:
            seen = torch.ones(num_tokens, length, dtype=torch.bool).tril(cached)
            mask = torch.zeros(num_tokens, length, dtype=self._pool.layer(0)[0].dtype).masked_fill_(~seen, -torch.inf)
        pages = step.page_table[slot, : -(-length // self._pool.page_size)].long()
        return _Span(first, num_tokens, length, pages, mask)

    def attend(self, plan: _Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._pool.layer(layer)
        keys[plan.write_pages, :, plan.write_offsets] = k
        values[plan.write_pages, :, plan.write_offsets] = v
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span in plan.spans:
            tokens = slice(span.first, span.first + span.num_tokens)
            out[tokens] = _attend_span(q[tokens], keys, values, span)
        return out.flatten(1)


def _attend_span(q: Tensor, keys: Tensor, values: Tensor, span: _Span) -> Tensor:
    """[num_tokens, heads, head_dim].

    Query heads that share a KV head become further queries of it: ``enable_gqa`` is 20 to 100 times slower in bf16 on
    CPU.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[3]

    def gather(pool: Tensor) -> Tensor:
        return pool.transpose(0, 1)[:, span.pages].flatten(1, 2)[None, :, : span.length]

    groups = q.shape[1] // kv_heads
    folded = q.view(-1, kv_heads, groups, head_dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, head_dim)
    mask = None if span.mask is None else span.mask.repeat(groups, 1)
    out = F.scaled_dot_product_attention(folded, gather(keys), gather(values), attn_mask=mask)
    return out.view(kv_heads, groups, -1, head_dim).permute(2, 0, 1, 3).reshape(q.shape)
